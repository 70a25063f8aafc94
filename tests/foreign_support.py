"""Checkpoints as other tools write them, packed here element by element from the published formulas."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 128


@dataclass(frozen=True)
class Drawn:
    """A layer's codes int8 [n, k] in -8..7 and scales [n, groups]."""

    codes: Tensor
    scales: Tensor

    @property
    def weight(self) -> Tensor:
        """Return what they stand for, float32 [n, k]."""
        size = self.codes.shape[1] // self.scales.shape[1]
        return self.codes.float() * self.scales.float().repeat_interleave(size, dim=1)


Write = Callable[[Drawn], Mapping[str, Tensor]]


def write(base: Path, folder: Path, config: Mapping[str, Any], layer: Write, group: int = GROUP) -> dict[str, Drawn]:
    """Write the float model ``base`` as a checkpoint whose blocks' linear layers have drawn codes; return these."""
    shutil.copytree(base, folder)
    stored = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Drawn] = {}
    for name in sorted(stored):
        if name.endswith("_proj.weight"):
            n, k = stored.pop(name).shape
            codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
            groups = 1 if group == -1 else k // group
            scales = (torch.rand(n, groups, generator=generator) * 0.02 + 0.002).half()
            drawn[name.removesuffix(".weight")] = Drawn(codes, scales)
    for name, weight in drawn.items():
        stored |= {f"{name}.{part}": tensor.contiguous() for part, tensor in layer(weight).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=dict(config), dtype="float16")
    return drawn


def change_config(folder: Path, **values: Any) -> None:
    """Set values in a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change what a folder's one weight file holds."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def words(nibbles: np.ndarray) -> np.ndarray:
    """Pack numbers 0..15 [rows, 8 * columns] into int32 [rows, columns], the first one lowest."""
    packed = np.zeros((nibbles.shape[0], nibbles.shape[1] // 8), dtype=np.uint32)
    for place in range(8):
        packed |= nibbles[:, place::8].astype(np.uint32) << np.uint32(4 * place)
    return packed.view(np.int32)


def gptq(layer: Drawn, zero: int = 8, minus: int = 1, order: Tensor | None = None) -> dict[str, Tensor]:
    """Return a layer as AutoGPTQ writes it: code + zero, the zero points stored minus 1; ``order``: its g_idx."""
    n, k = layer.codes.shape
    groups = layer.scales.shape[1]
    stored = (layer.codes.numpy().astype(np.int64) + zero).clip(0, 15)
    return {
        "qweight": torch.from_numpy(words(stored).T.copy()),
        "qzeros": torch.from_numpy(words(np.full((groups, n), zero - minus))),
        "scales": layer.scales.t(),
        "g_idx": torch.arange(k, dtype=torch.int32) // (k // groups) if order is None else order,
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}


def qqq(layer: Drawn) -> dict[str, Tensor]:
    """Return a layer as the original QQQ code writes it: its index map, and largest weight / 127 as channel scale."""
    (n, k), groups = layer.codes.shape, layer.scales.shape[1]
    nibbles = np.zeros((k // 16, 2 * n * 8), dtype=np.int64)
    for row in range(k):
        for column in range(n):
            t, b = row % 4, column % 16 // 8
            word = 128 * (column // 64) + 16 * (column % 8) + 4 * (row % 16 // 4) + column % 64 // 16
            code = int(layer.codes[column, row])
            if groups > 1:
                nibbles[row // 16, word * 8 + 4 * (t % 2) + 2 * b + t // 2] = code + 8
            else:
                nibbles[row // 16, word * 8 + 2 * t + 1 - b] = code & 0xF
    channel = torch.empty(1, n)
    group = torch.empty(groups, n, dtype=torch.float16)
    extra = layer.weight.abs().amax(dim=1) / 127 if groups > 1 else layer.scales.float()[:, 0] / 16
    for column in range(n):
        channel[0, column // 32 * 32 + 8 * (column % 8 // 2) + 2 * (column % 32 // 8) + column % 2] = extra[column]
        place = column // 64 * 64 + 8 * (column % 8) + column % 64 // 8
        group[:, place] = (layer.scales[column].float() / extra[column]).half()
    packed = {"B": torch.from_numpy(words(nibbles)), "s_channel": channel}
    return packed if groups == 1 else {**packed, "s_group": group}
