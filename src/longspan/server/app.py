"""The HTTP application: endpoints, and answers to errors in OpenAI's format.

It owns paths and status codes; the engine generates, and the modules of the bodies interpret them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response

from longspan.disaggregation.signature import SIGNATURE_HEADER
from longspan.errors import LongspanError
from longspan.server.async_engine import AsyncEngine
from longspan.server.bodies import BodyReader, JsonBounds, decoded_bytes, received
from longspan.server.chat import ChatBody
from longspan.server.completions import CompletionBody
from longspan.server.errors import HttpError, Problem, problem_of, problem_of_validation, renamed, shortened
from longspan.server.fields import Body, GenerationBody
from longspan.server.generation import CLIENT_GONE, Json, Refusal, respond
from longspan.server.middleware import BODY_HOLDS, BodyLimit, KeyCheck
from longspan.server.options import ServeOptions
from longspan.server.request_log import RequestLog
from longspan.server.served import ServedModel
from longspan.server.state import state_of
from longspan.server.text import Text
from longspan.server.tokens import DetokenizeBody, TokenizeBody
from longspan.version import __version__

_ESCAPED_BYTES = 6  # \\u0001 for one byte
_ID_BYTES = 8  # digits, comma and space of one token id
_LEAST_BODY, _LARGEST_BODY = 2 << 20, 64 << 20
_OTHER_TASKS = ("/v1/embeddings", "/v1/audio", "/v1/images", "/v1/moderations", "/v1/rerank", "/pooling", "/score")
_LOG = logging.getLogger("longspan.server")
_ERROR = {
    "type": "object", "required": ["message", "type", "param", "code"],
    "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    },
}  # fmt: skip
_ERROR_BODY = {
    "application/json": {
        "schema": {"type": "object", "required": ["error"], "properties": {"error": _ERROR}},
        "example": Problem(400, "field=value: what is wrong; remedy").body(),
    }
}
_DESCRIPTIONS: dict[int | str, str] = {
    400: "the request cannot be served", 401: "wrong key", 404: "no such model", 408: "it took too long",
    413: "too large a body", 415: "no JSON by its content type", 429: "too many requests wait",
    503: "the engine is not there",
    "default": "any other error",  # without it FastAPI adds a 422 of another shape, which is never sent
}  # fmt: skip
_ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": _ERROR_BODY} for status, description in _DESCRIPTIONS.items()
}


@dataclass(frozen=True)
class Service:
    """Everything that the endpoints use."""

    # completes prompts
    engine: AsyncEngine
    # the tokenizer
    text: Text
    # key and limits
    options: ServeOptions
    # the served model
    served: ServedModel
    # when the server was started, in `time.monotonic()`
    started: float

    @property
    def model(self) -> str:
        """Name of the served model."""
        return self.served.name

    def check_model(self, asked: str | None) -> None:
        """Raise `HttpError` (404) unless `asked` is the served model or None."""
        if asked is not None and asked != self.model:
            value = shortened(asked)
            raise HttpError(404, "model_not_found", "model", value, "is not served here", f"use {self.model!r}")

    def check_room(self) -> None:
        """Raise `QueueFull` if too many requests wait. Those being tokenised count, as they will be queued next."""
        self.engine.check_room(ahead=self.text.num_pending)

    @property
    def max_body_bytes(self) -> int:
        """The configured limit, or else a limit that has room for the longest prompt."""
        if self.options.max_body_bytes is not None:
            return self.options.max_body_bytes
        ids = self.engine.setup.max_model_len * _ID_BYTES
        return min(max(self.text.max_bytes * _ESCAPED_BYTES, ids, _LEAST_BODY), _LARGEST_BODY)


class _ParsedRequest(Request):
    """A request whose body has been read and checked."""

    def __init__(self, request: Request, parsed: Body, raw: bytes) -> None:
        super().__init__(request.scope, request.receive)
        self._parsed = parsed
        # kept only if the body is signed, because a long one would be held in memory until its answer ends
        self._raw = raw if SIGNATURE_HEADER in request.headers else b"{}"

    async def body(self) -> bytes:
        """The body as it was received if it is signed; otherwise any body that is not empty, as FastAPI requires."""
        return self._raw

    async def json(self) -> Any:
        """The parsed body: an instance of the endpoint's body type, which FastAPI accepts without parsing it again."""
        return self._parsed


def _route_class(reader: BodyReader) -> type[APIRoute]:
    """A route class whose bodies are parsed by `reader`: strict JSON (no NaN, no lone surrogates), within bounds."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
            handle = super().get_route_handler()
            kind: Any = self.body_field.field_info.annotation if self.body_field else None  # a `Body`

            async def read_and_handle(request: Request) -> Response:
                if kind is None:
                    return await handle(request)
                _require_json(request)
                try:
                    raw = await received(request)
                except ClientDisconnect:
                    return Response(status_code=CLIENT_GONE)
                request.scope[BODY_HOLDS](decoded_bytes(raw))
                return await handle(_ParsedRequest(request, await reader.parse(raw, kind), raw))

            return read_and_handle

    return Route


def _require_json(request: Request) -> None:
    """Raise `HttpError` unless the content type is JSON.

    Browsers send bodies without a content type, or with that of a form or of plain text, to other sites without a CORS
    preflight, so any web page could send them.
    """
    given = request.headers.get("content-type", "")
    media = given.partition(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        remedy = "send the body as it is"
        raise HttpError(415, "invalid_content_encoding", "Content-Encoding", shortened(coding), "is not read", remedy)
    if media == "application/json" or (media.startswith("application/") and media.endswith("+json")):
        return
    curl = " (curl -d sends a form's unless it is told -H 'Content-Type: application/json')"
    raise HttpError(
        415, "invalid_content_type", "Content-Type", shortened(given) if given else "",
        "is not JSON's" if given else "is missing",
        f"send the header Content-Type: application/json{curl if 'form' in media else ''}",
    )  # fmt: skip


def build_app(service: Service) -> FastAPI:
    """The application. Its caller starts and ends the engine."""
    app = FastAPI(title="Longspan", version=__version__, openapi_url=None, redirect_slashes=False)
    bounds = JsonBounds.of_model(service.engine.setup.max_model_len)
    app.router.route_class = _route_class(BodyReader(bounds))
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_models(app, service)
    _add_probes(app, service)
    _add_document(app)
    _add_errors(app, service)
    app.add_middleware(BodyLimit, max_bytes=service.max_body_bytes)
    if service.options.keys:
        app.add_middleware(KeyCheck, keys=service.options.keys)
    if service.options.allowed_origins:  # outside the check: a browser asks first without the key
        app.add_middleware(
            CORSMiddleware, allow_origins=service.options.allowed_origins, allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )  # fmt: skip
    app.add_middleware(RequestLog, options=service.options.log, on_failed=service.engine.metrics.failed)
    return app


def _add_document(app: FastAPI) -> None:
    """FastAPI's own pages, but the document is encoded once: a flood of requests for it would keep others waiting."""
    document = cache(lambda: msgspec.json.encode(app.openapi()))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(document(), media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(openapi_url="/openapi.json", title=f"{app.title} - Swagger UI")


def _add_generation(app: FastAPI, service: Service) -> None:
    def streams(body: GenerationBody) -> bool:
        service.check_model(body.model)
        service.check_room()
        return bool(body.stream)

    @app.post("/v1/completions", responses=_ANSWERS, tags=["OpenAI"])
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        stream = streams(body)
        with renamed(body.names):
            reply = await body.reply(service.text, service.served)
            return await respond(service.engine, reply, request, stream, service.options.cache_salt_by_key)

    @app.post("/v1/chat/completions", responses=_ANSWERS, tags=["OpenAI"])
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        stream = streams(body)
        with renamed(body.names):
            reply = await body.reply(service.text, service.served)
            return await respond(service.engine, reply, request, stream, service.options.cache_salt_by_key)


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=_ANSWERS, tags=["tokens"])
    async def tokenize(body: TokenizeBody) -> Response:
        """Token ids of a text or a conversation."""
        service.check_model(body.model)
        service.check_room()
        return Json(await body.answer(service.text, service.served))

    @app.post("/detokenize", responses=_ANSWERS, tags=["tokens"])
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids."""
        service.check_model(body.model)
        service.check_room()
        return Json({"prompt": await service.text.decode(body.tokens)})


def _add_models(app: FastAPI, service: Service) -> None:
    card = {
        "id": service.model, "object": "model", "created": int(time.time()), "owned_by": "longspan",
        "max_model_len": service.engine.setup.max_model_len,
    }  # fmt: skip

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> Response:
        """The served model."""
        return Json({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}", responses=_ANSWERS, tags=["OpenAI"])
    async def model(name: str) -> Response:
        """One model."""
        service.check_model(name)
        return Json(card)


def _add_probes(app: FastAPI, service: Service) -> None:
    page = files("longspan.server").joinpath("page/index.html").read_text()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page)

    @app.get("/health", responses={503: {"description": "not ready, and the reason"}}, tags=["probes"])
    async def health() -> Response:
        """200 while every rank is ready and answers, however long a step takes; else 503 with the reason."""
        trouble = service.engine.trouble
        if trouble is None:
            return Json({"status": "ready"})
        return Json({"status": "not ready", "reason": trouble}, status_code=503)

    @app.get("/version", tags=["probes"])
    async def version() -> Response:
        """The server's version."""
        return Json({"version": __version__})

    @app.get("/metrics", tags=["probes"])
    async def metrics() -> Response:
        """Prometheus' exposition text."""
        text = service.engine.metrics.render(await service.engine.state())
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/internal/peer", include_in_schema=False)
    async def peer() -> Response:
        load = service.engine.metrics.load
        info = service.engine.peer if service.engine.is_ready else None
        state = {"waiting": load.scheduler.waiting, "running": load.scheduler.running, "transfer": load.transfer}
        return Json({"info": info, "model": service.model, **state})

    @app.get("/internal/state", include_in_schema=False)
    async def state() -> Response:
        return Json(state_of(service.engine, await service.engine.state(), service.model, service.started))


def _not_served(app: FastAPI, request: Request) -> str:
    """Why a path or method is refused, and what there is in its place."""
    path = shortened(request.scope["path"])
    if request.scope["path"].startswith(_OTHER_TASKS):
        return f"path={path}: this server generates text and does nothing else; ask a server of another kind"
    served = [
        f"{'/'.join(sorted(route.methods or ()))} {route.path_format}"
        for route in app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
    ]
    return f"{request.method} {path}: is not served; there are {', '.join(served)}, and their fields at /docs"


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        route = request.scope.get("route")
        fields = getattr(getattr(route, "body_field", None), "field_info", None)
        known = list(getattr(getattr(fields, "annotation", None), "model_fields", {}))
        return Refusal(problem_of_validation(error.errors(), error.body, known))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = HTTPStatus(error.status_code).name.lower()
        message = _not_served(app, request) if error.status_code in (404, 405) else str(error.detail)
        reason = "is not served" if error.status_code in (404, 405) else message
        return Refusal(Problem(error.status_code, message, code=code, headers=error.headers or {}, reason=reason))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        problem = problem_of(error)
        if problem.status == 500:
            _LOG.error("a request failed", exc_info=error)
        return Refusal(problem)

    app.add_exception_handler(LongspanError, failed)  # a handler for `Exception` lets the server log a traceback
