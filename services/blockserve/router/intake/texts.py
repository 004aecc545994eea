"""How much text is tokenised: a length that no prompt needs is refused, and long texts take turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from blockserve.common.errors import PromptTooLongError

T = TypeVar("T")

NORMALISED = 4
"""UTF-8 bytes that a normaliser may make one byte of: mathematical letters become plain ones."""
BEGINNING = 16
"""UTF-8 bytes for each token of context that `check_beginning` looks at. Text has two to five in a token."""
CERTAINLY = 2
"""Times the context that the beginning of a text must have to be refused without the rest."""
REFUSED_BYTES_PER_SECOND = 32 << 20
"""What all callers together can have read and refused. Receiving, parsing and decoding a megabyte takes some
milliseconds in which nothing else of the server goes on."""
MAX_PAUSE_SECONDS = 4.0


def size_of(value: object) -> int:
    """UTF-8 bytes of a text, or of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    if isinstance(value, Mapping):
        return sum(size_of(key) + size_of(item) for key, item in value.items())
    if isinstance(value, Sequence):
        return sum(map(size_of, value))
    return 0


def check_text(size: int, ref: str, context: int, longest_token: int) -> None:
    """Refuse a text that has more tokens than the context, however it is divided into them.

    Args:
        size: UTF-8 bytes of it.
        ref: the variant.
        context: tokens that prompt and answer can have together.
        longest_token: UTF-8 bytes of the tokenizer's longest token.

    Raises:
        PromptTooLongError: naming the size and the most that may be sent.
    """
    most = context * longest_token * NORMALISED
    if size > most:
        raise PromptTooLongError(
            f"the text has {size} bytes; the {context} tokens of context that {ref} has for prompt and "
            f"answer together hold at most {most}",
            hint="Shorten the text; most texts have three to four bytes in a token.",
            text_bytes=size,
            max_text_bytes=most,
            context_length=context,
        )


def check_beginning(text: str, size: int, ref: str, context: int, count: Callable[[str], int]) -> None:
    """Refuse a text whose beginning alone has several times the tokens of the context.

    Where a text is cut, only the tokens around the cut are others than in the whole text, so that its
    beginning has nearly as many tokens as it has there. Texts that are not much longer than the beginning
    are passed, to be tokenised whole.

    Args:
        text: the text.
        size: UTF-8 bytes of it.
        ref: the variant.
        context: tokens that prompt and answer can have together.
        count: tells how many tokens a text has.

    Raises:
        PromptTooLongError: naming the size and the tokens that were counted.
    """
    looked_at = context * BEGINNING
    if size < 2 * looked_at:
        return
    tokens = count(text[: len(text) * looked_at // size])
    if tokens > context * CERTAINLY:
        raise PromptTooLongError(
            f"the first {looked_at} of the text's {size} bytes have {tokens} tokens already; {ref} has "
            f"{context} tokens of context for prompt and answer together",
            hint="Shorten the text.",
            text_bytes=size,
            context_length=context,
        )


class TextThreads:
    """Runs what takes as long as a text is long: short ones side by side, one long one at a time.

    So what is tokenised at once is bounded in bytes, and short texts never wait for long ones.
    """

    def __init__(self, long_bytes: int) -> None:
        """Keep the bound.

        Args:
            long_bytes: texts of more bytes take turns.
        """
        self._long_bytes = long_bytes
        self._refused_until = 0.0
        self._turns = ThreadPoolExecutor(1, "long-text")

    async def run(self, size: int, work: Callable[..., T], *arguments: Any) -> T:
        """Return what `work` makes of a text of that many bytes; a caller that leaves gives up its turn."""
        pool = self._turns if size > self._long_bytes else None
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)

    async def pause(self, size: int) -> None:
        """Let the caller of a long text that is refused wait for its turn, so that they come one by one."""
        if size <= self._long_bytes:
            return
        now = time.monotonic()
        turn = max(now, self._refused_until) + size / REFUSED_BYTES_PER_SECOND
        self._refused_until = min(turn, now + MAX_PAUSE_SECONDS)
        await asyncio.sleep(self._refused_until - now)

    def close(self) -> None:
        """Drop what waits."""
        self._turns.shutdown(wait=False, cancel_futures=True)
