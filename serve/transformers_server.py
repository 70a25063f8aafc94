"""transformers' own OpenAI server, in this process, around a checkpoint that our runtime loaded as W4A8."""

from __future__ import annotations

import hmac
import socket
from typing import TYPE_CHECKING, Any

from qtoolkit.errors import RequestError, ServeError
from qtoolkit.serve import report
from qtoolkit.serve.address import choose_port, url
from qtoolkit.serve.launcher import Announce, Order, Ready, Say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATIENCE = 3  # seconds that open streams get when the server stops


def serve_with_transformers(order: Order, announce: Announce, say: Say) -> None:
    """Serve ``order`` until a signal asks for the end; see ``launcher.serve``."""
    if order.extra:
        hint = "Drop them, or install vLLM: `pip install 'qtoolkit[serve-cpu]'`."
        raise RequestError(f"{order.extra[0]} is an option of vLLM, but transformers serves here.", hint)
    port = choose_port(order.host, order.port)
    try:
        import uvicorn

        from qtoolkit.serve.transformers_app import build_app
    except ImportError as error:
        raise ServeError(
            f"transformers' server needs a package that is missing: {error.name or error}.",
            "`pip install 'transformers[serving]'`.",
        ) from None
    from transformers import AutoTokenizer

    from qtoolkit import device, runtime

    say(f"loading {order.name} for transformers")
    model = runtime.load(order.path, device=str(device.choose(order.device)))
    app = build_app(order.name, model, AutoTokenizer.from_pretrained(order.path))
    if order.api_key:
        app.add_middleware(RequireKey, key=order.api_key)
    ready = Ready(f"{url(order.host, port)}/v1", order.name, report.kernels(describe(model)))
    say(report.sentence(describe(model)))

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce(ready)

    config = uvicorn.Config(
        app, host=order.host, port=port, log_level="warning", timeout_graceful_shutdown=PATIENCE, lifespan="on"
    )
    Server(config).run()  # ends on SIGINT and SIGTERM, and raises them again for us


def describe(model: PreTrainedModel) -> list[report.Layer]:
    """Return which kernel runs each linear layer of ``model``."""
    from torch import nn

    from qtoolkit.runtime import W4A8Linear

    layers = []
    for name, module in model.named_modules():
        if isinstance(module, W4A8Linear):
            layers.append(report.Layer(name, f"w4a8-{module.backend}"))
        elif isinstance(module, nn.Linear):
            layers.append(report.Layer(name, "unquantized", "it is not quantized in the checkpoint"))
    return layers


class RequireKey:
    """ASGI middleware: requests below /v1 need ``Authorization: Bearer <key>``, as they do with vLLM."""

    def __init__(self, app: Any, key: str, prefixes: tuple[str, ...] = ("/v1",)) -> None:
        self.app, self.expected, self.prefixes = app, f"Bearer {key}".encode(), prefixes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http" and scope["path"].startswith(self.prefixes) and scope["method"] != "OPTIONS":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                from starlette.responses import JSONResponse

                await JSONResponse({"error": {"message": "Unauthorized", "code": 401}}, 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)
