"""Where a model comes from: the bundled one, a local folder, or the Hugging Face hub; read lazily, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtoolkit.errors import ModelError, NumericError, RequestError, said

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = ("tiny",)
STRETCH = 1 << 24  # bytes of a file that are hashed together
HASHERS = 8  # threads that hash, at most
AT_ONCE = 1 << 22  # numbers of a tensor that are looked at together
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]  # never *.bin: pickles run code


@dataclass(frozen=True)
class Source:
    """A model folder on this disk, and the name and revision a report should give it."""

    path: Path
    name: str
    revision: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return config.json as it stands."""
        return read_json(self.path / "config.json")

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what reading this source changes in the model beyond its weights, for the user and the manifest."""
        return ()

    @cached_property
    def files(self) -> dict[str, Path]:
        """Return the file of every stored tensor.

        Raises:
            ModelError: no safetensors, a missing or truncated file.
        """
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index} has no weight_map of tensors to files.", "Download it again.")
            shards = sorted({self.path / str(name) for name in weight_map.values()})
        else:
            shards = sorted(self.path.glob("*.safetensors"))
        if not shards:
            pickles = sorted(path.name for path in self.path.glob("*.bin"))
            if pickles:
                raise ModelError(
                    f"{self.name} has only pickled weights ({pickles[0]}), which can run code when they are read.",
                    "Convert it: load it with transformers and call save_pretrained.",
                )
            raise ModelError(f"{self.name} has no *.safetensors weights.", "Is this a complete model folder?")
        return {tensor: shard for shard in shards for tensor in _tensor_names(shard)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every stored tensor, read from the files' headers."""
        found: dict[str, tuple[int, ...]] = {}
        for shard in sorted(set(self.files.values())):
            with _open(shard) as handle:
                found |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        return found

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            ModelError: the model has no tensor of that name.
        """
        if name not in self.files:
            raise ModelError(f"{self.name} has no tensor {name}.", "The model folder is incomplete.")
        with _open(self.files[name]) as handle:
            return handle.get_tensor(name)

    def read_finite(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Return one tensor, or the ``rows`` (int64) of it, in float32.

        Raises:
            NumericError: it holds NaN or Inf, in whatever row; it is looked through when first read.
        """
        import torch

        tensor = self.read(name)
        if name not in self._finite:
            parts = tensor.flatten().split(AT_ONCE) if tensor.numel() else ()
            if not all(math.isfinite(extreme) for part in parts for extreme in part.aminmax()):  # faster than isfinite
                bad = sum(int((~part.isfinite()).sum()) for part in parts)
                values = f"{bad} values that are NaN or Inf"
                raise NumericError(f"{self.name}: {name} holds {values}.", "The weights are damaged.")
            self._finite.add(name)
        chosen = tensor if rows is None else tensor[rows]
        return chosen.to(torch.float32, copy=True)  # float32 would be the file itself, and blocks are changed in place

    @cached_property
    def _finite(self) -> set[str]:
        """Return which tensors have been looked through: a block is read several times in a run."""
        return set()

    @property
    def bytes(self) -> int:
        """Return the size of the weight files in bytes."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def digest(self) -> str:
        """Return 12 hex digits of the content of config.json and every weight file, as first read."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        state = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        with ThreadPoolExecutor(min(HASHERS, os.cpu_count() or 1)) as pool:
            for path in sorted(set(self.files.values())):
                for part in pool.map(partial(_hashed, path), range(0, path.stat().st_size, STRETCH)):
                    state.update(part)
        return state.hexdigest()[:12]


def _hashed(path: Path, start: int) -> bytes:
    """Return the hash of ``STRETCH`` bytes of a file from ``start`` on, or of fewer at its end."""
    state, left = hashlib.sha256(), STRETCH
    chunk = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(chunk[:left])):
            state.update(chunk[:count])
            left -= count
    return state.digest()


def resolve(model: str | Path) -> Source:
    """Find ``model``: a bundled name, a folder, or a hub name such as ``org/name`` (optionally ``org/name@revision``).

    Raises:
        RequestError: there is no such folder or hub model.
        ModelError: the hub cannot be reached, or the folder has no config.json.
    """
    text = str(model)
    if text in BUNDLED:
        return Source(Path(str(files("qtoolkit") / "models" / text)), text)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {path} has no config.json.", "Give a Hugging Face model folder.")
        return Source(path, text)
    if path.is_file() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise RequestError(
            f"There is no model {text!r}: no such folder, and not a hub name.",
            f"Give a folder, a hub name like org/name, or {', '.join(BUNDLED)}.",
        )
    return _download(text)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> Path:
    """Save a loaded model in ``folder``, so that it is read as any other; the folder's name is the model's.

    Raises:
        RequestError: there is no tokenizer to go with it.
    """
    if tokenizer is None:
        raise RequestError("A loaded model was given without its tokenizer.", "Add tokenizer=..., or give its folder.")
    path = folder / (Path(model.config.name_or_path or "model").name or "model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _download(name: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repo, _, revision = name.partition("@")
    try:
        path = Path(snapshot_download(repo, revision=revision or None, allow_patterns=PATTERNS))
    except GatedRepoError:
        raise ModelError(f"The hub model {repo} needs an accepted licence.", "Run `hf auth login` first.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise RequestError(f"The hub has no model {repo!r}.", "Check the spelling, or give a local folder.") from None
    except (OSError, HfHubHTTPError) as error:  # offline, time-out, disk
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = "it is not in the cache, and the hub cannot be reached." if offline else said(error)
        raise ModelError(
            f"The hub model {repo} could not be downloaded: {reason}",
            "Without network, give a local folder, or `tiny`, the bundled model.",
        ) from None
    return Source(path, name, revision=path.name)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder.

    Raises:
        ModelError: the file cannot be read, or holds none.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {said(error)}.", "Download it again.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object.", "Download it again.")
    return found


def _tensor_names(path: Path) -> Iterator[str]:
    with _open(path) as handle:
        yield from handle.keys()


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"The weight file {path} named by the index is missing.", "Download it again.") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"The weight file {path} is damaged or truncated: {said(error)}.", "Download it again."
        ) from None
