"""Low-rank adapters of many variants, added to one batch in two matrix products."""

from blockkernels.lora.bank import LoraBank, RowRange
from blockkernels.lora.kernel import GroupedRows, add_lora, group_rows
from blockkernels.lora.reference import TokenRun, add_lora_reference

__all__ = [
    "GroupedRows",
    "LoraBank",
    "RowRange",
    "TokenRun",
    "add_lora",
    "add_lora_reference",
    "group_rows",
]
