"""The peers of the quality bench: which there are, and the contract that each of them keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        module: the file of this folder that runs it.
        about: what it is, for the table's legend.
        options: what the file is told beyond model, tokens, group size and seed.
    """

    module: str
    about: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


SYMMETRIC = "codes -8..7, scale absmax / 7.5"

PEERS = {
    "rtn": Peer("rtn", f"round to nearest; {SYMMETRIC}"),
    "qtoolkit": Peer("ours", "this package, recipe w4a8", {"recipe": "w4a8"}),
    "llmcompressor": Peer("llmcompressor", f"SmoothQuant 0.8, then GPTQ with static order; {SYMMETRIC}"),
    "llmcompressor-spinquant": Peer(
        "llmcompressor", f"rotations R1 and R2, then GPTQ with static order; {SYMMETRIC}", {"transform": "rotate"}
    ),
    "qqq-smooth": Peer(
        "qqq", "official QQQ: smoothing, GPTQ; groups -8..7 with int8 second level, channel -7..7", {"smooth": True}
    ),
    "qqq-rotate": Peer(
        "qqq", "official QQQ: Hadamard rotation, GPTQ with mse; a tied head is untied before", {"rotate": True}
    ),
    "qqq-rotate-tied": Peer(
        "qqq",
        "the same with the model as it comes: tied embeddings stay tied",
        {"rotate": True, "untie": False},
    ),
    "torchao": Peer("torchao", f"int8 dynamic activations, int4 weights, no calibration; {SYMMETRIC}"),
    "autoround": Peer("autoround", "signed gradient descent, 200 steps a block, int8 activations declared"),
    "gptqmodel": Peer("gptqmodel", f"GPTQ; its int4 weights under int8 activations; {SYMMETRIC}"),
}
