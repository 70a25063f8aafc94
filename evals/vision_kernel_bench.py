"""Times binary and sparse vision layers in turns with dense float32 and int8, beside the machine's measured limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtoolkit.errors import QToolkitError
from qtoolkit.evals import kernel_bench
from qtoolkit.kernels import vision_layout as layout, vision_ops as ops
from qtoolkit.kernels.cpu.vision import library

ROUNDS = 5_000  # of a peak's loop: about a tenth of a millisecond
CACHE = 32 << 20  # bytes; less than this may still be in a cache when it is read again
GEOMETRY = ((3, 3), (1, 1), (1, 1), (1, 1))  # kernel, stride, padding, dilation
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One layer and its input: a 3x3 convolution, or a linear layer where ``size`` is 0 and images are tokens."""

    images: int
    channels: int
    n: int
    size: int = 0

    @property
    def name(self) -> str:
        """Return it in words."""
        if not self.size:
            return f"linear {self.channels} x {self.n}, {self.images} tokens"
        return f"conv {self.channels} x {self.n}, {self.size}x{self.size}, {self.images} images"

    @property
    def taps(self) -> int:
        """Return the places of the kernel."""
        return 9 if self.size else 1

    @property
    def k(self) -> int:
        """Return the length of a weight row."""
        return self.taps * self.channels

    @property
    def products(self) -> int:
        """Return the multiplications of the dense layer."""
        return self.images * self.n * self.k * max(1, self.size**2)

    @property
    def moved(self) -> int:
        """Return the bytes of input and output in float32."""
        return 4 * self.images * (self.channels + self.n) * max(1, self.size**2)


CASES = (
    Case(1, 64, 64, 56), Case(1, 128, 128, 28), Case(1, 256, 256, 14), Case(1, 512, 512, 7),  # ResNet-18, one image
    Case(32, 16, 16, 32), Case(32, 32, 32, 16), Case(32, 64, 64, 8),  # ResNet-20 on CIFAR-10
    Case(1, 4096, 4096), Case(64, 1024, 1024), Case(197, 768, 3072),  # the last: ViT's first, one image
)  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """A call to time, and what limits it: bits it compares, float operations, bytes it must read and write."""

    name: str
    call: Call
    bits: float = 0.0
    flops: float = 0.0
    moved: float = 0.0


def contestants(case: Case) -> list[Contestant]:
    """Make every contestant of a case from random weights."""
    generator = torch.Generator().manual_seed(case.k)
    shape = (case.images, case.channels, case.size, case.size) if case.size else (case.images, case.channels)
    x = torch.randn(*shape, generator=generator)
    weight = torch.randn(case.n, case.k, generator=generator)
    dense, flops = 4.0 * weight.numel() + case.moved, 2.0 * case.products
    made = [Contestant("fp32", _float(case, x, weight), flops=flops, moved=dense)]
    if (int8 := _int8(case, x, weight)) is not None:
        made.append(Contestant("int8", int8))
    binary = _binary(case, x, weight)
    made.append(Contestant("binary", binary, bits=case.products, moved=weight.numel() / 8 + case.moved))
    for name, rows, left in (("2:4", 1, 2), ("1:4", 1, 1), ("1x2-50%", 2, 2), ("1x16-50%", 16, 2), ("1x16-75%", 16, 1)):
        values, columns = _sparse(case, generator, rows, left)
        size = 4.0 * (values.numel() + columns.numel()) + case.moved
        call = _sparse_call(case, x, values, columns)
        made.append(Contestant(name, call, flops=flops * left / 4, moved=size))
    return made


def run(
    cases: tuple[Case, ...] = CASES, seconds: float = 2.0, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Time every contestant of every case.

    ``int8`` is oneDNN's product of already quantized tensors, without quantizing its input or its output's scales: more
    than any layer that takes and gives floats can reach. ``binary`` and the sparse layers take and give float32.

    Args:
        cases: layers with their inputs.
        seconds: time for one case, all contestants together; each runs five times at least.
        progress: called with a line at each case.

    Returns:
        ``limits`` {popcount_tbits, fma_gflops, bandwidth_gbs}, medians over the run; ``machine``; ``rows`` [{case,
        name, median_us, min_us, max_us, runs, against_fp32, against_int8, of_limit}]. ``against`` are medians of the
        ratios within a turn, times of the peer over ours; ``of_limit`` is the time that the probes taken between the
        same turns allow over the median time: that of the arithmetic or, where more bytes are read and written than
        a cache holds, of the memory.

    Raises:
        QToolkitError: the kernels do not run here.
    """
    if reason := library.failure():
        raise QToolkitError(f"The vision kernels do not run here: {reason}.", "See `qtoolkit doctor`.")
    rows: list[dict[str, Any]] = []
    seen: list[tuple[float, float, float]] = []
    memory = kernel_bench.limits()
    with torch.inference_mode():
        for case in cases:
            if progress:
                progress(case.name)
            made = contestants(case)
            times, probes = _in_turns(made, memory, seconds)
            seen += probes
            middle = _middle(probes)
            rows += [_row(case, one, times, middle) for one in made]
    names = ("popcount_tbits", "fma_gflops", "bandwidth_gbs")
    units = (1e12, 1e9, 1e9)
    limits = {name: value / unit for name, value, unit in zip(names, _middle(seen), units, strict=True)}
    own = library.describe()
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "path": own["path"]}
    return {"limits": limits, "machine": machine | {"counts_bits": own["counts_bits"]}, "rows": rows}


def _in_turns(
    made: list[Contestant], memory: kernel_bench.Limits | None, seconds: float
) -> tuple[dict[str, list[float]], list[tuple[float, float, float]]]:
    own = library.load()
    times: dict[str, list[float]] = {one.name: [] for one in made}
    probes: list[tuple[float, float, float]] = []
    for one in made:
        one.call()  # first calls build caches
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(probes) < 5:
        peaks = [own.functions.qtv_peak(own.path_id, sparse, ROUNDS) for sparse in (0, 1)]
        probes.append((peaks[0], peaks[1], memory.bandwidth() if memory else float("inf")))
        for one in made:
            one.call()  # not timed: whatever the contestant before left in caches and threads
            start = time.perf_counter()
            one.call()
            times[one.name].append(time.perf_counter() - start)
    return times, probes


def _middle(probes: list[tuple[float, float, float]]) -> tuple[float, ...]:
    return tuple(statistics.median(values) for values in zip(*probes, strict=True))


def _row(case: Case, one: Contestant, times: dict[str, list[float]], limits: tuple[float, ...]) -> dict[str, Any]:
    own = times[one.name]
    middle = statistics.median(own)
    moved = one.moved if one.moved > CACHE else 0.0
    allowed = max(one.bits / limits[0], one.flops / limits[1], moved / limits[2])

    def against(peer: str) -> float | None:
        return statistics.median(a / b for a, b in zip(times[peer], own, strict=True)) if peer in times else None

    return {
        "case": case.name, "name": one.name,
        "median_us": middle * 1e6, "min_us": min(own) * 1e6, "max_us": max(own) * 1e6, "runs": len(own),
        "against_fp32": against("fp32"), "against_int8": against("int8"),
        "of_limit": allowed / middle if allowed else None,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Render a result as text."""
    limits, machine = result["limits"], result["machine"]
    lines = [
        f"{machine['path']} path, {machine['threads']} threads; limits measured beside: "
        f"{limits['popcount_tbits']:.2f} Tbit/s compared, {limits['fma_gflops']:.0f} float32 GFLOPS, "
        f"{limits['bandwidth_gbs']:.1f} GB/s",
        f"{'case':<32} {'name':<9} {'median us':>10} {'min':>9} {'max':>9} {'x fp32':>7} {'x int8':>7} {'of limit':>8}",
    ]
    for row in result["rows"]:
        int8 = "" if row["against_int8"] is None else f"{row['against_int8']:.2f}"
        share = "" if row["of_limit"] is None else f"{row['of_limit']:.0%}"
        lines.append(
            f"{row['case']:<32} {row['name']:<9} {row['median_us']:>10.0f} {row['min_us']:>9.0f} {row['max_us']:>9.0f}"
            f" {row['against_fp32']:>7.2f} {int8:>7} {share:>8}"
        )
    return "\n".join(lines)


def _image_weight(case: Case, weight: Tensor) -> Tensor:
    return weight.view(case.n, 3, 3, case.channels).permute(0, 3, 1, 2).contiguous()


def _float(case: Case, x: Tensor, weight: Tensor) -> Call:
    if not case.size:
        return lambda: F.linear(x, weight)
    own = _image_weight(case, weight)
    return lambda: F.conv2d(x, own, None, 1, 1)


def _binary(case: Case, x: Tensor, weight: Tensor) -> Call:
    scale = torch.ones(case.n)
    if not case.size:
        words = layout.binary_linear(weight)
        return lambda: ops.binary_linear(x, words, scale)
    words, ones = layout.binary_conv(weight, 9)
    return lambda: ops.binary_conv2d(x, words, ones, scale, None, None, *GEOMETRY)


def _sparse(case: Case, generator: torch.Generator, rows: int, left: int) -> tuple[Tensor, Tensor]:
    """Return a random weight of which ``left`` quarters stay: in every four inputs, or in whole blocks of outputs."""
    if rows == 1:
        order = torch.rand(case.n, case.k // 4, 4, generator=generator).argsort(dim=2)[..., :left].sort(dim=2).values
        columns = (order + torch.arange(case.k // 4).unsqueeze(1) * 4).flatten(1)
    else:
        kept = case.channels * left // 4
        order = torch.rand(case.n // rows, case.channels, generator=generator).argsort(dim=1)[:, :kept]
        channels = order.sort(dim=1).values.unsqueeze(1)
        columns = (torch.arange(case.taps).view(1, -1, 1) * case.channels + channels).flatten(1)
    values = torch.randn(len(columns), columns.shape[1], rows, generator=generator)
    return layout.sparse_groups(values, columns, case.k)


def _sparse_call(case: Case, x: Tensor, values: Tensor, columns: Tensor) -> Call:
    if not case.size:
        return lambda: ops.sparse_linear(x, values, columns)
    return lambda: ops.sparse_conv2d(x, values, columns, None, *GEOMETRY)


def _int8(case: Case, x: Tensor, weight: Tensor) -> Call | None:
    """Return oneDNN's int8 product of quantized tensors, or None where torch has no such engine."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        return None
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        codes = torch.quantize_per_tensor(x, 0.05, 128, torch.quint8)
        scales, zeros = torch.full((case.n,), 0.05), torch.zeros(case.n, dtype=torch.int64)
        own = _image_weight(case, weight) if case.size else weight
        coded = torch.quantize_per_channel(own, scales, zeros, 0, torch.qint8)
        if case.size:
            packed = torch.ops.quantized.conv2d_prepack(coded, None, [1, 1], [1, 1], [1, 1], 1)
            return lambda: torch.ops.quantized.conv2d(codes, packed, 1.0, 128)
        packed = torch.ops.quantized.linear_prepack(coded, None)
        return lambda: torch.ops.quantized.linear(codes, packed, 1.0, 128)
    finally:
        torch.backends.quantized.engine = before
