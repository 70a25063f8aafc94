"""What is measured: our backends, what torch ships, and other projects' W4A8 kernels when they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log2

import torch
from torch import Tensor

from qtoolkit.evals.gpu_bench.session import PATIENCE
from qtoolkit.kernels import folded, ops, reference, selection
from qtoolkit.kernels.selection import Grid, Problem

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Weight:
    """One random int4 layer: int8 codes [n, k] in -8..7 and fp32 scales [n, groups]."""

    codes: Tensor
    scales: Tensor
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n, k)."""
        n, k = self.codes.shape
        return n, k

    def dense(self) -> Tensor:
        """Return the weight in bfloat16 [n, k]."""
        n, k = self.shape
        grouped = self.codes.view(n, self.scales.shape[1], -1).float() * self.scales[:, :, None]
        return grouped.view(n, k).to(DTYPE)

    def packed(self) -> Tensor:
        """Return the checkpoint's layout: int32 [n, k / 8], low nibble first, stored with +8."""
        n, k = self.shape
        nibbles = (self.codes.to(torch.int32) + 8).view(n, k // 8, 8)
        words = nibbles[..., 0].clone()
        for i in range(1, 8):
            words |= nibbles[..., i] << 4 * i  # the last shift runs into the sign bit, as it must
        return words


def random_weight(n: int, k: int, group_size: int, device: str, seed: int = 0, fold: bool = False) -> Weight:
    """Draw a layer whose outputs have about unit size for inputs of unit size; ``fold``: its groups do, exactly."""
    random = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device, generator=random)
    groups = 1 if group_size == -1 else k // group_size
    if fold:  # multiples and bases of 4 bits each: their products are exact in the checkpoint's 8
        multiples = torch.randint(folded.LEAST, folded.MOST + 1, (n, groups), device=device, generator=random)
        base = torch.randint(8, 16, (n, 1), device=device, generator=random) * 2.0 ** (round(log2(0.2 / k**0.5)) - 7)
        return Weight(codes, multiples * base, group_size)
    scales = (0.5 + torch.rand(n, groups, device=device, generator=random)) * (0.2 / k**0.5)
    return Weight(codes, scales.to(DTYPE).float(), group_size)


# Given a layer, returns what runs it on tokens [m, k], or raises the reason why it cannot be.
Build = Callable[[Weight], Callable[[Tensor], Callable[[], object]]]


@dataclass(frozen=True)
class Contender:
    """One way to run a layer: ``build(weight)(x)`` gives a call without arguments, ``kind`` its place in the tables."""

    name: str
    kind: str  # "bf16", "w8a8", "w4a8" or "ours"
    build: Build
    group_size: int = -1
    whole: bool = True  # takes floats and gives the layer's result; else a part of the work
    most: int | None = None  # more tokens than these say nothing new
    of: str = ""  # whose kernels it runs, where those might break a run: "cuda", "triton" or a package
    patience: float = PATIENCE  # seconds that one point may take, compilation included
    fold: bool = False  # its layers' groups fold

    def draw(self, n: int, k: int, device: str, seed: int = 0) -> Weight:
        """Return a random layer of the kind that it runs."""
        return random_weight(n, k, self.group_size, device, seed, self.fold)


def ours(backend_name: str, grid: Grid = Grid.PLAIN) -> Build:
    """Return the operator with quantization on one backend."""

    def build(weight: Weight) -> Callable[[Tensor], Callable[[], object]]:
        backend = next(b for b in selection.backends() if b.name == backend_name and b.grid is grid)
        n, k = weight.shape
        problem = Problem(k, n, weight.group_size, DTYPE, weight.codes.device.type, grid)
        reason = backend.refuse(problem)
        if reason:
            raise RuntimeError(reason)
        own, scales = backend.prepare(weight.packed(), weight.scales, problem)
        return lambda x: lambda: ops.w4a8_linear(x, own, scales, None, n, weight.group_size, backend.layout)

    return build


def ours_by_hand(product_only: bool, grid: Grid = Grid.PLAIN) -> Build:
    """Return the Hopper product behind a quantizer of its own, or on tokens that are quantized already."""
    return lambda weight: _ours_by_hand(weight, product_only, grid)


def _ours_by_hand(weight: Weight, product_only: bool, grid: Grid) -> Callable[[Tensor], Callable[[], object]]:
    from qtoolkit.kernels.cuda import backend, plan

    n, k = weight.shape
    problem = Problem(k, n, weight.group_size, DTYPE, weight.codes.device.type, grid)
    if reason := backend.refuse(problem):
        raise RuntimeError(reason)
    own, scales = backend.prepare(weight.packed(), weight.scales, problem)

    def on(x: Tensor) -> Callable[[], object]:
        out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
        with backend.place_of(x) as place:
            quantized = backend.quantize(x, place, grid)
            grouped = backend.has_sums_of_groups(weight.group_size, grid)
            tiling = plan.choose(x.shape[0], n, k, grouped, place.card, place.multiprocessors)
            if tiling.fused:
                tiling = plan.estimate(x.shape[0], n, k, grouped, place.multiprocessors, fused=False)

        def call() -> Tensor:
            with backend.place_of(x) as here:
                codes, token_scales = quantized if product_only else backend.quantize(x, here, grid)
                backend.multiply(codes, token_scales, own, scales, None, out, weight.group_size, tiling, here, grid)
            return out

        return call

    return on


def torch_mm(weight: Weight) -> Callable[[Tensor], Callable[[], object]]:
    """Return bfloat16 ``torch.mm``: the yardstick."""
    dense = weight.dense().T
    return lambda x: lambda: torch.mm(x, dense)


def torch_int_mm(weight: Weight) -> Callable[[Tensor], Callable[[], object]]:
    """Return ``torch._int_mm`` on quantized tokens, without scaling; it takes no fewer than 17 tokens."""
    own = weight.codes.T

    def on(x: Tensor) -> Callable[[], object]:
        codes, _ = reference.quantize_tokens(x)
        codes = torch.nn.functional.pad(codes, (0, 0, 0, max(0, 32 - codes.shape[0])))
        return lambda: torch._int_mm(codes, own)

    return on


def torch_scaled_mm(weight: Weight) -> Callable[[Tensor], Callable[[], object]]:
    """Return fp8 ``torch._scaled_mm`` with row-wise scales, on tokens that are converted already."""
    own = weight.dense().to(torch.float8_e4m3fn).T
    columns = torch.ones(1, weight.shape[0], device=own.device)

    def on(x: Tensor) -> Callable[[], object]:
        tokens = x.to(torch.float8_e4m3fn)
        rows = torch.ones(x.shape[0], 1, device=x.device)
        return lambda: torch._scaled_mm(
            tokens, own, scale_a=rows, scale_b=columns, out_dtype=DTYPE, use_fast_accum=True
        )

    return on


def humming(product_only: bool) -> Build:
    """Return humming-kernels' int8-activation W4A8 with its own heuristics; raises ImportError without the package."""

    def build(weight: Weight) -> Callable[[Tensor], Callable[[], object]]:
        from humming.layer import HummingLayer  # type: ignore[import-not-found, unused-ignore]

        n, k = weight.shape
        config = {"dtype": "int4", "group_size": 0 if weight.group_size == -1 else weight.group_size}
        layer = HummingLayer(n, k, weight_config=config, input_config={"dtype": "int8"}, torch_dtype=DTYPE).cuda()
        layer.load_from_unquantized(weight.dense())
        layer.transform()

        def on(x: Tensor) -> Callable[[], object]:
            if not product_only:
                return lambda: layer(x)
            codes, scales = reference.quantize_tokens(x)
            return lambda: layer(codes, input_scale=scales)

        return on

    return build


def gemlite(weight: Weight) -> Callable[[Tensor], Callable[[], object]]:
    """Return gemlite's int8-activation W4 layer with quantization; raises ImportError without the package."""
    from gemlite.core import DType, GemLiteLinearTriton  # type: ignore[import-not-found, unused-ignore]

    n, k = weight.shape
    layer = GemLiteLinearTriton(4, k, k, n, DType.INT8, DType.BF16, scaled_activations=True)
    layer.pack((weight.codes + 8).to(torch.uint8), weight.scales[:, :1].to(DTYPE), 8, fma_mode=False)
    layer.W_group_mode, layer.channel_scale_mode = 1, 3
    return lambda x: lambda: layer(x)


COMPILES = 120.0  # seconds that a peer may take to compile and tune itself at one point
OURS = Contender("ours", "ours", ours("cuda"), of="cuda")
OURS_GROUPED = Contender("ours g128", "ours", ours("cuda"), 128, of="cuda")
OURS_FOLDED = Contender("ours g128 folded", "ours", ours("cuda", Grid.FOLDED), 128, of="cuda", fold=True)
TWO_LAUNCHES = Contender("ours, two launches", "ours", ours_by_hand(product_only=False), most=16, of="cuda")
YARDSTICK = Contender("torch.mm bf16", "bf16", torch_mm)
HUMMING = Contender("humming", "w4a8", humming(product_only=False), of="humming", patience=COMPILES)
CONTENDERS = (
    YARDSTICK,
    OURS,
    OURS_GROUPED,
    OURS_FOLDED,
    TWO_LAUNCHES,
    Contender("ours, product", "ours", ours_by_hand(product_only=True), whole=False, of="cuda"),
    Contender("ours g128, product", "ours", ours_by_hand(product_only=True), 128, whole=False, of="cuda"),
    replace(OURS_FOLDED, name="ours g128 folded, product", build=ours_by_hand(True, Grid.FOLDED), whole=False),
    Contender("torch._scaled_mm fp8", "w8a8", torch_scaled_mm, whole=False),
    Contender("torch._int_mm", "w8a8", torch_int_mm, whole=False),
    # the codes are random, so a chained layer is another layer: its results are checked, not compared
    Contender("ours chained", "ours", ours("cuda", Grid.CHAINED), whole=False, of="cuda"),
    Contender(
        "ours chained, product", "ours", ours_by_hand(product_only=True, grid=Grid.CHAINED), whole=False, of="cuda"
    ),
    Contender("ours, triton", "ours", ours("triton"), of="triton"),
    HUMMING,
    replace(HUMMING, name="humming, product", build=humming(product_only=True), whole=False),
    replace(HUMMING, name="humming g128", group_size=128),
    Contender("gemlite", "w4a8", gemlite, of="gemlite", patience=COMPILES),
)
ON_A_CPU = (
    YARDSTICK,
    Contender("ours", "ours", ours("reference")),
    Contender("torch._int_mm", "w8a8", torch_int_mm, whole=False),
)
# What each needs that torch does not bring: contender's first word to the module that is looked for.
PACKAGES = {"humming": "humming", "gemlite": "gemlite", "ours, triton": "triton"}
