"""lm-eval task definitions that read a local NAME.jsonl instead of a hub data set; one YAML file per task."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from qtoolkit.errors import DataError


def names() -> list[str]:
    """Return the tasks that have a definition here."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files(__name__).iterdir() if entry.name.endswith(".yaml")
    )


def definition(name: str, rows: Path) -> dict[str, Any]:
    """Return lm-eval's configuration of the task ``name`` with its documents read from the file ``rows``.

    Raises:
        DataError: the file is empty, not JSON lines, or a row lacks a field that the task needs.
    """
    task = yaml.safe_load((files(__name__) / f"{name}.yaml").read_text("utf-8"))
    documents = _read(rows, set(task["metadata"].pop("fields")))

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(documents)}

    return {"task": name, "test_split": "test", "custom_dataset": dataset, **task}


def _read(path: Path, fields: set[str]) -> list[dict[str, Any]]:
    documents = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from None
        if missing := sorted(fields - set(row)):
            raise DataError(
                f"{path}, line {number}: no field {', '.join(missing)}.", f"Needed: {', '.join(sorted(fields))}."
            )
        documents.append(row)
    if not documents:
        raise DataError(f"The task file {path} is empty.")
    return documents
