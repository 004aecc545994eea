"""Grouped adapters by Triton, interpreted: mixed ranks, several modules that read one input, bounds."""

from __future__ import annotations

import pytest
import torch

import support.triton_interpreter  # noqa: F401  (before the kernels)
from blockkernels.launching import Launch, watched
from blockkernels.lora import LoraBank, TokenRun, add_lora_reference, group_rows
from blockkernels.lora.gpu import add_lora_gpu, add_tables, lora_tables
from support.triton_interpreter import KernelError

CPU = torch.device("cpu")
RANKS = (1, 4, 16, 64, 128)
RUNS = [TokenRun(0, 1, 0), TokenRun(1, 4, 1), TokenRun(4, 24, 2), TokenRun(25, 27, 3), TokenRun(27, 28, 4)]
TWICE = [*RUNS, TokenRun(2, 5, 3)]
"""Three tokens have two adapters each, and token 24 none."""


class Module:
    """Adapters of all ranks on one module, in a bank whose free rows hold NaN."""

    def __init__(self, inner: int, outer: int, dtype: torch.dtype) -> None:
        self.bank = LoraBank(inner, outer, dtype, CPU)
        self.adapters = [
            (
                (torch.randn(rank, inner) / inner**0.5).to(dtype),
                (torch.randn(outer, rank) / rank**0.5).to(dtype),
                0.5 + rank / 64,
            )
            for rank in RANKS
        ]
        filler = self.bank.add(torch.randn(3, inner).to(dtype), torch.randn(outer, 3).to(dtype), 1.0)
        self.rows = [self.bank.add(*adapter) for adapter in self.adapters]
        self.bank.remove(filler)
        for part in (self.bank.down, self.bank.up):
            used = torch.zeros(len(part), dtype=torch.bool)
            for rows in self.rows:
                used[rows.start : rows.end] = True
            part[~used] = float("nan")

    def add_reference(self, y: torch.Tensor, x: torch.Tensor, runs: list[TokenRun]) -> None:
        adapters = [(down.float(), up.float(), scale) for down, up, scale in self.adapters]
        add_lora_reference(y, x.float(), runs, adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runs", [RUNS, TWICE], ids=["one each", "two for some"])
@pytest.mark.parametrize(("inner", "outers"), [(500, (63, 65)), (64, (32, 16))], ids=["odd", "aligned"])
def test_modules_that_read_one_input(
    inner: int, outers: tuple[int, int], runs: list[TokenRun], dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    modules = [Module(inner, outer, dtype) for outer in outers]
    x, y = torch.randn(29, inner).to(dtype), torch.randn(29, sum(outers) + 2).to(dtype)
    want = y.float().clone()
    columns = (0, outers[0] + 2)
    for module, column, outer in zip(modules, columns, outers, strict=True):
        module.add_reference(want[:, column : column + outer], x, runs)
    places = [
        (module.bank, group_rows(runs, module.rows, x), column)
        for module, column in zip(modules, columns, strict=True)
    ]
    seen: list[Launch] = []
    with watched(lambda launch: seen.append(launch) is None):
        nothing, tables = lora_tables([[], places], CPU)
        assert nothing == []
        add_tables(y, x, tables)
    assert len(seen) == (2 if runs is RUNS else 4)
    tolerance = 8 * torch.finfo(dtype).eps
    assert (y.double() - want.double()).abs().max() <= tolerance * want.abs().max()
    untouched = [24, 28]
    assert torch.equal(y[untouched].float(), want[untouched])


def test_one_module_as_layers_that_are_computed_part_by_part_ask_for_it() -> None:
    torch.manual_seed(1)
    module = Module(40, 24, torch.float32)
    x, y = torch.randn(28, 40), torch.randn(28, 30)[:, 3:27]
    want = y.clone()
    module.add_reference(want, x, RUNS)
    add_lora_gpu(y, x, module.bank, group_rows(RUNS, module.rows, x))
    assert (y - want).abs().max() <= 1e-5


def test_items_without_work_fill_a_table_up() -> None:
    """As a captured launch is used for fewer tokens than it was made for."""
    torch.manual_seed(1)
    module = Module(64, 32, torch.float32)
    x, y = torch.randn(28, 64), torch.randn(28, 32)
    want = y.clone()
    module.add_reference(want, x, RUNS[:2])
    ((table,),) = lora_tables([[(module.bank, group_rows(RUNS, module.rows, x), 0)]], CPU)
    table.items[2:] = 0
    add_tables(y, x, [table])
    assert (y - want).abs().max() <= 1e-5


def test_an_address_outside_the_banks_is_found() -> None:
    """Of the interpreter: the addresses in a table are checked like any other."""
    module = Module(64, 32, torch.float32)
    x, y = torch.randn(28, 64), torch.randn(28, 32)
    ((table,),) = lora_tables([[(module.bank, group_rows(RUNS, module.rows, x), 0)]], CPU)
    table.items[0, 2] += 1 << 40
    with pytest.raises(KernelError, match="outside every tensor"):
        add_tables(y, x, [table])
