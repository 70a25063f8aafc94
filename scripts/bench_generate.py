"""Times transformers' generate() on a float model in bfloat16 and on the same model with W4A8 layers, in turns.

    python scripts/bench_generate.py FOLDER [--rounds 3] [--tokens 32] [--prompt 512] [--lm-head int8] [--json]

The W4A8 twin is rounded to nearest in groups of 128 where it stands, so FOLDER can be any Llama-like model, also one of
`make_random_llama.py`. Both are in memory at once and take turns within a round; rates are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtoolkit import runtime
from qtoolkit.packing.int4 import pack_int4
from qtoolkit.runtime import W4A8Linear
from qtoolkit.scheme import Head, Scheme

SCHEME = Scheme(group_size=128)


def w4a8(layer: nn.Linear) -> W4A8Linear:
    """Return a layer rounded to nearest."""
    n, k = layer.weight.shape
    grouped = layer.weight.float().view(n, -1, SCHEME.group_size)
    scales = (grouped.abs().amax(2, keepdim=True) / 7).bfloat16().float().clamp_min(1e-30)
    codes = (grouped / scales).round().clamp(-8, 7).to(torch.int8).view(n, k)
    return W4A8Linear(pack_int4(codes), scales.squeeze(2), layer.bias, k, SCHEME, layer.weight.dtype)


@torch.inference_mode()
def twin(model: Any, head: Head) -> Any:
    """Return the model with W4A8 layers; everything else is shared with the original."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    made = copy.deepcopy(model, shared)
    for name, layer in list(made.model.named_modules()):
        if isinstance(layer, nn.Linear):
            made.model.set_submodule(name, w4a8(layer))
    runtime.quantize_head(made, head)
    return made


@torch.inference_mode()
def seconds(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Return how long ``tokens`` greedy tokens take."""
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start


def main() -> None:
    """Parse the command line, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--lm-head", default="float", choices=[word.value for word in Head])
    parser.add_argument("--json", action="store_true")
    own = parser.parse_args()
    model = runtime.load(own.folder, dtype=torch.bfloat16)
    models = {"bf16": model, "w4a8": twin(model, Head(own.lm_head))}
    long = torch.randint(3, model.config.vocab_size, (1, own.prompt), generator=torch.Generator().manual_seed(0))
    rates: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for one in models.values():
        seconds(one, long[:, :16], 2)  # allocates, warms the caches
    for _ in range(own.rounds):
        for name, one in models.items():
            rates[name]["prefill"].append(own.prompt / seconds(one, long, 1))
            first = seconds(one, long[:, :16], 1)
            rates[name]["decode"].append((own.tokens - 1) / (seconds(one, long[:, :16], own.tokens) - first))
    middle = {name: {key: statistics.median(values) for key, values in row.items()} for name, row in rates.items()}
    if own.json:
        print(json.dumps({"rows": middle, "all": rates}))
        return
    for key in ("prefill", "decode"):
        each = [ours / theirs for ours, theirs in zip(rates["w4a8"][key], rates["bf16"][key], strict=True)]
        print(
            f"{key}: bf16 {middle['bf16'][key]:.1f}, W4A8 {middle['w4a8'][key]:.1f} tokens a second; "
            f"{statistics.median(each):.2f} times ({min(each):.2f} to {max(each):.2f})"
        )


if __name__ == "__main__":
    main()
