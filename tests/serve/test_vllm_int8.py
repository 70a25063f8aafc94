"""vLLM's int8 layers in other dtypes than bfloat16 on CPUs with AMX: oneDNN's operator runs them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
from vllm.platforms import PlatformEnum
from vllm.utils.torch_utils import set_default_torch_dtype

from qtoolkit.serve.vllm_int8 import KERNELS, OneDnnInt8, register_int8

LAYER = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)


@pytest.mark.parametrize(
    ("amx", "dtype", "taken"),
    [
        (True, torch.float16, True),
        (True, torch.float32, True),
        (True, torch.bfloat16, False),
        (False, torch.float16, False),
    ],
)
def test_only_what_vllms_operator_for_amx_cannot_run_is_taken(
    amx: bool, dtype: torch.dtype, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    with set_default_torch_dtype(dtype):
        assert OneDnnInt8.can_implement(LAYER)[0] == taken


def test_the_kernel_stands_first_once_however_often_it_is_registered() -> None:
    for _ in range(2):
        register_int8()
    assert KERNELS[PlatformEnum.CPU][0] is OneDnnInt8
    assert KERNELS[PlatformEnum.CPU].count(OneDnnInt8) == 1
