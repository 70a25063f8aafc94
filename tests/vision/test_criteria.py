"""Each filter criterion, similarity and selection against another way of computing it."""

from __future__ import annotations

import math
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qtoolkit.calibration import criteria, selection
from qtoolkit.errors import RequestError
from qtoolkit.stages import Block, ChannelGroup
from qtoolkit.vision import data, models, similarity
from qtoolkit.vision.context import VisionContext, stream
from qtoolkit.vision.pattern import Pattern


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prepared() -> tuple[Block, list[torch.Tensor], VisionContext]:
    model = models.resolve("cifar-resnet20")
    x = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    context = VisionContext(
        Pattern(pattern="filter", rate=0.3), model.architecture, data.Images(x, torch.arange(16) % 10), 0, print
    )
    return model.block(), stream(context.training, model.architecture).batches, context


def scored(criterion: str) -> tuple[torch.Tensor, Block, ChannelGroup, VisionContext]:
    block, _, context = prepared()
    group = block.groups[4]
    images = stream(context.training, context.architecture)
    return criteria.scores(block, group, criterion, images, context), block, group, context


def test_l2_is_the_root_of_the_sum_of_squares() -> None:
    found, block, group, _ = scored("l2")
    weight = block.layer(group.producers[0]).weight.detach().numpy().astype(np.float64)  # type: ignore[union-attr, operator]
    np.testing.assert_allclose(found, [math.sqrt(sum(v * v for v in row.ravel())) for row in weight], rtol=1e-5)


def test_fpgm_is_the_sum_of_distances_to_every_other_filter() -> None:
    found, block, group, _ = scored("fpgm")
    weight = block.layer(group.producers[0]).weight.detach().numpy().astype(np.float64)  # type: ignore[union-attr, operator]
    expected = [sum(np.linalg.norm(a - b) for b in weight) for a in weight]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_batchnorm_is_its_scales_magnitude() -> None:
    block, _, context = prepared()
    group = block.groups[0]
    norm = block.layer("layer1.0.bn1")
    norm.weight.data = random(16)  # type: ignore[union-attr]
    found = criteria.scores(block, group, "batchnorm", stream(context.training, context.architecture), context)
    assert torch.equal(found, norm.weight.detach().abs())  # type: ignore[union-attr, operator]


def test_taylor_is_the_change_of_the_loss_to_first_order() -> None:
    model = models.resolve("digits")
    block, images = model.block(), data.load("digits-train", model.architecture).first(16)
    context = VisionContext(Pattern(pattern="filter", rate=0.3), model.architecture, images, 0, print)
    found = criteria.scores(
        block, ChannelGroup("conv1", ("conv1",), ()), "taylor", stream(images, model.architecture), context
    )
    weight: torch.Tensor = block.layer("conv1").weight  # type: ignore[assignment, union-attr]
    (x, y) = next(images.batches(16, model.architecture))
    network = block.module.double()
    step = 1e-5

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(network(x.double()), y))

    total = 0.0
    for index in np.ndindex(*weight.shape[1:]):  # central differences, one weight of the first filter at a time
        value = float(weight.data[(0, *index)])
        ends = []
        for sign in (1, -1):
            weight.data[(0, *index)] = value + sign * step
            ends.append(loss())
        weight.data[(0, *index)] = value
        total += abs(value * (ends[0] - ends[1]) / (2 * step))
    assert float(found[0]) == pytest.approx(total, rel=1e-3)


def test_ezcrop_is_the_energy_outside_the_centre_of_the_spectrum() -> None:
    found, block, group, context = scored("ezcrop")
    seen: list[torch.Tensor] = []
    handle = block.layer(group.consumers[0]).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in context.training.batches(16, context.architecture):
            block.module.eval()(x)
    handle.remove()
    maps = torch.cat(seen).numpy().astype(np.float64)
    size = maps.shape[-1]
    turn = np.exp(-2j * np.pi * np.outer(np.arange(size), np.arange(size)) / size)  # the transform written out
    energy = np.log1p(np.abs(turn @ maps @ turn.T))
    step = math.ceil(0.25 * (size - 1 - size // 2))
    low = np.minimum(np.arange(size), size - np.arange(size)) <= step  # distance from frequency 0
    whole = energy.sum(axis=(-2, -1))
    outside = np.where(whole > 0, 1 - energy[..., low, :][..., low].sum(axis=(-2, -1)) / np.maximum(whole, 1e-9), 0)
    np.testing.assert_allclose(found, outside.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize(("size", "kept"), [(32, 9), (16, 5), (8, 3), (7, 3), (3, 1), (1, 1)])
def test_ezcrops_centre_is_odd_and_a_quarter_of_the_way_out(size: int, kept: int) -> None:
    assert len(range(size)[criteria.centre(size)]) == kept


def test_layers_that_write_one_sum_are_scored_together_and_heads_as_a_whole() -> None:
    parts = [torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([30.0, 10.0, 20.0, 20.0])]
    group = ChannelGroup("sum", ("a", "b"), ("c",))
    assert torch.equal(criteria.joined(parts, group), torch.full((4,), 2.0))
    heads = ChannelGroup("heads", ("a",), ("c",), unit=2)
    assert torch.equal(criteria.joined(parts[:1], heads), torch.tensor([4.0, 4.0]))


def test_a_criterion_without_its_facts_is_refused() -> None:
    block, _, context = prepared()
    alone = ChannelGroup("layer1.0.conv1", ("layer1.0.conv1",), ())
    images = stream(context.training, context.architecture)
    for criterion, words in {"batchnorm": "no batch norm", "ezcrop": "Nobody", "l3": "no filter criterion"}.items():
        with pytest.raises(RequestError, match=words):
            criteria.scores(block, alone, criterion, images, context)


def test_cka_is_the_alignment_of_centred_features() -> None:
    a, b = random(40, 30).double(), random(40, 50, seed=1).double()
    x, y = a - a.mean(dim=0), b - b.mean(dim=0)
    expected = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert similarity.cka(a @ a.T, b @ b.T) == pytest.approx(float(expected))
    turned = a @ torch.linalg.qr(random(30, 30, seed=2).double())[0] * 3
    assert similarity.cka(a @ a.T, turned @ turned.T) == pytest.approx(1)


def test_graph_similarity_counts_common_neighbours() -> None:
    a, b = random(30, 8).double(), random(30, 8, seed=1).double()
    shared = 0
    for features in zip(F.normalize(a), F.normalize(b), strict=True):
        near = [
            set((F.normalize(whole) @ one).argsort(descending=True)[:4].tolist())  # itself and three others
            for one, whole in zip(features, (a, b), strict=True)
        ]
        shared += len(near[0] & near[1]) - 1
    assert similarity.gbs(a @ a.T, b @ b.T) == pytest.approx(shared / 90)
    turned = a @ torch.linalg.qr(random(8, 8, seed=2).double())[0] * 3
    assert similarity.gbs(a @ a.T, turned @ turned.T) == 1


def test_modularity_is_networkxs() -> None:
    features, y = random(60, 5).double(), torch.arange(60) % 4
    features += 2 * F.one_hot(y, 5)
    gram = features @ features.T
    directed = similarity.neighbours(gram).double()
    graph = networkx.from_numpy_array(((directed + directed.T) / 2).numpy())
    classes = [set((y == label).nonzero().flatten().tolist()) for label in range(4)]
    assert similarity.modularity(gram, y) == pytest.approx(networkx.community.modularity(graph, classes))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
def test_core_numbers_and_onion_layers_are_networkxs(density: float) -> None:
    upper = (torch.rand(50, 50, generator=torch.Generator().manual_seed(3)) < density).triu(1)
    graph = upper | upper.T
    core, layer = selection.peel(graph)
    other = networkx.from_numpy_array(graph.numpy())
    assert core.tolist() == [networkx.core_number(other)[node] for node in range(50)]
    assert layer.tolist() == [networkx.onion_layers(other)[node] for node in range(50)]


def test_kcore_selection_spreads_over_every_classs_ranks(digits_weights: Path) -> None:
    model = models.resolve("digits", digits_weights)
    images = data.load("digits-train", model.architecture)
    chosen = selection.kcore(model.network, images, model.architecture, 100, 0)
    assert chosen.y.bincount().tolist() == [10] * 10
    features = selection.penultimate(model.network, images, model.architecture)
    members = (images.y == 3).nonzero().flatten()
    order = selection.ranks(selection.alike(features[members])).argsort(stable=True)
    inside = {bytes(images.x[members[i]].numpy()) for i in (order[0], order[-1])}
    assert inside <= {bytes(x.numpy()) for x in chosen.x[chosen.y == 3]}  # the outermost and the innermost are there


def test_penultimate_features_make_the_logits(digits_weights: Path) -> None:
    model = models.resolve("digits", digits_weights)
    images = data.load("digits-test", model.architecture).first(20)
    features = selection.penultimate(model.network, images, model.architecture)
    (x, _) = next(images.batches(20, model.architecture))
    last: nn.Linear = model.network.linear  # type: ignore[assignment]
    with torch.inference_mode():
        torch.testing.assert_close(last(features), model.network(x))
