"""Which dtype scales are stored in, and what is said where a layout cannot hold them."""

from __future__ import annotations

import pytest
import torch

from qtoolkit.bridges.repack import repack, stored_scales
from qtoolkit.errors import NumericError, RequestError
from qtoolkit.packed import integer_packer
from qtoolkit.stages import QuantizedWeight

THIRD = torch.full((128, 2), 1 / 3)


def weight(scales: torch.Tensor) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    return QuantizedWeight(torch.randint(-8, 8, (128, 256), generator=generator, dtype=torch.int8), scales)


@pytest.mark.parametrize(
    ("scales", "layout", "model", "stored"),
    [
        (THIRD.half(), "int4", torch.bfloat16, torch.float16),  # 16 bits stay what they are
        (THIRD.bfloat16(), "gptq", torch.float16, torch.bfloat16),
        (THIRD.bfloat16().float(), "int4", torch.bfloat16, torch.bfloat16),  # exact in the model's dtype
        (THIRD, "int4", torch.bfloat16, torch.float32),
        (THIRD, "int8", torch.float32, torch.float32),
        (THIRD.half().float(), "gptq", torch.bfloat16, torch.float16),  # exact in one of 16 bits
        (THIRD.bfloat16().float(), "gptq", torch.float32, torch.float16),
        (THIRD, "gptq", torch.bfloat16, torch.bfloat16),
        (THIRD, "gptq", torch.float32, torch.float16),
        (THIRD, "qqq", torch.float16, torch.float32),
    ],
)
def test_the_dtype_in_which_scales_are_stored(
    scales: torch.Tensor, layout: str, model: torch.dtype, stored: torch.dtype
) -> None:
    assert stored_scales(scales, layout, model).dtype == stored


def test_the_error_is_that_of_the_dtype() -> None:
    assert repack("layer", weight(THIRD), integer_packer("int4"), torch.bfloat16)[1] == 0
    rounded = repack("layer", weight(THIRD), integer_packer("gptq"), torch.bfloat16)[1]
    assert rounded == pytest.approx(abs(float(torch.tensor(1 / 3).bfloat16()) * 3 - 1), rel=1e-3)


def test_a_scale_that_falls_out_of_range_is_refused_unless_its_codes_are_zero() -> None:
    far = weight(torch.stack((torch.ones(128), torch.full((128,), 2.0**-40)), dim=1).bfloat16())
    with pytest.raises(RequestError, match="layer has scales outside the range of the layout qqq: relative error 1"):
        repack("layer", far, integer_packer("qqq"), torch.bfloat16)
    far.codes[:, 128:] = 0
    assert repack("layer", far, integer_packer("qqq"), torch.bfloat16)[1] == 0


def test_damaged_scales_are_told() -> None:
    with pytest.raises(NumericError, match="layer has scales that are NaN"):
        repack("layer", weight(THIRD * torch.nan), integer_packer("int4"), torch.bfloat16)
