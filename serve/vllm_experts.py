"""Mixtures of experts in vLLM on CPUs: int4 experts with int8 activations, each on our linear operator.

vLLM chooses how experts run in one static method of its compressed-tensors code and has no table to enter a row in, so
that method is wrapped: it answers with ours where ours runs, and asks vLLM's own otherwise. A checkpoint's experts
stand in a config group that declares no integer inputs, because with them vLLM expects another layout; that they are
meant to run W4A8 is what qtoolkit.json says.
"""

from __future__ import annotations

from dataclasses import replace
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
from qtoolkit.kernels import folded, selection
from qtoolkit.kernels.experts import w4a8_experts
from qtoolkit.scheme import CHANNEL
from qtoolkit.serve.intent import MODE, Mode, mode

PARTS = ("weight_packed", "weight_scale")


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
    """Loads packed int4 experts as vLLM's own method does, and runs them on ``w4a8_experts``."""

    def __init__(self, weights: Any, layer: RoutedExperts) -> None:
        FusedMoEMethodBase.__init__(self, layer.moe_config)  # the parent's own looks for a kernel of vLLM's
        self.strategy, self.num_bits, self.symmetric = weights.strategy, 4, True
        self.packed_factor = 8  # codes in an int32
        self.group_size = weights.group_size or CHANNEL
        self.prepared: dict[str, selection.Prepared] = {}  # of one expert: the others have the same layout

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Permute each expert's weights once into the layout of the chosen backend."""
        for name in ("w13", "w2"):
            codes, scales = (cast(Tensor, getattr(layer, f"{name}_{part}")) for part in PARTS)
            _, n, words = codes.shape
            device = current_platform.device_type
            problem = selection.Problem(8 * words, n, self.group_size, self.moe.in_dtype, device)
            fold = folded.split(scales.data.flatten(0, 1)) is not None  # all of them or none
            made = [selection.prepare(*expert, problem, fold) for expert in zip(codes.data, scales.data, strict=True)]
            for part, tensors in zip(PARTS, ([m.weight for m in made], [m.scales for m in made]), strict=True):
                replace_parameter(layer, f"{name}_{part}", torch.stack(tensors))
            self.prepared[name] = replace(made[0], weight=codes.new_empty(0), scales=scales.new_empty(0))

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
        """Return the weighted sum of the chosen experts' outputs, [tokens, hidden] in the dtype of x.

        Args:
            layer: has the weights.
            x: bfloat16, float16 or float32 [tokens, hidden].
            topk_weights: [tokens, top_k].
            topk_ids: integers [tokens, top_k].
            shared_experts: run elsewhere.
            shared_experts_input: likewise.
        """
        return w4a8_experts(
            x,
            topk_ids,
            topk_weights,
            cast(Tensor, layer.w13_weight_packed),
            cast(Tensor, layer.w13_weight_scale),
            cast(Tensor, layer.w2_weight_packed),
            cast(Tensor, layer.w2_weight_scale),
            self.moe.intermediate_size_per_partition,
            self.group_size,
            self.prepared["w13"].layout,
            self.prepared["w2"].layout,
        )
