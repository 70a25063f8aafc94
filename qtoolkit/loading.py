"""`qtoolkit.load`: a checkpoint of either kind, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtoolkit import checkpoint, runtime
from qtoolkit.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qtoolkit.vision.runtime import Loaded


def load(path: str | Path, **options: Any) -> PreTrainedModel | Loaded:
    """Load a language model (see ``qtoolkit.runtime.load``, which takes the options) or an image classifier.

    Raises:
        RequestError: no such folder, or options for an image classifier, which has none.
        CheckpointError: the folder is damaged.
    """
    folder = Path(path).expanduser()
    if not (folder / checkpoint.MANIFEST).is_file() or checkpoint.read_manifest(folder).kind != "vision":
        return runtime.load(path, **options)
    if options:
        raise RequestError(f"{folder} is an image classifier, which has no option {sorted(options)[0]}.", "Drop it.")
    from qtoolkit.vision import runtime as vision

    return vision.load(folder)
