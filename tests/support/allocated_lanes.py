"""The CPU as if it were one of ONNX Runtime's accelerators: a cache in memory that the runtime allocates, and short types."""

from dataclasses import replace

from penstock.backends.contract import Registration
from penstock.backends.onnxruntime import REGISTRATION
from penstock.backends.onnxruntime.model import OnnxRuntimeModel
from penstock.backends.onnxruntime.providers import PROVIDERS, Target
from penstock.backends.onnxruntime.registration import DTYPES, decide

DEVICE = Target("cpu", PROVIDERS["cpu"], "cpu")


def create(spec, config):
    return OnnxRuntimeModel(spec, config, decide(config, {"cpu": DTYPES})[1], DEVICE)


def capabilities(spec):
    return replace(REGISTRATION.capabilities(spec), prefix_cache=False)


ON_DEVICE = Registration("onnxruntime", REGISTRATION.probe, capabilities, create)
