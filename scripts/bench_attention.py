"""Times attention of a prompt in bfloat16: ours, vLLM's own for CPUs and torch's, in turns, beside the peak.

    python scripts/bench_attention.py [--tokens 512 1024] [--cached 0] [--heads 32] [--key-heads 4] [--dim 64] [--json]

One layer, one sequence; --cached tokens of it are in the cache already. `of peak` counts both products of a causal
triangle, without the softmax. vLLM's operator is the one of the machine's instruction set, as a server chooses it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtoolkit.kernels.cpu.attention import library

PAGE = 128


@dataclass(frozen=True)
class Layer:
    """One layer's tensors: query [new, heads, dim], keys and values [tokens, key heads, dim], and the cache of them."""

    query: Tensor
    keys: Tensor
    values: Tensor
    cache: Tensor  # [pages, key heads, page, 2 dim], as job.h draws it
    table: Tensor
    starts: Tensor
    lengths: Tensor

    @property
    def scale(self) -> float:
        """Return what scores are multiplied with."""
        return float(self.query.shape[2] ** -0.5)

    @property
    def operations(self) -> float:
        """Return additions and multiplications of both products, of the keys that queries see."""
        new, heads, dim = self.query.shape
        total = self.keys.shape[0]
        return 4.0 * heads * dim * (new * (total - new) + new * (new + 1) / 2)


def make(new: int, cached: int, heads: int, key_heads: int, dim: int) -> Layer:
    """Return a layer of random numbers."""
    total = new + cached
    pages = -(-total // PAGE)
    query, keys, values = (
        torch.randn(n, h, dim).bfloat16() for n, h in ((new, heads), (total, key_heads), (total, key_heads))
    )
    padded = torch.zeros(2, pages * PAGE, key_heads, dim, dtype=torch.bfloat16)
    padded[0, :total], padded[1, :total] = keys, values
    by_page = padded.view(2, pages, PAGE, key_heads, dim)
    cache = torch.stack([by_page[0].permute(0, 2, 3, 1).flatten(2), by_page[1].transpose(1, 2).flatten(2)], dim=2)
    whole = torch.tensor([total], dtype=torch.int32)
    starts, table = torch.tensor([0, new], dtype=torch.int32), torch.arange(pages, dtype=torch.int32)[None]
    return Layer(query, keys, values, cache.view(pages, key_heads, PAGE, 2 * dim), table, starts, whole)


def ours(layer: Layer) -> Callable[[], Tensor]:
    """Return our attention of a layer."""
    output = torch.empty_like(layer.query)

    def run() -> Tensor:
        library.attend(layer.query, layer.cache, output, layer.table, layer.starts, layer.lengths, layer.scale)
        return output

    return run


def torchs(layer: Layer) -> Callable[[], Tensor]:
    """Return torch's, which knows no cache; it takes part where all tokens are new."""
    query, keys, values = (x.transpose(0, 1)[None] for x in (layer.query, layer.keys, layer.values))

    def run() -> Tensor:
        made = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
        return made[0].transpose(0, 1)

    return run


def vllms(layer: Layer) -> Callable[[], Tensor]:
    """Return vLLM's operator over a cache that it has written itself."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    _, heads, dim = layer.query.shape
    _, key_heads, page, both = layer.cache.shape
    isa = _get_attn_isa(torch.bfloat16, page, dim)
    if isa == "amx":
        torch.cpu._init_amx()  # asks the system for the tile registers; linear layers of a server have by then
    keys, values = torch.zeros_like(layer.cache).view(-1, key_heads, 2 * page, both // 2).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(layer.keys, layer.values, keys, values, torch.arange(layer.keys.shape[0]), isa)
    shape: dict[str, Any] = {"num_reqs": 1, "num_heads": heads, "num_kv_heads": key_heads, "head_dim": dim}
    plan = ops.cpu_attn_get_scheduler_metadata(
        **shape, seq_lens=layer.lengths, dtype=torch.bfloat16, query_start_loc=layer.starts, causal=True,
        sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    output = torch.empty_like(layer.query)

    def run() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            layer.query, keys, values, output, layer.starts, layer.lengths, layer.scale, True, None, -1, layer.table,
            0.0, plan, None,
        )  # fmt: skip
        return output

    return run


def times(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of every contestant, one of each a round, after one round that does not count."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                spent[name].append(time.perf_counter() - start)
    return spent


def main() -> None:
    """Parse the command line, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024], help="queries")
    parser.add_argument("--cached", type=int, default=0, help="tokens before them")
    for name, value in (("--heads", 32), ("--key-heads", 4), ("--dim", 64), ("--rounds", 20)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--json", action="store_true")
    own = parser.parse_args()
    rows = []
    for new in own.tokens:
        layer = make(new, own.cached, own.heads, own.key_heads, own.dim)
        runs = {"qtoolkit": ours(layer), "vllm": vllms(layer), **({} if own.cached else {"torch": torchs(layer)})}
        expected = runs["vllm"]().float()
        for name, run in runs.items():
            if not torch.allclose(run().float(), expected, atol=0.03):  # values are about 1, so bfloat16 ends at 0.008
                raise SystemExit(f"{name} computes something else")
        for name, seconds in times(runs, own.rounds).items():
            peak = library.load().qta_dot_peak(1 << 17)
            middle = statistics.median(seconds)
            row = {"name": name, "tokens": new, "cached": own.cached, "median_us": middle * 1e6}
            rows.append({**row, "min_us": min(seconds) * 1e6, "of_peak": layer.operations / min(seconds) / peak})
    if own.json:
        print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))
        return
    for row in rows:
        print("{tokens:5} tokens {name:9} {median_us:9.0f} us {min_us:8.0f} least {of_peak:6.1%} of peak".format(**row))


if __name__ == "__main__":
    main()
