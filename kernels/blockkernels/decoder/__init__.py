"""Decoder layers of a batch in one call."""

from blockkernels.decoder.kernel import DecoderLayer, DecoderLayers, LayerAdapters, SlotPlan
from blockkernels.decoder.layer import LayerSizes, LayerSlot, LayerWeights
from blockkernels.decoder.reference import SlotAdapters, decoder_layers_reference

__all__ = [
    "DecoderLayer",
    "DecoderLayers",
    "LayerAdapters",
    "LayerSizes",
    "LayerSlot",
    "LayerWeights",
    "SlotAdapters",
    "SlotPlan",
    "decoder_layers_reference",
]
