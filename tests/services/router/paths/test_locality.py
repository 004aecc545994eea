"""Which workers probably have a prompt's beginning."""

from blockserve.common.api.cluster import PathStep, Run, WorkerId
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.router.paths.locality import BLOCK_TOKENS, PrefixLocality
from blockzoo.manifest import ChainId

LONG = tuple(range(3 * BLOCK_TOKENS + 5))


def ask(prompt: tuple[int, ...], chain: str = "c", salt: str = "") -> EngineRequest:
    return EngineRequest("r", ChainId(chain), prompt, SamplingParams(), 10, cache_salt=salt)


def path(*names: str) -> tuple[PathStep, ...]:
    return tuple(PathStep(WorkerId(name), name, Run(place, place + 1)) for place, name in enumerate(names))


def test_a_prompt_is_known_as_far_as_it_is_the_same() -> None:
    locality = PrefixLocality()
    locality.note(ask(LONG), path("a", "b"))
    assert locality.cached_tokens(ask(LONG)) == {"a": 3 * BLOCK_TOKENS, "b": 3 * BLOCK_TOKENS}
    parted = (*LONG[: BLOCK_TOKENS + 1], -1, *LONG[BLOCK_TOKENS + 2 :])
    assert locality.cached_tokens(ask(parted)) == {"a": BLOCK_TOKENS, "b": BLOCK_TOKENS}
    assert locality.cached_tokens(ask(LONG[: BLOCK_TOKENS - 1])) == {}


def test_other_variants_and_other_tenants_have_nothing_in_common() -> None:
    locality = PrefixLocality()
    locality.note(ask(LONG), path("a"))
    assert locality.cached_tokens(ask(LONG, chain="d")) == {}
    assert locality.cached_tokens(ask(LONG, salt="tenant")) == {}


def test_the_last_path_counts_and_the_memory_is_bounded() -> None:
    locality = PrefixLocality(max_blocks=4)
    locality.note(ask(LONG), path("a"))
    locality.note(ask(LONG), path("b"))
    assert set(locality.cached_tokens(ask(LONG))) == {"b"}
    locality.note(ask(tuple(-one for one in LONG)), path("c"))
    assert locality.cached_tokens(ask(LONG)) == {}  # its first block was the oldest
