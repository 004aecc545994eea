"""Changing logits before a token is drawn: bias, bans, and penalties on tokens that came before."""

from blockkernels.penalties.kernel import edit_logits
from blockkernels.penalties.reference import RowEdit, edit_logits_reference

__all__ = ["RowEdit", "edit_logits", "edit_logits_reference"]
