"""Folding a norm and a sign into thresholds: the float layers' signs for every sum, and a network's very logits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qtoolkit import checkpoint, registry
from qtoolkit.calibration.fold import Fold, FoldOptions, thresholds
from qtoolkit.errors import CheckpointError, RequestError
from qtoolkit.stages import Stream
from qtoolkit.vision import data, layers, measure, models, runtime
from qtoolkit.vision.context import VisionContext
from qtoolkit.vision.layers import Binary
from qtoolkit.vision.pattern import Pattern
from qtoolkit.vision.pipeline import compress


def norm(n: int, seed: int) -> nn.BatchNorm2d:
    """A norm with weights of both signs, one of them zero, and shifts that leave some outputs constant."""
    generator = torch.Generator().manual_seed(seed)
    made = nn.BatchNorm2d(n).eval()
    made.weight.data = torch.randn(n, generator=generator)
    made.weight.data[0] = 0.0
    made.bias.data = torch.randn(n, generator=generator) * 2
    made.running_mean = torch.randn(n, generator=generator) * 3
    made.running_var = torch.rand(n, generator=generator) * 20 + 0.1
    return made


def layer(n: int, seed: int) -> Binary:
    torch.manual_seed(seed)
    return Binary(nn.Conv2d(7, n, 3, padding=1, bias=seed % 2 == 0)).eval()


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_give_the_sign_of_the_norm_for_every_image(seed: int) -> None:
    binary, after = layer(24, seed), norm(24, seed)
    x = torch.randn(8, 7, 9, 9, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        want = layers.signs(after(binary(x)))
        folded = copy.deepcopy(binary)
        folded.thresholds, folded.turned = thresholds(binary, after)
        assert torch.equal(folded(x), want)
    assert folded.turned.any()
    assert not folded.turned.all()


def test_outputs_that_never_change_get_thresholds_that_no_sum_meets_or_every_sum() -> None:
    binary, after = layer(3, 1), norm(3, 1)
    after.weight.data = torch.zeros(3)
    after.bias.data = torch.tensor([1.0, 0.0, -1.0])
    least, turned = thresholds(binary, after)
    assert least.tolist() == [-63, -63, 64]
    assert not turned.any()


def test_packing_keeps_thresholds_and_refuses_damaged_ones() -> None:
    binary, after = layer(24, 2), norm(24, 2)
    binary.thresholds, binary.turned = thresholds(binary, after)
    packer = registry.packers.get("binary")
    tensors = packer.pack(binary.packed())
    again = packer.pack(packer.unpack(tensors))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert tensors["weight_thresholds"].dtype == torch.int32
    for damaged in (tensors["weight_thresholds"][1:], tensors["weight_thresholds"].long()):
        with pytest.raises(CheckpointError, match="thresholds"):
            packer.unpack({**tensors, "weight_thresholds": damaged})


def logits(network: nn.Module, images: data.Images, model: models.Model) -> Tensor:
    return measure.logits(network, images, model.architecture)


def test_a_folded_checkpoint_loads_without_its_norms_and_passes_signs_on(tmp_path: Path) -> None:
    changes = {"recover.epochs": 4, "recover.lr": 0.05, "recover.batch": 64}
    result = compress("digits-plain", "ovsw", tmp_path / "out", test="digits-test", changes=changes)
    assert result.figures["accuracy_after"] > 0.4  # of ten classes, after four epochs
    loaded = runtime.load(tmp_path / "out")
    assert isinstance(loaded.network.get_submodule("bn2"), nn.Identity)
    assert isinstance(loaded.network.get_submodule("bn4"), nn.BatchNorm2d)
    assert checkpoint.verify(tmp_path / "out").packing == ("binary",)
    images = data.load("digits-test", loaded.architecture)
    with torch.inference_mode():
        first = next(iter(images.batches(8, loaded.architecture)))[0]
        inner = loaded.network.get_submodule("conv2")(loaded.network.get_submodule("conv1")(first))
    assert set(inner.unique().tolist()) == {-1.0, 1.0}


def test_the_transform_changes_no_logit() -> None:
    model = models.resolve("digits-plain", seed=3)
    block, images = model.block(), data.load("digits-test", model.architecture)
    context = VisionContext(Pattern(pattern="binary"), model.architecture, images, 0, lambda text: None)
    registry.transforms.get("binarize")(FoldOptions()).apply(block, Stream([], []), context)
    network = block.module.eval()
    for index in (2, 3):
        network.set_submodule(f"bn{index}", norm(64, index))
    before = logits(network, images, model)
    report = Fold(FoldOptions()).apply(block, Stream([], []), context)
    assert set(report) == {"conv2", "conv3"}
    assert torch.equal(logits(network, images, model), before)


def test_a_fold_that_names_no_norm_is_refused() -> None:
    model = models.resolve("digits-plain")
    wrong = model.architecture.model_copy(update={"folds": {"conv2": "conv3"}})
    block = model.block()
    context = VisionContext(Pattern(pattern="binary"), wrong, data.load("digits-test", wrong), 0, lambda text: None)
    registry.transforms.get("binarize")(FoldOptions()).apply(block, Stream([], []), context)
    with pytest.raises(RequestError, match="conv3"):
        Fold(FoldOptions()).apply(block, Stream([], []), context)
