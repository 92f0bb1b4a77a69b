"""A server of the public API that does what each test asks of it."""

import asyncio
import contextlib
import threading
from types import SimpleNamespace

from google.protobuf import duration_pb2

from penstock.common import errors
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import inference_pb2_grpc as pb_grpc
from penstock.v1 import models_pb2, models_pb2_grpc

CLOSING = pb.Closing(
    usage=pb.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1),
    request_id="r",
    model="m",
    placements=[pb.Placement(executor_id="e1", backend="fake", device="cpu")],
    queue_time=duration_pb2.Duration(nanos=5_000_000),
    seed=2**63,
)


class FakeServer(pb_grpc.InferenceServicer, models_pb2_grpc.ModelsServicer):
    """Answers with one message per entry of `script`; an exception there is raised, and None waits until the call is cancelled."""

    def __init__(self):
        self.script = []
        self.calls = []
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    async def _play(self, request, context, answer):
        self.calls.append(
            SimpleNamespace(request=request, metadata=dict(context.invocation_metadata()), left=context.time_remaining())
        )
        self.begun.set()
        script = self.script.pop(0) if self.script and isinstance(self.script[0], list) else self.script
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if step is None:
                    await asyncio.Event().wait()
                yield answer(closing=step) if isinstance(step, pb.Closing) else answer(**step)
        except (asyncio.CancelledError, GeneratorExit):  # the latter where it is cancelled while an answer is written
            self.cancelled.set()
            raise

    async def Generate(self, request, context):  # noqa: N802 - the name in the proto
        async with contextlib.aclosing(self._play(request, context, pb.GenerateResponse)) as answers:
            async for answer in answers:
                yield answer

    async def Chat(self, request, context):  # noqa: N802 - the name in the proto
        async with contextlib.aclosing(self._play(request, context, pb.ChatResponse)) as answers:
            async for answer in answers:
                yield answer

    async def CountTokens(self, request, context):  # noqa: N802 - the name in the proto
        async for _ in self._play(request, context, lambda **fields: None):
            pass
        return pb.CountTokensResponse(count=2, token_ids=[5, 6] if request.token_ids else [], context_length=128)

    async def ListModels(self, request, context):  # noqa: N802 - the name in the proto
        decode = [models_pb2.DecodeSpeed(batch=n, tokens_per_second=1000.5 * n) for n in (1, 2, 4)]
        speeds = models_pb2.Calibration(prefill_tokens_per_second=2500, decode=decode, prefill_chunk=64)
        executors = [
            models_pb2.ModelExecutor(executor_id="e1", backend="fake", kv_blocks=9, calibration=speeds, role="prefill"),
            models_pb2.ModelExecutor(executor_id="e2", backend="fake", kv_blocks=9),
        ]
        return models_pb2.ListModelsResponse(
            models=[models_pb2.Model(name="m", context_length=128, executors=executors, created_unix_seconds=60)]
        )

    async def GetModel(self, request, context):  # noqa: N802 - the name in the proto
        if request.name != "m":
            raise errors.UnknownModel(f"no model {request.name!r}; there is m")
        return models_pb2.GetModelResponse(model=models_pb2.Model(name="m"))
