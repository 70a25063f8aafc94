"""The vocabulary's matrix in vLLM: the output layer on our kernels, in integers on request; no copy nobody reads."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from qtoolkit import head
from qtoolkit.kernels.cpu import bfloat16
from qtoolkit.scheme import Head
from qtoolkit.serve import intent
from qtoolkit.serve.vllm_attention import runs_w4a8


def register_head() -> None:
    """Let vLLM make our classes for its two vocabulary layers; doing it twice changes nothing."""
    for base, own in ((ParallelLMHead, OutputLayer), (VocabParallelEmbedding, Embedding)):
        if base.__name__ not in op_registry_oot:
            base.register_oot(own)


class OutputLayer(ParallelLMHead):
    """vLLM's output layer, on our kernels where other layers are, with the weights that QTOOLKIT_LM_HEAD asks for."""

    quant_method: QuantizeMethodBase

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plain = isinstance(self.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        wanted = intent.head()
        if plain and wanted is not None and (wanted is not Head.FLOAT or _refuse_float() is None):
            self.quant_method = HeadMethod(wanted)


class Embedding(VocabParallelEmbedding):
    """vLLM's embedding, which on CPUs also packs its matrix for products: here only if a product is asked for."""

    quant_method: QuantizeMethodBase

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Exactly that class: subclasses are other layers' business.
        if type(self.quant_method) is UnquantizedEmbeddingMethod and current_platform.is_cpu():
            self.quant_method = LookupMethod()


class LookupMethod(UnquantizedEmbeddingMethod):
    """Looks tokens up; models whose output layer is the embedding itself pack it when they first multiply."""

    def __init__(self) -> None:
        self.packed = False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Do nothing: a packed copy is as large as the matrix."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ w.T + bias`` as vLLM does."""
        if not self.packed:
            super().process_weights_after_loading(layer)
            self.packed = True
        return super().apply(layer, x, bias)


class HeadMethod(QuantizeMethodBase):
    """Loads the float matrix of this rank's tokens and keeps it in a kernel's layout only, rounded if that is asked."""

    def __init__(self, kind: Head) -> None:
        self.kind = kind
        self.made: head.QuantizedHead | head.FloatHead | None = None
        self.stock = UnquantizedEmbeddingMethod()
        self.reason = _refuse_model() or ""  # why it stays in float, if it does

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Register the float matrix that the checkpoint has, as vLLM's own method does."""
        self.stock.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Make the kernel's matrix; a tied float one stays with the embedding, an own one is dropped."""
        weight = cast(Tensor, layer.weight)
        n, k = weight.shape
        self.reason = self.reason or head.refuse(n, k, self.kind, weight.dtype, weight.device.type) or ""
        if self.reason:
            self.stock.process_weights_after_loading(layer)
            return
        if self.kind is Head.FLOAT:
            self.made = head.keep(weight.data)
        else:
            self.made = head.quantize(weight.data, self.kind, weight.dtype)
        layer.weight = torch.nn.Parameter(weight.data.new_empty(0), requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits of this rank's tokens, in the dtype of x."""
        return self.stock.apply(layer, x, bias) if self.made is None else self.made(x, bias)

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        """Refuse: embeddings have a layer of their own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("An output layer looks no tokens up.")


def _refuse_float() -> str | None:
    """Return in words why the output layer of the model that is being built is left to vLLM as it is, or None."""
    config = get_current_vllm_config()
    if not runs_w4a8(config):
        return "the model's other layers are vLLM's"
    return bfloat16.refuse(config.model_config.dtype, current_platform.device_type) or _refuse_model()


def _refuse_model() -> str | None:
    """Return in words why this engine needs the float matrix later, or None."""
    config = get_current_vllm_config()
    if config.lora_config is not None:
        return "adapters are in use, which add to the float matrix"
    model = config.model_config
    if model.head_dtype != model.dtype:
        return f"logits in {model.head_dtype} are asked for"
    return None
