"""Page numbers: nothing lost, nothing given twice, neighbours where there are any."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.worker.kv.pages import PageAllocator, Pages

_ACTIONS = st.sampled_from(["take", "extend", "hold", "let go"])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 60),
    st.lists(
        st.tuples(
            st.sampled_from(["take", "extend", "hold", "let go"]), st.integers(0, 6), st.integers(0, 9)
        ),
        max_size=60,
    ),
)
def test_no_page_is_lost_or_given_twice(num_pages: int, steps: list[tuple[str, int, int]]) -> None:
    """Holders are counted beside the allocator, page by page."""
    allocator = PageAllocator(num_pages)
    counts = np.zeros(num_pages, dtype=int)
    held: list[Pages] = []
    for action, rows, length in steps:
        if action == "take":
            pages = allocator.try_allocate(rows, length)
            assert (pages is None) == (rows * length > int((counts == 0).sum()))
            if pages is not None:
                assert pages.shape == (rows, length)
                assert (counts[pages] == 0).all()
                assert len(np.unique(pages)) == pages.size
                counts[pages] += 1
                held.append(pages.reshape(-1))
        elif held:
            chosen = held[rows % len(held)]
            if action == "hold":
                allocator.hold(chosen)
                counts[chosen] += 1
                held.append(chosen)
            elif action == "let go":
                allocator.let_go(chosen)
                counts[chosen] -= 1
                held.pop(rows % len(held))
            elif chosen.size and length:
                more = allocator.try_extend(chosen[-1:], length)
                wanted = np.arange(chosen[-1] + 1, chosen[-1] + 1 + length)
                free = wanted[-1] < num_pages and bool((counts[wanted] == 0).all())
                assert (more is not None) == free
                if more is not None:
                    assert more.tolist() == [wanted.tolist()]
                    counts[wanted] += 1
                    held.append(wanted)
        assert allocator.holders.tolist() == counts.tolist()
        assert allocator.num_free == int((counts == 0).sum())
    for pages in held:
        allocator.let_go(pages)
    whole = allocator.try_allocate(1, num_pages)
    assert whole is not None
    assert whole.tolist() == [list(range(num_pages))]


def test_the_smallest_gap_that_holds_all_is_taken() -> None:
    allocator = PageAllocator(20)
    parts = [allocator.try_allocate(1, size) for size in (5, 6, 2, 7)]
    for part in (parts[1], parts[3]):
        assert part is not None
        allocator.let_go(part.reshape(-1))
    taken = allocator.try_allocate(2, 3)
    assert taken is not None
    assert taken.tolist() == [[5, 6, 7], [8, 9, 10]]


def test_rows_go_where_they_fit_whole() -> None:
    """Gaps of 2, 4 and 3 pages: a row of three in each of the last two, no row torn apart."""
    allocator = PageAllocator(12)
    whole = allocator.try_allocate(1, 12)
    assert whole is not None
    allocator.let_go(np.array([0, 1, 3, 4, 5, 6, 8, 9, 10]))
    rows = allocator.try_allocate(2, 3)
    assert rows is not None
    assert sorted(rows.tolist()) == [[3, 4, 5], [8, 9, 10]]


def test_rows_behind_each_other_cannot_both_be_extended() -> None:
    allocator = PageAllocator(10)
    rows = allocator.try_allocate(2, 2)
    assert rows is not None
    assert allocator.try_extend(rows[:, -1], 1) is None
    assert allocator.try_extend(np.array([3, 4]), 2) is None
    assert allocator.num_free == 6
