"""Keeping a zoo healthy: collecting what nothing needs, reading everything back, copying it elsewhere."""
