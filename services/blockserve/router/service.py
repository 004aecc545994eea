"""How callers are answered, free of any wire format: calls in, results out.

A Generate call goes through: check, admit, resolve, tokenise, plan, load, stream; it is counted all along.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

from blockserve.common.api.calls import CallField, Conversation, GenerateCall
from blockserve.common.api.engine import Engine
from blockserve.common.api.results import Chunk, ModelInfo, Tokenized
from blockserve.common.errors import (
    ChainNotLoadedError,
    DeadlineExceededError,
    DeadlineTooShortError,
    QueueFullError,
    ResumeError,
)
from blockserve.common.metrics import AnswerMeter, MetricsRegistry, RequestMeter, RequestMetrics
from blockserve.router.admission.gate import Admission
from blockserve.router.admission.pacing import Pacer
from blockserve.router.answers.answer import Answer, stream_answer
from blockserve.router.answers.choices import Choices
from blockserve.router.intake.catalog import DamagedVariant, ServedVariant, VariantCatalog
from blockserve.router.intake.chat import ChatLimits, ChatRenderer
from blockserve.router.intake.checks import check_call, check_conversation
from blockserve.router.intake.loading import ChainLoader
from blockserve.router.intake.plan import Plan, plan
from blockserve.router.limits import RouterConfig
from blockserve.router.paths.adaptive import AdaptiveAssembly
from blockserve.router.traces.book import CallTimes, ChoiceTimes, TraceBook
from blockzoo.manifest import ChainId

log = logging.getLogger(__name__)

DEADLINE_MARGIN = 2.0
"""A request is refused when its queue is estimated to take this many times what is left to its deadline."""


class Router:
    """Serves the variants of a zoo with an engine. One event loop.

    Attributes:
        limits: on requests.
        admission: who is let in; the server drains it.
        metrics: where requests are counted.
    """

    def __init__(
        self,
        catalog: VariantCatalog,
        engine: Engine,
        loader: ChainLoader,
        limits: RouterConfig | None = None,
        *,
        traces: TraceBook | None = None,
        renderer: ChatRenderer | None = None,
        metrics: RequestMetrics | None = None,
        adaptive: AdaptiveAssembly | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            catalog: where variants are looked up.
            engine: what runs requests.
            loader: brings chains into memory; `close` closes it.
            limits: on requests.
            traces: records where the time of calls goes; None records what nobody reads.
            renderer: one made earlier, with its child process already started; `close` closes it.
            metrics: where requests are counted; None counts into a registry that nobody reads.
            adaptive: chooses among approved equivalents; None always runs a variant's own chain.
        """
        self._adaptive = adaptive
        self._instance = secrets.token_hex(3)
        self.limits = limits or RouterConfig()
        self.admission = Admission(self.limits.max_requests, self.limits.retry_after_seconds)
        self.metrics = metrics or RequestMetrics(MetricsRegistry())
        self._pacer = Pacer(self.limits.retry_after_seconds, self.limits.max_retry_after_seconds)
        self._catalog = catalog
        self._renderer = renderer or ChatRenderer(chat_limits(self.limits))
        self._engine = engine
        self._loader = loader
        self._numbers = itertools.count()
        self._traces = traces or TraceBook(self.limits.traced_requests)

    async def close(self) -> None:
        """Let go of child processes and loads; requests have to be drained before."""
        await self._loader.close()
        await self._renderer.close()
        self._catalog.close()

    async def generate(
        self, call: GenerateCall, *, arrival: float | None = None, deadline: float | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Answer one call; closing the iterator cancels it.

        Args:
            call: what was asked.
            arrival: `time.monotonic()` value when it came in; None means now.
            deadline: `time.monotonic()` value, or None.

        Raises:
            BlockzooError: any of `errors`; see `plan`, `VariantCatalog.get` and `Engine.generate`.
        """
        arrival = time.monotonic() if arrival is None else arrival
        with self.metrics.request(arrival) as meter:
            try:
                check_call(call, self.limits)
                with self.admission.admit(call.num_choices), self._traces.follow(call, arrival) as times:
                    resolved, answer = await self._prepare(call, arrival, deadline, times)
                    meter.resolve(resolved.variant.record.name, len(resolved.request.prompt))
                    with _logged(resolved, answer, arrival):
                        async with aclosing(self._run_all(answer, meter, times)) as chunks:
                            async for chunk in chunks:
                                yield chunk
            except QueueFullError as error:
                error.retry_after = self._pacer.delay(self._engine.report().running_requests)
                raise

    async def _prepare(
        self, call: GenerateCall, arrival: float, deadline: float | None, times: CallTimes
    ) -> tuple[Plan, Choices]:
        """Everything that comes before the engine."""
        variant = await self._catalog.get(call.model)
        times.resolve(variant.record.name, variant.record.version)
        prompt = await self._prompt_ids(variant, call)
        times.tokenise(len(prompt))
        # Workers serve several routers, and callers may reuse their ids.
        engine_id = f"{call.request_id}#{self._instance}.{next(self._numbers)}"
        resolved = plan(call, variant, prompt, self.limits, engine_id=engine_id, deadline=deadline)
        self._check_deadline(resolved)
        resolved = await self._adapt(resolved)
        tokenizer = await self._catalog.tokenizer(variant)
        return resolved, Choices(resolved, tokenizer, arrival=arrival)

    async def _adapt(self, resolved: Plan) -> Plan:
        """Let an approved equivalent answer where that is allowed and pays; see `adaptive`."""
        call, request, ref = resolved.call, resolved.request, resolved.variant.ref
        if call.is_resumed:
            if call.resume_chain in ("", request.chain):
                return resolved
            if self._adaptive is None:
                raise ResumeError("this server does not use equivalents", field=CallField.RESUME_CHAIN)
            chosen = await self._adaptive.resume(request, ref, ChainId(call.resume_chain))
        elif self._adaptive is None or not call.allow_equivalents:
            return resolved
        else:
            taken = await self._adaptive.choose(request, ref)
            if taken is None:
                return resolved
            chosen = taken
        self.metrics.substituted.labels(self.metrics.labels.of(resolved.variant.record.name)).inc()
        told = f"equivalent:{chosen.record} mean_kl={chosen.mean_kl:.4g}"
        return replace(resolved, request=replace(request, chain=chosen.result), approximations=(told,))

    def _check_deadline(self, resolved: Plan) -> None:
        """Refuse at once what would wait in vain (DeadlineTooShortError); in doubt let it try.

        The estimate takes every waiting request for one that comes first, so requests that may overtake
        others are let through.
        """
        deadline = resolved.request.deadline
        if deadline is None or resolved.request.priority < 0:
            return
        report = self._engine.report()
        wait = self._pacer.wait(report.waiting_requests, report.running_requests)
        remaining = deadline - time.monotonic()
        if wait > DEADLINE_MARGIN * remaining:
            delay = self._pacer.delay(report.running_requests)
            raise DeadlineTooShortError(
                f"the deadline is in {remaining:.1f} s, and the estimated time in the queue is {wait:.1f} s",
                retry_after=delay,
                hint=f"Allow more time, or try again in {delay:.1f} s.",
            )

    def _note_served(self, answer: Answer) -> None:
        if answer.finished and answer.timing is not None:
            self._pacer.note_served(time.monotonic() - answer.timing.scheduled)

    async def tokenize(
        self, model: str, prompt: str | Conversation, *, add_special_tokens: bool = True
    ) -> Tokenized:
        """The token ids that `generate` would run for this prompt.

        Raises:
            BlockzooError: the variant, its template or its tokenizer is at fault.
        """
        if isinstance(prompt, Conversation):
            check_conversation(prompt, self.limits)
        variant = await self._catalog.get(model)
        ids, text = await self._encode(variant, prompt, add_special_tokens)
        return Tokenized(ids, text, variant.chain.context_length)

    async def models(self, after: str, size: int) -> tuple[list[ModelInfo], bool]:
        """One page of variants by name, and whether more follow."""
        variants, more = await self._catalog.page(after, size)
        return [
            self._model(variant) if isinstance(variant, ServedVariant) else _damaged_model(variant)
            for variant in variants
        ], more

    async def model(self, ref: str) -> ModelInfo:
        """One variant (VariantNotFoundError)."""
        return self._model(await self._catalog.get(ref))

    def _run_all(
        self, choices: Choices, meter: RequestMeter, times: CallTimes
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of every choice."""
        streams = [
            self._run(one, answer, meter.answer(), times.choice(one.request.request_id))
            for one, answer in zip(choices.plans, choices.answers, strict=True)
        ]
        return streams[0] if len(streams) == 1 else choices.merge(streams)

    async def _run(
        self, resolved: Plan, answer: Answer, meter: AnswerMeter, times: ChoiceTimes
    ) -> AsyncGenerator[Chunk, None]:
        """Load, stream and count; once more when the chain was unloaded between the first two."""
        chain, deadline = resolved.request.chain, resolved.request.deadline
        for attempt in (1, 2):
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineExceededError("the deadline passed before the request could start")
            await self._loader.ensure(chain)
            times.begin()
            try:
                async with aclosing(stream_answer(self._engine, resolved, answer)) as chunks:
                    async for chunk in chunks:
                        meter.advance(answer.num_tokens, answer.timing, answer.finish_reason)
                        times.advance(answer.num_tokens, finished=answer.finished)
                        self._note_served(answer)
                        yield chunk
                return
            except ChainNotLoadedError:
                if attempt == 2 or answer.num_tokens:
                    raise

    async def _prompt_ids(self, variant: ServedVariant, call: GenerateCall) -> tuple[int, ...]:
        if isinstance(call.prompt, tuple):
            return call.prompt
        ids, _ = await self._encode(variant, call.prompt, call.add_special_tokens)
        return ids

    async def _encode(
        self, variant: ServedVariant, prompt: str | Conversation, add_special_tokens: bool
    ) -> tuple[tuple[int, ...], str]:
        """Token ids and the text behind them; templates write their special tokens themselves."""
        if isinstance(prompt, str):
            return await self._catalog.encode(variant, prompt, add_special_tokens=add_special_tokens), prompt
        await self._catalog.check_conversation(variant, prompt)
        text = await self._renderer.render(variant.templates, prompt)
        return await self._catalog.encode(variant, text, add_special_tokens=False), text

    def _model(self, variant: ServedVariant) -> ModelInfo:
        record, chain = variant.record, variant.chain
        return ModelInfo(
            name=record.name,
            version=record.version,
            chain_digest=record.chain,
            family=chain.family,
            context_length=chain.context_length,
            has_chat_template=bool(variant.templates.by_name),
            loaded=self._engine.is_loaded(record.chain),
            num_layers=len(chain.links) - 2,
            provenance=record.provenance,
        )


def chat_limits(limits: RouterConfig) -> ChatLimits:
    """The renderer's part of the limits."""
    return ChatLimits(
        seconds=limits.chat_seconds,
        memory_bytes=limits.chat_memory_bytes,
        max_chars=limits.chat_max_chars,
        processes=limits.chat_processes,
    )


def _damaged_model(variant: DamagedVariant) -> ModelInfo:
    """An entry that says what is wrong where a description would stand."""
    record = variant.record
    return ModelInfo(
        name=record.name,
        version=record.version,
        chain_digest=record.chain,
        family="",
        context_length=0,
        has_chat_template=False,
        loaded=False,
        num_layers=0,
        provenance={**record.provenance, "error": f"{variant.error.reason}: {variant.error}"},
    )


@contextmanager
def _logged(resolved: Plan, answer: Choices, arrival: float) -> Iterator[None]:
    """One line in the log at the answer's end."""
    outcome = ""
    try:
        yield
    except Exception as error:
        outcome = type(error).__name__
        raise
    finally:
        # A caller may leave as soon as it has the last chunk; that answer is finished all the same.
        outcome = outcome or ("finished" if answer.finished else "cancelled")
        _log_request(resolved, answer, outcome, time.monotonic() - arrival)


def _log_request(resolved: Plan, answer: Choices, outcome: str, seconds: float) -> None:
    """One line per request; never what was said."""
    log.info(
        "request id=%s model=%s outcome=%s prompt_tokens=%d output_tokens=%d first_token=%.3f seconds=%.3f",
        resolved.call.request_id,
        resolved.variant.ref,
        outcome,
        len(resolved.request.prompt),
        answer.num_tokens,
        answer.first_token_seconds,
        seconds,
    )
