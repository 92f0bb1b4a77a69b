"""The contract between the executor and a backend, on one page.

A backend is a `Registration`. Built-in ones are modules of this package; others are found by the entry-point group
``penstock.backends``. The executor calls, in this order: ``probe``, ``capabilities``, ``create``, then ``step`` for every engine
step, and ``close``. Nothing that is heavy to import is imported before ``create``.

Calls to one model never overlap, but may come from different threads; calls to different models overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from penstock.backends.architectures.spec import DecoderSpec, SamplingDefaults

__all__ = [
    "CANONICAL_DTYPES",
    "Availability",
    "Available",
    "Broken",
    "Capabilities",
    "DType",
    "DeviceConfig",
    "GenerativeModel",
    "InvalidTensor",
    "KvChunk",
    "KvSpec",
    "ModelLost",
    "ModelSpec",
    "NativeKv",
    "PrefixCopies",
    "Registration",
    "StepBatch",
    "StepOutput",
    "Task",
    "TensorModel",
    "TensorSpec",
    "TopLogits",
    "TopOutput",
    "TopRequest",
    "Tuned",
    "Unavailable",
    "Unsupported",
]


class DType(StrEnum):
    """How weights are held and products computed. ``int8`` and ``int4`` hold weights only in that type."""

    F32 = "f32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def quantised(self) -> bool:
        """Whether weights are rounded to fewer bits than they are computed with."""
        return self in {DType.INT8, DType.INT4}


class Task(StrEnum):
    """What a backend does with a model: continue token ids, or turn named tensors into others."""

    GENERATE = "generate"
    TENSORS = "tensors"


@dataclass(frozen=True, slots=True)
class Available:
    """The backend can run here.

    Attributes:
        devices: on which, best first (``cpu``, ``cuda:0``).
        version: of its library.
        unused: why not on others that its library names.
    """

    devices: tuple[str, ...]
    version: str
    unused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The backend is not meant to run here: its library or device is absent."""

    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The backend is meant to run here and failed."""

    reason: str


Availability = Available | Unavailable | Broken


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint, read by its headers.

    Attributes:
        folder: where config.json and the safetensors files are.
        fingerprint: identity of its configuration and of every byte of its weights.
        shards: the safetensors files that hold the weights.
    """

    name: str
    folder: Path
    fingerprint: str
    decoder: DecoderSpec
    shards: tuple[Path, ...]
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """What the operator asks of a backend.

    Attributes:
        dtype: None lets the backend choose its fastest faithful one.
        device: where it is to run, as the backend's probe named it; the executor gives the one that it was chosen for. A backend
            that can not have it raises `StartError`, and takes no other. None: the best there is.
        threads: of computation; None: every core of the process's affinity.
        kv_cache_bytes: None: from the memory that is free once the weights are loaded.
        kv_cache_share: of that memory, what the cache may take; the rest is for activations, logits and other processes.
        kv_cache_dtype: of the cache; None: the backend's own choice.
        max_batch_tokens: tokens that one step computes at most.
        max_batch_size: sequences that one step holds at most.
        max_context: tokens that one sequence holds at most; at most the model's own.
        weight_cache: folder where weights that had to be rounded, and engines built with weights in them, may be kept for the next
            start; None: nowhere.
    """

    dtype: DType | None = None
    device: str | None = None
    threads: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_share: float = 0.5
    kv_cache_dtype: DType | None = None
    max_batch_tokens: int = 2048
    max_batch_size: int = 64
    max_context: int | None = None
    weight_cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend does for one model. None is advice: the executor keeps to each, and conformance holds the backend to it.

    Attributes:
        dtypes: in order of preference; the first is what ``dtype=None`` takes, so a quantised one only where there is no other.
        chunked_prefill: whether a prompt may come in several steps, beside decodes.
        prefix_cache: whether a sequence may begin with what others computed of the same tokens: in blocks that they share, or in
            copies of them, where `KvSpec.copies_prefixes` says so.
        prompt_logits: whether logits of every prompt token can be asked for.
        batch_invariant: whether a sequence's logits are the same bits whatever runs beside it.
        tasks: what it can do with the model.
        kv_layouts: in which its cache may lie, as `KvSpec.layout` names them; one that it is created with is among them.
        kv_dtypes: in which its cache may be held if asked, beside its own choice.
        max_context: tokens that one sequence may hold; None: as many as the model's own.
        max_batch_size: sequences that one step may hold; None: as many as asked.
        weight_bytes: memory that the weights take, by dtype; absent ones are estimated from their shapes.
        yields: by dtype, why any other backend that can is to be taken before it, as long as the two were not measured.
    """

    dtypes: tuple[DType, ...]
    chunked_prefill: bool = True
    prefix_cache: bool = True
    prompt_logits: bool = True
    batch_invariant: bool = False
    export_kv: bool = False
    import_kv: bool = False
    tasks: tuple[Task, ...] = (Task.GENERATE,)
    kv_layouts: tuple[str, ...] = ()
    kv_dtypes: tuple[DType, ...] = ()
    max_context: int | None = None
    max_batch_size: int | None = None
    weight_bytes: Mapping[DType, int] = field(default_factory=dict)
    yields: Mapping[DType, str] = field(default_factory=dict)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of what it can do beyond computing a batch: those of the fields above that say yes."""
        names = ("chunked_prefill", "prefix_cache", "prompt_logits", "batch_invariant", "export_kv", "import_kv")
        return tuple(name for name in names if getattr(self, name))


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The backend can not run this model, and why."""

    reason: str


CANONICAL_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {np.dtype(t).name: np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}
)
"""Types that KV may have in the canonical layout, by numpy's name: each backend exports one of them and imports all."""


@dataclass(frozen=True, slots=True)
class KvSpec:
    """The KV cache that a model was created with: `blocks` blocks of `block_size` tokens, ids 0 … blocks - 1.

    Attributes:
        token_shape: layers, kv heads and head dim of the canonical layout.
        canonical_dtype: of what it exports in that layout, one of `CANONICAL_DTYPES`: what the cache holds is told exactly by it.
        native_layout: names how a block lies, byte for byte, with all that the bytes depend on (shapes, types, scales, the version
            of the form); two models of one fingerprint with the same name may exchange blocks as they are. Empty where the model is
            no `NativeKv`.
        copies_prefixes: whether no block may be shared, and the model is `PrefixCopies`.
    """

    block_size: int
    blocks: int
    bytes_per_block: int
    layout: str
    dtype: str
    token_shape: tuple[int, int, int]
    canonical_dtype: str = "float32"
    native_layout: str = ""
    copies_prefixes: bool = False

    def canonical_shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Of a `KvChunk` of so many tokens."""
        layers, heads, dim = self.token_shape
        return layers, 2, tokens, heads, dim

    def canonical_bytes(self, tokens: int, dtype: str) -> int:
        """Of a `KvChunk` of so many tokens in a type of `CANONICAL_DTYPES`."""
        return math.prod(self.canonical_shape(tokens)) * CANONICAL_DTYPES[dtype].itemsize


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One engine step: for each of S sequences, T_s ≥ 1 new tokens behind P_s ≥ 0 that stand in its blocks already.

    The new tokens of all sequences lie end to end, T in all. Sequence s owns ``token_ids[starts[s]:starts[s + 1]]`` and the blocks
    ``block_ids[block_starts[s]:block_starts[s + 1]]``, in order, exactly as many as P_s + T_s tokens need. Sequences may share
    blocks that are full of past tokens, unless the cache copies prefixes; no block that a step writes to is shared.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], P_s … P_s + T_s - 1 for each sequence.
        past_lengths: int32 [S].
        starts: int32 [S + 1], from 0 to T.
        block_ids: int32 [sum of blocks].
        block_starts: int32 [S + 1].
        logits_rows: int64 [R], indices into T, rising: where logits are wanted. May be empty.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    past_lengths: NDArray[np.int32]
    starts: NDArray[np.int32]
    block_ids: NDArray[np.int32]
    block_starts: NDArray[np.int32]
    logits_rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gives: float32 logits [R, vocabulary], valid until the next call of `step`; the caller may overwrite them."""

    logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class KvChunk:
    """KV of a range of tokens in the canonical layout: [layer, 2 (key, value), token, kv head, head dim].

    Keys are as attention takes them: normalised where the family does so, and turned to their positions. The type is one of
    `CANONICAL_DTYPES`.
    """

    tokens: range
    data: NDArray[np.generic]


class ModelLost(RuntimeError):
    """A model can compute nothing any more, whatever it is asked; the text names the backend and says why. The engine then ends."""


class GenerativeModel(Protocol):
    """A model in memory: paged, batched, one engine step at a time."""

    @property
    def kv(self) -> KvSpec:
        """The cache it was created with."""

    @property
    def dtype(self) -> DType:
        """The type it was created with."""

    @property
    def device(self) -> str:
        """Where it runs."""

    def step(self, batch: StepBatch) -> StepOutput:
        """Compute one step, writing KV of the new tokens into their blocks. Releases the interpreter lock while it computes.

        Raises:
            ValueError: the batch is beyond what the model was created for (its most sequences, tokens or context), or names a block
                or a token that is not there, or too few blocks; nothing is written then. `step_limits` checks for that.
            ModelLost: there is no more model.
            Exception: any other; the executor fails the sequences of the batch, and the process if it happens again.
        """

    def export_kv(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy the KV of `tokens` (positions in a sequence whose blocks these are) out of the cache, in `kv.canonical_dtype`.

        Raises:
            ValueError: `tokens` are not within these blocks, or a block is not of this cache.
            RuntimeError: the cache has had to give them up.
        """

    def import_kv(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk into the cache, converted from any of `CANONICAL_DTYPES` to its type.

        Raises:
            ValueError: as for `export_kv`, or the chunk's shape is not this model's, or its type none of these; nothing is written
                then.
            RuntimeError: the cache has had to give up what stands before it.
        """

    def close(self) -> None:
        """Give all memory back. Idempotent, and safe after a start that failed; a step after it raises."""


@runtime_checkable
class NativeKv(Protocol):
    """What a `GenerativeModel` has beside it whose blocks can go to another of the same `KvSpec.native_layout` as they are."""

    def export_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """Copy blocks out of the cache: [block, `kv.bytes_per_block`], slots that nothing was written to included.

        Raises:
            ValueError: a block is not of this cache.
        """

    def import_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Copy blocks into the cache.

        Raises:
            ValueError: a block is not of this cache, or the bytes are not so many; nothing is written then.
        """


@runtime_checkable
class PrefixCopies(Protocol):
    """What a `GenerativeModel` has beside it whose sequences share no blocks, as where each one's KV has to lie in one piece."""

    def copy_prefix(self, source: Sequence[int], target: Sequence[int]) -> int:
        """Copy KV of computed tokens into the first blocks of a sequence that has none yet.

        Args:
            source: blocks that are full; the i-th is the i-th of a sequence whose tokens up to its end are those of the new one.
            target: as many blocks, none of them a source.

        Returns:
            how many were copied, from the first on: fewer than asked where the cache has had to give one up.

        Raises:
            ValueError: a block is not of this cache, or they are not as many; nothing is written then.
            ModelLost: there is no more model.
        """


@dataclass(frozen=True, slots=True)
class TopRequest:
    """What is wanted of R rows of logits in place of the rows: their likeliest tokens, and beside them others that are named.

    Named tokens are told whatever their logits are, and are none of the likeliest.

    Attributes:
        counts: int32 [R], how many of the likeliest tokens, at most `TopLogits.most_top`; 0: the whole row, which names no token.
        named_starts: int64 [R + 1]; row r names ``named[named_starts[r]:named_starts[r + 1]]``.
        named: int64, rising within a row.
        temperatures: float64 [R], for which masses are wanted; 0: none is.
    """

    counts: NDArray[np.int32]
    named_starts: NDArray[np.int64]
    named: NDArray[np.int64]
    temperatures: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TopOutput:
    """What a step tells of R rows of logits: of each what a `TopRequest` asks for, or the row.

    Attributes:
        starts: int64 [R + 1]; row r has ``ids[starts[r]:starts[r + 1]]``, none where it is told whole.
        ids: int64, rising within a row: of the tokens that are not named all whose logit is at least the k-th largest of them; more
            than k where some are equal.
        values: float32, their logits.
        named: float32, those of the named tokens, in the order of the request.
        log_masses: float64 [R, 2], of all tokens that are not named: the logarithms of the sum of exp(logit), and of the sum of
            exp(logit / temperature). Without meaning where no mass was asked for, and where the row is told whole.
        whole: int64 [R], where in `logits` the row is; -1: it is not told whole.
        logits: float32 [rows told whole, vocabulary], valid until the next step; the caller may overwrite them.
    """

    starts: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[np.float32]
    named: NDArray[np.float32]
    log_masses: NDArray[np.float64]
    whole: NDArray[np.int64]
    logits: NDArray[np.float32]


@runtime_checkable
class TopLogits(Protocol):
    """What a `GenerativeModel` has beside it whose logits need not leave its device where a few of them decide."""

    @property
    def most_top(self) -> int:
        """How many of a row's likeliest tokens may be asked for; 0: none, since whole rows cost no more here."""

    def step_top(self, batch: StepBatch, request: TopRequest) -> TopOutput:
        """As `GenerativeModel.step`, raising the same; tokens and logits are those of the rows that it would give, to the bit.

        A row may be told whole in any case, and is where one of its logits is NaN or +inf, or where more tokens are equally likely
        than the backend looked for.
        """

    def rows_of_top(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the last `step_top` that it did not tell whole, [rows, vocabulary]; to be asked for before the next step.

        Args:
            rows: their indices, each below R.

        Raises:
            RuntimeError: the model is closed, or another step has been made.
        """


@runtime_checkable
class Tuned(Protocol):
    """What a `GenerativeModel` has beside it that knows several ways of computing the same, and took those that suit its device."""

    @property
    def ways(self) -> Mapping[str, str]:
        """Their names, by what they are for: ``{"decode_attention": "paged"}``. Advertised as features, and otherwise not used."""


class InvalidTensor(ValueError):
    """A tensor that a model can not take: names it, and what would be right."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor of a model.

    Attributes:
        dtype: numpy's name of it: ``float32``, ``int64``, ``bool`` …
        shape: of each dimension the size, or a name where it may differ from call to call; the same name is the same size.
    """

    dtype: str
    shape: tuple[int | str, ...]


class TensorModel(Protocol):
    """A model in memory that maps named tensors to named tensors: embeddings, rerankers, classifiers."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What it takes; all of them at each call."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What it gives."""

    @property
    def device(self) -> str:
        """Where it runs."""

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Compute every output. Any number of threads may call at once; the interpreter lock is released while it computes.

        Raises:
            InvalidTensor: an input is missing, unknown, or of another type or shape; nothing has been computed then.
            RuntimeError: the model is closed, or the runtime failed.
        """

    def close(self) -> None:
        """Give all memory back. Idempotent."""


@dataclass(frozen=True, slots=True)
class Registration:
    """How the executor finds and makes a backend.

    Attributes:
        name: unique among backends; what ``--backend`` takes.
        probe: cheap, and never raises: importable? a device there?
        capabilities: what it does for this model, from the spec alone.
        create: loads the weights and allocates the cache; heavy imports happen here.
    """

    name: str
    probe: Callable[[], Availability]
    capabilities: Callable[[ModelSpec], Capabilities | Unsupported]
    create: Callable[[ModelSpec, DeviceConfig], GenerativeModel]
