"""Drawing tokens from logits: greedy, temperature, top-k, top-p, min-p, with noise that can be replayed."""

from blockkernels.sampling.kernel import TokenLogprobs, logprobs, nonfinite_rows, sample
from blockkernels.sampling.reference import SamplingBatch, sample_reference, uniform

__all__ = [
    "SamplingBatch",
    "TokenLogprobs",
    "logprobs",
    "nonfinite_rows",
    "sample",
    "sample_reference",
    "uniform",
]
