"""`qtoolkit convert`: a quantized checkpoint in another layout."""

from __future__ import annotations

from typing import Annotated

import typer

from qtoolkit.cli import output


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint of ours; or a GPTQ, QQQ or compressed-tensors one.")],
    out: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")] = "",
    to: Annotated[str, typer.Option(help="int4, int8 (both compressed-tensors), qqq or gptq.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace a finished checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a quantized checkpoint in another layout, code by code."""
    from qtoolkit.errors import RequestError

    if not out or not to:
        raise RequestError(
            f"No {'layout' if out else 'output folder'} was given.", f"Add {'--to int4' if out else '-o DIR'}."
        )
    from qtoolkit.bridges.convert import convert

    result = convert(model, out, to, fresh=fresh, say=output.note)
    if as_json:
        output.emit(result.to_json())
        return
    for note in result.notes:
        output.note(note)
    output.result(
        f"{result.output}: {result.scheme}, {result.layers} layers, {result.layout_before} -> {result.layout}, "
        f"{output.megabytes(result.bytes_before)} -> {output.megabytes(result.bytes_after)}, "
        f"{output.seconds(result.seconds)}"
    )
