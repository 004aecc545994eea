"""Segments: maximal runs that the same chains pass through, split and fused as chains come and go."""

import itertools
from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.common.api.cluster import ChainSpan, Run
from blockserve.worker.blocks.segments import SegmentMap, compute_segments
from blockzoo.manifest import BlockId, ChainId


def _span(name: str, blocks: Sequence[str], first: int = 0) -> ChainSpan:
    return ChainSpan(ChainId(name), Run(first, first + len(blocks)))


def _compute(chains: Mapping[str, Sequence[str]]) -> SegmentMap:
    return compute_segments(
        {_span(name, blocks): [BlockId(one) for one in blocks] for name, blocks in chains.items()}
    )


def _spans(chains: Mapping[str, str]) -> dict[str, list[str]]:
    """Chain -> its segments as strings of one-letter blocks."""
    found = _compute(chains)
    return {
        name: ["".join(found.ordered[index].blocks) for index in found.paths[_span(name, blocks)]]
        for name, blocks in chains.items()
    }


def test_a_run_shares_segments_with_the_whole_chains_that_pass_through_it() -> None:
    whole, part = _span("base", "eabcdh"), _span("tuned", "bcd", first=2)
    found = compute_segments({whole: [*map(BlockId, "eabcdh")], part: [*map(BlockId, "bcd")]})
    names = ["".join(segment.blocks) for segment in found.ordered]
    assert names == ["ea", "bcd", "h"]
    assert [found.ordered[index].first for index in found.paths[part]] == [2]
    assert found.ordered[1].chains == {whole, part}


def test_a_chain_that_shares_nothing_is_one_segment() -> None:
    assert _spans({"base": "eabcdh"}) == {"base": ["eabcdh"]}


def test_no_chains_no_segments() -> None:
    assert compute_segments({}).ordered == ()


def test_variants_of_one_base_are_one_segment() -> None:
    """Adapters are not part of a chain's base blocks, so eight LoRA variants look like this."""
    assert _spans({"a": "eabh", "b": "eabh"}) == {"a": ["eabh"], "b": ["eabh"]}


def test_a_tuned_top_splits_the_trunk_and_shares_the_head() -> None:
    assert _spans({"base": "eabcdh", "tuned": "eabxyh"}) == {
        "base": ["eab", "cd", "h"],
        "tuned": ["eab", "xy", "h"],
    }


def test_a_private_embedding_leaves_the_rest_shared() -> None:
    assert _spans({"base": "eabh", "own": "fabh"}) == {"base": ["e", "abh"], "own": ["f", "abh"]}


def test_the_same_block_at_another_depth_is_another_segment() -> None:
    assert _spans({"long": "eabh", "short": "eah"}) == {"long": ["ea", "bh"], "short": ["ea", "h"]}


def test_segment_ids_are_stable_when_another_chain_comes() -> None:
    alone = _compute({"a": list("eabh"), "b": list("eabh")})
    more = _compute({"a": list("eabh"), "b": list("eabh"), "c": list("xyzw")})
    assert {segment.id for segment in alone.ordered} < {segment.id for segment in more.ordered}


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("klmnop"),
        st.lists(st.sampled_from("abc"), min_size=1, max_size=7),
        max_size=6,
    )
)
def test_segments_partition_every_chain(chains: dict[str, list[str]]) -> None:
    found = _compute(chains)
    assert list(found.ordered) == sorted(found.ordered, key=lambda segment: (segment.first, segment.id))
    for name, blocks in chains.items():
        path = [found.ordered[index] for index in found.paths[_span(name, blocks)]]
        # In depth order, without gap or overlap, exactly the chain's blocks.
        assert [block for segment in path for block in segment.blocks] == blocks
        assert [segment.first for segment in path] == [
            sum(len(earlier.blocks) for earlier in path[:place]) for place in range(len(path))
        ]
        assert list(found.paths[_span(name, blocks)]) == sorted(found.paths[_span(name, blocks)])
        for segment in path:
            assert _span(name, blocks) in segment.chains
        # Maximal: neighbours differ in who passes.
        assert all(left.chains != right.chains for left, right in itertools.pairwise(path))
    for segment in found.ordered:
        for span in segment.chains:
            end = segment.first + len(segment.blocks)
            assert tuple(chains[span.chain][segment.first : end]) == segment.blocks
