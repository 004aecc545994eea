"""What is read of a run of a chain: its manifests, its type, its sizes, blocks and adapters ready to use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blockkernels.backends import Backend, CpuBackend, ReferenceBackend
from blockserve.common.api.cluster import ChainSpan, Run
from blockserve.common.errors import SpanError
from blockserve.worker.blocks.reading import BlockReader
from blockzoo.compute.build import build_block
from blockzoo.compute.decoder import LayerBlock
from blockzoo.errors import InvalidConfigError
from blockzoo.manifest import JsonValue
from support.tiny import SMALL, TinyZoo


def reader(tiny: TinyZoo, backend: Backend | None = None, **changes: str) -> BlockReader:
    return BlockReader(tiny.zoo, replace(SMALL, **changes), backend or CpuBackend())  # type: ignore[arg-type]


def whole(tiny: TinyZoo, name: str) -> ChainSpan:
    chain = tiny.chains[name]
    return ChainSpan(chain, reader(tiny).whole(chain))


def test_a_run_holds_its_own_blocks_and_the_type_of_the_whole_chain(tiny: TinyZoo) -> None:
    span = whole(tiny, "all")
    assert span.run == Run(0, len(tiny.zoo.chain(span.chain).links))
    run = reader(tiny, dtype="auto").open(replace(span, run=Run(2, 3)))
    (link,) = tiny.zoo.chain(span.chain).links[2:3]
    assert set(run.blocks) == {link.base}
    assert run.adapters() == [(link.base, applied) for applied in link.applied]
    assert run.dtype == torch.float32


@pytest.mark.parametrize("run", [Run(0, 1), Run(0, 99)])
def test_a_run_lies_in_the_chain_and_has_a_layer(tiny: TinyZoo, run: Run) -> None:
    with pytest.raises(SpanError, match="positions"):
        reader(tiny).open(ChainSpan(tiny.chains["base"], run))


def test_the_type_that_is_asked_for_wins(tiny: TinyZoo) -> None:
    assert reader(tiny, dtype="bfloat16").open(whole(tiny, "base")).dtype == torch.bfloat16


def test_sizes_are_those_of_the_tensors_in_the_type_they_are_computed_in(tiny: TinyZoo) -> None:
    wide = reader(tiny, dtype="float32").estimate_sizes(whole(tiny, "all"))
    half = reader(tiny, dtype="bfloat16").estimate_sizes(whole(tiny, "all"))
    assert sum(wide.values()) == 2 * sum(half.values())
    base = reader(tiny, dtype="float32").estimate_sizes(whole(tiny, "base"))
    assert base.items() <= wide.items()


@pytest.mark.parametrize("backend", [CpuBackend(), ReferenceBackend(torch.device("cpu"))])
def test_blocks_are_laid_out_by_the_backend(tiny: TinyZoo, backend: Backend) -> None:
    run = reader(tiny).open(whole(tiny, "base"))
    block = reader(tiny, backend).build(run.blocks[run.manifest.links[1].base], torch.float32)
    assert isinstance(block, LayerBlock)
    assert type(block._weights.qkv) is type(backend.linear(torch.zeros(1, 1), None, exact=False))


def test_blocks_of_a_family_that_came_later_are_refused(tiny: TinyZoo) -> None:
    """Even though this version could read their config: it might pass over what is new in it."""
    run = reader(tiny).open(whole(tiny, "base"))
    for link in run.manifest.links:
        later = replace(run.blocks[link.base], family="llama9")
        with pytest.raises(InvalidConfigError, match="llama9") as caught:
            reader(tiny).build(later, torch.float32)
        assert "Upgrade" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": {"eps": "1e-5", "kind": "layer"}}, "norms of kind 'layer'"),
        ({"norms": {"attention_inside": "input_layernorm"}}, "attention_inside"),
        ({"norms": {"attention_input": "another_norm"}}, "another_norm"),
        ({"norms": {"attention_input": "self_attn.q_proj"}}, "a norm has the shape"),
        ({"rope": [1]}, "rope parameters"),
        ({"rope": {"type": "default", "theta": "1e4", "rotary_dim": 16}}, "16 of 14 dimensions"),
        ({"rope": {"type": "default", "theta": "1e4", "rotary_dim": 7}}, "7 of 14 dimensions"),
        ({"attention_softcap": "wide"}, "attention_softcap"),
    ],
)
def test_what_this_version_does_not_know_of_a_layer_is_refused(
    tiny: TinyZoo, change: dict[str, JsonValue], words: str
) -> None:
    run = reader(tiny).open(whole(tiny, "base"))
    block = run.blocks[run.manifest.links[1].base]
    with pytest.raises(InvalidConfigError, match=words):
        reader(tiny).build(replace(block, config={**block.config, **change}), torch.float32)


@pytest.mark.parametrize("size", [7, 28, 14 * 9])
def test_norms_of_queries_and_keys_have_the_size_of_a_head_or_of_all(tiny: TinyZoo, size: int) -> None:
    run = reader(tiny).open(whole(tiny, "base"))
    manifest = run.blocks[run.manifest.links[1].base]
    read = reader(tiny)
    tensors = {name: read._read(ref, torch.float32) for name, ref in manifest.tensors.items()}
    norms = {f"self_attn.{name}_norm.weight": torch.ones(size) for name in "qk"}
    with pytest.raises(InvalidConfigError, match="queries and keys"):
        build_block(manifest, tensors | norms, CpuBackend())


def test_an_adapter_is_read_by_module_and_a_base_block_is_none(tiny: TinyZoo) -> None:
    run = reader(tiny).open(whole(tiny, "all"))
    base, applied = run.adapters()[0]
    block = reader(tiny).manifest(applied)
    adapter = reader(tiny).read_adapter(block, run.blocks[base], torch.bfloat16)
    assert adapter.linears
    for change in adapter.linears.values():
        assert change.down.shape[0] == change.up.shape[1]
        assert change.down.dtype == change.up.dtype == torch.bfloat16
        assert change.scale > 0
    with pytest.raises(InvalidConfigError, match="cannot be applied"):
        reader(tiny).read_adapter(run.blocks[base], run.blocks[base], torch.float32)
