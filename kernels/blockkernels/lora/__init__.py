"""Low-rank adapters of many variants, added to one batch in one call."""

from blockkernels.lora.bank import LoraBank, RowRange
from blockkernels.lora.kernel import GroupedRows, LoraJob, add_lora, fill_lora_job, group_rows
from blockkernels.lora.reference import TokenRun, add_lora_reference

__all__ = [
    "GroupedRows",
    "LoraBank",
    "LoraJob",
    "RowRange",
    "TokenRun",
    "add_lora",
    "add_lora_reference",
    "fill_lora_job",
    "group_rows",
]
