"""From a checkpoint to an engine: graph, parser, profiles, builder; or straight from the plan that an earlier start left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import DType, ModelSpec
from penstock.backends.safetensors import Weights
from penstock.backends.tensorrt.api import Builder, IBuilderConfig, ICudaEngine, ILogger, OnnxParser, TensorRt
from penstock.backends.tensorrt.graph import DecoderGraph, build_graph
from penstock.backends.tensorrt.plans import PlanCache
from penstock.backends.tensorrt.profiles import Profile, shapes
from penstock.common.service import StartError

__all__ = ["EngineBuilder"]

_NUMPY_TYPES: Mapping[DType, np.dtype[Any]] = {DType.F32: np.dtype(np.float32), DType.BF16: np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, slots=True)
class EngineBuilder:
    """Makes the engine of a model on a GPU.

    Attributes:
        gpu: name and compute capability.
    """

    trt: TensorRt
    spec: ModelSpec
    dtype: DType
    gpu: str
    profiles: Sequence[Profile]
    plans: PlanCache

    def engine(self) -> ICudaEngine:
        """The engine, from its plan where there is one that fits; else it is built, and the plan kept.

        Raises:
            CheckpointError: the weights can not be read; also where a plan holds them, since what is gone is not to be served.
            StartError: TensorRT can not build it, and what it said.
        """
        errors: list[str] = []
        logger = _logger(self.trt, errors)
        runtime = self.trt.Runtime(logger)
        graph = build_graph(self.spec.decoder, self.dtype)
        plan_of = self._built_for(graph)
        with Weights(self.spec) as weights:
            with self.plans.load("plan", plan_of) as plan:
                engine = None if plan is None else runtime.deserialize_cuda_engine(plan)
            if engine is not None:
                return engine
            errors.clear()
            built = self._build(graph, weights, logger, errors)
        self.plans.store("plan", plan_of, built)
        engine = runtime.deserialize_cuda_engine(built)
        if engine is None:
            raise StartError(f"TensorRT does not read the plan that it built of {self.spec.name}: {_last(errors)}")
        return engine

    def _built_for(self, graph: DecoderGraph) -> Mapping[str, str]:
        return {
            "model": self.spec.fingerprint,
            "graph": _digest(graph),
            "dtype": self.dtype.value,
            "profiles": json.dumps([asdict(profile) for profile in self.profiles]),
            **self._machine(),
        }

    def _machine(self) -> Mapping[str, str]:
        return {"tensorrt": self.trt.__version__, "gpu": self.gpu}

    def _build(self, graph: DecoderGraph, weights: Mapping[str, NDArray[Any]], logger: ILogger, errors: list[str]) -> memoryview:
        builder = self.trt.Builder(logger)
        network = builder.create_network(0)
        config = builder.create_builder_config()
        if self.dtype == DType.F32:
            config.clear_flag(self.trt.BuilderFlag.TF32)  # which keeps 10 bits of a product's operands: not what f32 promises
        for profile in self.profiles:
            self._add(profile, builder, config)
        with self._timings(config):
            parser = self.trt.OnnxParser(network, logger)
            held = self._parse(graph, parser, weights)
            plan = builder.build_serialized_network(network, config)
            # Until here the network points into the parser, and the parser to the arrays.
            del parser
            held.clear()
        if plan is None:
            raise StartError(f"TensorRT can not build {self.spec.name} in {self.dtype}: {_last(errors)}")
        return memoryview(plan)

    def _add(self, profile: Profile, builder: Builder, config: IBuilderConfig) -> None:
        ranges = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes(self.spec.decoder, profile).items():
            ranges.set_shape(name, least, usual, most)
        if config.add_optimization_profile(ranges) < 0:
            raise StartError(f"TensorRT refuses the shapes {profile}; lower max_batch_size, max_batch_tokens or max_context")

    def _parse(self, graph: DecoderGraph, parser: OnnxParser, weights: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Read the graph into the parser's network, and its weights: views of the checkpoint's files where the type is the same."""
        held: list[NDArray[Any]] = []
        read = parser.load_model_proto(graph.model.SerializeToString())
        for name in graph.weights:
            array = np.ascontiguousarray(weights[name].astype(_NUMPY_TYPES[self.dtype], copy=False))
            held.append(array)
            read = read and parser.load_initializer(name, array.ctypes.data, array.nbytes)
        if not (read and parser.parse_model_proto()):
            found = [parser.get_error(i) for i in range(parser.num_errors)]
            errors = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in found)
            raise StartError(f"TensorRT's parser does not read the graph of {self.spec.name}: {errors or 'it does not say why'}")
        return held

    @contextmanager
    def _timings(self, config: IBuilderConfig) -> Iterator[None]:
        """What earlier builds on this GPU measured of kernels, and what this one adds."""
        machine = self._machine()
        with self.plans.load("timings", machine) as stored:
            cache = config.create_timing_cache(b"" if stored is None else bytes(stored))
        if not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        yield
        measured = config.get_timing_cache()
        if measured is not None:
            self.plans.store("timings", machine, memoryview(measured.serialize()))


def _digest(graph: DecoderGraph) -> str:
    return hashlib.blake2b(graph.model.SerializeToString(deterministic=True), digest_size=16).hexdigest()


def _logger(trt: TensorRt, errors: list[str]) -> ILogger:
    """A logger that keeps what went wrong, for the one line that tells it."""
    base: Any = trt.ILogger

    class Errors(base):  # type: ignore[misc]  # the base class is known when TensorRT is there
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in {base.INTERNAL_ERROR, base.ERROR}:
                errors.append(msg)

    logger: ILogger = Errors()
    return logger


def _last(errors: Sequence[str]) -> str:
    return errors[-1] if errors else "it does not say why"
