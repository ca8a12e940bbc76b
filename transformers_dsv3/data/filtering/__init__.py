"""Filtering of text in stages, cheap to dear, on datatrove: what is kept, what is dropped, and why."""
