"""An OpenAI-compatible HTTP server over the engine of `generation`, and a page to talk to a model."""
