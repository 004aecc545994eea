"""Settings of the zoo's network front."""

from __future__ import annotations

from typing import Self

from blockserve.common.settings import Section, setting


class ControllerConfig(Section):
    """Limits on pushes and exports, and who is believed."""

    prove_possession: bool = setting(
        True,
        "Require proof that a pusher has the bytes of blobs that the zoo has already.",
        reason="Knowing a digest must not grant access. Turn it off if every caller is an administrator.",
    )
    max_pushes: int = setting(
        16,
        "Maximum number of open pushes; further ones are refused with a delay.",
        reason="Each holds a lease and may hold half-sent bytes.",
        ge=1,
    )
    push_idle_seconds: float = setting(
        600.0,
        "How long a push may be idle before the server ends it. An export whose caller reads nothing for so "
        "long no longer counts.",
        unit="seconds",
        reason="Longer than any reconnection; stored data stays until the next gc.",
        gt=0,
    )
    max_exports: int = setting(
        4,
        "Maximum number of exports at once; further ones are refused with a delay. 0 refuses all, so that "
        "this server hands out no weights.",
        reason="Each reads the zoo as fast as its caller can write, and holds one tensor in memory.",
        ge=0,
    )
    max_piece_bytes: int = setting(
        1 << 20,
        "Maximum tensor bytes of one message of a push or an export.",
        unit="bytes",
        reason="Large enough for full speed, small enough that a broken connection costs little.",
        ge=1,
        le=8 << 20,
    )
    max_unstored_bytes: int = setting(
        2 << 30,
        "Maximum bytes of incomplete or unstored tensors in memory, for all pushes together.",
        unit="bytes",
        reason="Bounds memory, and with it the largest tensor; a layer's largest matrix has under 2 GB.",
        ge=1,
    )
    store_every_bytes: int = setting(
        64 << 20,
        "Complete tensors are written to storage once they add up to this size.",
        unit="bytes",
        reason="Making many tensors durable at once costs as much as one.",
        ge=1,
    )
    max_digests: int = setting(
        4096,
        "Maximum number of digests of one call.",
        reason="A quarter of a megabyte; each costs one lookup in the storage.",
        ge=1,
        le=65536,
    )
    max_push_blobs: int = setting(
        1 << 20,
        "Maximum number of blobs of one push.",
        reason="Each is leased, and gc reads leases; the largest models have some thousands.",
        ge=1,
    )
    zoo_threads: int = setting(
        4,
        "Number of threads that work on the zoo for network callers.",
        reason="A few keep a disk busy, and computing answers needs the cores too.",
        ge=1,
    )

    def within_messages(self, max_message_bytes: int) -> Self:
        """The same with calls that fit messages of this size."""
        return self.model_copy(
            update={
                "max_piece_bytes": min(self.max_piece_bytes, max_message_bytes // 2),
                "max_digests": min(self.max_digests, max_message_bytes // 256),
            }
        )
