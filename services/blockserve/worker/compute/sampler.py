"""From logits to outcomes: sampling, log-probabilities, the end of a request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockkernels.backends import Backend
from blockkernels.penalties import RowEdit
from blockkernels.sampling import SamplingBatch
from blockserve.common.api.engine import TokenEvent
from blockserve.common.api.tokens import FinishReason, PositionLogprobs
from blockserve.common.errors import NonFiniteLogitsError
from blockserve.worker.requests.edits import RequestEdits, edits_logits
from blockserve.worker.requests.running import ChunkLogits, Outcome, RunningRequest

_LOGPROB_ROWS = 32


class Sampler:
    """Draws the tokens of passes."""

    def __init__(self, backend: Backend) -> None:
        """Draw with the operations of `backend`."""
        self._backend = backend

    @torch.inference_mode()
    def sample_next(self, results: Sequence[ChunkLogits]) -> list[tuple[RunningRequest, Outcome]]:
        """Draw each request's next token from the last row of its logits; one vocabulary size for all."""
        running = [result.chunk.running for result in results]
        logits = _last_rows(results)
        broken = set(self._backend.nonfinite_rows(logits))
        if broken:
            logits[list(broken)] = 0.0
        params = [one.request.sampling for one in running]
        batch = SamplingBatch(
            temperature=[one.temperature for one in params],
            top_k=[one.top_k for one in params],
            top_p=[one.top_p for one in params],
            min_p=[one.min_p for one in params],
            seed=[one.seed for one in params],
            choice=[one.choice for one in params],
            position=[len(one.output) for one in running],
        )
        tokens: list[int] = self._backend.sample(self._edited(logits, running), batch).tolist()
        chosen = self._logprobs(logits, tokens, [one.request.logprobs for one in running])
        outcomes: list[tuple[RunningRequest, Outcome]] = []
        for place, (one, token) in enumerate(zip(running, tokens, strict=True)):
            if place in broken:
                error = NonFiniteLogitsError(
                    "the logits are not finite",
                    hint="Check the variant's weights, or serve it in a wider type (dtype).",
                    chain=one.request.chain,
                )
                outcomes.append((one, error))
                continue
            index = len(one.output)
            one.output.append(token)
            finish = None
            if token in one.request.stop_token_ids:
                finish = FinishReason.STOP
            elif len(one.output) >= one.request.max_tokens:
                finish = FinishReason.LENGTH
            prompt = tuple(one.prompt_logprobs) if index == 0 and one.request.prompt_logprobs else None
            cached = one.num_cached if index == 0 else 0
            outcomes.append((one, [TokenEvent(index, token, chosen[place], prompt, finish, cached)]))
        return outcomes

    def collect_prompt(self, result: ChunkLogits) -> None:
        """Keep what a chunk's logits say about the prompt tokens that follow them."""
        running, start = result.chunk.running, result.chunk.start
        prompt = running.request.prompt
        if start >= len(prompt):
            return
        if running.probe is not None:
            running.probe.append(result.rows)
        following = list(prompt[start + 1 : result.chunk.end + 1])
        if running.request.prompt_logprobs and following:
            rows = result.rows[: len(following)]
            count = running.request.logprobs or 0
            running.prompt_logprobs.extend(self._position_logprobs(rows, following, [count] * len(following)))

    def _edited(self, logits: Tensor, running: Sequence[RunningRequest]) -> Tensor:
        """Logits to draw from; the given ones stay as they are where somebody wants to know them."""
        edits: list[RowEdit] = []
        for place, one in enumerate(running):
            if edits_logits(one.request):
                one.edits = one.edits or RequestEdits(one.request)
                edits.append(one.edits.row(place, one.output))
        if not edits:
            return logits
        if any(one.request.logprobs is not None for one in running):
            logits = logits.clone()
        self._backend.edit_logits(logits, edits)
        return logits

    def _logprobs(
        self, logits: Tensor, tokens: Sequence[int], wanted: Sequence[int | None]
    ) -> list[PositionLogprobs | None]:
        """Log-probabilities of chosen tokens for the rows that want them."""
        result: list[PositionLogprobs | None] = [None] * len(tokens)
        places = [place for place, count in enumerate(wanted) if count is not None]
        if places:
            counts = [wanted[place] or 0 for place in places]
            rows = logits if len(places) == len(tokens) else logits[places]
            found = self._position_logprobs(rows, [tokens[place] for place in places], counts)
            for place, one in zip(places, found, strict=True):
                result[place] = one
        return result

    def _position_logprobs(
        self, logits: Tensor, tokens: Sequence[int], counts: Sequence[int]
    ) -> list[PositionLogprobs]:
        """Chosen token and the best `counts[i]` tokens of each row of logits [rows, vocab].

        A few rows at a time: sorting takes several times the memory of the logits.
        """
        whole: list[PositionLogprobs] = []
        for at in range(0, len(tokens), _LOGPROB_ROWS):
            rows = slice(at, at + _LOGPROB_ROWS)
            whole.extend(self._logprobs_of_rows(logits[rows], tokens[rows], counts[rows]))
        return whole

    def _logprobs_of_rows(
        self, logits: Tensor, tokens: Sequence[int], counts: Sequence[int]
    ) -> list[PositionLogprobs]:
        found = self._backend.logprobs(logits, torch.tensor(tokens, device=logits.device), max(counts))
        chosen, top_ids, top = found.chosen.tolist(), found.top_ids.tolist(), found.top.tolist()
        return [
            PositionLogprobs(
                token, chosen[row], tuple(zip(top_ids[row][:count], top[row][:count], strict=True))
            )
            for row, (token, count) in enumerate(zip(tokens, counts, strict=True))
        ]


def _last_rows(results: Sequence[ChunkLogits]) -> Tensor:
    """The last row of each, [results, vocab], to be modified at will."""
    first = results[0].rows
    vocab, start = first.shape[1], first.storage_offset()
    one_matrix = all(
        result.rows.shape[0] == 1
        and result.rows.data_ptr() == first.data_ptr() + place * vocab * first.itemsize
        and not result.chunk.running.wants_prompt_logits
        for place, result in enumerate(results)
    )
    if one_matrix and first.is_contiguous():  # as the head gives them when everybody decodes
        return first.as_strided((len(results), vocab), (vocab, 1), start)
    return torch.stack([result.rows[-1] for result in results])
