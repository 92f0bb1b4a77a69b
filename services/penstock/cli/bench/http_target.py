"""A suite, or any server of OpenAI's API that tells token ids, through its HTTP door."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from penstock.cli.bench.http_stream import Door, HttpError, request
from penstock.cli.bench.scenarios import Request
from penstock.cli.bench.target import Description, of_all
from penstock.cli.bench.timeline import Timeline
from penstock.common.service import StartError

__all__ = ["HttpTarget"]

_LOOKUP_SECONDS = 10


class HttpTarget:
    """Looks the model up when it is made; each request has a connection of its own.

    Args:
        door: where it is.
        model: its served name; None: the one that is served.
        vocabulary: of the model, where the server does not tell it: OpenAI's API does not.
        prefix_cache: False makes every request unlike any other to the suite's prefix cache.
        timeout: deadline of each request in seconds.

    Raises:
        StartError: nothing answers there, or it serves no such model.
    """

    def __init__(self, door: Door, *, model: str | None, vocabulary: int, prefix_cache: bool, timeout: float) -> None:
        self._door = door
        self._prefix_cache = prefix_cache
        self._timeout = timeout
        found = asyncio.run(self._find(model))
        self._model = str(found["id"])
        executors = found.get("executors", [])
        dtype, backend = (of_all(executor[key] for executor in executors) for key in ("dtype", "backend"))
        size = found.get("vocabulary_size", vocabulary)
        self.description = Description("penstock-http", version("penstock"), dtype, backend, size)

    def run(self, requests: Sequence[Request], finished: Callable[[], None]) -> list[Timeline]:
        return asyncio.run(self._run(requests, finished))

    def close(self) -> None:
        """Nothing is kept between runs."""

    async def _find(self, name: str | None) -> Mapping[str, Any]:
        """The model as the server lists it; Penstock tells more of it than OpenAI's API has."""
        try:
            async with asyncio.timeout(_LOOKUP_SECONDS):
                listed = json.loads(b"".join([part async for part in request(self._door, "GET", "/v1/models")]))
        except (OSError, HttpError, TimeoutError, ValueError) as error:
            if isinstance(error, HttpError) and error.status == HTTPStatus.UNAUTHORIZED:
                raise StartError(f"--api-key: {self._door.address} wants one that it knows ({error})") from error
            raise StartError(f"--target: {self._door.address} does not answer as OpenAI's API ({error})") from error
        served = {str(model["id"]): model for model in listed["data"]}
        if name is None and len(served) == 1:
            name = next(iter(served))
        if name is None or name not in served:
            raise StartError(f"--model: must be one of those that {self._door.address} serves: {', '.join(served) or 'none'}")
        found: Mapping[str, Any] = served[name]
        return found

    async def _run(self, requests: Sequence[Request], finished: Callable[[], None]) -> list[Timeline]:
        began = time.perf_counter()
        return await asyncio.gather(*(self._one(one, began, finished) for one in requests))

    async def _one(self, asked: Request, began: float, finished: Callable[[], None]) -> Timeline:
        body = self._body(asked)
        if asked.at:
            await asyncio.sleep(began + asked.at - time.perf_counter())
        timeline = Timeline(sent=time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout):
                async for event in _events(request(self._door, "POST", "/v1/completions", body)):
                    _note(timeline, event)
        except (OSError, HttpError, TimeoutError, ValueError) as error:
            timeline.error = str(error) or type(error).__name__
        timeline.ended = time.perf_counter()
        if timeline.error is None and len(timeline.ids) != asked.new_tokens:
            timeline.error = f"{len(timeline.ids)} tokens came where {asked.new_tokens} were asked for"
        finished()
        return timeline

    def _body(self, asked: Request) -> Mapping[str, Any]:
        salt = {} if self._prefix_cache else {"cache_salt": secrets.token_hex(8)}
        return {
            "model": self._model,
            "prompt": asked.prompt,
            "max_tokens": asked.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **salt,
        }


def _note(timeline: Timeline, event: Mapping[str, Any]) -> None:
    if "error" in event:
        raise HttpError(str(event["error"].get("message", event["error"])))
    for choice in event["choices"]:
        if choice.get("token_ids"):
            timeline.bear(time.perf_counter(), choice["token_ids"])


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[Mapping[str, Any]]:
    """The JSON of each server-sent event, to the closing ``[DONE]``."""
    pending = b""
    async for part in parts:
        *lines, pending = (pending + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
