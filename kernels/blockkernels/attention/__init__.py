"""Causal attention over keys and values that lie in pages."""

from blockkernels.attention.kernel import attend
from blockkernels.attention.reference import attend_reference

__all__ = ["attend", "attend_reference"]
