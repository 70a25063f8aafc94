"""The web application of an image classifier: the Open Inference Protocol under /v2, and a page to try it at /."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING

import torch
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from qtoolkit import __version__
from qtoolkit.serve import vision_protocol as protocol
from qtoolkit.serve.vision_batches import Batches

if TYPE_CHECKING:
    from qtoolkit.vision.runtime import Loaded

MOST_BYTES = 32 << 20  # of a request's body


def build_app(name: str, loaded: Loaded) -> Starlette:
    """Return the application for ``loaded``, known to clients as ``name``."""
    network, architecture, figures = loaded.network, loaded.architecture, loaded.manifest.figures

    @torch.inference_mode()
    def run(x: torch.Tensor) -> torch.Tensor:
        return network(x)

    batches = Batches(run)
    classes = run(torch.zeros(1, *architecture.input)).shape[1]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with batches:
            yield

    async def server(request: Request) -> Response:
        return JSONResponse({"name": "qtoolkit", "version": __version__, "extensions": []})

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": True})

    async def model_ready(request: Request) -> Response:
        return _known(request) or JSONResponse({"name": name, "ready": True})

    async def describe(request: Request) -> Response:
        return _known(request) or JSONResponse(
            {
                **protocol.metadata(name, architecture, classes),
                "parameters": {
                    "scheme": loaded.manifest.scheme.name,
                    "labels": list(architecture.labels),
                    **figures,
                },
            }
        )

    async def infer(request: Request) -> Response:
        refused = _known(request)
        if refused:
            return refused
        try:
            question = protocol.read(await _body(request), architecture)
        except protocol.Malformed as error:
            return _error(400, error.message)
        except TooLarge:
            return _error(413, f"The body has more than {MOST_BYTES >> 20} MiB.")
        except ClientDisconnect:
            return Response(status_code=499)
        return JSONResponse(protocol.answer(question, await batches.submit(question.x), name, architecture.labels))

    def _known(request: Request) -> Response | None:
        wanted, version = request.path_params["model"], request.path_params.get("version", "1")
        if wanted == name and version == "1":
            return None
        return _error(404, f"There is no model {wanted!r} of version {version!r} here, only {name!r} of version '1'.")

    async def page(request: Request) -> Response:
        text = (files("qtoolkit.serve") / "vision_page.html").read_text("utf-8")
        return HTMLResponse(text.replace("{{model}}", name))

    routes = [
        Route("/", page),
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
    ]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        endpoints: dict[str, tuple[Callable, str]] = {
            "": (describe, "GET"),
            "/ready": (model_ready, "GET"),
            "/infer": (infer, "POST"),
        }
        routes += [Route(prefix + path, handler, methods=[verb]) for path, (handler, verb) in endpoints.items()]
    return Starlette(routes=routes, lifespan=lifespan)


class TooLarge(Exception):
    """The body is larger than anybody needs."""


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise TooLarge
        parts.append(part)
    return b"".join(parts)


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
