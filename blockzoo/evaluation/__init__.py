"""Measuring what one run of links does in place of another. Needs torch; decisions are in `equivalence`."""
