"""Segments: maximal runs that the same chains pass through, split and fused as chains come and go."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.worker.segments import compute_segments


def _spans(chains: dict[str, str]) -> dict[str, list[str]]:
    """Chain -> its segments as strings of one-letter blocks."""
    found = compute_segments({name: list(blocks) for name, blocks in chains.items()})
    return {name: ["".join(found.ordered[index].blocks) for index in found.paths[name]] for name in chains}


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
    alone = compute_segments({"a": list("eabh"), "b": list("eabh")})
    more = compute_segments({"a": list("eabh"), "b": list("eabh"), "c": list("xyzw")})
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
    found = compute_segments(chains)
    assert list(found.ordered) == sorted(found.ordered, key=lambda segment: (segment.first, segment.id))
    for name, blocks in chains.items():
        path = [found.ordered[index] for index in found.paths[name]]
        # In depth order, without gap or overlap, exactly the chain's blocks.
        assert [block for segment in path for block in segment.blocks] == blocks
        assert [segment.first for segment in path] == [
            sum(len(earlier.blocks) for earlier in path[:place]) for place in range(len(path))
        ]
        assert list(found.paths[name]) == sorted(found.paths[name])
        for segment in path:
            assert name in segment.chains
        # Maximal: neighbours differ in who passes.
        assert all(left.chains != right.chains for left, right in itertools.pairwise(path))
    for segment in found.ordered:
        for name in segment.chains:
            end = segment.first + len(segment.blocks)
            assert tuple(chains[name][segment.first : end]) == segment.blocks
