"""`qtoolkit list`: what this installation knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from qtoolkit.cli import output


def command(
    what: Annotated[
        str, typer.Argument(help="recipes, transforms, packers, architectures, models, vision or data.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List recipes, transforms, packers, architectures, bundled models and data sets."""
    from qtoolkit.errors import RequestError
    from qtoolkit.registry import suggest

    tables: dict[str, Callable[[], dict[str, str]]] = {
        "recipes": _recipes,
        "transforms": _transforms,
        "packers": _packers,
        "architectures": _architectures,
        "models": _models,
        "vision": _vision,
        "data": _data,
    }
    if what and what not in tables:
        raise RequestError(f"There is no list of {what!r}.", suggest(what, tables))
    found = {name: make() for name, make in tables.items() if what in ("", name)}
    if as_json:
        output.emit({"ok": True, **found})
        return
    for name, rows in found.items():
        output.result(name)
        width = max(map(len, rows), default=0)
        for row, about in rows.items():
            output.result(f"  {row:<{width}}  {about}".rstrip())


def _recipes() -> dict[str, str]:
    from qtoolkit.recipe import presets

    return {**presets(), **presets("vision")}


def _transforms() -> dict[str, str]:
    from qtoolkit.registry import transforms

    return transforms.targets()


def _packers() -> dict[str, str]:
    from qtoolkit.registry import packers

    return packers.targets()


def _architectures() -> dict[str, str]:
    from qtoolkit.architecture import table

    return {name: f"{len(row.targets)} layers a block, {len(row.groups)} groups" for name, row in table().items()}


def _models() -> dict[str, str]:
    from qtoolkit.source import BUNDLED

    return dict.fromkeys(BUNDLED, "bundled with qtoolkit")


def _vision() -> dict[str, str]:
    from qtoolkit.vision.models import table

    return {name: row.about for name, row in table().items()}


def _data() -> dict[str, str]:
    from qtoolkit.data import HUB

    return {"self": "text the model itself writes; needs no data"} | {name: row[0] for name, row in HUB.items()}
