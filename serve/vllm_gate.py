"""Activation, quantization and product in one operator: what vLLM's models ask of a layer after silu(gate) * up.

vLLM has a hook for this: a linear layer says which quantized input it takes, and a table says who makes that from which
activation. Ours makes nothing: it hands gate and up on as they are, and the operator does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8DynamicTokenSym

from qtoolkit.kernels import ops

ROW = (SiluAndMul, kInt8DynamicTokenSym)


@dataclass
class GateAndUp:
    """The input of an activation function, on its way to a layer that applies it: x is [tokens, 2 k]."""

    x: Tensor


def register_gate() -> None:
    """Enter our row in vLLM's table; doing it twice changes nothing."""
    fused_act_quant._FUSED_ACT_QUANT.setdefault(ROW, _hand_on)


def offer(layer: torch.nn.Module, layout: str) -> None:
    """Say for ``layer`` that it takes gate and up, if the backend of its weights does."""
    if ops.fuses_gate(layout):
        layer._input_quant_key = kInt8DynamicTokenSym  # as vLLM's own kernels do


def _hand_on(x: Tensor, linear: torch.nn.Module) -> GateAndUp:
    return GateAndUp(x)
