"""The two ends of a chain: token ids to hidden states, and hidden states to logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from blockkernels.backends import Backend
from blockkernels.rms_norm import rms_norm
from blockkernels.soft_cap import soft_cap
from blockzoo.compute.context import BlockContext
from blockzoo.compute.parts import Norms, fused, optional
from blockzoo.manifest import JsonValue

HEAD_MODULE = "lm_head"


class EmbeddingBlock:
    """Token ids to hidden states."""

    def __init__(self, config: Mapping[str, JsonValue], tensors: Mapping[str, Tensor]) -> None:
        self._weight = tensors["weight"]
        self._scale = optional(config, "scale")
        if self._scale is not None and config.get("scale_type") == "rounded":
            self._scale = torch.tensor(self._scale).to(self._weight.dtype).item()
        self.num_bytes = self._weight.nbytes
        self.hidden_size = self._weight.shape[1]
        self.module_shapes: dict[str, tuple[int, int]] = {}

    def __call__(self, token_ids: Tensor, context: BlockContext) -> Tensor:
        """Shape: token_ids int64 [tokens], result [tokens, hidden]."""
        hidden = functional.embedding(token_ids, self._weight)
        context.adapt_embedding(token_ids, hidden)
        return hidden if self._scale is None else hidden.mul_(self._scale)


class HeadBlock:
    """Final norm and projection to the vocabulary."""

    def __init__(
        self,
        config: Mapping[str, JsonValue],
        tensors: Mapping[str, Tensor],
        backend: Backend,
        *,
        exact: bool = False,
    ) -> None:
        norms = Norms(config)
        self._eps = norms.eps
        self._norm = norms.weight(tensors["norm.weight"])
        self._divisor = optional(config, "logits_divisor")
        self._softcap = optional(config, "logits_softcap")
        self._lm_head = fused(tensors, (HEAD_MODULE,), backend, exact=exact)
        self.hidden_size = self._norm.shape[0]
        self.vocab_size = self._lm_head.out_features
        self.num_bytes = self._norm.nbytes + self._lm_head.num_bytes
        self.module_shapes = {HEAD_MODULE: (self.vocab_size, self.hidden_size)}

    def __call__(self, hidden: Tensor, context: BlockContext) -> Tensor:
        """Shape: hidden [rows, hidden_size], result logits [rows, vocab] in the block's dtype."""
        x = rms_norm(hidden, self._norm, self._eps)
        logits = self._lm_head(x)
        context.adapt(HEAD_MODULE, x, logits)
        if self._divisor is not None:
            logits = logits.div_(self._divisor)
        return logits if self._softcap is None else soft_cap(logits, self._softcap)
