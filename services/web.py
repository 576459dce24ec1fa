"""Routes, and the one table from exception to status. Every error has OpenAI's form, whatever caused it."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion_core.denoiser import NULL
from services.generator import Generator
from services.schema import (
    MAX_BODY,
    Answer,
    BodyTooLargeError,
    Generation,
    MediaTypeError,
    ModelName,
    NotReadyError,
    Picture,
    RequestError,
    UnknownModelError,
)
from services.service import Meter, Service

BODY_SECONDS = 10.0  # for the whole body to arrive
PAGE = Path(__file__).with_name("page.html")
STATUS: Mapping[type[Exception], int] = {
    RequestError: 400,
    ClientDisconnect: 400,
    UnknownModelError: 404,
    TimeoutError: 408,
    BodyTooLargeError: 413,
    MediaTypeError: 415,
    Exception: 500,
    NotReadyError: 503,
}
SCHEMA = {"application/json": {"schema": Generation.model_json_schema()}}
log = logging.getLogger(__name__)


def create(service: Service) -> FastAPI:
    """The application around one replica's state."""
    app = FastAPI(title="Inkwell", redoc_url=None)
    app.add_middleware(Counting, meter=service.meter)
    for known in (*STATUS, HTTPException):
        app.add_exception_handler(known, _failed)

    @app.post(
        "/v1/images/generations",
        response_model_exclude_none=True,
        openapi_extra={"requestBody": {"required": True, "content": SCHEMA}},
    )
    async def generate(request: Request) -> Answer:
        """Draw pictures of a class or a text."""
        held = service.ready()
        asked = Generation.parse(await _body(request))
        orders = held.generator.orders(asked)
        drawn = await held.batcher.submit(orders)
        return Answer(
            created=int(time.time()),
            data=[
                Picture(b64_json=base64.b64encode(png).decode(), seed=order.seed)
                for png, order in zip(drawn, orders, strict=True)
            ],
            model=_name(held.generator),
            label=None if orders[0].label == NULL else orders[0].label,
            prompt=orders[0].prompt,
            steps=orders[0].steps,
            guidance=orders[0].guidance,
            size=held.generator.size,
        )

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models in service, with what they can be asked for."""
        held = service.current
        return {"object": "list", "data": [_card(held.generator)] if held else []}

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def ready() -> Response:
        """200 while a verified, warm model is in service; `refused` says why the last target did not go there."""
        held = service.current
        state = {
            "status": "ready" if held else "not ready",
            "model": _name(held.generator).model_dump() if held else None,
            "refused": service.refusal,
            "revision": service.revision,
        }
        return _json(state, 200) if held else _json(state | _told(service.not_ready(), 503), 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(service.meter.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE.read_text()

    return app


class Counting:
    """Counts and times every request; an ASGI layer of its own, so that it also sees answers to unknown paths."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self.app, self.meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.perf_counter(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.meter.requests.labels(route, str(status)).inc()
            self.meter.latency.labels(route).observe(time.perf_counter() - begun)


async def _body(request: Request) -> bytes:
    """The whole body, bounded in kind, size and time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or "content-encoding" in request.headers:
        raise MediaTypeError("the body must be JSON, with content-type application/json", code="unsupported_media_type")
    body = bytearray()
    async with asyncio.timeout(BODY_SECONDS):
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                raise BodyTooLargeError(f"the body has more than {MAX_BODY} bytes", code="body_too_large")
    return bytes(body)


async def _failed(request: Request, error: Exception) -> Response:
    """Any exception as an answer in OpenAI's form; of a bug, only that there was one."""
    if isinstance(error, HTTPException):
        status, message = error.status_code, f"{request.method} {request.url.path}: {error.detail}"
    else:
        status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
        message = str(error) or type(error).__name__
    if status == 500:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        message = "the server failed; its log says more"
    return _json(_told(error, status, message), status)


def _told(error: Exception, status: int, message: str = "") -> dict[str, Any]:
    """OpenAI's form of an error, in its own words or in `message`."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": message or str(error), "type": kind, "param": param, "code": code}}


def _json(body: Mapping[str, Any], status: int) -> Response:
    """ASCII only: a message may repeat text that UTF-8 cannot hold."""
    headers = {"retry-after": "2"} if status == 503 else None
    return Response(json.dumps(body), status, headers, media_type="application/json")


def _name(generator: Generator) -> ModelName:
    model = generator.model
    return ModelName(name=model.name, version=model.version, digest=model.digest)


def _card(generator: Generator) -> dict[str, Any]:
    """One entry of the list of models, in OpenAI's form with our fields beside it."""
    model, sampling = generator.model, generator.model.bundle.sampling
    return {
        "id": model.name,
        "object": "model",
        "owned_by": "inkwell",
        "reference": model.reference,
        "version": model.version,
        "digest": model.digest,
        "classes": list(model.bundle.classes),
        "text": model.bundle.text is not None,
        "size": generator.size,
        "channels": model.bundle.image_shape[0],
        "allowed_steps": sampling.allowed_steps,
        "sampling": {"steps": sampling.steps, "guidance": sampling.guidance},
    }
