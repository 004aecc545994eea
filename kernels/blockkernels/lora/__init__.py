"""Low-rank adapters of many variants, added to one batch in one call."""

from blockkernels.lora.bank import LoraBank, RowRange
from blockkernels.lora.kernel import GroupedRows, LoraJob, add_lora, fill_lora_job, group_rows
from blockkernels.lora.reference import TokenRun, add_lora_reference
from blockkernels.lora.shaped import (
    GroupedShapes,
    OutputShape,
    add_shaped_lora,
    dora_column_gain,
    dora_gain,
    shaped_lora_reference,
)

__all__ = [
    "GroupedRows",
    "GroupedShapes",
    "LoraBank",
    "LoraJob",
    "OutputShape",
    "RowRange",
    "TokenRun",
    "add_lora",
    "add_lora_reference",
    "add_shaped_lora",
    "dora_column_gain",
    "dora_gain",
    "fill_lora_job",
    "group_rows",
    "shaped_lora_reference",
]
