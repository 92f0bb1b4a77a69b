"""Assembly of the tokenizer service."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from penstock.common import metrics as endpoint
from penstock.common import tracing
from penstock.common.checks import check_numbers
from penstock.common.logs import logger
from penstock.common.server import GrpcServer
from penstock.common.service import StartError
from penstock.common.sources import resolve
from penstock.common.tracing import Traceparents
from penstock.internal.v1 import tokenizer_pb2_grpc as pb_grpc
from penstock.tokenizer.config import TokenizerConfig
from penstock.tokenizer.encoding import Model, Models
from penstock.tokenizer.loading import LoadError, load
from penstock.tokenizer.metrics import TokenizerMetrics
from penstock.tokenizer.servicer import TokenizerServicer
from penstock.tokenizer.templates import TemplateError, TemplateLimits, Templates

__all__ = ["TokenizerServer"]

_NAME = "penstock.internal.v1.TokenizerService"
_LAST_WORDS_SECONDS = 1.0


class TokenizerServer:
    """The tokenizer service, as `penstock.common.service.Service`."""

    name = "tokenizer"

    def __init__(self, config: TokenizerConfig) -> None:
        self._config = config
        self._metrics = TokenizerMetrics()
        self._models = Models([])
        self._servicer = TokenizerServicer(self._models, self._metrics)
        self._grpc: GrpcServer | None = None
        self._endpoint: endpoint.MetricsServer | None = None
        self._closed = asyncio.Event()

    async def start(self) -> Mapping[str, str]:
        config = self._config
        check_numbers(config, may_be_zero=("grace_seconds",))
        tracing.configure(self.name, config.otlp_endpoint)
        if not config.models:
            raise StartError("models: none given; give at least one NAME=FOLDER")
        self._models = Models([await self._load(entry) for entry in config.models])
        self._grpc = GrpcServer(interceptors=[Traceparents()])
        self._servicer = TokenizerServicer(self._models, self._metrics)
        self._grpc.add(pb_grpc.add_TokenizerServiceServicer_to_server, self._servicer, _NAME)
        try:
            bound = {"grpc": self._grpc.listen(config.listen)}
        except RuntimeError as error:
            raise StartError(f"listen: can not listen on {config.listen}: {error}") from error
        if config.metrics is not None:
            endpoint.count_tasks(self._metrics.registry)
            self._endpoint = endpoint.serve(self._metrics.registry, config.metrics)
            bound["metrics"] = self._endpoint.address
        await self._grpc.start()
        await self._grpc.set_serving(serving=True)
        return bound

    async def wait(self) -> None:
        await self._closed.wait()

    async def drain(self) -> None:
        """Take no more calls and end decoding streams, which last as long as gateways; return when the running calls have ended."""
        if self._grpc is None:
            return
        stopping = asyncio.create_task(self._grpc.stop(self._config.grace_seconds))
        leaving = asyncio.create_task(self._servicer.leave())
        await asyncio.wait((stopping, leaving), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        # For answers that are on their way; who watches health hears no end.
        await asyncio.wait((stopping,), timeout=_LAST_WORDS_SECONDS)

    async def close(self) -> None:
        self._closed.set()
        if self._grpc is not None:
            await self._grpc.stop(0)
            self._grpc = None
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        await self._models.close()

    async def _load(self, entry: str) -> Model:
        name, separator, folder = entry.partition("=")
        if not (name and separator and folder):
            raise StartError(f"models: {entry!r} is not NAME=FOLDER")
        try:
            vocabulary = await asyncio.to_thread(lambda: load(resolve(folder)))
            templates = None
            if vocabulary.chat_template is not None:
                templates = Templates(vocabulary.chat_template, vocabulary.special_tokens, self._limits())
                await templates.start()
        except (LoadError, TemplateError) as error:
            raise StartError(f"model {name}: {error}") from error
        tables = vocabulary.pieces is not None
        logger().info("tokenizer loaded", model=name, fingerprint=vocabulary.fingerprint, size=vocabulary.size, tables=tables)
        return Model(name, vocabulary, templates)

    def _limits(self) -> TemplateLimits:
        config = self._config
        return TemplateLimits(
            seconds=config.template_seconds,
            memory_bytes=config.template_memory_mib << 20,
            output_characters=config.template_output_mib << 20,
            workers=config.template_workers,
        )
