"""Channel removal by traced groups: masked equals packed, torch-pruning agrees, costs are what a counter finds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vision_support import KINDS, save

import qtoolkit
from qtoolkit import checkpoint
from qtoolkit.calibration import criteria, filters
from qtoolkit.errors import DataError, ModelError, RequestError
from qtoolkit.vision import dependencies, models, runtime
from qtoolkit.vision.pipeline import Compressed, compress


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("classifiers")
    return {kind: save(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Twenty random images in each of the sizes that the small classifiers take."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for size in (32, 384):
        x = random.integers(0, 256, (20, size, size, 3), dtype=np.uint8)
        np.savez(
            folder / f"{size}.npz", x=x[: 20 if size == 32 else 2], y=np.arange(20)[: 20 if size == 32 else 2] % 10
        )
    return {size: str(folder / f"{size}.npz") for size in (32, 384)}


def run(kind: str, recipe: str, saved: dict[str, Path], images: dict[int, str], out: Path, **more: Any) -> Compressed:
    data = images[384 if kind == "bottleneck" else 32]
    changes = {"calibration.data": data, **more}
    return compress(str(saved[kind]), recipe, out, test=data, changes=changes)


CASES = [(kind, where) for kind in ("resnet", "mobilenet", "vit", "convnext") for where in ("inner", "coupled")]
CASES += [("bottleneck", "coupled"), ("resnet", "all"), ("vit", "all")]


@pytest.mark.parametrize(("kind", "where"), CASES)
def test_the_narrower_network_answers_as_the_masked_one(
    kind: str, where: str, saved: dict[str, Path], images: dict[int, str], tmp_path: Path
) -> None:
    changes = {"filters.where": where, "scheme.rate": 0.5}
    result = run(kind, "filters", saved, images, tmp_path / "out", **changes)
    assert result.figures["packing_error"] < 1e-5
    dense, loaded = models.resolve(str(saved[kind])), runtime.load(tmp_path / "out")
    x = torch.zeros(1, *dense.architecture.input)
    counts = []
    for network in (dense.network, loaded.network):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(x)
        counted = counter.get_flop_counts()["Global"]
        counts.append(sum(n for op, n in counted.items() if "bmm" not in str(op) and "attention" not in str(op)) / 2)
    assert [result.figures[f"multiply_adds_{when}"] for when in ("before", "after")] == counts
    assert counts[1] < 0.85 * counts[0]
    tensors = {id(t): t for m in loaded.network.modules() for t in _parameters(m)}
    assert result.figures["parameters_after"] == sum(t.numel() for t in tensors.values())
    assert result.figures["parameters_after"] < 0.85 * result.figures["parameters_before"]


def _parameters(module: nn.Module) -> list[torch.Tensor]:
    """A removed filter's layer keeps its weight and bias as buffers."""
    own = list(module._parameters.values())
    own += [module._buffers.get(name) for name in ("weight", "bias")]
    return [t for t in own if t is not None]


@pytest.mark.parametrize("kind", ["resnet", "mobilenet", "vit", "convnext"])
def test_torch_pruning_removes_the_same_channels_to_the_same_effect(kind: str, saved: dict[str, Path]) -> None:
    import torch_pruning

    model = models.resolve(str(saved[kind]))
    block = model.block("filter")
    x = torch.randn(2, *model.architecture.input, generator=torch.Generator().manual_seed(0))
    for group in block.groups[:3]:
        masked, theirs = copy.deepcopy(block), copy.deepcopy(model.network).requires_grad_(True)
        first = criteria.made_by(block, group)[0]
        width = masked.layer(first).weight.shape[0]  # type: ignore[union-attr, index, operator]
        removed = (torch.arange(width // group.unit) % 2 == 0).repeat_interleave(group.unit)
        filters.remove(masked, group, removed)
        graph = torch_pruning.DependencyGraph().build_dependency(theirs, [x], verbose=False)
        root = theirs.get_submodule(first)
        graph.get_pruning_group(
            root, graph.get_pruner_of_module(root).prune_out_channels, removed.nonzero().flatten().tolist()
        ).prune()
        with torch.inference_mode():
            torch.testing.assert_close(theirs(x), masked.module(x), rtol=1e-4, atol=1e-5)


def test_channels_that_a_layer_norm_mixes_stay_and_are_listed(
    saved: dict[str, Path], images: dict[int, str], tmp_path: Path
) -> None:
    run("convnext", "filters", saved, images, tmp_path / "out")
    reasons = {row.name: row.reason for row in checkpoint.verify(tmp_path / "out").unquantized}
    assert "LayerNorm mixes" in reasons["convnext.encoder.stages.1.downsampling_layer.1"]
    assert "mixes" in reasons["convnext.encoder.stages.0.layers.0.dwconv"]


def test_heads_go_as_a_whole(saved: dict[str, Path], images: dict[int, str], tmp_path: Path) -> None:
    run("vit", "filters", saved, images, tmp_path / "out", **{"filters.where": "coupled", "scheme.rate": 0.5})
    network = runtime.load(tmp_path / "out").network
    for name in ("q_proj", "k_proj", "v_proj"):
        layer: Any = network.get_submodule(f"vit.layers.0.attention.{name}")
        assert layer.weight.shape[0] == 16  # two of four heads


@pytest.mark.parametrize("recipe", ["sfp", "cr-sfp"])
@pytest.mark.parametrize("kind", ["mobilenet", "vit"])
def test_training_removes_coupled_channels_too(
    kind: str, recipe: str, saved: dict[str, Path], images: dict[int, str], tmp_path: Path
) -> None:
    changes = {"recover.epochs": 2, "recover.batch": 10, "recover.where": "coupled", "scheme.rate": 0.5}
    result = run(kind, recipe, saved, images, tmp_path / "out", **changes)
    assert result.figures["packing_error"] < 1e-4  # trained on noise, float32 sums grow; seen: 1.2e-5
    assert result.figures["multiply_adds_after"] < 0.8 * result.figures["multiply_adds_before"]


@pytest.mark.parametrize("kind", ["resnet", "mobilenet", "vit", "convnext"])
def test_n_m_sparsity_leaves_what_does_not_fit_and_says_why(
    kind: str, saved: dict[str, Path], images: dict[int, str], tmp_path: Path
) -> None:
    result = run(kind, "nm", saved, images, tmp_path / "out")
    assert result.figures["packing_error"] < 1e-4
    dense = models.resolve(str(saved[kind]))
    every = {name for name, module in dense.network.named_modules() if isinstance(module, models.LAYERS)}
    reasons = {row["name"]: row["reason"] for row in result.unquantized}
    assert {layer["name"] for layer in result.layers} | reasons.keys() == every
    assert reasons["classifier.1" if kind == "resnet" else "classifier"] == "the architecture keeps it"
    if kind == "mobilenet":
        assert reasons["mobilenet_v2.layer.0.conv_3x3.convolution"] == "a grouped convolution"


def test_labels_and_files_go_with_the_weights_and_code_is_never_named(
    saved: dict[str, Path], images: dict[int, str], tmp_path: Path
) -> None:
    run("vit", "nm", saved, images, tmp_path / "out")
    loaded = qtoolkit.load(tmp_path / "out")
    assert isinstance(loaded, runtime.Loaded)
    Image.fromarray(np.arange(3000, dtype=np.uint8).reshape(50, 20, 3)).save(tmp_path / "x.png")
    (found,) = loaded.classify(tmp_path / "x.png", top=10)
    assert {name for name, _ in found} == {f"kind {index}" for index in range(10)}
    assert sum(value for _, value in found) == pytest.approx(1)
    assert found == sorted(found, key=lambda row: -row[1])
    with pytest.raises(RequestError, match="no option dtype"):
        qtoolkit.load(tmp_path / "out", dtype=torch.float32)
    assert loaded.architecture.labels == tuple(f"kind {index}" for index in range(10))
    assert loaded.architecture.builder == ""
    (tmp_path / "out" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="preprocessor_config"):
        runtime.load(tmp_path / "out")


def test_data_of_another_task_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 32, 32, 3), np.uint8), y=np.array([0, 1, 2, 10]))
    with pytest.raises(DataError, match="10 classes"):
        compress(str(saved["vit"]), "nm", tmp_path / "out", changes={"calibration.data": str(tmp_path / "x.npz")})


def test_a_network_whose_channels_nobody_can_lose_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    traced = dependencies.trace(network, (3, 8, 8))
    assert not traced.groups
    assert "rearranged" in traced.refused["0"]
