"""Causal attention over keys and values that lie in pages."""

from blockkernels.attention.batch import BatchAttention
from blockkernels.attention.gathered import GatheredAttention
from blockkernels.attention.kernel import attend
from blockkernels.attention.paged import PagedAttention, can_attend_paged
from blockkernels.attention.reference import attend_reference

__all__ = [
    "BatchAttention",
    "GatheredAttention",
    "PagedAttention",
    "attend",
    "attend_reference",
    "can_attend_paged",
]
