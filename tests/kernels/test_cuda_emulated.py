"""The CUDA kernels' own text, run on the CPU by emulating the instructions it uses, against the exact reference."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from qtoolkit.kernels import chained, folded, ops, reference, selection
from qtoolkit.kernels.cuda import backend, compiler, layout, source
from qtoolkit.kernels.cuda.source import Tiling
from qtoolkit.kernels.selection import Grid, Problem
from qtoolkit.packing.int4 import pack_int4

from .cuda_emulator import COMPILER, Emulator

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"))


@dataclasses.dataclass
class Layer:
    """Random tokens and weights, prepared; ``seed`` also orders the emulated copies."""

    tokens: int
    n: int
    k: int
    group_size: int = -1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    grid: Grid = Grid.PLAIN

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        self.x = torch.randn(self.tokens, self.k, generator=random).to(self.dtype)
        self.codes = torch.randint(-8, 8, (self.n, self.k), generator=random, dtype=torch.int8)
        groups = 1 if self.group_size == -1 else self.k // self.group_size
        self.scales = torch.rand(self.n, groups, generator=random) * 0.02 + 0.001
        if self.grid is Grid.FOLDED:
            multiples = torch.randint(folded.LEAST, folded.MOST + 1, (self.n, groups), generator=random)
            self.scales = multiples * 2.0**-13 * torch.randint(8, 16, (self.n, 1), generator=random)
        self.bias = torch.randn(self.n, generator=random).to(self.dtype)

    def want(self) -> torch.Tensor:
        linear = {Grid.PLAIN: reference, Grid.CHAINED: chained, Grid.FOLDED: folded}[self.grid].w4a8_linear
        return linear(self.x, self.codes, self.scales, self.bias, self.group_size)


def quantized(emulator: Emulator, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    return backend.quantize(layer.x, emulator.place(), layer.grid)


def product(emulator: Emulator, layer: Layer, tiling: Tiling) -> torch.Tensor:
    weight, scales = layout.prepare(pack_int4(layer.codes), layer.scales, layer.k, layer.group_size, layer.grid)
    out = torch.full((layer.tokens, layer.n), torch.nan, dtype=layer.dtype)
    rest = (weight, scales, layer.bias, out, layer.group_size, tiling, emulator.place(), layer.grid)
    emulator.seed = layer.seed
    if tiling.fused:
        emulator.tensors = [weight, scales]
        backend.multiply_floats(layer.x, *rest)
    else:
        codes, token_scales = quantized(emulator, layer)
        emulator.tensors = [codes, weight, scales]
        backend.multiply(codes, token_scales, *rest)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "k"), [(1, 8), (9, 520), (3, 8448)])
def test_the_quantizer_gives_the_references_bits(emulator: Emulator, dtype: torch.dtype, tokens: int, k: int) -> None:
    layer = Layer(tokens, 8, k, dtype=dtype)
    layer.x[0] *= 1e-3
    codes, scales = quantized(emulator, layer)
    want_codes, want_scales = reference.quantize_tokens(layer.x)
    assert torch.equal(codes[:, :tokens], layout.to_swizzled(want_codes)[:, :tokens])
    assert torch.equal(scales[0, :tokens], want_scales[:, 0])


def test_zero_and_non_finite_rows_follow_the_references_rule(emulator: Emulator) -> None:
    layer = Layer(4, 8, 128)
    layer.x[0], layer.x[1, 5], layer.x[2, 7] = 0, torch.nan, -torch.inf
    codes, scales = quantized(emulator, layer)
    want_codes, want_scales = reference.quantize_tokens(layer.x)
    assert torch.equal(codes[:, :4], layout.to_swizzled(want_codes)[:, :4])
    assert torch.equal(scales[0, :4].nan_to_num(-1), want_scales[:, 0].nan_to_num(-1))
    assert scales[0, :4].isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("grid", Grid)
@pytest.mark.parametrize("k", [520, 8448])
def test_the_quantizer_writes_each_grids_order_and_sums(emulator: Emulator, grid: Grid, k: int) -> None:
    layer = Layer(9, 8, k, grid=grid)
    codes, scales = quantized(emulator, layer)
    want_codes, want_scales = reference.quantize_tokens(layer.x)
    assert torch.equal(codes[:, :9], layout.to_swizzled(want_codes, grid)[:, :9])
    assert torch.equal(scales[0, :9], want_scales[:, 0])
    if grid is Grid.FOLDED:
        assert torch.equal(scales[1, :9].view(torch.int32), want_codes.int().sum(1, dtype=torch.int32))


# Every tile shape; one and several tiles a block; a ring that wraps; shares of k that differ; odd edges everywhere.
PER_CHANNEL = [
    (Layer(1, 8, 8), Tiling(8, 1, 1, 2)),
    (Layer(13, 264, 520, dtype=torch.float16), Tiling(16, 1, 2, 2)),
    (Layer(30, 136, 2176), Tiling(32, 1, 8, 2)),
    (Layer(41, 384, 384), Tiling(48, 1, 1, 2)),
    (Layer(100, 256, 2048), Tiling(64, 2, 4, 1)),
    (Layer(200, 256, 640, dtype=torch.float16), Tiling(96, 2, 1, 1)),
    (Layer(300, 512, 1152), Tiling(128, 2, 1, 1)),
    (Layer(259, 128, 1024), Tiling(256, 1, 2, 1)),
]
# Chained weights: both tile heights, a cluster, padding behind the inputs.
CHAINED = [
    (Layer(13, 136, 520, grid=Grid.CHAINED), Tiling(16, 1, 2, 2)),
    (Layer(70, 256, 640, dtype=torch.float16, grid=Grid.CHAINED), Tiling(64, 2, 1, 1)),
]
# Products that quantize for themselves: alone over two tiles, in clusters with unequal shares, with empty tokens.
FUSED = [
    (Layer(1, 8, 8), Tiling(8, 1, 1, 2, fused=True)),
    (Layer(8, 640, 1152), Tiling(8, 1, 1, 2, fused=True)),
    (Layer(13, 136, 1352, dtype=torch.float16), Tiling(16, 1, 4, 2, fused=True)),
    (Layer(16, 128, 2176, grid=Grid.CHAINED), Tiling(16, 1, 2, 2, fused=True)),
]
# Ping-pong on two multiprocessors: one tile in all, two or three a block, odd and even k-blocks, a ring that wraps.
PINGPONG = [
    (Layer(33, 128, 128), Tiling(64, 1, 1, 1, pingpong=True)),
    (Layer(70, 264, 1160, dtype=torch.float16), Tiling(64, 1, 1, 1, pingpong=True)),
    (Layer(97, 512, 512), Tiling(96, 1, 1, 1, pingpong=True)),
    (Layer(129, 384, 392, dtype=torch.float16), Tiling(128, 1, 1, 1, pingpong=True)),
    (Layer(161, 136, 640, grid=Grid.CHAINED), Tiling(160, 1, 1, 1, pingpong=True)),
]
# Streams on two multiprocessors of two blocks: less work than blocks, tiles in two and in three parts, two token tiles.
STREAMED = [
    (Layer(3, 8, 264), Tiling(8, 1, 1, 2, streamed=True)),
    (Layer(13, 264, 520, dtype=torch.float16), Tiling(16, 1, 1, 2, streamed=True)),
    (Layer(30, 136, 2176), Tiling(32, 1, 1, 2, streamed=True)),
    (Layer(9, 640, 384, grid=Grid.CHAINED), Tiling(8, 1, 1, 2, streamed=True)),
]
# Folded groups in every schedule: both tile heights, clusters, one launch with unequal shares, ping-pong, a stream.
FOLDED = [
    (Layer(1, 8, 128, 128, grid=Grid.FOLDED), Tiling(8, 1, 1, 2)),
    (Layer(13, 136, 768, 256, torch.float16, grid=Grid.FOLDED), Tiling(16, 1, 2, 2)),
    (Layer(70, 256, 640, 128, grid=Grid.FOLDED), Tiling(64, 2, 1, 1)),
    (Layer(100, 512, 1024, 128, torch.float16, grid=Grid.FOLDED), Tiling(96, 2, 2, 1)),
    (Layer(259, 128, 384, 128, grid=Grid.FOLDED), Tiling(256, 1, 2, 1)),
    (Layer(8, 640, 1152, 128, grid=Grid.FOLDED), Tiling(8, 1, 1, 2, fused=True)),
    (Layer(13, 136, 1408, 128, torch.float16, grid=Grid.FOLDED), Tiling(16, 1, 4, 2, fused=True)),
    (Layer(70, 264, 1152, 128, grid=Grid.FOLDED), Tiling(64, 1, 1, 1, pingpong=True)),
    (Layer(161, 512, 384, 384, torch.float16, grid=Grid.FOLDED), Tiling(160, 1, 1, 1, pingpong=True)),
    (Layer(13, 264, 640, 128, grid=Grid.FOLDED), Tiling(16, 1, 1, 2, streamed=True)),
    (Layer(30, 136, 2176, 128, torch.float16, grid=Grid.FOLDED), Tiling(32, 1, 1, 2, streamed=True)),
]
EVERY = PER_CHANNEL + CHAINED + FUSED + PINGPONG + STREAMED + FOLDED


@pytest.mark.parametrize(("layer", "tiling"), EVERY, ids=lambda v: f"{v.tokens}")
def test_products_with_one_sum_a_row_equal_the_reference_bit_for_bit(
    emulator: Emulator, layer: Layer, tiling: Tiling
) -> None:
    assert torch.equal(product(emulator, layer, tiling), layer.want())


@pytest.mark.parametrize(("code", "largest"), [(7, 112), (-8, 128)])
def test_the_largest_folded_sums_stay_exact(emulator: Emulator, code: int, largest: int) -> None:
    """All 65536 inputs at the end of their ranges: operands of 240 times 127 make sums just below 2^31."""
    layer = Layer(1, 8, backend.MAX_K, 8192, grid=Grid.FOLDED)
    layer.codes.fill_(code)
    layer.scales = torch.full_like(layer.scales, 16 * 2.0**-13)
    layer.scales[:, 1] = 15 * 2.0**-13  # or a larger scale of the channel would do
    layer.codes[:, 8192:16384] = 0
    layer.x.fill_(1.0)
    got, sums = product(emulator, layer, Tiling(8, 1, 1, 2)), (backend.MAX_K - 8192) * 127 * largest
    assert torch.equal(got, layer.want())
    assert torch.allclose((got - layer.bias).float().abs(), torch.tensor(sums * 2.0**-13 / 127), rtol=2**-7)


GROUPED = [
    (Layer(13, 256, 384, 128), Tiling(8, 1, 1, 2)),
    (Layer(40, 136, 1024, 256), Tiling(48, 1, 2, 2)),
    (Layer(100, 512, 1024, 128, torch.float16), Tiling(96, 2, 2, 1)),
    (Layer(150, 256, 512, 512), Tiling(128, 2, 1, 1)),
    (Layer(30, 256, 384, 128, grid=Grid.CHAINED), Tiling(32, 1, 1, 2)),
    (Layer(5, 256, 1024, 128), Tiling(8, 1, 4, 2, fused=True)),
    (Layer(20, 384, 1280, 256), Tiling(16, 1, 1, 2, streamed=True)),
    (Layer(11, 136, 768, 256, torch.float16, grid=Grid.CHAINED), Tiling(16, 1, 2, 2, fused=True)),
]


@pytest.mark.parametrize(("layer", "tiling"), GROUPED, ids=lambda v: f"{v.tokens}")
def test_grouped_products_differ_by_fp32_rounding_only(emulator: Emulator, layer: Layer, tiling: Tiling) -> None:
    """The kernel fuses multiply and add, and adds shares in rank order: a last bit of the 16-bit result may differ."""
    got, want = product(emulator, layer, tiling), layer.want()
    spacing = 2.0**-8 if layer.dtype == torch.bfloat16 else 2.0**-11
    assert torch.allclose(got.double(), want.double(), rtol=2 * spacing, atol=1e-5)
    assert (got != want).float().mean() < 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_copies_gives_the_same_bits(emulator: Emulator, seed: int) -> None:
    for tiling in (Tiling(32, 1, 4, 2), Tiling(16, 1, 1, 2, streamed=True)):
        layer = Layer(20, 256, 2048, 128, seed=7)
        first = product(emulator, layer, tiling)
        layer.seed = 100 + seed
        assert torch.equal(product(emulator, layer, tiling), first)


def test_a_fused_product_follows_the_rule_for_zero_and_non_finite_rows(emulator: Emulator) -> None:
    layer = Layer(4, 128, 512)
    layer.x[0], layer.x[1, 5], layer.x[2, 300] = 0, torch.nan, -torch.inf  # in different ranks' shares
    got = product(emulator, layer, Tiling(8, 1, 2, 2, fused=True))
    assert torch.equal(got.nan_to_num(-1), layer.want().nan_to_num(-1))
    assert got.isnan().all(dim=1).tolist() == [False, True, True, False]


TWICE = [Layer(70, 264, 1152, 128), Layer(129, 512, 512, 256, torch.float16, grid=Grid.CHAINED)]


@pytest.mark.parametrize("layer", TWICE, ids=lambda v: f"{v.tokens}")
def test_whole_tiles_of_a_warpgroup_give_the_bits_of_shared_ones(emulator: Emulator, layer: Layer) -> None:
    tokens = 64 if layer.tokens < 128 else 128
    shared, owned = (product(emulator, layer, Tiling(tokens, 1, 1, 1, pingpong=own)) for own in (False, True))
    assert torch.equal(owned, shared)


# Each change plants a synchronization bug that a GPU might hide most of the time. The emulation must not.
BUGS = {
    "a register operand is overwritten while it is read": ("products_wait<HEIGHT>()", "products_wait<2 * HEIGHT>()"),
    "a stage is handed back too early": ("if (s == 0 && previous >= 0", "if (s == 3 && (previous = ring.stage) >= 0"),
    "the producer does not wait for empty stages": ("if (refill) barrier_wait", "if (false) barrier_wait"),
    "consumers do not wait for full stages": ("barrier_wait(full_barrier(base, ring.stage), ring.parity);", ""),
    "parts are laid over stages in use": ("sync_some<1, CONSUMERS>();  // both", "// both"),
    "fused: stores are not fenced": ("shared_writes_fence();  //", "//"),
    "fused: products start before all codes are there": ("sync_some<1, CONSUMERS>();\n}", "}"),
    "fused: maxima are read before all ranks wrote theirs": ("cluster_sync();  // all ranks", "// all ranks"),
    "ping-pong: a tile begins out of turn": ("if (PINGPONG && walk.tile >= blocks) turn_await(group);", ""),
    "ping-pong: the turn stays where it is": ("arrive_pair(3 - group)", "arrive_pair(2 + group)"),
    "ping-pong: a stage is handed back to the other ring": (
        "empty_barrier(base, previous)",
        "empty_barrier(base, (previous + STAGES) % ALL_STAGES)",
    ),
    "ping-pong: a warpgroup reads the other's ring": (
        "Ring ring(number);\n#if",
        "Ring ring(RINGS - 1 - number);\n#if",
    ),
    "stream: a part is counted before it is written": ("global_fence();\n    sync_some", "sync_some"),
    "stream: a part is counted before all warps have written theirs": (
        "sync_some<1, CONSUMERS>();  // this",
        "// this",
    ),
    "stream: the first to come adds the parts": (") != tail - head) return", ") != 0) return"),
    "stream: both parts of a block lie in one place": ("+ (walk.first == 0)) * WORDS", "+ 1) * WORDS"),
    "folded: sums of codes are added before all warps have theirs": (
        "__syncthreads();\n    if (warp == 0)",
        "if (warp == 0)",
    ),
    "ping-pong: both warpgroups hand every stage back": ("CONSUMERS / 32 / RINGS);", "CONSUMERS / 32);"),
}


@pytest.mark.slow  # it tests the emulation, a compilation a bug
@pytest.mark.parametrize("bug", BUGS)
def test_the_emulation_finds_planted_races(emulator: Emulator, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = "fused" in bug
    split = 2 if fused or "parts" in bug else 1
    original = source.Kernel.text
    assert any(BUGS[bug][0] in path.read_text() for path in source.FOLDER.glob("*.cu*"))

    def broken(kernel: source.Kernel, helpers: str | None = None) -> str:
        return original(kernel, helpers).replace(*BUGS[bug])

    layer, tiling = Layer(16, 128, 4096, seed=3), Tiling(16 if fused else 64, 1, split, 2, fused)
    if "ping-pong" in bug:
        layer, tiling = Layer(16, 1024, 1024, seed=3), Tiling(64, 1, 1, 1, pingpong=True)  # four tiles a block
    if "stream" in bug:
        layer, tiling = Layer(16, 640, 1024, seed=3), Tiling(16, 1, 1, 2, streamed=True)  # ten k-blocks a block
    if "folded" in bug:
        layer, tiling = Layer(16, 128, 4096, 128, seed=3, grid=Grid.FOLDED), Tiling(16, 1, 1, 2)
    want = layer.want()
    monkeypatch.setattr(source.Kernel, "text", broken)
    try:
        got = product(emulator, layer, tiling)
    except RuntimeError:  # the emulation named a deadlock or a broken barrier
        return
    assert not torch.equal(got, want)


@pytest.mark.parametrize(("group_size", "grid"), [(-1, Grid.PLAIN), (128, Grid.PLAIN), (128, Grid.FOLDED)], ids=str)
def test_the_operator_runs_prepared_weights_of_this_layout(
    emulator: Emulator, group_size: int, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(6, 136, 256, group_size, grid=grid)
    problem = Problem(layer.k, layer.n, group_size, layer.dtype, "cuda")
    monkeypatch.setattr(backend, "refuse", lambda problem: backend.refuse_shape(problem))
    here = tuple(dataclasses.replace(b, refuse=backend.refuse) for b in backend.BACKENDS)
    monkeypatch.setattr(selection, "backends", lambda: here)
    own = selection.prepare(pack_int4(layer.codes), layer.scales, problem)
    assert own.layout == backend.LAYOUTS[grid]  # folded where scales fold, without being asked for

    @contextmanager
    def place_of(x: torch.Tensor) -> Iterator[backend.Place]:
        emulator.tensors = [own.weight, own.scales]
        yield emulator.place(everything_readable=True)

    monkeypatch.setattr(backend, "place_of", place_of)
    x = torch.cat((layer.x, layer.x)).view(2, 6, 256)[:, :, :]
    got = ops.w4a8_linear(x, own.weight, own.scales, layer.bias.float(), layer.n, group_size, own.layout)
    assert got.shape == (2, 6, 136)
    assert torch.allclose(got[1].float(), layer.want().float(), rtol=2**-7, atol=1e-5)
    nothing = ops.w4a8_linear(x[:0], own.weight, own.scales, None, layer.n, group_size, own.layout)
    assert nothing.shape == (0, 6, 136)


def test_shapes_that_the_kernels_cannot_do_are_refused_in_words() -> None:
    for k, n, group_size, word in [(100, 64, -1, "k must"), (128, 12, -1, "n must"), (256, 64, 64, "groups")]:
        reason = backend.refuse_shape(Problem(k, n, group_size, torch.bfloat16, "cuda"))
        assert reason is not None
        assert word in reason
    assert backend.refuse_shape(Problem(4096, 11008, 128, torch.bfloat16, "cuda")) is None
    assert backend.refuse_shape(Problem(4096, 128, -1, torch.bfloat16, "cuda", Grid.FOLDED)) == "only groups fold"
    assert backend.refuse(Problem(128, 64, -1, torch.float32, "cuda")) is not None
    assert backend.refuse(Problem(128, 64, -1, torch.bfloat16, "cpu")) == "needs a CUDA device"


def test_a_compiler_without_mixed_signs_keeps_groups_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: backend.CAPABILITY)
    layer = Layer(1, 8, 256, 128, grid=Grid.FOLDED)
    problem = Problem(layer.k, layer.n, layer.group_size, layer.dtype, "cuda")
    for version, expected in (("nvrtc 12.3", Grid.PLAIN), ("nvcc 12.4", Grid.FOLDED), ("nvrtc 13.0", Grid.FOLDED)):
        monkeypatch.setattr(compiler, "version", lambda version=version: version)
        own = selection.prepare(pack_int4(layer.codes), layer.scales, problem)
        assert own.layout == backend.LAYOUTS[expected]
    monkeypatch.setattr(compiler, "version", lambda: "nvrtc 12.3")
    assert "12.4" in (backend.refuse(dataclasses.replace(problem, grid=Grid.FOLDED)) or "")


def test_inputs_that_do_not_fit_the_prepared_weight_are_an_error() -> None:
    layer = Layer(6, 136, 256)
    weight, scales = backend.prepare(pack_int4(layer.codes), layer.scales, Problem(256, 136, -1, layer.dtype, "cuda"))
    with pytest.raises(ValueError, match="384 inputs"):
        ops.w4a8_linear(torch.zeros(2, 384).bfloat16(), weight, scales, None, 136, -1, "hopper")
    with pytest.raises(ValueError, match="float32"):
        ops.w4a8_linear(layer.x.float(), weight, scales, None, 136, -1, "hopper")
