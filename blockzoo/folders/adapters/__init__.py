"""Adapters as PEFT writes them: what they change in a base chain."""
