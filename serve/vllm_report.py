"""Says at start-up which kernel runs how many layers of a model that vLLM has just loaded, and why any is not W4A8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from qtoolkit.head import FloatHead
from qtoolkit.kernels.selection import Prepared
from qtoolkit.scheme import Head
from qtoolkit.serve import report
from qtoolkit.serve.intent import HEAD
from qtoolkit.serve.vllm_attention import OwnAttention
from qtoolkit.serve.vllm_experts import W4A8ExpertsMethod
from qtoolkit.serve.vllm_head import HeadMethod
from qtoolkit.serve.vllm_kernel import W4A8LinearKernel, refuse

UNQUANTIZED = "it is not quantized in the checkpoint"
KERNELS = {Head.INT8: "w8a8", Head.INT4: "w4a8"}  # of output layers
logger = init_logger("vllm.qtoolkit")  # below "vllm", so that vLLM's own handlers print it


def report_after_loading() -> None:
    """Make every later ``load_model`` end with our report; doing it twice changes nothing.

    vLLM has no hook after loading, so the base loader's method is wrapped: same arguments, same result.
    """
    load = BaseModelLoader.load_model
    if getattr(load, "reports_kernels", False):
        return

    @wraps(load)
    def load_and_report(
        self: BaseModelLoader, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        model = load(self, vllm_config, model_config, prefix)
        if model_config is vllm_config.model_config and get_tensor_model_parallel_rank() == 0:  # no draft model
            layers = list(describe(model, vllm_config))
            logger.info(report.sentence(layers))
            if reasons := list(attention(model)):
                logger.info(report.attention(reasons))
            report.write(layers, f"stage-{get_pp_group().rank_in_group}")
        return model

    load_and_report.reports_kernels = True  # type: ignore[attr-defined]
    BaseModelLoader.load_model = load_and_report


def describe(model: torch.nn.Module, config: VllmConfig) -> Iterator[report.Layer]:
    """Yield each linear layer of a loaded model, fused ones (q, k, v; gate, up; experts) as the one layer they are."""
    for name, module in model.named_modules():
        if isinstance(module, (LinearBase, ParallelLMHead)):
            yield describe_layer(name, module, config)
        elif isinstance(module, RoutedExperts):
            yield describe_experts(module)


def attention(model: torch.nn.Module) -> Iterator[str]:
    """Yield for each attention layer that was offered our kernel why vLLM's runs it, "" where ours does."""
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.impl, OwnAttention):
            yield module.impl.reason


def describe_experts(module: RoutedExperts) -> report.Layer:
    """Return what runs a block's experts."""
    method: Any = module.quant_method
    if isinstance(method, W4A8ExpertsMethod):
        return report.Layer(module.layer_name, f"w4a8-{method.prepared['w2'].backend}")
    backend = getattr(method, "wna16_backend", None)
    kernel = f"vllm-{backend.value.lower()}" if backend is not None else f"vllm-{type(method).__name__}"
    return report.Layer(module.layer_name, kernel, getattr(method, "not_w4a8", "vLLM's own operator was asked for"))


def describe_layer(name: str, module: torch.nn.Module, config: VllmConfig) -> report.Layer:
    """Return which kernel runs one layer."""
    method: Any = module.quant_method
    if isinstance(method, HeadMethod):
        if method.made is None:
            return report.Layer(name, "unquantized", f"{HEAD}={method.kind.value}, but {method.reason}")
        if isinstance(method.made, FloatHead):
            return report.Layer(name, "bf16-cpu", UNQUANTIZED)
        return report.Layer(name, f"{KERNELS[method.kind]}-{method.made.prepared.backend}")
    prepared = getattr(method, "prepared", None)  # the qqq method
    if isinstance(prepared, Prepared):
        return report.Layer(name, f"w4a8-{prepared.backend}")
    kernel = getattr(getattr(module, "scheme", None), "kernel", None) or getattr(method, "kernel", None)
    if isinstance(kernel, W4A8LinearKernel):
        if kernel.prepared is not None:
            return report.Layer(name, f"w4a8-{kernel.prepared.backend}")
        return report.Layer(name, f"vllm-{type(kernel.stock).__name__}", "its group declares no int8 activations")
    if isinstance(kernel, MPLinearKernel):
        reason = refuse(kernel.config, config) or "another kernel was asked for by name"
        return report.Layer(name, f"vllm-{type(kernel).__name__}", reason)
    if type(method).__name__.startswith("Unquantized"):
        return report.Layer(name, "unquantized", UNQUANTIZED)
    return report.Layer(name, f"vllm-{type(method).__name__}", "its scheme is not int4")
