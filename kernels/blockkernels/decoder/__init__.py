"""A whole decoder layer of a batch in one call."""

from blockkernels.decoder.kernel import DecoderLayer, LayerAdapters, LayerSizes, LayerWeights

__all__ = ["DecoderLayer", "LayerAdapters", "LayerSizes", "LayerWeights"]
