"""What a request asks of its logits before a token is drawn: bias, a least length, penalties.

Everything here is a function of the request and the tokens of its output. A request that was pre-empted,
moved or resumed builds it again from those, and the border between prompt and output stays where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blockkernels.penalties import RowEdit
from blockserve.common.api.engine import EngineRequest


def edits_logits(request: EngineRequest) -> bool:
    """Whether a request's tokens are drawn from anything but the model's own logits."""
    sampling = request.sampling
    held = bool(request.min_tokens and request.held_token_ids)
    return held or sampling.has_biases or sampling.has_penalties


class RequestEdits:
    """The edits of one request, kept up to date a token at a time."""

    def __init__(self, request: EngineRequest) -> None:
        """Begin with an empty output."""
        self._request = request
        biases = dict(request.sampling.logit_bias)
        held = dict.fromkeys(sorted(request.held_token_ids), -math.inf)
        self._biases, self._biases_while_short = biases, biases | held
        self._bias, self._bias_while_short = _arrays(biases), _arrays(self._biases_while_short)
        self._sequences = _Sequences(request)
        self._seen = _SeenTokens(request)

    def row(self, place: int, output: Sequence[int]) -> RowEdit:
        """The edit for the token after `output`, in the row `place` of a batch."""
        params = self._request.sampling
        bias_ids, bias = self._bias_after(output)
        if not params.has_penalties:
            return RowEdit(place, bias_ids, bias)
        if not self._seen.follow(output):
            self._seen = _SeenTokens(self._request)
            self._seen.follow(output)
        return RowEdit(
            place,
            bias_ids,
            bias,
            *self._seen.arrays(),
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
        )

    def _bias_after(self, output: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        short = len(output) < self._request.min_tokens
        passing = self._sequences.biases(output)
        if not output:
            passing |= dict.fromkeys(self._request.sampling.begin_suppress, -math.inf)
        if not passing:
            return self._bias_while_short if short else self._bias
        lasting = self._biases_while_short if short else self._biases
        return _arrays({**lasting, **{t: lasting.get(t, 0.0) + bias for t, bias in passing.items()}})


class _Sequences:
    """Token sequences whose last token gets a bias where it would complete them."""

    def __init__(self, request: EngineRequest) -> None:
        self._prompt = request.prompt
        self._by_end: dict[int, list[tuple[tuple[int, ...], int, float]]] = {}
        for ids, bias in request.sampling.sequence_bias:
            self._by_end.setdefault(ids[-2], []).append((ids[:-1], ids[-1], bias))

    def biases(self, output: Sequence[int]) -> dict[int, float]:
        """What to add to logits of the token after `output`."""
        found: dict[int, float] = {}
        end = output[-1] if output else self._prompt[-1]
        for before, token, bias in self._by_end.get(end, ()):
            if self._ends_with(before, output):
                found[token] = found.get(token, 0.0) + bias
        return found

    def _ends_with(self, before: tuple[int, ...], output: Sequence[int]) -> bool:
        inside = min(len(before), len(output))
        split = len(before) - inside
        return tuple(output[len(output) - inside :]) == before[split:] and (
            split == 0 or self._prompt[-split:] == before[:split]
        )


class _SeenTokens:
    """The distinct tokens that penalties are for, and how often each is in the output."""

    def __init__(self, request: EngineRequest) -> None:
        params = request.sampling
        # Presence and frequency are about the output alone.
        prompt = np.unique(request.prompt) if params.repetition_penalty != 1.0 else np.empty(0, np.int64)
        most = len(prompt) + (request.max_tokens if params.has_penalties else 0)
        self._ids = np.empty(most, dtype=np.int64)
        self._counts = np.zeros(most, dtype=np.float32)
        self._ids[: len(prompt)] = prompt
        self._places = {token: place for place, token in enumerate(prompt.tolist())}
        self._followed = 0

    def follow(self, output: Sequence[int]) -> bool:
        """Count the tokens that are new in `output`; False when it is shorter than what was counted."""
        if len(output) < self._followed:
            return False
        for token in output[self._followed :]:
            place = self._places.setdefault(token, len(self._places))
            self._ids[place] = token
            self._counts[place] += 1
        self._followed = len(output)
        return True

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and counts, valid until the next `follow`."""
        known = len(self._places)
        return self._ids[:known], self._counts[:known]


def _arrays(biases: Mapping[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Token ids and what is added to their logits."""
    return np.array(list(biases), dtype=np.int64), np.array(list(biases.values()), dtype=np.float32)
