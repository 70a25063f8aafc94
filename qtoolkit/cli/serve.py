"""`qtoolkit serve`: a checkpoint behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qtoolkit.cli import output


def command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder; or a float model: folder, hub name, `tiny`.")],
    engine_args: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM OPTIONS]", help="What follows `--` goes to vLLM.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; this machine only by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one and says it.")] = 8000,
    api_key: Annotated[str, typer.Option(envvar="VLLM_API_KEY", help="Key that clients must send.")] = "",
    name: Annotated[str, typer.Option("--served-model-name", help="Name for clients; the folder's by default.")] = "",
    engine: Annotated[str, typer.Option(help="vllm or transformers; vllm where it is installed.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; 'auto' takes the GPU where there is one.")] = "auto",
    reference: Annotated[str, typer.Option(help="Image classifiers: what it was made from, served beside it.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when ready.")] = False,
) -> None:
    """Serve a checkpoint until Ctrl-C: vLLM with our W4A8 kernels, or transformers where vLLM is missing."""
    from qtoolkit.checkpoint import MANIFEST, verify
    from qtoolkit.errors import RequestError
    from qtoolkit.serve import intent, launcher
    from qtoolkit.source import resolve

    intent.mode()  # a wrong QTOOLKIT_W4A8 is told now, not by a worker process in a minute
    source = resolve(checkpoint)
    path = source.path.resolve()
    source.shapes()  # refuses pickles, truncated and missing files now; the engine would in a minute
    vision = (path / MANIFEST).is_file() and verify(path).kind == "vision"
    if reference and not vision:
        raise RequestError("--reference is for image classifiers.", "Drop it.")
    chosen = launcher.VISION if vision else launcher.choose_engine(engine)
    order = launcher.Order(path, name or path.name, host, port, api_key, tuple(engine_args or ()), device, reference)
    running = False

    def announce(ready: launcher.Ready) -> None:
        nonlocal running
        running = True
        if as_json:
            output.emit(ready.to_json())
            return
        counts = ", ".join(f"{count} layers on {kernel}" for kernel, count in ready.kernels.items())
        output.result(
            f"{ready.model} answers on {ready.url}" + (f" ({counts})" if counts else "") + "; Ctrl-C stops it"
        )

    try:
        launcher.serve(chosen, order, announce, output.note)
    except KeyboardInterrupt as stop:
        if not running:
            raise
        output.note("stopped")
        sys.exit(0 if isinstance(stop, launcher.Terminated) else 130)  # told above, and the one object is out
