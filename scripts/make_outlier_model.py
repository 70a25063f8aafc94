"""Writes a Llama that computes the same as another one, but whose activations have the outliers of large models.

    python scripts/make_outlier_model.py tiny FOLDER [--share 0.02] [--scales 32 64] [--seed 0]

In every block a share of the channels that its norms, v_proj and up_proj write is scaled up, and whoever reads them is
scaled down as much. The same channels of the hidden stream are taken in all blocks, as large models have them. Scales
are powers of two, which no float format rounds: the float logits keep every bit, and only a quantizer sees a
difference. The last norm is left alone: its reader, the head, is the embedding where the two are tied.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qtoolkit import source
from qtoolkit.checkpoint import copy_companions, write_json
from qtoolkit.source import Source

SCALES = (32.0, 64.0)


def outlier_scales(channels: int, share: float, scales: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """Return float32 [channels]: 1, but one of ``scales`` at the drawn channels, at least at one."""
    found = torch.ones(channels)
    count = max(1, round(share * channels))
    picks = torch.randint(len(scales), (count,), generator=generator)
    found[torch.randperm(channels, generator=generator)[:count]] = torch.tensor(scales)[picks]
    return found


def add_outliers(
    tensors: dict[str, Tensor], config: dict[str, Any], share: float, scales: tuple[float, ...], seed: int
) -> None:
    """Scale channels of every block in place; the function that the tensors compute stays the same.

    Args:
        tensors: all of a Llama's, by name.
        config: its config.json.
        share: of the channels that become outliers.
        scales: to draw from, powers of two.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = config["num_attention_heads"]
    groups = heads // (config.get("num_key_value_heads") or heads)  # query heads that read one key-value head
    hidden = {
        norm: outlier_scales(config["hidden_size"], share, scales, generator)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        value, up = tensors[f"{block}.self_attn.v_proj.weight"], tensors[f"{block}.mlp.up_proj.weight"]
        s_value = outlier_scales(len(value), share, scales, generator)  # [kv heads x head dim]
        s_up = outlier_scales(len(up), share, scales, generator)
        per_head = s_value.view(-1, 1, len(value) * groups // heads)  # [kv heads, 1, head dim]
        moves = [
            ("input_layernorm", hidden["input_layernorm"], [f"self_attn.{name}_proj" for name in "qkv"]),
            ("post_attention_layernorm", hidden["post_attention_layernorm"], ["mlp.gate_proj", "mlp.up_proj"]),
            ("self_attn.v_proj", s_value, []),
            ("mlp.up_proj", s_up, ["mlp.down_proj"]),
        ]
        for producer, scale, consumers in moves:
            for part in ("weight", "bias"):
                if (name := f"{block}.{producer}.{part}") in tensors:
                    shape = (-1, *[1] * (tensors[name].dim() - 1))
                    tensors[name] = tensors[name] * scale.view(shape).to(tensors[name].dtype)
            for consumer in consumers:
                _divide_columns(tensors, f"{block}.{consumer}.weight", scale)
        _divide_columns(tensors, f"{block}.self_attn.o_proj.weight", per_head.expand(-1, groups, -1).reshape(-1))


def write(model: Source, folder: Path, share: float, scales: tuple[float, ...], seed: int) -> None:
    """Write the outlier variant of ``model`` into a new folder.

    Raises:
        FileExistsError: there is such a folder.
        ValueError: a scale is not a power of two.
    """
    if any(math.frexp(scale)[0] != 0.5 for scale in scales):
        raise ValueError(f"Scales must be powers of two, not {scales}: others would round the weights.")
    tensors = {name: model.read(name) for name in model.files}
    add_outliers(tensors, model.config, share, scales, seed)
    folder.mkdir(parents=True)
    copy_companions(model.path, folder)
    write_json(folder / "config.json", model.config)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def _divide_columns(tensors: dict[str, Tensor], name: str, scale: Tensor) -> None:
    tensors[name] = tensors[name] / scale.to(tensors[name].dtype)


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Llama: folder, hub name, or tiny")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.02, help="of the channels")
    parser.add_argument("--scales", type=float, nargs="+", default=list(SCALES))
    parser.add_argument("--seed", type=int, default=0)
    own = parser.parse_args()
    write(source.resolve(own.model), own.folder, own.share, tuple(own.scales), own.seed)
    print(f"{own.folder}: {own.share:.1%} of the channels scaled by {', '.join(f'{scale:g}' for scale in own.scales)}")


if __name__ == "__main__":
    main()
