"""vLLM's int8 layers on CPUs with AMX in other dtypes than bfloat16: its operator for AMX ends the process there.

Seen with vLLM 0.32: ``int8_scaled_mm_with_quant`` knows no float16 and no float32. oneDNN's operator, which vLLM takes
on other CPUs, knows both.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_INT8_KERNELS as KERNELS,
    register_linear_kernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
from vllm.platforms import PlatformEnum


def register_int8() -> None:
    """Let vLLM choose oneDNN's operator where its own would fail; doing it twice changes nothing."""
    if OneDnnInt8 not in KERNELS.get(PlatformEnum.CPU, []):
        register_linear_kernel(OneDnnInt8, PlatformEnum.CPU, "int8")  # appends, and the first that accepts wins
        KERNELS[PlatformEnum.CPU].insert(0, KERNELS[PlatformEnum.CPU].pop())


class OneDnnInt8(CPUInt8ScaledMMLinearKernel):
    """vLLM's own kernel with the operator that it takes on CPUs without AMX."""

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """Accept layers of a model, whose dtype is PyTorch's while it is built, that vLLM's choice cannot run."""
        if torch.get_default_dtype() == torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
            return False, "vLLM's own choice runs it"
        return super().can_implement(c)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the layer's weight for oneDNN."""
        self.linear_method = self._apply_weights_onednn
        self.process_weights_for_onednn(layer)
