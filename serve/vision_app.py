"""The web application of an image classifier: the Open Inference Protocol under /v2, and a page to try it at /."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from torch import nn

from qtoolkit import __version__
from qtoolkit.serve import vision_protocol as protocol
from qtoolkit.serve.vision_batches import Batches

if TYPE_CHECKING:
    from qtoolkit.vision.models import Architecture
    from qtoolkit.vision.runtime import Loaded

MOST_BYTES = 32 << 20  # of a request's body
FLOAT = "float"  # the scheme of the network that was compressed; its name is the model's with this behind it


@dataclass(frozen=True)
class Served:
    """One network behind the server: its batches, and what clients are told about it."""

    batches: Batches
    description: dict[str, Any]


def build_app(name: str, loaded: Loaded, reference: nn.Module | None = None) -> Starlette:
    """Return the application for ``loaded``, known to clients as ``name``.

    ``reference``, the network that it was made from, is served beside it as ``name-float``.
    """
    architecture, figures = loaded.architecture, loaded.manifest.figures
    models = {name: _served(name, loaded.network, architecture, loaded.manifest.scheme.name, figures)}
    if reference is not None:
        before = {key: value for key, value in figures.items() if key.endswith("_before")}
        models[f"{name}-{FLOAT}"] = _served(f"{name}-{FLOAT}", reference, architecture, FLOAT, before)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for served in models.values():
                await stack.enter_async_context(served.batches)
            yield

    async def server(request: Request) -> Response:
        return JSONResponse({"name": "qtoolkit", "version": __version__, "extensions": []})

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": True})

    async def model_ready(request: Request) -> Response:
        return _unknown(request) or JSONResponse({"name": request.path_params["model"], "ready": True})

    async def describe(request: Request) -> Response:
        return _unknown(request) or JSONResponse(models[request.path_params["model"]].description)

    async def infer(request: Request) -> Response:
        refused = _unknown(request)
        if refused:
            return refused
        wanted = request.path_params["model"]
        try:
            question = protocol.read(await _body(request), architecture)
        except protocol.Malformed as error:
            return _error(400, error.message)
        except TooLarge:
            return _error(413, f"The body has more than {MOST_BYTES >> 20} MiB.")
        except ClientDisconnect:
            return Response(status_code=499)
        found = await models[wanted].batches.submit(question.x)
        return JSONResponse(protocol.answer(question, found.out, found.seconds, wanted, architecture.labels))

    def _unknown(request: Request) -> Response | None:
        wanted, version = request.path_params["model"], request.path_params.get("version", "1")
        if wanted in models and version == "1":
            return None
        known = " and ".join(repr(name) for name in models)
        return _error(404, f"There is no model {wanted!r} of version {version!r} here, only {known} of version '1'.")

    async def page(request: Request) -> Response:
        text = (files("qtoolkit.serve") / "vision_page.html").read_text("utf-8")
        return HTMLResponse(text.replace("{{models}}", json.dumps(list(models)).replace("<", "\\u003c")))

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


def _served(
    name: str, network: nn.Module, architecture: Architecture, scheme: str, figures: dict[str, float]
) -> Served:
    @torch.inference_mode()
    def run(x: torch.Tensor) -> torch.Tensor:
        return network(x)

    classes = run(torch.zeros(1, *architecture.input)).shape[1]
    parameters = {"scheme": scheme, "labels": list(architecture.labels), **figures}
    return Served(Batches(run), {**protocol.metadata(name, architecture, classes), "parameters": parameters})


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
