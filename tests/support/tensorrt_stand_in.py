"""Stands in for TensorRT where there is none: engines run in ONNX Runtime, on tensors in main memory, reached by their addresses.

It is the surface of `penstock.backends.tensorrt.api`, as strict as TensorRT where that is known: shapes outside of a profile are
refused, weights must have been given and be as large as declared, memory must be large enough, a plan of another version is not read,
types must agree. What it can not stand in for is TensorRT's own parsing of operators, its kernels and a GPU's concurrency.
"""

import ctypes
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, numpy_helper

__version__ = "11.4.0.106"

ACTIVATION_BYTES = 4096
FLOAT, BF16 = TensorProto.FLOAT, TensorProto.BFLOAT16
NUMPY = {FLOAT: np.float32, BF16: ml_dtypes.bfloat16, TensorProto.INT32: np.int32}

# Operators of ONNX that TensorRT's parser reads in the types that the graph has them in, by the table in its documentation.
READ = {"Add", "And", "Cast", "Concat", "Cos", "Div", "Gather", "Gemm", "Greater", "Identity", "LessOrEqual", "MatMul", "Mul"}
READ |= {"ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin", "Softmax", "Split", "Sqrt", "Sub", "Transpose", "Unsqueeze", "Where"}


class HostDevice:
    """Main memory instead of a GPU's."""

    torch = torch.device("cpu")
    STREAM = 7

    def __init__(self, identity="Stand-in 9.0", free=1 << 30):
        self.identity, self._free, self.released = identity, free, 0

    @contextmanager
    def stream(self):
        yield self.STREAM

    def free_memory(self):
        return self._free

    def release(self):
        self.released += 1


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = "internal error", "error", "warning"

    def log(self, severity, msg):
        raise NotImplementedError


class BuilderFlag:
    TF32 = "tf32"


class ExecutionContextAllocationStrategy:
    USER_MANAGED = "user managed"


@dataclass
class TimingCache:
    content: bytes

    def serialize(self):
        return self.content


class Config:
    def __init__(self):
        self.flags, self.profiles, self.timings = {BuilderFlag.TF32}, [], None

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        return TimingCache(bytes(serialized_timing_cache) or b"timings of")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if not cache.content.startswith(b"timings of"):
            return False
        self.timings = cache
        return True

    def get_timing_cache(self):
        return self.timings


@dataclass
class Profile:
    shapes: dict = field(default_factory=dict)

    def set_shape(self, input, min, opt, max):  # noqa: A002
        assert len(min) == len(opt) == len(max)
        assert all(0 < a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        assert math.prod(max) < 1 << 31
        self.shapes[input] = [list(min), list(opt), list(max)]


class Network:
    model = None
    weights = None


class Builder:
    builds = 0
    """How many engines were built, over all builders."""
    flags = None
    """Those of the last build."""
    fail = None
    """What a build is to fail with."""

    def __init__(self, logger):
        assert isinstance(logger, ILogger)
        self.logger = logger

    def create_network(self, flags=0):
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        if Builder.fail is not None:
            self.logger.log(ILogger.ERROR, Builder.fail)
            return None
        inputs = {value.name for value in network.model.graph.input}
        assert config.profiles
        assert all(set(profile) == inputs for profile in config.profiles)
        Builder.builds += 1
        Builder.flags = set(config.flags)
        config.timings.content += f" build {Builder.builds}".encode()
        model = filled(network.model, network.weights)
        onnx.checker.check_model(model, full_check=True)  # types agree: TensorRT's networks are strongly typed
        header = json.dumps({"version": __version__, "profiles": config.profiles}).encode()
        return header + b"\n" + model.SerializeToString()


@dataclass
class ParserError:
    operator: str
    name: str
    what: str

    def desc(self):
        return self.what

    def node_name(self):
        return self.name

    def node_operator(self):
        return self.operator


class OnnxParser:
    def __init__(self, network, logger):
        self.network, self.model, self.given, self.errors = network, None, {}, []

    @property
    def num_errors(self):
        return len(self.errors)

    def get_error(self, index):
        return self.errors[index]

    def load_model_proto(self, model):
        self.model = onnx.ModelProto.FromString(bytes(model))
        return True

    def load_initializer(self, name, data, size):
        declared = next((t for t in self.model.graph.initializer if t.name == name), None)
        if declared is None or math.prod(declared.dims) * np.dtype(NUMPY[declared.data_type]).itemsize != size:
            return False
        self.given[name] = (data, size)
        return True

    def parse_model_proto(self):
        graph = self.model.graph
        self.errors += [ParserError(n.op_type, n.name, "not supported") for n in graph.node if n.op_type not in READ]
        outside = [t.name for t in graph.initializer if t.data_location == TensorProto.EXTERNAL and t.name not in self.given]
        self.errors += [ParserError("Constant", name, "its weights are not there") for name in outside]
        self.network.model, self.network.weights = self.model, self.given
        return not self.errors


class Runtime:
    def __init__(self, logger):
        assert isinstance(logger, ILogger)

    def deserialize_cuda_engine(self, serialized_engine):
        header, _, model = bytes(serialized_engine).partition(b"\n")
        try:
            told = json.loads(header)
        except ValueError:
            return None
        return Engine(told["profiles"], onnx.ModelProto.FromString(model)) if told["version"] == __version__ else None


class Engine:
    def __init__(self, profiles, model):
        values = [*model.graph.input, *model.graph.output]
        self.profiles, self.types = profiles, {v.name: v.type.tensor_type.elem_type for v in values}
        self.inputs, self.outputs = ([v.name for v in values] for values in (model.graph.input, model.graph.output))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            in_float32(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    num_io_tensors = property(lambda self: len(self.types))
    num_optimization_profiles = property(lambda self: len(self.profiles))

    def get_tensor_name(self, index):
        return list(self.types)[index]

    def get_device_memory_size_for_profile_v2(self, profile_index):
        return ACTIVATION_BYTES * (profile_index + 1)

    def create_execution_context(self, strategy):
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class Context:
    runs = 0
    """How many runs there were, over all contexts."""

    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses, self.memory = engine, None, {}, {}, 0

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self.profile, self.shapes = profile_index, {}
        return 0 <= profile_index < len(self.engine.profiles) and stream_handle == HostDevice.STREAM

    def set_device_memory(self, memory, size):
        assert memory
        self.memory = size

    def set_input_shape(self, name, shape):
        if name not in self.engine.inputs:
            return False
        least, _, most = self.engine.profiles[self.profile][name]
        self.shapes[name] = shape
        return len(shape) == len(least) and all(a <= d <= b for a, d, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return name in self.engine.types and memory != 0

    def execute_async_v3(self, stream_handle):
        enough = self.memory >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        bound = set(self.shapes) == set(self.engine.inputs) and set(self.addresses) == set(self.engine.types)
        if not (enough and bound and stream_handle == HostDevice.STREAM):
            return False
        Context.runs += 1
        feeds = {name: self.view(name, self.shapes[name]) for name in self.engine.inputs}
        wide = {name: array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array for name, array in feeds.items()}
        for name, found in zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, wide), strict=True):
            self.view(name, found.shape)[...] = found
        return True

    def view(self, name, shape):
        """What lies at a tensor's address."""
        dtype = np.dtype(NUMPY[self.engine.types[name]])
        return np.frombuffer(memory_at(self.addresses[name], math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def memory_at(address, size):
    return (ctypes.c_char * size).from_address(address)


def filled(model, weights):
    """The model with its weights, read from where the parser was told that they are."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.raw_data = bytes(memory_at(*weights[tensor.name]))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return whole


def in_float32(model):
    """The model with every bfloat16 widened: ONNX Runtime's CPU has few products in it."""
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == BF16:
            value.type.tensor_type.elem_type = FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == BF16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == BF16:
                attribute.i = FLOAT
    return model
