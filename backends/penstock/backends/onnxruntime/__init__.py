"""ONNX Runtime: the decoder as a graph of its contributed operators, over a cache of lanes that this backend owns."""

from penstock.backends.onnxruntime.registration import REGISTRATION

__all__ = ["REGISTRATION"]
