"""Compressed layers on kernels: the packed network answers as the simulated one, and dense torch is there without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from qtoolkit import registry
from qtoolkit.kernels import vision_selection
from qtoolkit.kernels.cpu.vision import library
from qtoolkit.kernels.vision_selection import VisionProblem, slower
from qtoolkit.vision import accelerated, data, layers, measure, runtime
from qtoolkit.vision.accelerated import Accelerated, AcceleratedBinary, AcceleratedSparse
from qtoolkit.vision.matrix import Geometry, Layer, from_matrix, to_matrix
from qtoolkit.vision.pattern import Pattern
from qtoolkit.vision.pipeline import compress

needs_library = pytest.mark.skipif(library.failure() is not None, reason=f"no vision kernels here: {library.failure()}")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernels whether they are faster or not."""
    monkeypatch.setattr(vision_selection, "refuse", lambda problem: None)


def layer(linear: bool, channels: int, n: int, seed: int) -> Layer:
    torch.manual_seed(seed)
    if linear:
        return nn.Linear(channels, n, bias=seed % 2 == 0)
    return nn.Conv2d(
        channels, n, (3, 2), stride=(1, 2), padding=(1, seed % 3), dilation=(1 + seed % 2, 1), bias=seed % 2 == 0
    )


def example(like: Layer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = Geometry.of(like).inputs
    return torch.randn(*((5, inputs) if isinstance(like, nn.Linear) else (2, inputs, 9, 8)), generator=generator)


@needs_library
@settings(max_examples=25, deadline=None)
@given(linear=st.booleans(), channels=st.integers(2, 80), n=st.integers(1, 40), seed=st.integers(0, 1000))
def test_binary_answers_are_the_simulations_bit_for_bit(linear: bool, channels: int, n: int, seed: int) -> None:
    like = layer(linear, channels, n, seed)
    simulated = layers.Binary(like).eval()
    packer = registry.packers.get("binary")
    packed = AcceleratedBinary(packer.unpack(packer.pack(simulated.packed())), like)
    x = example(like, seed)
    with torch.inference_mode():
        assert torch.equal(packed(x), simulated(x))
        assert torch.equal(packed.plain()(x), simulated(x))
    assert torch.equal(packed.weight, layers.signs(like.weight))


@needs_library
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:16", "1x2", "1x5", "1x16"])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_answers_are_the_dense_layers(pattern: str, linear: bool, seed: int) -> None:
    like = layer(linear, 32, 80, seed)
    chosen, matrix = Pattern(pattern=pattern, rate=0.0), to_matrix(like.weight.detach()).clone()
    if chosen.kind == "nm":
        kept, size = chosen.nm
        blocks = matrix.view(len(matrix), -1, size)
        blocks[torch.rand(blocks.shape).argsort(dim=-1) >= kept] = 0
    else:
        cube = matrix.view(len(matrix) // chosen.rows, chosen.rows, -1, 32)
        cube.masked_fill_((torch.rand(len(cube), 32).argsort(dim=1) < 16)[:, None, None, :], 0.0)
    like.weight.data = from_matrix(matrix, tuple(like.weight.shape))
    packer = registry.packers.get(chosen.kind)
    tensors = packer.pack(packer.read(matrix, chosen, 32))
    packed = accelerated.build(chosen.kind, tensors, like)
    assert isinstance(packed, AcceleratedSparse)
    x = example(like, seed)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), like(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(packed.plain()(x), layers.build(chosen.kind, tensors, like)(x))
    assert torch.equal(packed.weight, like.weight)


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_a_trained_binary_network_gives_the_simulated_logits(
    digits_weights: Path, tmp_path: Path, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        changes = {"recover.epochs": 2, "recover.batch": 64, "recover.lr": 0.05}
        compress("digits", "ovsw", tmp_path / "out", weights=digits_weights, changes=changes)
        loaded = runtime.load(tmp_path / "out")
        names = [name for name, module in loaded.network.named_modules() if isinstance(module, AcceleratedBinary)]
        if library.load().path in vision_selection.BINARY_PATHS:
            assert names == ["conv2", "conv3", "conv4"]
        images = data.load("digits-test", loaded.architecture)
        simulated = measure.logits(accelerated.plain(loaded.network), images, loaded.architecture)
        assert torch.equal(measure.logits(loaded.network, images, loaded.architecture), simulated)
    finally:
        torch.set_num_threads(before)


def test_without_a_compiler_layers_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "failure", lambda: "no C++ compiler found")
    assert vision_selection.refuse(VisionProblem("binary", 64)) == "no C++ compiler found"
    like = nn.Linear(64, 64)
    packer = registry.packers.get("binary")
    assert accelerated.build("binary", packer.pack(layers.Binary(like).packed()), like) == "no C++ compiler found"


def test_the_rule_names_its_reason() -> None:
    assert slower(VisionProblem("binary", 64), "avx512") is None
    assert "8 input channels" in str(slower(VisionProblem("binary", 8), "avx2"))
    assert "portable" in str(slower(VisionProblem("binary", 64), "portable"))
    assert slower(VisionProblem("block", 64, 4, 0.5), "avx512") is None
    assert "90% of the weights" in str(slower(VisionProblem("block", 64, 4, 0.9), "avx512"))
    assert slower(VisionProblem("nm", 64, 1, 0.25), "avx512") is None
    assert "50%" in str(slower(VisionProblem("nm", 64, 1, 0.5), "avx2"))
    assert "50%" in str(slower(VisionProblem("nm", 64, 1, 0.5, taps=9), "avx512"))
    assert slower(VisionProblem("nm", 128, 1, 0.5, taps=9), "avx512") is None
    assert slower(VisionProblem("nm", 64, 1, 0.01), "portable") is not None


@needs_library
def test_what_is_loaded_says_which_layer_runs_on_which_kernel(tmp_path: Path) -> None:
    changes = {"recover.epochs": 1, "recover.distill": 0}
    compress("digits", "ovsw", tmp_path / "binary", changes=changes)
    compress("digits", "sfp", tmp_path / "filter", changes={**changes, "recover.where": "all"})
    assert {runs.name for runs in runtime.load(tmp_path / "binary").kernels.values()} == {
        f"binary-{library.load().path}"
    }
    runs = runtime.load(tmp_path / "filter").kernels
    assert {name: found.name for name, found in runs.items()} == {"conv2": "torch", "conv3": "torch", "conv4": "torch"}
    assert "torch's own operations" in runs["conv2"].reason


def test_a_plain_network_holds_no_kernel() -> None:
    network = nn.Sequential(AcceleratedBinary(layers.Binary(nn.Linear(16, 16)).packed(), nn.Linear(16, 16)))
    assert not any(isinstance(module, Accelerated) for module in accelerated.plain(network).modules())
    assert isinstance(network[0], Accelerated)
