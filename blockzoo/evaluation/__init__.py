"""Measuring what one run of links does in place of another: the records that `blockzoo.equivalence` keeps.

Needs torch while it measures (`forward`, `measure`), and not to be imported.
"""
