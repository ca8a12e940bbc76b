"""A pool of real text whose every document is known, clean or junk, to measure a filter by."""
