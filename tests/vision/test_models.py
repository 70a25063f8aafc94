"""The shipped networks: weights load by name, published accuracies are reproduced, wrong weights are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qtoolkit.errors import ModelError, NumericError, RequestError
from qtoolkit.vision import data, measure, models


def test_resnet20_has_the_published_accuracy_on_the_balanced_half_of_the_test_split(shared_data: Path) -> None:
    model = models.resolve("cifar-resnet20", shared_data / "vision/weights/resnet20_cifar10.npz")
    images = data.load(str(shared_data / "vision/cifar10_test_5k.npz"), model.architecture)
    # measured once; 0.9173 on the full split, whose sampling error at 5000 images is 0.004
    assert measure.accuracy(model.network, images, model.architecture) == pytest.approx(0.9164, abs=0.0005)


def test_lenet_has_the_published_accuracy(shared_data: Path) -> None:
    model = models.resolve("lenet", shared_data / "vision/weights/lenet_mnist.npz")
    images = data.load(str(shared_data / "vision/mnist_test.npz"), model.architecture)
    assert measure.accuracy(model.network, images, model.architecture) == pytest.approx(0.9929, abs=0.0002)
    assert sum(p.numel() for p in model.network.parameters()) == 61482


@pytest.mark.parametrize("name", sorted(models.table()))
def test_every_architecture_builds_runs_and_names_its_groups_correctly(name: str) -> None:
    model = models.resolve(name)
    assert model.network(torch.zeros(2, *model.architecture.input)).shape == (2, 10)
    block = model.block()
    assert block.targets
    for group in block.groups:
        for module in (*group.producers, *group.consumers):
            block.layer(module)


def test_equal_seeds_build_equal_networks() -> None:
    first, again, other = (models.resolve("digits", seed=seed).digest() for seed in (1, 1, 2))
    assert first == again != other


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    state = {name: tensor.numpy() for name, tensor in models.resolve("lenet").network.state_dict().items()}
    cases = {
        "missing": ({k: v for k, v in state.items() if k != "fc.bias"}, ModelError, "no tensor fc.bias"),
        "shape": ({**state, "fc.bias": np.zeros(3, np.float32)}, ModelError, r"shape \[3\]"),
        "unknown": ({**state, "fc9.bias": np.zeros(3, np.float32)}, ModelError, "fc9.bias"),
        "nan": ({**state, "fc.bias": np.full(128, np.nan, np.float32)}, NumericError, "NaN"),
    }
    for name, (arrays, error, words) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(error, match=words):
            models.resolve("lenet", tmp_path / f"{name}.npz")


def test_unknown_names_and_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cifar-resnet20"):
        models.resolve("cifar-resnet21")
    (tmp_path / "weights.pt").write_bytes(b"\x80")
    with pytest.raises(RequestError, match="Pickled"):
        models.resolve("lenet", tmp_path / "weights.pt")
    (tmp_path / "weights.npz").write_bytes(b"PK broken")
    with pytest.raises(ModelError, match="damaged"):
        models.resolve("lenet", tmp_path / "weights.npz")
