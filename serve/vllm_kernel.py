"""vLLM's view of our W4A8 product: a mixed-precision linear kernel that stands ahead of the stock ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_KERNELS as KERNELS,
    choose_mp_linear_kernel,
    register_linear_kernel,
)
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

from qtoolkit.kernels import ops, selection
from qtoolkit.packing.int4 import pack_int4
from qtoolkit.serve.intent import MODE, Declared, Mode, declared, mode
from qtoolkit.serve.vllm_gate import GateAndUp, offer

PLATFORMS = (PlatformEnum.CPU, PlatformEnum.CUDA)
ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
_ASIDE: ContextVar[bool] = ContextVar("aside", default=False)  # True while we ask vLLM for its own choice


def place_first() -> None:
    """Register the kernel with vLLM ahead of the stock ones; doing it twice changes nothing."""
    for platform in PLATFORMS:
        if W4A8LinearKernel not in KERNELS.get(platform, []):
            register_linear_kernel(W4A8LinearKernel, platform, "mp")  # appends, and the first that accepts wins
            KERNELS[platform].insert(0, KERNELS[platform].pop())


def checkpoint_declares(config: VllmConfig) -> Declared:
    """Return what the served model's checkpoint says about int8 activations."""
    arch = getattr(config.model_config, "model_arch_config", None)
    return declared(getattr(arch, "quantization_config", None))


def refuse(layer: MPLinearLayerConfig, config: VllmConfig) -> str | None:
    """Return in words why a layer does not run W4A8, or None."""
    wanted = mode()
    if wanted is Mode.OFF:
        return f"{MODE}=off"
    if wanted is Mode.DECLARED and checkpoint_declares(config) is Declared.NONE:
        return f"the checkpoint declares no int8 activations ({MODE}=always runs it W4A8 all the same)"
    if layer.zero_points:
        return "its weights have zero points; W4A8 wants symmetric int4"
    if layer.weight_type not in (scalar_types.uint4b8, scalar_types.int4):
        return f"its weights are {layer.weight_type}; W4A8 wants symmetric int4"
    if layer.act_type not in ACTIVATIONS or layer.out_type not in (None, layer.act_type):
        return f"its activations are {layer.act_type}, its outputs {layer.out_type}"
    return refuse_backend(layer, wanted)


def refuse_backend(layer: MPLinearLayerConfig, wanted: Mode) -> str | None:
    """Return in words why no backend of ours runs a layer here, or why vLLM's own kernel is better, or None."""
    own = problem(layer)
    if own.group_size != -1 and own.k % own.group_size:
        return f"its {own.k} inputs on this rank are not a multiple of the group size {own.group_size}"
    try:
        choice = selection.choose(own)
    except ValueError as error:
        return str(error)
    by_name = all(other.name == choice.backend.name for other in selection.backends())  # QTOOLKIT_BACKEND=reference
    if choice.backend is not selection.REFERENCE or wanted is Mode.ALWAYS or by_name or not stock_runs(layer):
        return None
    why = "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())
    return f"only the reference would run it, slower than vLLM's own int4 kernels ({why}; {MODE}=always takes it)"


def stock_runs(layer: MPLinearLayerConfig) -> bool:
    """Say whether vLLM has a kernel of its own for a layer."""
    try:
        with _stand_aside():
            choose_mp_linear_kernel(layer)
    except ValueError:
        return False
    return True


def problem(layer: MPLinearLayerConfig) -> selection.Problem:
    """Return the layer as kernel selection sees it: this rank's shape on this rank's device."""
    k, n = layer.partition_weight_shape
    return selection.Problem(k, n, layer.group_size, layer.act_type, current_platform.device_type)


def neutral(codes: Tensor, scales: Tensor, group_major: bool) -> tuple[Tensor, Tensor]:
    """Bring a loaded weight to the neutral layout.

    Args:
        codes: int32 [n, k/8] (compressed-tensors), int32 [k/8, n] (GPTQ), both low nibble first and stored with +8,
            or int8 [n, k] (compressed-tensors ``int-quantized``).
        scales: [n, groups], or [groups, n] if ``group_major``.
        group_major: the input dimension comes first, as in GPTQ.

    Returns:
        int32 [n, k/8] and [n, groups].
    """
    if group_major:
        codes, scales = codes.t(), scales.t()
    return (pack_int4(codes) if codes.dtype == torch.int8 else codes), scales


class W4A8LinearKernel(MPLinearKernel):
    """Runs symmetric int4 layers through the operator ``qtoolkit::w4a8_linear``."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: backends refuse devices themselves."""
        return 0

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Answer vLLM's question whether this kernel runs the layer, with the reason if not."""
        reason = "vLLM's own choice was asked for" if _ASIDE.get() else refuse(c, get_current_vllm_config())
        return reason is None, reason

    def __init__(
        self, c: MPLinearLayerConfig, w_q_param_name: str, w_s_param_name: str, w_zp_param_name: str | None = None
    ) -> None:
        super().__init__(c, w_q_param_name, w_s_param_name, w_zp_param_name)
        self.prepared: selection.Prepared | None = None
        self.stock: MPLinearKernel | None = None
        if mode() is Mode.DECLARED and checkpoint_declares(get_current_vllm_config()) is Declared.SOME:
            with _stand_aside():  # only the layer itself knows its group, and it comes with its weights
                stock = choose_mp_linear_kernel(c)
            self.stock = stock(c, w_q_param_name, w_s_param_name, w_zp_param_name)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Permute the loaded weight once into the layout of the chosen backend."""
        if self.stock is not None and not _layer_declares(layer):
            self.stock.process_weights_after_loading(layer)
            return
        self.stock = None
        codes, scales, _ = self._get_weight_params(layer)
        group_major = codes.input_dim == 0
        self.prepared = selection.prepare(*neutral(codes.data, scales.data, group_major), problem(self.config))
        replace_parameter(layer, self.w_q_name, self.prepared.weight)
        replace_parameter(layer, self.w_s_name, self.prepared.scales)
        for leftover in ("weight", self.w_zp_name):  # int-quantized files have "weight", GPTQ files have zero points
            if leftover and getattr(layer, leftover, None) is not None:
                setattr(layer, leftover, None)
        offer(layer, self.prepared.layout)

    def apply_weights(self, layer: torch.nn.Module, x: Tensor | GateAndUp, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ w.T + bias``, the activations quantized per token on the way; one opaque operator."""
        if self.prepared is None:
            assert self.stock is not None
            return self.stock.apply_weights(layer, x, bias)
        weight, scales, _ = self._get_weight_params(layer)
        n = self.config.partition_weight_shape[1]
        if isinstance(x, GateAndUp):
            return ops.w4a8_gated_linear(x.x, weight, scales, bias, n, self.config.group_size, self.prepared.layout)
        return ops.w4a8_linear(x, weight, scales, bias, n, self.config.group_size, self.prepared.layout)


def _layer_declares(layer: torch.nn.Module) -> bool:
    """Say whether the scheme that vLLM matched to this layer has int8 activations."""
    scheme: Any = getattr(layer, "scheme", None)
    return getattr(scheme, "input_quant", None) is not None or hasattr(scheme, "input_symmetric")


@contextmanager
def _stand_aside() -> Iterator[None]:
    token = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(token)
