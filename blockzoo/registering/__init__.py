"""Bringing folders into a zoo: planned and checked as a whole, then stored, then committed in one step."""
