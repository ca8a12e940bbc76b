"""The compiled backend for CPUs: `library` loads it, `operators` has what all share, then a file an operation."""
