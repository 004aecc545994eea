"""Choosing the workers of a request, and which of its approved equivalents to use. No I/O."""
