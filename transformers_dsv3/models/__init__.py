"""Model definitions: one folder an architecture."""
