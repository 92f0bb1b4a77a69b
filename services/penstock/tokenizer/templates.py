"""Rendering of chat templates in worker processes that have a hard limit on time, memory and output."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from penstock.common.errors import InternalError, InvalidRequest
from penstock.common.logs import logger
from penstock.tokenizer.template_worker import HEADER, Kind

__all__ = ["TemplateError", "TemplateLimits", "Templates"]

FIELD = "messages"
_OF_THE_CONVERSATION = {"messages", "add_generation_prompt", "continue_final_message"}


class TemplateError(Exception):
    """A chat template can not be compiled; one line that says why."""


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one rendering may take.

    Attributes:
        seconds: processor time.
        memory_bytes: address space of the process.
        output_characters: length of the rendered text.
        workers: processes that render at the same time.
    """

    seconds: float
    memory_bytes: int
    output_characters: int
    workers: int


class _Died(Exception):
    """The worker ended, or had to be ended, instead of answering; `by_limit` where it was the limit on time."""

    def __init__(self, text: str, *, by_limit: bool) -> None:
        super().__init__(text)
        self.by_limit = by_limit


class _Worker:
    """One process; renders one conversation at a time.

    Attributes:
        variables: names that the template reads.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.variables: frozenset[str] = frozenset()
        self._process = process

    @classmethod
    async def start(cls, setup: bytes) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "penstock.tokenizer.template_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Ctrl-C is for the service, which lets its work finish first.
            process_group=0,
        )
        worker = cls(process)
        try:
            kind, text = await worker.ask(setup, seconds=60)
        except _Died as error:
            raise TemplateError(f"the chat template can not be compiled within its limits ({error})") from error
        except BaseException:
            await worker.kill()
            raise
        if kind is not Kind.RENDERED:
            await worker.kill()
            raise TemplateError(f"the chat template is wrong: {text.splitlines()[0] if text else kind.name}")
        worker.variables = frozenset(json.loads(text))
        return worker

    async def ask(self, request: bytes, seconds: float) -> tuple[Kind, str]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise _Died("no pipes", by_limit=False)
        try:
            async with asyncio.timeout(seconds):
                stdin.write(HEADER.pack(len(request), 0) + request)
                await stdin.drain()
                size, kind = HEADER.unpack(await stdout.readexactly(HEADER.size))
                return Kind(kind), (await stdout.readexactly(size)).decode()
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            status = None if isinstance(error, TimeoutError) else await self._process.wait()
            await self.kill()
            raise _Died(f"exit status {status}", by_limit=status in {None, -signal.SIGPROF}) from error

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()


class Templates:
    """The workers of one chat template. `start` first, `close` in the end.

    Args:
        source: the template.
        variables: what it may use beside the conversation: the special tokens by name.
        limits: what one rendering may take.
    """

    def __init__(self, source: str, variables: Mapping[str, str], limits: TemplateLimits) -> None:
        # `tools` and `documents` stand undefined-as-None, as transformers passes them.
        self._variables = {**variables, "tools": None, "documents": None}
        self._free: frozenset[str] = frozenset()
        self._limits = limits
        setup = {
            "template": source,
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_bytes,
            "output_characters": limits.output_characters,
        }
        self._setup = json.dumps(setup).encode()
        self._idle: list[_Worker] = []
        self._turn = asyncio.Semaphore(limits.workers)
        self._closed = False

    async def start(self) -> None:
        """Compile the template in a first worker.

        Raises:
            TemplateError: it is no valid template.
        """
        worker = await _Worker.start(self._setup)
        self._free = worker.variables - self._variables.keys() - _OF_THE_CONVERSATION
        self._idle.append(worker)

    async def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool,
        chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The conversation as the prompt that the model was trained on.

        Args:
            messages: see `penstock.tokenizer.encoding.Model.encode_chat`, for the others too.
            add_generation_prompt: the opening of an answer follows them.
            chat_template_kwargs: what the template reads beside the conversation, by its names.

        Raises:
            InvalidRequest: the template refuses these messages, or takes too long or too much memory over them; or it does not read
                one of the names.
        """
        self._check_names(chat_template_kwargs)
        conversation = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        variables = {**chat_template_kwargs, **self._variables, **conversation}
        request = json.dumps(variables, ensure_ascii=False).encode("utf-8", "surrogatepass")
        async with self._turn:
            try:
                kind, text = await self._ask(request)
            except _Died as error:
                logger().warning("chat template ended by force", reason=str(error))
                if error.by_limit:
                    raise self._too_long() from None
                # The process may have died before it was asked; a new one tells.
                kind, text = await self._ask_again(request)
        return self._answer(kind, text)

    def _check_names(self, given: Mapping[str, Any]) -> None:
        unknown = next((name for name in given if name not in self._free), None)
        if unknown is not None:
            names = f"it reads {', '.join(sorted(self._free))}" if self._free else "it reads nothing but the conversation"
            raise InvalidRequest.field(
                "chat_template_kwargs", f"{unknown[:64]!r} is nothing that the model's chat template reads of a request; {names}"
            )

    async def _ask(self, request: bytes) -> tuple[Kind, str]:
        worker = self._idle.pop() if self._idle else await _Worker.start(self._setup)
        try:
            # The worker's own limit is processor time; the wall's is for a machine that gives it none.
            answer = await worker.ask(request, seconds=5 * self._limits.seconds + 5)
        except BaseException:
            await worker.kill()
            raise
        if self._closed:
            await worker.kill()
        else:
            self._idle.append(worker)
        return answer

    async def _ask_again(self, request: bytes) -> tuple[Kind, str]:
        try:
            return await self._ask(request)
        except _Died as error:
            if error.by_limit:
                raise self._too_long() from None
            return Kind.OUT_OF_MEMORY, ""

    def _too_long(self) -> InvalidRequest:
        seconds = f"{self._limits.seconds:g} s"
        return InvalidRequest.field(
            FIELD, f"the model's chat template takes longer than {seconds} over them; send fewer or shorter ones"
        )

    def _answer(self, kind: Kind, text: str) -> str:
        match kind:
            case Kind.RENDERED:
                return text
            case Kind.REFUSED:
                raise InvalidRequest.field(FIELD, f"the model's chat template refuses them: {text}")
            case Kind.TOO_LARGE:
                raise InvalidRequest.field(
                    FIELD, f"the model's chat template makes more than {self._limits.output_characters} characters of them"
                )
            case Kind.OUT_OF_MEMORY:
                raise InvalidRequest.field(
                    FIELD, "the model's chat template needs too much memory for them; send fewer or shorter ones"
                )
            case Kind.FAILED:
                logger().warning("chat template failed", reason=text)
                raise InvalidRequest.field(FIELD, "the model's chat template can not render them")
        raise InternalError(f"unknown answer {kind}")

    async def close(self) -> None:
        """End the workers. Idempotent."""
        self._closed = True
        idle, self._idle = self._idle, []
        for worker in idle:
            await worker.kill()
