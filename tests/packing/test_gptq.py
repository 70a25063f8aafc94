"""The GPTQ layout against its formula, and the files of other tools that it must tell apart."""

from __future__ import annotations

import pytest
import torch
from foreign_support import Drawn, gptq

from qtoolkit.errors import CheckpointError, RequestError
from qtoolkit.packing.gptq import PACKER
from qtoolkit.scheme import CHANNEL, INT8, Scheme
from qtoolkit.stages import QuantizedWeight

N, K = 64, 256


def drawn(groups: int = 2) -> Drawn:
    generator = torch.Generator().manual_seed(groups)
    codes = torch.randint(-8, 8, (N, K), generator=generator, dtype=torch.int8)
    return Drawn(codes, (torch.rand(N, groups, generator=generator) + 0.1).half())


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_packing_is_the_published_formula(groups: int) -> None:
    layer = drawn(groups)
    expected = gptq(layer)
    found = PACKER.pack(QuantizedWeight(layer.codes, layer.scales))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    scheme = Scheme(group_size=CHANNEL if groups == 1 else K // groups)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == PACKER.shapes(N, K, scheme)


def test_a_file_without_an_order_is_read() -> None:
    layer = drawn()
    tensors = gptq(layer)
    del tensors["g_idx"]
    assert torch.equal(PACKER.unpack(tensors).dequantize(), layer.weight)


def test_groups_in_another_order_are_put_in_order() -> None:
    layer = drawn(2)
    order = 1 - torch.arange(K, dtype=torch.int32) // 128  # the first 128 inputs are of group 1
    swapped = Drawn(layer.codes, layer.scales.flip(1))
    found = PACKER.unpack(gptq(swapped, order=order))
    assert torch.equal(found.scales, layer.scales)
    assert torch.equal(found.dequantize(), layer.weight)


@pytest.mark.parametrize("order", [torch.arange(K) % 2, torch.arange(K) // 64, torch.full((K,), -1)])
def test_an_order_that_scatters_groups_is_refused(order: torch.Tensor) -> None:
    with pytest.raises(RequestError, match="desc_act"):
        PACKER.unpack(gptq(drawn(), order=order.to(torch.int32)))


def test_zero_points_are_refused() -> None:
    tensors = gptq(drawn())
    tensors["qzeros"][0, 3] = 0x77777774
    with pytest.raises(RequestError, match="zero points"):
        PACKER.unpack(tensors)


@pytest.mark.parametrize(("name", "rows"), [("qweight", 31), ("scales", 1), ("qzeros", 1), ("g_idx", 8)])
def test_tensors_that_do_not_belong_together_are_refused(name: str, rows: int) -> None:
    tensors = gptq(drawn())
    with pytest.raises(CheckpointError, match="do not belong together"):
        PACKER.unpack({**tensors, name: tensors[name][:rows]})


@pytest.mark.parametrize(
    ("n", "k", "scheme", "words"),
    [
        (64, 256, Scheme(), None),
        (64, 256, Scheme(group_size=CHANNEL), None),
        (60, 256, Scheme(), "multiples of 8"),
        (64, 192, Scheme(), "group size 128"),
        (64, 256, INT8, "8-bit"),
    ],
)
def test_refuse_says_what_does_not_fit(n: int, k: int, scheme: Scheme, words: str | None) -> None:
    reason = PACKER.refuse(n, k, scheme)
    assert (reason is None) == (words is None)
    assert words is None or words in str(reason)
