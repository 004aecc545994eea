"""The sampler against its plain reference, against transformers' warpers and against itself."""

import math
import random

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from blockkernels.sampling import (
    SamplingBatch,
    bench,
    logprobs,
    nonfinite_rows,
    sample,
    sample_reference,
    uniform,
)
from blockkernels.sampling.kernel import ONE, SORT_BOUNDS, token_weights, uniforms
from blockkernels.sampling.reference import draw, logprobs_reference, philox4x32, probabilities

VOCAB = 501
SORT_BOUND = SORT_BOUNDS[-1]

# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.3, 40, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.9, 0, 0.9, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (2.0, 0, 0.999, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),
    (1e-3, 0, 0.95, 0.0),
    (1.1, 60, 0.8, 0.02),
    (1.5, 500, 0.5, 0.0),
    (1.5, 501, 1.0, 0.001),
    (1.5, 100000, 0.97, 0.001),
]


def make_logits(rows, vocab=VOCAB, seed=0, scale=3.0):
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def make_batch(settings, seeds=None, positions=None):
    rows = len(settings)
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    return SamplingBatch(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=list(seeds) if seeds is not None else [7] * rows,
        choice=[0] * rows,
        position=list(positions) if positions is not None else list(range(rows)),
    )


def hf_probabilities(logits, temperature, top_k, top_p, min_p):
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1).to(torch.float64)


def chi_square_limit(freedom):
    """The value that chi-square exceeds with probability 1e-6 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3


# Known answers published with Random123 (kat_vectors, "philox4x32 10").
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    assert philox4x32(counter, key) == answer


def test_uniform_takes_its_bits_from_philox():
    first, second, _, _ = philox4x32((3, 1, 5, 0), (0xFFFFFFFE, 0xFFFFFFFF))
    assert uniform(2**64 - 2, 5, 2**32 + 3) == ((first << 32 | second) >> 11) / 2**53


def test_uniform_depends_on_each_key_and_nothing_else():
    base = uniform(1, 2, 3)
    assert base == uniform(1, 2, 3)
    others = [
        uniform(2, 2, 3),
        uniform(1, 3, 3),
        uniform(1, 2, 4),
        uniform(1 + 2**32, 2, 3),
        uniform(1, 2, 3 + 2**32),
    ]
    assert len({base, *others}) == 6
    assert all(0.0 <= value < 1.0 for value in others)


def test_uniforms_equals_uniform():
    rng = random.Random(0)
    seeds = [0, 2**64 - 1, *(rng.getrandbits(64) for _ in range(200))]
    choices = [0, 2**32 - 1, *(rng.getrandbits(32) for _ in range(200))]
    positions = [0, 2**64 - 1, *(rng.getrandbits(40) for _ in range(200))]
    expected = [uniform(*keys) for keys in zip(seeds, choices, positions, strict=True)]
    assert uniforms(seeds, choices, positions).tolist() == expected


def test_uniform_is_uniform():
    count = 20000
    for keys in (
        ([5] * count, [0] * count, list(range(count))),
        (list(range(count)), [0] * count, [0] * count),
        ([5] * count, list(range(count)), [9] * count),
    ):
        values = torch.from_numpy(uniforms(*keys))
        cells = torch.histc(values, bins=100, min=0.0, max=1.0)
        assert ((cells - count / 100) ** 2 / (count / 100)).sum().item() < chi_square_limit(99)


@pytest.mark.parametrize("settings", SETTINGS)
def test_token_weights_are_the_reference_probabilities(settings):
    logits = make_logits(3)
    weight = token_weights(logits, make_batch([settings] * 3)).to(torch.float64)
    temperature, top_k, top_p, min_p = settings
    for row in range(3):
        expected = torch.tensor(
            probabilities(
                logits[row].tolist(), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
            ),
            dtype=torch.float64,
        )
        torch.testing.assert_close(weight[row] / weight[row].sum(), expected, atol=1e-7, rtol=0)
        assert (weight[row][expected == 0] == 0).all()
        assert (weight[row][expected > 1e-11] > 0).all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_token_weights_are_transformers_distribution(settings):
    logits = make_logits(4, seed=1)
    weight = token_weights(logits, make_batch([settings] * 4)).to(torch.float64)
    expected = hf_probabilities(logits, *settings)
    torch.testing.assert_close(weight / weight.sum(1, keepdim=True), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS)
def test_sample_equals_the_reference(settings):
    rows = 40
    logits = make_logits(rows, seed=2)
    batch = make_batch([settings] * rows)
    assert torch.equal(sample(logits, batch), sample_reference(logits, batch))


def test_sample_equals_the_reference_in_a_mixed_batch():
    settings = [*SETTINGS, (0.0, 0, 1.0, 0.0), (0.0, 5, 0.5, 0.5)] * 3
    logits = make_logits(len(settings), seed=3)
    batch = make_batch(settings, seeds=range(100, 100 + len(settings)))
    assert torch.equal(sample(logits, batch), sample_reference(logits, batch))


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s[0] > 0.1])
def test_sample_follows_transformers_distribution(settings):
    """Chi-square over 20000 draws; cells expected less than five times are thrown together."""
    count = 20000
    row = make_logits(1, vocab=63, seed=4, scale=1.0)
    batch = make_batch([settings] * count)
    drawn = torch.bincount(sample(row.expand(count, -1).contiguous(), batch), minlength=63).to(torch.float64)
    expected = hf_probabilities(row, *settings)[0] * count
    assert (drawn[expected == 0] == 0).all()
    large = expected >= 5
    cells = [(drawn[large], expected[large])]
    if expected[~large].sum() >= 5:
        cells.append((drawn[~large].sum()[None], expected[~large].sum()[None]))
    got, want = (torch.cat(column) for column in zip(*cells, strict=True))
    if len(want) == 1:
        assert got.item() >= count - 20
        return
    assert ((got - want) ** 2 / want).sum().item() < chi_square_limit(len(want) - 1)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(2, VOCAB)
    logits[1, [77, 400]] = 5.0
    batch = make_batch([(0.0, 0, 1.0, 0.0)] * 2)
    assert sample(logits, batch).tolist() == [0, 77] == sample_reference(logits, batch).tolist()


@pytest.mark.parametrize(
    "settings",
    [(1.0, 1, 1.0, 0.0), (5.0, 0, 1e-9, 0.0), (5.0, 0, 1.0, 1.0), (1e-3, 0, 1.0, 0.0), (1e-300, 0, 1.0, 0.0)],
)
def test_settings_that_leave_one_token_are_greedy(settings):
    logits = make_logits(50, seed=5)
    assert torch.equal(sample(logits, make_batch([settings] * 50)), logits.argmax(-1))


def test_top_k_keeps_every_token_equal_to_the_kth():
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = 2.0
    logits[0, 10:20] = 1.0
    for top_k in (4, 8, 13):
        weight = token_weights(logits, make_batch([(1.0, top_k, 1.0, 0.0)]))
        assert (weight[0] > 0).nonzero()[:, 0].tolist() == [0, 1, 2, *range(10, 20)]


def test_top_p_takes_lower_ids_first_among_equals():
    logits = torch.full((1, VOCAB), -30.0)
    logits[0, [3, 100, 200, 300]] = 1.0
    for top_p, kept in ((0.2, [3]), (0.4, [3, 100]), (0.7, [3, 100, 200]), (0.9, [3, 100, 200, 300])):
        weight = token_weights(logits, make_batch([(1.0, 0, top_p, 0.0)]))
        assert (weight[0] == ONE).nonzero()[:, 0].tolist() == kept
        assert weight.sum() == len(kept) * ONE


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
def test_rows_are_sorted_whole_when_the_bounded_search_is_too_short(spread):
    """Flat rows hold their mass in more than SORT_BOUND tokens; ties at the bound must not be lost."""
    vocab = 4 * SORT_BOUND + 3
    logits = make_logits(8, vocab=vocab, seed=6, scale=spread).clamp_(min=-2 * spread)
    settings = [
        (1.0, 0, 0.5, 0.0),
        (1.0, 2 * SORT_BOUND, 1.0, 0.0),
        (1.0, 2 * SORT_BOUND, 0.9, 0.0),
        (1.0, SORT_BOUND, 0.99, 0.0),
        (1.0, SORT_BOUND + 1, 0.01, 0.0),
        (1.0, 0, 1.0, 0.0),
        (1.0, 100, 0.9, 0.0),
        (1.0, SORT_BOUNDS[0] + 1, 0.999, 0.0),
    ]
    weight = token_weights(logits, make_batch(settings)).to(torch.float64)
    for row, (temperature, top_k, top_p, min_p) in enumerate(settings):
        expected = torch.tensor(
            probabilities(
                logits[row].tolist(), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
            ),
            dtype=torch.float64,
        )
        # The boundary of the nucleus may move by one token where float32 and float64 sums round apart.
        assert abs(int((weight[row] > 0).sum()) - int((expected > 0).sum())) <= 1
        torch.testing.assert_close(weight[row] / weight[row].sum(), expected, atol=2e-3 / 3, rtol=1e-3)


def test_tokens_that_are_masked_out_are_never_drawn():
    logits = torch.full((400, VOCAB), -math.inf)
    logits[:, [5, 9]] = 0.0
    drawn = sample(logits, make_batch([SETTINGS[i % 2] for i in range(400)]))
    assert set(drawn.tolist()) == {5, 9}


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 32])
def test_a_row_gives_the_same_bits_in_every_batch(rows):
    vocab = 2 * SORT_BOUND + 13
    settings = [SETTINGS[i % len(SETTINGS)] if i % 5 else (0.0, 0, 1.0, 0.0) for i in range(64)]
    logits = make_logits(64, vocab=vocab, seed=7)
    whole = make_batch(settings, seeds=range(64), positions=range(64, 128))
    tokens, chosen = sample(logits, whole), logprobs(logits, torch.arange(64), 5)
    rng = random.Random(rows)
    for _ in range(10):
        picked = rng.sample(range(64), rows)
        part = make_batch([settings[r] for r in picked], seeds=picked, positions=[r + 64 for r in picked])
        assert torch.equal(sample(logits[picked], part), tokens[picked])
        other = logprobs(logits[picked], torch.tensor(picked), 5)
        assert torch.equal(other.chosen, chosen.chosen[picked])
        assert torch.equal(other.top, chosen.top[picked])
        assert torch.equal(other.top_ids, chosen.top_ids[picked])


def test_weights_do_not_depend_on_the_batch_around_a_row():
    logits = make_logits(len(SETTINGS), vocab=3001, seed=8)
    whole = token_weights(logits, make_batch(SETTINGS))
    for row, settings in enumerate(SETTINGS):
        assert torch.equal(token_weights(logits[row : row + 1], make_batch([settings]))[0], whole[row])


def test_the_number_of_threads_changes_nothing():
    logits, batch = make_logits(len(SETTINGS), vocab=49152, seed=9), make_batch(SETTINGS)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = token_weights(logits, batch)
        torch.set_num_threads(4)
        assert torch.equal(token_weights(logits, batch), one)
    finally:
        torch.set_num_threads(before)


def test_a_poisoned_row_disturbs_no_other():
    logits = make_logits(len(SETTINGS) + 1, seed=10)
    settings = [*SETTINGS, (0.0, 0, 1.0, 0.0)]
    clean = sample(logits, make_batch(settings))
    for poison in (math.nan, math.inf):
        for bad in range(len(settings)):
            dirty = logits.clone()
            dirty[bad, 13] = poison
            tokens = sample(dirty, make_batch(settings))
            keep = [row for row in range(len(settings)) if row != bad]
            assert torch.equal(tokens[keep], clean[keep])
            assert 0 <= tokens[bad] < VOCAB


def test_logits_are_not_modified_and_padding_is_not_read():
    """Rows are a slice of a buffer whose remainder is NaN."""
    buffer = torch.full((20, 640), math.nan)
    buffer[3:17, :VOCAB] = make_logits(14, seed=11)
    view, copy = buffer[3:17, :VOCAB], buffer[3:17, :VOCAB].clone()
    batch = make_batch(SETTINGS)
    assert torch.equal(sample(view, batch), sample(copy, batch))
    assert torch.equal(
        logprobs(view, torch.zeros(14, dtype=torch.int64), 3).top,
        logprobs(copy, torch.zeros(14, dtype=torch.int64), 3).top,
    )
    assert torch.equal(view, copy)


def test_nonfinite_rows_names_rows_that_cannot_be_drawn_from():
    logits = make_logits(6)
    logits[1, 500] = math.nan
    logits[2, 0] = -math.inf
    logits[3] = -math.inf
    logits[5, 7] = math.inf
    assert nonfinite_rows(logits) == [1, 3, 5]
    assert nonfinite_rows(logits[[0, 2, 4]]) == []


def test_logprobs_are_log_softmax_of_the_unmodified_logits():
    logits = make_logits(5, seed=12, scale=8.0)
    tokens = torch.tensor([0, 500, 77, 3, 250])
    result = logprobs(logits, tokens, 7)
    expected = logits.to(torch.float64).log_softmax(-1)
    torch.testing.assert_close(result.chosen, expected.gather(1, tokens[:, None])[:, 0], atol=1e-9, rtol=0)
    best = expected.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(result.top_ids, best.indices[:, :7])
    torch.testing.assert_close(result.top, best.values[:, :7], atol=1e-9, rtol=0)
    for row in range(5):
        reference = logprobs_reference(logits[row].tolist())
        assert result.chosen[row].item() == pytest.approx(reference[tokens[row]], abs=1e-9)


@pytest.mark.parametrize("top_n", [0, 3, 64])
@pytest.mark.parametrize("column", [0, 3, VOCAB - 1])
def test_logprobs_of_a_row_with_nan_are_nan_and_those_beside_it_are_not(top_n, column):
    logits = make_logits(3, seed=2)
    logits[1, column] = math.nan
    found = logprobs(logits, torch.tensor([5, 5, 5]), top_n)
    assert found.chosen.isnan().tolist() == [False, True, False]
    alone = logprobs(logits[2:], torch.tensor([5]), top_n)
    assert torch.equal(found.chosen[2:], alone.chosen)
    assert torch.equal(found.top_ids[2:], alone.top_ids)


def test_logprobs_order_equals_by_id_whatever_top_n():
    logits = torch.zeros(2, VOCAB)
    logits[0, [400, 20]] = 1.0
    for top_n in (1, 2, 3, 6):
        result = logprobs(logits, torch.tensor([1, 2]), top_n)
        assert result.top_ids[0].tolist() == [20, 400, 0, 1, 2, 3][:top_n]
        assert result.top_ids[1].tolist() == list(range(top_n))
    empty = logprobs(logits, torch.tensor([1, 2]), 0)
    assert empty.top_ids.shape == empty.top.shape == (2, 0)


def test_draw_never_leaves_the_support():
    assert draw([0.0, 0.5, 0.0, 0.5, 0.0], 0.0) == 1
    assert draw([0.0, 0.5, 0.0, 0.5, 0.0], 0.5) == 3
    assert draw([0.0, 0.5, 0.0, 0.4999999, 0.0], 0.99999999) == 3


def test_misuse_is_refused():
    batch = make_batch(SETTINGS[:2])
    with pytest.raises(ValueError, match="3 rows"):
        sample(make_logits(3), batch)
    with pytest.raises(ValueError, match="float32"):
        sample(make_logits(2).to(torch.bfloat16), batch)
    with pytest.raises(ValueError, match="vocabulary"):
        sample(torch.empty(2, 0), batch)
    with pytest.raises(ValueError, match="differ in length"):
        SamplingBatch([1.0], [0], [1.0], [0.0], [0], [0], [])
    with pytest.raises(ValueError, match="top_n"):
        logprobs(make_logits(2), torch.zeros(2, dtype=torch.int64), VOCAB + 1)
    with pytest.raises(ValueError, match="token ids"):
        logprobs(make_logits(2), torch.zeros(3, dtype=torch.int64), 1)


def test_an_empty_batch_gives_no_tokens():
    assert sample(torch.empty(0, VOCAB), make_batch_of_nothing()).shape == (0,)


def make_batch_of_nothing():
    return SamplingBatch([], [], [], [], [], [], [])


def test_bench_prints_no_speed_up_when_the_check_is_red(monkeypatch, capsys):
    argv = ["bench", "--rows", "3", "--vocab", "301", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", argv)
    assert bench.main() == 0
    assert capsys.readouterr().out.count("x\n") == len(bench.CASES)
    monkeypatch.setattr(
        bench, "sample", lambda logits, batch: torch.zeros(logits.shape[0], dtype=torch.int64)
    )
    assert bench.main() == 1
    output = capsys.readouterr().out
    assert output.count("WRONG") == len(bench.CASES)
    assert "ms" not in output
