"""Mixtures of experts in vLLM on CPUs: int4 experts with int8 activations, each on our linear operator.

vLLM chooses how experts run in one static method of its compressed-tensors code and has no table to enter a row in, so
that method is wrapped: it answers with ours where ours runs, and asks vLLM's own otherwise. A checkpoint's experts
stand in a config group that declares no integer inputs, because with them vLLM expects another layout; that they are
meant to run W4A8 is what qtoolkit.json says.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from qtoolkit.checkpoint import MANIFEST
from qtoolkit.kernels import ops, selection
from qtoolkit.scheme import CHANNEL
from qtoolkit.serve.intent import MODE, Mode, mode


def register_experts() -> None:
    """Let vLLM ask us first how a mixture's experts run; doing it twice changes nothing."""
    stock = CompressedTensorsMoEMethod.get_moe_method
    if getattr(stock, "asks_qtoolkit", False):
        return

    @wraps(stock)
    def get_moe_method(quant_config: Any, layer: RoutedExperts, layer_name: str) -> FusedMoEMethodBase:
        scheme = quant_config.get_scheme_dict(layer, f"{layer_name}.0.{layer.ckpt_gate_proj_name}")
        reason = refuse(scheme, layer, layer_name)
        if reason is None:
            return W4A8ExpertsMethod(scheme["weights"], layer)
        try:
            method = stock(quant_config, layer, layer_name)
        except NotImplementedError as error:
            raise NotImplementedError(f"{layer_name}: {error} qtoolkit does not run it either: {reason}.") from error
        method.not_w4a8 = reason
        return method

    get_moe_method.asks_qtoolkit = True  # type: ignore[attr-defined]
    CompressedTensorsMoEMethod.get_moe_method = staticmethod(get_moe_method)


def refuse(scheme: dict[str, Any] | None, layer: RoutedExperts, name: str) -> str | None:
    """Return in words why the experts ``name`` do not run on our operator, or None.

    Args:
        scheme: what vLLM found for an expert's layer in the config groups; None: nothing, it stays in float.
        layer: the experts, without weights yet.
        name: such as ``model.layers.0.mlp.experts``.
    """
    if scheme is None:
        return "they are not quantized in the checkpoint"
    weights, moe = scheme["weights"], layer.moe_config
    if scheme["format"] != "pack-quantized" or weights.num_bits != 4 or not weights.symmetric:
        return "their weights are not packed symmetric int4"
    if mode() is Mode.DECLARED and not declared(name):
        return f"{MANIFEST} does not say that they run W4A8 ({MODE}=always does it all the same)"
    if not current_platform.is_cpu():
        return "qtoolkit has an operator for experts on CPUs only"
    if layer.activation != MoEActivation.SILU or moe.has_bias or layer.apply_router_weight_on_input:
        return "they are not silu(gate) * up without bias, weighted at the end"
    if moe.moe_parallel_config.use_ep:
        return "they are spread over ranks as wholes (expert parallelism)"
    return None


def declared(name: str) -> bool:
    """Say whether the served checkpoint's manifest has W4A8 layers within ``name``."""
    model = get_current_vllm_config().model_config
    return any(row.startswith(f"{name}.") for row in _w4a8_layers(model.model, model.revision))


@cache
def _w4a8_layers(model: str, revision: str | None) -> frozenset[str]:
    manifest = get_hf_file_to_dict(MANIFEST, model, revision) or {}
    return frozenset(row["name"] for row in manifest.get("layers", ()) if row["scheme"].startswith("W4A8"))


class W4A8ExpertsMethod(CompressedTensorsWNA16MoEMethod):
    """Loads packed int4 experts as vLLM's own method does, and runs those that have tokens one after another."""

    def __init__(self, weights: Any, layer: RoutedExperts) -> None:
        FusedMoEMethodBase.__init__(self, layer.moe_config)  # the parent's own looks for a kernel of vLLM's
        self.strategy, self.num_bits, self.symmetric = weights.strategy, 4, True
        self.packed_factor = 8  # codes in an int32
        self.group_size = weights.group_size or CHANNEL
        self.gate_up: list[selection.Prepared] = []
        self.down: list[selection.Prepared] = []

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Permute each expert's weights once into the layout of the chosen backend, and drop what was loaded."""
        for prepared, name in ((self.gate_up, "w13"), (self.down, "w2")):
            packed, scales = (
                cast(Tensor, getattr(layer, f"{name}_{part}")) for part in ("weight_packed", "weight_scale")
            )
            _, n, words = packed.shape
            k, device = 8 * words, current_platform.device_type
            problem = selection.Problem(k, n, self.group_size, self.moe.in_dtype, device)
            prepared += [selection.prepare(*expert, problem) for expert in zip(packed.data, scales.data, strict=True)]
            for part in ("weight_packed", "weight_scale"):
                replace_parameter(layer, f"{name}_{part}", packed.data.new_empty(0))

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """Return None: no kernel of vLLM's runs here."""

    @property
    def is_monolithic(self) -> bool:
        """Say that routing is done outside."""
        return False

    @property
    def supports_eplb(self) -> bool:
        """Say that experts stay where they are."""
        return False

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs [tokens, hidden] for x [tokens, hidden].

        Args:
            layer: not needed, the weights are here.
            x: bfloat16, float16 or float32.
            topk_weights: [tokens, top_k].
            topk_ids: integers [tokens, top_k].
            shared_experts: run elsewhere.
            shared_experts_input: likewise.
        """
        chosen, order = topk_ids.flatten().sort(stable=True)
        tokens = order // topk_ids.shape[1]
        counts = torch.bincount(chosen, minlength=len(self.down)).tolist()
        rows = x[tokens].split(counts)
        made = torch.cat([self._expert(number, some) for number, some in enumerate(rows) if len(some)])
        weighted = made.float() * topk_weights.flatten()[order].float().unsqueeze(1)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, tokens, weighted).to(x.dtype)

    def _expert(self, number: int, x: Tensor) -> Tensor:
        first, second = self.gate_up[number], self.down[number]
        inner = 2 * self.moe.intermediate_size_per_partition
        both = ops.w4a8_linear(x, first.weight, first.scales, None, inner, self.group_size, first.layout)
        return ops.w4a8_gated_linear(
            both, second.weight, second.scales, None, x.shape[1], self.group_size, second.layout
        )
