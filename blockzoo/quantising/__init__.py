"""Variants with quantised blocks, made from variants that are registered. Needs torch."""
