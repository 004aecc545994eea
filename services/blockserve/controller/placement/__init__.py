"""Desired placement: which worker is to hold which runs of which chains. Pure, no I/O."""
