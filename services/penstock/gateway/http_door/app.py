"""The HTTP door: OpenAI's API and what operators ask."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from penstock.common.errors import InvalidRequest, PenstockError
from penstock.gateway.bounds import MAX_COUNTED_TOKENS
from penstock.gateway.catalog import Model
from penstock.gateway.http_door import generations
from penstock.gateway.http_door.access import AccessLog
from penstock.gateway.http_door.errors import error_response
from penstock.gateway.http_door.generate import Door, chat_endpoint, completions_endpoint
from penstock.gateway.http_door.schemas import DetokenizeBody, TokenizeBody
from penstock.gateway.request import Caller, Generation
from penstock.gateway.validation import validate_input

__all__ = ["DRAINING", "http_app"]

DRAINING = "draining"
_SHOWN_CHARACTERS = 128


def http_app(door: Door, registry: CollectorRegistry, not_ready: Callable[[], str], cors_origins: Sequence[str] = ()) -> ASGIApp:
    """The ASGI application. `not_ready` tells why the gateway can not serve now, or nothing."""
    pages = _Pages(door, registry, not_ready)
    app = Starlette(
        routes=[
            Route("/v1/completions", completions_endpoint(door), methods=["POST"]),
            Route("/v1/chat/completions", chat_endpoint(door), methods=["POST"]),
            Route("/v1/models", pages.models, methods=["GET"]),
            Route("/v1/models/{name:path}", pages.model, methods=["GET"]),
            Route("/tokenize", pages.tokenize, methods=["POST"]),
            Route("/detokenize", pages.detokenize, methods=["POST"]),
            Route("/health", pages.health, methods=["GET"]),
            Route("/ready", pages.ready, methods=["GET"]),
            Route("/metrics", pages.metrics, methods=["GET"]),
        ],
        exception_handlers={
            HTTPException: _no_such_page,  # type: ignore[dict-item]  # narrower
            PenstockError: _refused,
            ClientDisconnect: _left,  # type: ignore[dict-item]  # narrower
            Exception: _refused,
        },
    )
    app.router.redirect_slashes = False  # a page that is not there is told as such, with the one that was meant
    return AccessLog(_open_to(cors_origins, app) if cors_origins else app)


def _open_to(origins: Sequence[str], app: ASGIApp) -> ASGIApp:
    """Let browsers have what pages of these origins ask for. A key stands in a header, and no cookie is ever looked at."""
    told = ("Retry-After", "X-Request-Id")
    return CORSMiddleware(app, allow_origins=origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=told)


class _Pages:
    """Everything but generation."""

    def __init__(self, door: Door, registry: CollectorRegistry, not_ready: Callable[[], str]) -> None:
        self._door = door
        self._registry = registry
        self._not_ready = not_ready

    async def models(self, request: Request) -> Response:
        self._door.caller(request.headers)
        models = self._door.admission.catalog.models().values()
        return JSONResponse({"object": "list", "data": [_model(m) for m in models]})

    async def model(self, request: Request) -> Response:
        self._door.caller(request.headers)
        return JSONResponse(_model(self._door.admission.catalog.live(request.path_params["name"])))

    async def tokenize(self, request: Request) -> Response:
        caller = self._door.caller(request.headers)
        with self._door.admission.counted():
            body = await self._door.read(TokenizeBody, request.scope, request.receive)
            return await self._tokenize(body, caller)

    async def _tokenize(self, body: TokenizeBody, caller: Caller) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest.field("prompt", "give either a prompt or messages")
        generation = Generation(
            model=body.model or "",
            text=body.prompt,
            messages=generations.messages(body.messages) if body.messages is not None else None,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message or False,
            chat_template_kwargs=body.chat_template_kwargs or {},
        )
        admission = self._door.admission
        model = admission.catalog.model(generation.model)
        validate_input(generation, model)
        ids, _ = await admission.encode(generation, model, caller.deadline, MAX_COUNTED_TOKENS)
        return JSONResponse({"count": len(ids), "max_model_len": model.context_length, "tokens": list(ids)})

    async def detokenize(self, request: Request) -> Response:
        caller = self._door.caller(request.headers)
        with self._door.admission.counted():
            body = await self._door.read(DetokenizeBody, request.scope, request.receive)
            return await self._detokenize(body, caller)

    async def _detokenize(self, body: DetokenizeBody, caller: Caller) -> Response:
        admission = self._door.admission
        model = admission.catalog.model(body.model or "")
        if body.tokens and not (min(body.tokens) >= 0 and max(body.tokens) < model.vocabulary_size):
            raise InvalidRequest.field("tokens", f"token ids from 0 to {model.vocabulary_size - 1}")
        text = await admission.tokenization.detokenize(model.name, body.tokens, caller.deadline, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    async def health(self, _request: Request) -> Response:
        # A gateway that drains is well; one that no engine stands behind is not.
        reason = self._not_ready()
        return (
            JSONResponse({"status": "ok"})
            if reason in {"", DRAINING}
            else JSONResponse({"status": "failing", "reason": reason}, 503)
        )

    async def ready(self, _request: Request) -> Response:
        reason = self._not_ready()
        return JSONResponse({"status": "not ready", "reason": reason}, 503) if reason else JSONResponse({"status": "ready"})

    async def metrics(self, _request: Request) -> Response:
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _model(model: Model) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created or int(time.time()),
        "owned_by": "penstock",
        "max_model_len": model.context_length,
        "vocabulary_size": model.vocabulary_size,
        "executors": [{"backend": e.backend, "device": e.device, "dtype": e.dtype} for e in model.executors],
    }


async def _no_such_page(request: Request, error: HTTPException) -> Response:
    path, pages = request.url.path[:_SHOWN_CHARACTERS], [route.path.replace(":path", "") for route in request.app.routes]
    code, message = "invalid_request", str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        near = difflib.get_close_matches(path, [page for page in pages if "{" not in page], n=1, cutoff=0.75)
        meant = next((page for page in pages if page == f"/v1{path}"), near[0] if near else None)
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(pages)}"
        code, message = "not_found", f"there is no page {path}; {hint}"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        code, message = "method_not_allowed", f"{path} does not take {request.method}; it takes {allowed}"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _left(_request: Request, _error: ClientDisconnect) -> None:
    """Nobody is there to be answered."""


async def _refused(_request: Request, error: Exception) -> Response:
    return error_response(error)
