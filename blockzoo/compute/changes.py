"""Adapter blocks in memory: what an adapter changes of the results of its base block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from blockkernels.backends import Backend
from blockkernels.linear import Linear
from blockkernels.lora import OutputShape, dora_column_gain, dora_gain
from blockzoo.compute.stored import read_weight
from blockzoo.errors import InvalidConfigError
from blockzoo.manifest import BlockKind, BlockManifest, JsonValue, TensorRef

EMBEDDING_NAME, HEAD_NAME = "embed_tokens", "lm_head"
"""Names of the vocabulary matrices in adapter blocks."""

_KNOWN = {"rank", "scale", "bias", "magnitude", "tokens"}

ReadTensor = Callable[[TensorRef, torch.dtype], Tensor]
"""Reads a tensor in a type."""


@dataclass(frozen=True, slots=True)
class LinearChange:
    """LoRA on one linear module.

    Attributes:
        down: A [rank, in].
        up: B [out, rank].
        scale: factor of their product.
        shape: what else happens to the outputs; None for plain LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float
    shape: OutputShape | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingLora:
    """LoRA on the embedding.

    Attributes:
        table: transposed A [vocabulary, rank].
        up: rank -> hidden.
        scale: factor of their product.
        gain: float32 [hidden], of table and product together (DoRA); None for 1.
    """

    table: Tensor
    up: Linear
    scale: float
    gain: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self.table.nbytes + self.up.num_bytes + (0 if self.gain is None else self.gain.nbytes)

    def merged(self, table: Tensor) -> Tensor:
        """The whole table [vocabulary, hidden] with the adapter."""
        table = table.clone()
        self(torch.arange(len(table), device=table.device), table)
        return table

    def __call__(self, token_ids: Tensor, hidden: Tensor) -> None:
        """Shape: token_ids int64 [tokens], hidden [tokens, hidden], changed in place."""
        added = self.up(self.table[token_ids]).float() * self.scale
        wide = hidden.float()
        hidden.copy_(wide + added if self.gain is None else self.gain * wide + self.gain * added)


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """New rows of the embedding.

    Attributes:
        tokens: which, int64 [tokens], ascending.
        rows: [tokens, hidden].
    """

    tokens: Tensor
    rows: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self.tokens.nbytes + self.rows.nbytes

    def merged(self, table: Tensor) -> Tensor:
        """The whole table [vocabulary, hidden] with the new rows."""
        return table.index_copy(0, self.tokens, self.rows.to(table.dtype))

    def __call__(self, token_ids: Tensor, hidden: Tensor) -> None:
        """Shape: token_ids int64 [tokens], hidden [tokens, hidden], changed in place."""
        place = torch.searchsorted(self.tokens, token_ids).clamp_(max=len(self.tokens) - 1)
        is_new = (self.tokens[place] == token_ids).unsqueeze(1)
        hidden.copy_(torch.where(is_new, self.rows[place], hidden))


@dataclass(frozen=True, slots=True)
class HeadRows:
    """New rows of the head.

    Attributes:
        tokens: which, int64 [tokens].
        linear: hidden -> their logits.
        dtype: of both.
    """

    tokens: Tensor
    linear: Linear
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self.tokens.nbytes + self.linear.num_bytes

    def merged(self, weight: Tensor) -> Tensor:
        """The whole matrix [vocabulary, hidden] with the new rows."""
        unit = torch.eye(self.linear.in_features, dtype=self.dtype, device=weight.device)
        return weight.index_copy(0, self.tokens, self.linear(unit).T.to(weight.dtype))

    def __call__(self, x: Tensor, logits: Tensor) -> None:
        """Shape: x [rows, hidden], logits [rows, vocabulary], changed in place."""
        logits[:, self.tokens] = self.linear(x)


@dataclass(frozen=True, slots=True)
class AdapterChanges:
    """What an adapter changes at one link of a chain.

    Attributes:
        linears: by module of the base block.
        embedding: on the embedding; gets token ids and rows of the table.
        head: on the head, before LoRA is added there; gets its input and logits.
    """

    linears: Mapping[str, LinearChange] = field(default_factory=dict)
    embedding: EmbeddingLora | EmbeddingRows | None = None
    head: HeadRows | None = None

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the base block with what the adapter does to it, float32 as `tensor`.

        Biases that the base does not have are left out.
        """
        if name == "weight":
            return tensor if self.embedding is None else self.embedding.merged(tensor)
        module, _, part = name.rpartition(".")
        change = self.linears.get(module)
        if part == "weight" and module == HEAD_NAME and self.head is not None:
            tensor = self.head.merged(tensor)
        if change is None or part not in ("weight", "bias"):
            return tensor
        gain = None if change.shape is None else change.shape.gain
        if part == "bias":
            shift = None if change.shape is None else change.shape.shift
            return tensor if shift is None or gain is not None else tensor + shift
        tensor = tensor + change.scale * (change.up.float() @ change.down.float())
        return tensor if gain is None else gain.unsqueeze(1) * tensor

    def without_matrices(self) -> AdapterChanges:
        """The same with empty matrices for linear modules, for whoever keeps these elsewhere."""
        linears = {
            module: replace(change, down=change.down[:0].clone(), up=change.up[:0].clone())
            for module, change in self.linears.items()
        }
        return replace(self, linears=linears)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, without the matrices of linear modules."""
        shapes = [change.shape for change in self.linears.values()]
        parts = (self.embedding, self.head, *shapes)
        return sum(part.num_bytes for part in parts if part is not None)


class AdapterReader:
    """Makes adapter blocks ready to compute.

    Args:
        read: reads a tensor.
        dtype: of hidden states.
        backend: will compute.
        exact: see `blockzoo.compute.build.build_block`.
    """

    def __init__(
        self, read: ReadTensor, dtype: torch.dtype, backend: Backend, *, exact: bool = False
    ) -> None:
        self._read = read
        self._dtype = dtype
        self._backend = backend
        self._exact = exact

    def changes(self, block: BlockManifest, base: BlockManifest) -> AdapterChanges:
        """Read an adapter block that is applied on a base block.

        Raises:
            InvalidConfigError: this version does not know everything that the block does.
            CorruptBlobError, BlobNotFoundError: the zoo is damaged.
        """
        linears: dict[str, LinearChange] = {}
        embedding: EmbeddingLora | EmbeddingRows | None = None
        head = None
        for module, change in _changes_of(block).items():
            if "tokens" in change:
                tokens, rows = self._rows(block, module, change)
                if module == EMBEDDING_NAME:
                    embedding = EmbeddingRows(tokens, rows)
                elif module == HEAD_NAME:
                    head = HeadRows(tokens, self._backend.linear(rows, None, exact=self._exact), self._dtype)
                else:
                    raise _unknown(block, f"new rows of {module[:80]!r}")
            if "scale" not in change:
                continue
            if module == EMBEDDING_NAME:
                embedding = self._embedding_lora(block, base, change)
            else:
                linears[module] = self._linear(block, base, module, change)
        return AdapterChanges(linears, embedding, head)

    def _linear(
        self, block: BlockManifest, base: BlockManifest, module: str, change: Mapping[str, JsonValue]
    ) -> LinearChange:
        names = f"{module}.lora_A", f"{module}.lora_B"
        down, up = (self._read(block.tensors[name], self._dtype) for name in names)
        scale = _scale(module, change)
        gain = shift = None
        if change.get("bias"):
            shift = scale * self._wide(block.tensors[f"{module}.lora_bias"])
        if change.get("magnitude"):
            gain = dora_gain(
                read_weight(base, module, self._dtype, self._read),
                self._wide(block.tensors[names[0]]),
                self._wide(block.tensors[names[1]]),
                scale,
                self._wide(block.tensors[f"{module}.magnitude"]),
            )
            if f"{module}.bias" in base.tensors:  # the gain leaves it out
                shift = (1 - gain) * self._read(base.tensors[f"{module}.bias"], self._dtype).float()
        shape = None if gain is None and shift is None else OutputShape(gain, shift)
        return LinearChange(down, up, scale, shape)

    def _embedding_lora(
        self, block: BlockManifest, base: BlockManifest, change: Mapping[str, JsonValue]
    ) -> EmbeddingLora:
        names = f"{EMBEDDING_NAME}.lora_A", f"{EMBEDDING_NAME}.lora_B"
        down, up = (self._read(block.tensors[name], self._dtype) for name in names)
        scale = _scale(EMBEDDING_NAME, change)
        gain = None
        if change.get("magnitude"):
            gain = dora_column_gain(
                self._read(base.tensors["weight"], self._dtype),
                self._wide(block.tensors[names[0]]),
                self._wide(block.tensors[names[1]]),
                scale,
                self._wide(block.tensors[f"{EMBEDDING_NAME}.magnitude"]),
            )
        table = down.T.clone(memory_format=torch.contiguous_format)
        return EmbeddingLora(table, self._backend.linear(up, None, exact=self._exact), scale, gain)

    def _rows(
        self, block: BlockManifest, module: str, change: Mapping[str, JsonValue]
    ) -> tuple[Tensor, Tensor]:
        """Tokens in ascending order, and their rows."""
        tokens = torch.tensor(change["tokens"], dtype=torch.int64)
        rows = self._read(block.tensors[f"{module}.rows"], self._dtype)
        tokens, order = (part.to(rows.device) for part in tokens.sort())
        return tokens, rows[order]

    def _wide(self, ref: TensorRef) -> Tensor:
        return self._read(ref, torch.float32)


def _changes_of(block: BlockManifest) -> Mapping[str, Mapping[str, JsonValue]]:
    """What the config says of each module.

    Modules that have LoRA and nothing else stand under "modules", as they did before there was anything else.
    """
    plain, changes = block.config.get("modules"), block.config.get("changes")
    if block.kind != BlockKind.ADAPTER or not isinstance(plain or changes, dict):
        raise _unknown(block, f"block of kind {block.kind!r}")
    found: dict[str, Mapping[str, JsonValue]] = {}
    assert isinstance(plain or changes, dict)
    for key, known in (("modules", {"rank", "scale"}), ("changes", _KNOWN)):
        modules = block.config.get(key)
        for module, change in modules.items() if isinstance(modules, dict) else ():
            if not isinstance(change, dict):
                raise InvalidConfigError(f"adapter settings of {module} are {change!r}", module=module)
            if unknown := change.keys() - known:
                raise _unknown(block, f"{min(unknown)[:80]!r} of {module[:80]}")
            found[module] = change
    return found


def _unknown(block: BlockManifest, what: str) -> InvalidConfigError:
    return InvalidConfigError(
        f"{what} cannot be applied on a base block by this version",
        hint="Upgrade blockzoo on this machine.",
        kind=block.kind,
    )


def _scale(module: str, change: Mapping[str, JsonValue]) -> float:
    try:
        return float(str(change["scale"]))
    except ValueError as error:
        raise InvalidConfigError(f"adapter settings of {module} are {change!r}", module=module) from error
