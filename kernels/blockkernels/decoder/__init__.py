"""Decoder layers of a batch in one call."""

from blockkernels.decoder.kernel import DecoderLayer, DecoderLayers, LayerAdapters, LayerSizes, LayerWeights

__all__ = ["DecoderLayer", "DecoderLayers", "LayerAdapters", "LayerSizes", "LayerWeights"]
