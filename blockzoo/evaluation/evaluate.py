"""Measuring on held-out text what one run of links does in the place of another; needs torch when it runs."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from blockzoo.canonical import digest_bytes
from blockzoo.equivalence.decide import timestamp
from blockzoo.equivalence.ledger import Ledger
from blockzoo.equivalence.records import EquivalenceRecord, chain_digest, splice
from blockzoo.errors import InvalidInputError, MissingPackageError
from blockzoo.evaluation.compatibility import check_compatible
from blockzoo.evaluation.selection import Pair, select
from blockzoo.evaluation.tokens import check_lengths, tokenise, windows
from blockzoo.manifest import BlobId
from blockzoo.progress import NoProgress, Progress
from blockzoo.zoo import Zoo

if TYPE_CHECKING:
    from blockzoo.evaluation.forward import LinkLoader

MAX_TOKENS = 4096
"""Default number of compared tokens: half a minute on one core for a model of 135 million parameters."""

WINDOW_TOKENS = 512
"""Default tokens of a window, or the model's context where that is shorter."""

DTYPES = ("float32", "bfloat16", "float16")
"""What may be computed in. float32 shows what the weights do, without rounding of its own."""


def evaluate(
    zoo: Zoo,
    a: str,
    b: str,
    text: str,
    *,
    max_tokens: int = MAX_TOKENS,
    window_tokens: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[EquivalenceRecord]:
    """Compute A's chain as it is and with B in A's place, compare the outputs, and store what was found.

    The text is cut into windows; every token sees those before it in its window, and the outputs at every
    position count. Special tokens are not added. For the other direction call it with A and B exchanged.

    Args:
        zoo: where both are registered, and where the records go.
        a: what is to be replaced; see `blockzoo.evaluation.selection` for the spellings.
        b: what stands in for it.
        text: held-out text: neither model was trained on it, and callers send the like.
        max_tokens: most tokens to compare.
        window_tokens: tokens of a window; `WINDOW_TOKENS` or the model's context when None.
        dtype: one of `DTYPES`.
        device: where to compute, as torch names it.
        progress: told of the tokens compared, not of bytes.

    Returns:
        A record for each run that was compared, stored: one, or for two whole variants that differ in several
        runs one each and one of all together.

    Raises:
        InvalidInputError, NotFoundError: A, B or an argument cannot be; see `select`.
        IncompatibleBlocksError: B cannot stand in for A.
        EvaluationError: the text is too short, or a chain computes NaN.
        MissingPackageError: torch or tokenizers is not installed.
        CorruptionError: the zoo is damaged.
    """
    zoo.store.check_writable()
    pairs = select(zoo, a, b)
    for pair in pairs:
        check_compatible(zoo, pair)
    first = pairs[0]
    if window_tokens is None:
        window_tokens = min(WINDOW_TOKENS, first.chain_a.context_length)
    check_lengths(max_tokens, window_tokens, first.chain_a.context_length)
    tokenizer, ids = tokenise(zoo, first, text, max_tokens)
    loader = _loader(zoo, dtype, device)
    reporter = progress or NoProgress()
    return [_evaluate(zoo, pair, text, tokenizer, ids, window_tokens, loader, reporter) for pair in pairs]


def _evaluate(
    zoo: Zoo,
    pair: Pair,
    text: str,
    tokenizer: BlobId,
    ids: list[int],
    window_tokens: int,
    loader: LinkLoader,
    progress: Progress,
) -> EquivalenceRecord:
    from blockzoo.evaluation.measure import measure, weight_distance

    start = pair.original.positions.first
    result = splice(pair.chain_a, pair.original.positions, pair.substitute.links)
    progress.start(f"evaluating {pair.substitute} for {pair.original}", len(ids))
    try:
        original, substituted = loader.load(pair.chain_a.links), loader.load(result.links)
        found = measure(loader, original, substituted, start, windows(ids, window_tokens), progress.advance)
        distance = weight_distance(zoo, loader, pair.original.links, pair.substitute.links)
    finally:
        progress.finish()
    encoded = text.encode()
    draft = EquivalenceRecord(
        original=pair.original,
        substitute=pair.substitute,
        result=chain_digest(result),
        mean_kl=found.mean_kl,
        worst_kl=found.worst_kl,
        top1_agreement=found.top1_agreement,
        weight_distance=distance,
        num_tokens=found.num_tokens,
        window_tokens=window_tokens,
        text_digest=digest_bytes(encoded),
        text_bytes=len(encoded),
        tokenizer=tokenizer,
        dtype=str(loader.dtype).removeprefix("torch."),
        created_at=timestamp(zoo.store),
        blockzoo_version=importlib.metadata.version("blockzoo"),
    )
    return Ledger(zoo.store).put(draft)


def _loader(zoo: Zoo, dtype: str, device: str) -> LinkLoader:
    if dtype not in DTYPES:
        raise InvalidInputError(
            f"{dtype!r} is not a supported compute type", hint=f"Use {', '.join(DTYPES)}."
        )
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(
            "an evaluation needs torch, which is not installed here",
            hint="Install blockzoo[worker,router] on this machine. Listing and approving records needs "
            "neither.",
        ) from error
    from blockkernels.backends import DeviceUnavailableError, check_device
    from blockzoo.evaluation.forward import LinkLoader

    try:
        check_device(device)
    except DeviceUnavailableError as error:
        raise InvalidInputError(str(error), hint="Use cpu, or cuda if the machine has a GPU.") from error
    return LinkLoader(zoo, getattr(torch, dtype), torch.device(device))
