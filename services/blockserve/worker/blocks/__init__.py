"""Blocks and chains in memory: read once, shared by whoever uses them, let go when room is needed."""
