"""Attention in pages by torch alone against the reference: mixed batches, windows, pages near and far."""

import numpy as np
import pytest
import torch

from blockkernels.attention import GatheredAttention, attend_reference

LAYERS, LAYER = 3, 1
HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 6, 2, 16, 7
REQUESTS = ((1, 1), (5, 5), (64, 63), (65, 1), (130, 30))
"""Keys with the new ones, and queries, of each request."""


class Batch:
    """Requests over one pool; memory that nobody wrote is NaN."""

    def __init__(self, requests: tuple[tuple[int, int], ...], *, scattered: bool, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.lengths, self.counts = zip(*requests, strict=True)
        widths = [-(-length // PAGE_TOKENS) for length in self.lengths]
        pages = np.arange(LAYERS * sum(widths) + 3)
        if scattered:
            pages = np.random.default_rng(0).permutation(pages)
        self.tables = []
        for width in widths:
            self.tables.append(pages[: LAYERS * width].reshape(LAYERS, width))
            pages = pages[LAYERS * width :]
        size = ((LAYERS * sum(widths) + 3) * PAGE_TOKENS, KV_HEADS, HEAD_DIM)
        self.keys, self.values = (torch.full(size, float("nan"), dtype=dtype) for _ in range(2))
        self.query = [torch.randn(length, HEADS, HEAD_DIM).to(dtype) for length in self.lengths]
        self.whole = [torch.randn(2, length, KV_HEADS, HEAD_DIM).to(dtype) for length in self.lengths]
        for table, (keys, values), length, count in zip(
            self.tables, self.whole, self.lengths, self.counts, strict=True
        ):
            old = self.slots(table, length - count)
            self.keys[old], self.values[old] = keys[: length - count], values[: length - count]

    def slots(self, table: np.ndarray, end: int) -> torch.Tensor:
        """Where the first tokens of a request lie at `LAYER`."""
        at = np.arange(end)
        return torch.from_numpy(table[LAYER, at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS)

    def made(self) -> GatheredAttention:
        """The batch as the operation takes it."""
        return GatheredAttention(self.keys, self.values, PAGE_TOKENS, self.tables, self.lengths, self.counts)

    def new(self) -> list[torch.Tensor]:
        """Query, key and value of the new tokens of all requests."""
        parts = zip(self.query, self.whole, self.lengths, self.counts, strict=True)
        rows = [(query[n - c :], keys[n - c :], values[n - c :]) for query, (keys, values), n, c in parts]
        return [torch.cat(part) for part in zip(*rows, strict=True)]

    def expected(self, **options: float | None) -> torch.Tensor:
        """What the reference says, one request after the other, in float64."""
        parts = zip(self.query, self.whole, self.lengths, self.counts, strict=True)
        return torch.cat(
            [
                attend_reference(
                    query[n - c :].double(), keys.double(), values.double(), scale=0.3, **options
                )
                for query, (keys, values), n, c in parts
            ]
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("scattered", [False, True])
def test_mixed_batch_is_the_reference(
    scattered: bool, window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    batch = Batch(REQUESTS, scattered=scattered, dtype=dtype)
    made = batch.made()
    assert made.num_tokens == sum(batch.counts)
    for softcap in (None, 0.5):
        got = made(*batch.new(), layer=LAYER, scale=0.3, window=window, softcap=softcap)
        want = batch.expected(window=window, softcap=softcap)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scattered", [False, True])
def test_new_keys_and_values_are_stored_at_their_layer_only(scattered: bool) -> None:
    batch = Batch(REQUESTS, scattered=scattered, dtype=torch.float32)
    batch.made()(*batch.new(), layer=LAYER, scale=0.3, window=None)
    for table, (keys, values), length in zip(batch.tables, batch.whole, batch.lengths, strict=True):
        slots = batch.slots(table, length)
        assert torch.equal(batch.keys[slots], keys)
        assert torch.equal(batch.values[slots], values)
    assert int((~batch.keys.isnan()).sum()) == sum(batch.lengths) * KV_HEADS * HEAD_DIM


def test_neighbouring_pages_are_read_without_a_copy() -> None:
    near = Batch(((30, 1),), scattered=False, dtype=torch.float32)
    keys, values = near.made()._read(0, LAYER)
    assert keys.untyped_storage().data_ptr() == near.keys.untyped_storage().data_ptr()
    assert values.untyped_storage().data_ptr() == near.values.untyped_storage().data_ptr()


def test_tables_with_other_numbers_of_layers_and_pages_set_aside() -> None:
    """Chains of other depths share a batch where they share its layers."""
    batch = Batch(((9, 2), (20, 3)), scattered=False, dtype=torch.float32)
    spare = np.full((LAYERS, 2), 10_000)
    batch.tables[0] = np.concatenate([batch.tables[0], spare], axis=1)
    batch.tables[1] = np.concatenate([batch.tables[1], batch.tables[1][:1]])
    got = batch.made()(*batch.new(), layer=LAYER, scale=0.3, window=None)
    torch.testing.assert_close(got.double(), batch.expected(), rtol=2e-5, atol=2e-5)
