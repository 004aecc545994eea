"""What the router does, free of any wire format: calls in, results out.

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
from typing import Protocol

from blockserve.common.api.call_trace import CallTrace
from blockserve.common.api.calls import Conversation, GenerateCall
from blockserve.common.api.engine import Engine
from blockserve.common.api.results import Chunk, LoadedChain, ModelInfo, ServerStatus, Tokenized
from blockserve.common.errors import (
    ChainNotLoadedError,
    DeadlineExceededError,
    DeadlineTooShortError,
    QueueFullError,
    ResumeError,
    WorkerNotFoundError,
)
from blockserve.common.metrics import AnswerMeter, MetricsRegistry, RequestMeter, RequestMetrics
from blockserve.common.placement.wishes import WishKeeper
from blockserve.router.admission.gate import Admission
from blockserve.router.admission.pacing import Pacer
from blockserve.router.answers.answer import Answer, stream_answer
from blockserve.router.answers.choices import Choices
from blockserve.router.cluster.report import KnowsCluster, describe
from blockserve.router.intake.catalog import DamagedVariant, ServedVariant, VariantCatalog, ZooReader
from blockserve.router.intake.chat import ChatLimits, ChatRenderer
from blockserve.router.intake.loading import ChainLoader
from blockserve.router.intake.plan import Plan, check_call, check_conversation, plan
from blockserve.router.limits import RouterConfig
from blockserve.router.paths.adaptive import AdaptiveAssembly
from blockserve.router.traces.book import CallTimes, ChoiceTimes, TraceBook
from blockzoo.manifest import ChainId

log = logging.getLogger(__name__)

DEADLINE_MARGIN = 2.0
"""A request is refused when its queue is estimated to take this many times what is left to its deadline."""


class WorkerOperator(Protocol):
    """Acts on single workers of a cluster."""

    async def drain_worker(self, worker: str, seconds: float, *, resume: bool) -> int:
        """Have a worker take no new requests; how many it gave back (WorkerNotFoundError)."""
        ...


class Router:
    """Serves the variants of a zoo with an engine. One event loop."""

    def __init__(
        self,
        zoo: ZooReader,
        engine: Engine,
        config: RouterConfig | None = None,
        *,
        version: str = "",
        catalog: VariantCatalog | None = None,
        renderer: ChatRenderer | None = None,
        metrics: RequestMetrics | None = None,
        adaptive: AdaptiveAssembly | None = None,
        operator: WorkerOperator | None = None,
        wishes: WishKeeper | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            zoo: where variants are looked up.
            engine: what runs them.
            config: the limits.
            version: of the program, for `status`.
            catalog: one made earlier over the same zoo, with tokenizers already parsed.
            renderer: one made earlier, with its child process already started.
            metrics: where requests are counted; None counts into a registry that nobody reads.
            adaptive: chooses among approved equivalents; None always runs a variant's own chain.
            operator: acts on workers; None where there are none.
            wishes: keeps what is to stay loaded in a cluster; None where there is one process.
        """
        self._wishes = wishes
        self._operator = operator
        self._adaptive = adaptive
        self._instance = secrets.token_hex(3)
        self.config = config or RouterConfig()
        self.admission = Admission(self.config.max_requests, self.config.retry_after_seconds)
        self.metrics = metrics or RequestMetrics(MetricsRegistry())
        self._pacer = Pacer(self.config.retry_after_seconds, self.config.max_retry_after_seconds)
        self._catalog = catalog or VariantCatalog(zoo, self.config)
        self._renderer = renderer or ChatRenderer(chat_limits(self.config))
        self._engine = engine
        self._loader = ChainLoader(engine)
        self._version = version
        self._started = time.monotonic()
        self._numbers = itertools.count()
        self._traces = TraceBook(self.config.traced_requests)

    async def close(self) -> None:
        """Let go of child processes and loads; requests have to be drained before."""
        await self._loader.close()
        await self._renderer.close()

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
                check_call(call, self.config)
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
        resolved = plan(call, variant, prompt, self.config, engine_id=engine_id, deadline=deadline)
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
                raise ResumeError("this server runs no equivalents", field="resume_chain")
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
            raise DeadlineTooShortError(
                f"the deadline is in {remaining:.1f} s, and the queue takes about {wait:.1f} s",
                retry_after=self._pacer.delay(report.running_requests),
                hint="Allow more time, or try again after the time that RetryInfo says.",
            )

    def _note_served(self, answer: Answer) -> None:
        if answer.finished and answer.timing is not None:
            self._pacer.note_served(time.monotonic() - answer.timing.scheduled)

    async def tokenize(self, model: str, prompt: str | Conversation) -> Tokenized:
        """The token ids that `generate` would run for this prompt.

        Raises:
            BlockzooError: the variant, its template or its tokenizer is at fault.
        """
        if isinstance(prompt, Conversation):
            check_conversation(prompt, self.config)
        variant = await self._catalog.get(model)
        ids, text = await self._encode(variant, prompt)
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

    async def load(self, ref: str, *, pinned: bool | None = None) -> tuple[str, float]:
        """Bring a variant's blocks into memory; its chain's digest and the seconds it took.

        Args:
            ref: `name` or `name@version`.
            pinned: whether they must stay when others need room; None leaves that as it is.
        """
        started = time.monotonic()
        variant = await self._catalog.get(ref)
        if self._wishes is not None and pinned is not None:
            await self._wishes.wish(ref, pinned=pinned)
        await self._loader.ensure(variant.record.chain)
        if pinned is not None:
            await self._engine.load(variant.record.chain, pinned=pinned)
        return variant.record.chain, time.monotonic() - started

    async def unload(self, ref: str) -> str:
        """Let go of a variant's blocks once its requests have ended; its chain's digest."""
        variant = await self._catalog.get(ref)
        if self._wishes is not None and "@" not in ref:
            await self._wishes.wish(ref, pinned=False)
        await self._engine.unload(variant.record.chain)
        return variant.record.chain

    async def drain_worker(self, worker: str, seconds: float, *, resume: bool = False) -> int:
        """Have a worker take no new requests; how many it gave back.

        Raises:
            WorkerNotFoundError: there is none of this name, or this server is one process.
        """
        if self._operator is None:
            raise WorkerNotFoundError(
                f"there is no worker {worker!r}: this server is one process", hint="Stop the server instead."
            )
        return await self._operator.drain_worker(worker, seconds, resume=resume)

    async def trace(self, request_id: str) -> tuple[CallTrace, ...]:
        """Where the time of a request went (RequestNotFoundError); see `TraceBook.trace`."""
        return await self._traces.trace(request_id, self._engine)

    def forget(self, name: str) -> None:
        """Let requests see at once what was changed about a name."""
        self._catalog.forget(name)

    async def status(self) -> ServerStatus:
        """What is loaded, the segments, the queues and the use of KV pages."""
        report, refs = self._engine.report(), await self._catalog.refs_by_chain()
        return ServerStatus(
            version=self._version,
            uptime_seconds=time.monotonic() - self._started,
            zoo_url=self._catalog.zoo_url,
            device=report.device,
            waiting_requests=report.waiting_requests,
            running_requests=report.running_requests,
            passes=report.passes,
            kv_pages_total=report.kv_pages_total,
            kv_pages_used=report.kv_pages_used,
            kv_bytes_total=report.kv_bytes_total,
            block_bytes=report.block_bytes,
            kv_pages_cached=report.kv_pages_cached,
            prefix_queried_tokens=report.prefix_queried_tokens,
            prefix_hit_tokens=report.prefix_hit_tokens,
            preemptions=report.preemptions,
            chain_evictions=report.chain_evictions,
            chains=tuple(
                LoadedChain(
                    chain_digest=chain.chain,
                    models=refs.get(chain.chain, ()),
                    running_requests=chain.running_requests,
                    private_bytes=chain.private_bytes,
                    total_bytes=chain.total_bytes,
                    pinned=chain.pinned,
                )
                for chain in report.chains
            ),
            segments=report.segments,
            cluster=describe(self._engine) if isinstance(self._engine, KnowsCluster) else None,
        )

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
        ids, _ = await self._encode(variant, call.prompt)
        return ids

    async def _encode(
        self, variant: ServedVariant, prompt: str | Conversation
    ) -> tuple[tuple[int, ...], str]:
        """Token ids and the text behind them; templates write their special tokens themselves."""
        if isinstance(prompt, str):
            return await self._catalog.encode(variant, prompt, add_special_tokens=True), prompt
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


def chat_limits(config: RouterConfig) -> ChatLimits:
    """The renderer's part of the settings."""
    return ChatLimits(
        seconds=config.chat_seconds,
        memory_bytes=config.chat_memory_bytes,
        max_chars=config.chat_max_chars,
        processes=config.chat_processes,
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
