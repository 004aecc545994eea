"""Checkpoints, adapters and the oracle's answers, made on first use and kept for a test session."""

from dataclasses import dataclass
from pathlib import Path

from support.adapters import ADAPTERS, AdapterSpec, make_adapter
from support.models import EVEN_SPECS, NUM_LAYERS, SPECS, make_checkpoint, top_quarter, tune_layers
from support.oracle import NUM_TOKENS, PROMPT_LENGTHS, Expected, Oracle, Propose


@dataclass(frozen=True)
class Variant:
    """A folder to register.

    Attributes:
        name: what to register it as.
        path: checkpoint or adapter folder.
        base: the variant an adapter goes on, or that a tuned checkpoint was made from.
        is_adapter: whether `path` holds an adapter.
    """

    name: str
    path: Path
    base: "Variant | None" = None
    is_adapter: bool = False


class VariantFactory:
    """Makes variants under one folder. Asking twice gives the same files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Variant] = {}
        self._oracles: dict[str, Oracle] = {}
        self._cases: dict[tuple[str, tuple[int, ...], int, int], list[Expected]] = {}

    def checkpoint(self, name: str) -> Variant:
        """One of `support.models.SPECS` or `EVEN_SPECS`."""
        if name not in self._made:
            self._made[name] = Variant(name, make_checkpoint((SPECS | EVEN_SPECS)[name], self._root / name))
        return self._made[name]

    def existing(self, name: str, path: Path) -> Variant:
        """A checkpoint that is there already."""
        return self._made.setdefault(name, Variant(name, path))

    def adapter(self, base: Variant, name: str, *, spec: AdapterSpec | None = None, seed: int = 1) -> Variant:
        """One of `support.adapters.ADAPTERS` (or ``spec``) made for ``base``."""
        full = f"{base.name}.{name}.{seed}"
        if full not in self._made:
            path = make_adapter(spec or ADAPTERS[name], base.path, self._root / full, seed=seed)
            self._made[full] = Variant(full, path, base, is_adapter=True)
        return self._made[full]

    def top_quarter(self, base: Variant, *, num_layers: int = NUM_LAYERS, seed: int = 1) -> Variant:
        """A copy of a checkpoint with its top quarter of layers moved."""
        full = f"{base.name}.top.{seed}"
        if full not in self._made:
            path = tune_layers(base.path, self._root / full, top_quarter(num_layers), seed=seed)
            self._made[full] = Variant(full, path, base)
        return self._made[full]

    def oracle(self, variant: Variant) -> Oracle:
        """The variant in transformers and PEFT."""
        if variant.name not in self._oracles:
            if variant.is_adapter:
                assert variant.base is not None
                self._oracles[variant.name] = Oracle(variant.base.path, variant.path)
            else:
                self._oracles[variant.name] = Oracle(variant.path)
        return self._oracles[variant.name]

    def cases(
        self,
        variant: Variant,
        count: int = 20,
        *,
        lengths: tuple[int, ...] = PROMPT_LENGTHS,
        num_tokens: int = NUM_TOKENS,
        seed: int = 0,
        propose: Propose | None = None,
    ) -> list[Expected]:
        """The oracle's answers to random prompts; see `support.oracle.Oracle.cases`."""
        key = (variant.name, lengths, num_tokens, seed)
        if len(self._cases.get(key, ())) < count:
            self._cases[key] = self.oracle(variant).cases(
                count, lengths=lengths, num_tokens=num_tokens, seed=seed, propose=propose
            )
        return self._cases[key][:count]

    def forget(self, variant: Variant) -> None:
        """Let go of a large model in the oracle; its answers stay."""
        self._oracles.pop(variant.name, None)
