"""The port: everything of TensorRT's Python package that this backend uses, and nothing else.

The backend is typed by these protocols alone, so that mypy refuses what is not here; `tools/check_tensorrt_api.py` holds each
class, method, argument and value named here against TensorRT's own binary. Names and arguments are therefore TensorRT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = [
    "Builder",
    "BuilderFlag",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "ITimingCache",
    "OnnxParser",
    "ParserError",
    "Runtime",
    "TensorRt",
]


class ILogger(Protocol):
    """Base of a logger; its values are severities, worst first."""

    INTERNAL_ERROR: Any
    ERROR: Any

    def log(self, severity: Any, msg: str) -> None: ...


class IHostMemory(Protocol):
    """Bytes that TensorRT owns, by the buffer protocol."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class ITimingCache(Protocol):
    """What the builder measured of single layers."""

    def serialize(self) -> IHostMemory: ...


class IOptimizationProfile(Protocol):
    """Ranges of shapes that kernels are chosen for."""

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None: ...  # noqa: A002  TensorRT's


class BuilderFlag(Protocol):
    """Members of the enumeration."""

    TF32: Any


class IBuilderConfig(Protocol):
    """How an engine is built."""

    def clear_flag(self, flag: Any) -> None: ...
    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: bytes | memoryview) -> ITimingCache: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> ITimingCache | None: ...


class INetworkDefinition(Protocol):
    """A network, strongly typed since TensorRT 11."""


class Builder(Protocol):
    """Makes engines of networks."""

    def __init__(self, logger: ILogger) -> None: ...
    def create_network(self, flags: int = 0) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...
    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None: ...


class ParserError(Protocol):
    """What the parser could not read."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """Reads an ONNX graph into a network."""

    num_errors: int

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None: ...
    def load_model_proto(self, model: bytes | memoryview) -> bool: ...
    def load_initializer(self, name: str, data: int, size: int) -> bool: ...
    def parse_model_proto(self) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class ExecutionContextAllocationStrategy(Protocol):
    """Members of the enumeration."""

    USER_MANAGED: Any


class IExecutionContext(Protocol):
    """An engine with bindings of its own."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class ICudaEngine(Protocol):
    """A plan that is on the device."""

    num_io_tensors: int
    num_optimization_profiles: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int: ...
    def create_execution_context(self, strategy: Any) -> IExecutionContext | None: ...


class Runtime(Protocol):
    """Reads plans."""

    def __init__(self, logger: ILogger) -> None: ...
    def deserialize_cuda_engine(self, serialized_engine: bytes | memoryview) -> ICudaEngine | None: ...


class TensorRt(Protocol):
    """The module ``tensorrt``."""

    __version__: str
    ILogger: type[ILogger]
    Builder: type[Builder]
    BuilderFlag: type[BuilderFlag]
    OnnxParser: type[OnnxParser]
    Runtime: type[Runtime]
    ExecutionContextAllocationStrategy: type[ExecutionContextAllocationStrategy]
