"""Physical removal and ONNX: the narrow network and the exported one answer as the masked one does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner
from vision_support import save

from qtoolkit import cli, recipe
from qtoolkit.errors import NumericError, RequestError
from qtoolkit.pipeline import build_transforms
from qtoolkit.vision import data, export, measure, models, runtime
from qtoolkit.vision.context import VisionContext, stream
from qtoolkit.vision.layers import Filtered
from qtoolkit.vision.pipeline import Run, compress
from qtoolkit.vision.record import VisionRecipe


def pruned(where: str) -> tuple[nn.Module, nn.Module]:
    """Return a random ResNet-20 with pruned filters as the transform leaves it (masked), and as it is packed."""
    settings = recipe.load("filters", {"filters.where": where, "calibration.samples": 32}, VisionRecipe)
    model = models.resolve("cifar-resnet20")
    x = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    run = Run(model, settings, data.Images(x, torch.arange(64) % 10), None, lambda text: None)
    context = VisionContext(settings.scheme, model.architecture, run.training, 0, run.say)
    for transform in build_transforms(settings).values():
        transform.apply(run.block, stream(run.training.first(32), model.architecture), context)
    tensors, packed = run._pack()
    return model.network.eval(), runtime.assemble(model.architecture, tensors, packed, "filter")[0]


@pytest.mark.parametrize("where", ["inner", "all"])
def test_masked_and_packed_logits_agree_and_the_packed_network_is_narrower(where: str) -> None:
    masked, packed = pruned(where)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), masked(x), rtol=1e-5, atol=1e-5)
    firsts = [module for name, module in packed.named_modules() if name.endswith(".conv1")]
    widths = [module.weight.shape[0] for module in firsts]  # type: ignore[union-attr, index, operator]
    assert widths == [12] * 3 + [23] * 3 + [45] * 3  # 16, 32 and 64 less 30 %
    assert packed.get_submodule("layer1.0.bn1").weight.shape == (12,)  # type: ignore[union-attr]
    second = packed.get_submodule("layer1.0.conv2")
    assert isinstance(second, Filtered)
    assert second.weight.shape[:2] == ((16, 12) if where == "inner" else (12, 12))


@pytest.mark.parametrize("name", ["nm", "filters", "ovsw", "debut"])
def test_onnxruntime_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    changes = {"recover.epochs": 1} if name in ("ovsw", "debut") else {}
    if name == "filters":
        changes = {"filters.where": "all"}
    if name == "debut":
        changes |= {"debut.chains": "search", "debut.sweeps": 0}
    weights = tmp_path / "w.safetensors"
    save_file(dict(models.resolve("digits").network.state_dict()), weights)
    compress("digits", name, tmp_path / "out", weights=weights, changes=changes)
    loaded = runtime.load(tmp_path / "out")
    session = onnxruntime.InferenceSession(str(export.to_onnx(loaded, tmp_path / "net.onnx")))
    images = data.load("digits-test", loaded.architecture).first(20)
    x = torch.cat([x for x, _ in images.batches(20, loaded.architecture)])
    (found,) = session.run(None, {"images": x.numpy()})
    expected = measure.logits(loaded.network, images, loaded.architecture)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["resnet", "mobilenet", "vit", "convnext"])
def test_the_command_writes_onnx_of_a_transformers_classifier_and_checks_it(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    x = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(10))
    words = ["compress", str(save(kind, tmp_path / "model")), "-o", str(tmp_path / "out"), "--recipe", "filters"]
    words += ["--set", "filters.where=coupled", "--data", str(tmp_path / "x.npz"), "--json"]
    done = CliRunner().invoke(cli.app, [*words, "--onnx", str(tmp_path / "one.onnx")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["onnx_difference"] < 1e-4
    again = CliRunner().invoke(cli.app, ["compress", str(tmp_path / "out"), "--onnx", str(tmp_path / "two.onnx")])
    assert again.exit_code == 0, again.output
    assert "two.onnx: onnxruntime's logits differ by" in again.stdout
    sizes = [sum(i.numel() for i in _weights(tmp_path / name)) for name in ("one.onnx", "two.onnx")]
    assert sizes[0] == sizes[1] < sum(p.numel() for p in models.resolve(str(tmp_path / "model")).network.parameters())
    session = onnxruntime.InferenceSession(str(tmp_path / "two.onnx"))
    assert session.get_inputs()[0].shape == ["n", 3, 32, 32]


def _weights(file: Path) -> list[torch.Tensor]:
    import onnx

    return [torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in onnx.load(file).graph.initializer]


def test_an_exported_file_that_answers_otherwise_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weights = tmp_path / "w.safetensors"
    save_file(dict(models.resolve("digits").network.state_dict()), weights)
    for seed in (0, 1):
        options = {"changes": {"calibration.samples": 64}, "weights": weights}
        compress("digits", "nm", tmp_path / f"{seed}", **options)  # type: ignore[arg-type]
        save_file(dict(models.resolve("digits", seed=1).network.state_dict()), weights)
    first, second = (runtime.load(tmp_path / f"{seed}") for seed in (0, 1))
    file = export.to_onnx(first, tmp_path / "net.onnx")
    assert export.difference(first, file) == pytest.approx(0, abs=1e-4)
    with pytest.raises(NumericError, match="differ by"):
        export.difference(second, file)
    with pytest.raises(RequestError, match="no folder"):
        export.to_onnx(first, tmp_path / "nowhere" / "net.onnx")
