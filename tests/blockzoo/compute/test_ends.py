"""Embedding and head against the modules of transformers, bit for bit in bfloat16."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

from blockkernels.backends import CpuBackend
from blockzoo.compute.ends import EmbeddingBlock, HeadBlock

HIDDEN, VOCAB = 48, 90
SCALE = HIDDEN**0.5
"""6.9282: in bfloat16 it is 6.9375."""


class NoAdapters:
    def adapt(self, *_: object) -> None:
        pass

    adapt_embedding = adapt


def weight(rows: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_a_rounded_scale_is_that_of_a_scaled_embedding() -> None:
    ids = torch.arange(VOCAB)
    theirs = Gemma2TextScaledWordEmbedding(VOCAB, HIDDEN, 0, embed_scale=SCALE).bfloat16()
    theirs.weight.data = weight()
    want = theirs(ids).detach()
    rounded = EmbeddingBlock({"scale": repr(SCALE), "scale_type": "rounded"}, {"weight": weight()})
    assert torch.equal(rounded(ids, NoAdapters()), want)
    plain = EmbeddingBlock({"scale": repr(SCALE)}, {"weight": weight()})
    assert torch.equal(plain(ids, NoAdapters()), weight() * SCALE)
    assert not torch.equal(plain(ids, NoAdapters()), want)
    assert torch.equal(EmbeddingBlock({}, {"weight": weight()})(ids, NoAdapters()), weight())


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({}, lambda logits: logits),
        ({"logits_divisor": "3.0"}, lambda logits: logits / 3.0),
        ({"logits_softcap": "5.0"}, lambda logits: torch.tanh(logits / 5.0) * 5.0),
    ],
    ids=["plain", "divided", "capped"],
)
def test_logits_are_divided_and_capped(details, expected) -> None:
    tensors = {"norm.weight": torch.ones(HIDDEN).bfloat16(), "lm_head.weight": weight()}
    hidden = weight(12)
    plain = HeadBlock({"norm_eps": "1e-6"}, tensors, CpuBackend())(hidden, NoAdapters())
    config = {"norm": {"eps": "1e-6", "kind": "rounded"}, **details}
    got = HeadBlock(config, tensors, CpuBackend())(hidden, NoAdapters())
    torch.testing.assert_close(got, expected(plain), rtol=2**-7 if "logits_softcap" in details else 0, atol=0)
