"""Serving an image classifier with uvicorn: same defaults, key and orderly end as the language-model servers."""

from __future__ import annotations

import socket
from collections import Counter

from qtoolkit.errors import RequestError, ServeError
from qtoolkit.serve.address import choose_port, url
from qtoolkit.serve.launcher import Announce, Order, Ready, Say
from qtoolkit.serve.transformers_server import PATIENCE, RequireKey


def serve_vision(order: Order, announce: Announce, say: Say) -> None:
    """Serve ``order`` until a signal asks for the end; see ``launcher.serve``."""
    if order.extra:
        raise RequestError(f"{order.extra[0]} is an option of vLLM, but this is an image classifier.", "Drop it.")
    if order.device not in ("auto", "cpu"):
        raise RequestError(f"Image classifiers are served on the CPU, not on {order.device}.", "Drop --device.")
    port = choose_port(order.host, order.port)
    try:
        import uvicorn

        from qtoolkit.serve.vision_app import build_app
    except ImportError as error:
        raise ServeError(
            f"The vision server needs a package that is missing: {error.name or error}.",
            "`pip install 'qtoolkit[vision]'`.",
        ) from None
    from qtoolkit.vision.runtime import load

    loaded = load(order.path)
    app = build_app(order.name, loaded, loaded.made_from(order.reference) if order.reference else None)
    if order.api_key:
        app.add_middleware(RequireKey, key=order.api_key, prefixes=("/v2/models",))
    kinds = Counter(runs.name for runs in loaded.kernels.values())
    ready = Ready(f"{url(order.host, port)}/v2", order.name, dict(kinds))
    packed, address = sum(kinds.values()), url(order.host, port)
    say(f"{order.name}: {loaded.manifest.scheme.name}, {packed} packed layers; try it at {address}")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce(ready)

    config = uvicorn.Config(
        app, host=order.host, port=port, log_level="warning", timeout_graceful_shutdown=PATIENCE, lifespan="on"
    )
    Server(config).run()  # ends on SIGINT and SIGTERM, and raises them again for us
