"""Which device a command works on."""

from __future__ import annotations

import torch

from qtoolkit.errors import RequestError

AUTO = "auto"  # the GPU where there is one
CPU = torch.device("cpu")
WORDS = (AUTO, "cpu", "cuda")


def choose(wanted: str | None = AUTO) -> torch.device:
    """Return the device that ``wanted`` means: "auto" (or None), "cpu", "cuda", or one GPU such as "cuda:1".

    Raises:
        RequestError: the word is unknown, or there is no such GPU.
    """
    if wanted in (None, "", AUTO):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(wanted))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in WORDS:
        raise RequestError(f"{wanted!r} is not a device.", f"Known: {', '.join(WORDS)}, cuda:0 ...")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise RequestError(f"There is no {device}: torch sees {count} CUDA devices.", "Use --device cpu.")
    return device
