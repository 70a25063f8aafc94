"""Attention in vLLM on CPUs: our bfloat16 kernel, over the cache that vLLM's operators keep.

vLLM has a table of attention backends whose rows may be overridden. In ours a layer writes its cache in the same
operator that attends: one way through Python a layer less. In models with W4A8 layers prompts (whole or in part, alone
or among sequences that decode) and single tokens whose heads share keys run on the kernel of ``kernels/cpu/attention``.
Every kind of attention that the kernel does not know stays vLLM's, as do models without W4A8 layers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import (
    VllmConfig,
    get_current_vllm_config,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
)
from vllm.model_executor.layers.attention import Attention as AttentionLayer
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    _get_attn_isa,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from qtoolkit.kernels.cpu.attention import library
from qtoolkit.kernels.cpu.attention.step import Step
from qtoolkit.serve.intent import ATTENTION, Attention, Declared, Mode, attention, mode
from qtoolkit.serve.vllm_kernel import checkpoint_declares

PAGES = "vec"  # vLLM's name for the layout that the kernel reads
TILES = "amx"  # and for that of its own kernel with AMX
SHARED = 4  # heads on one key/value head from which the kernel is faster for single tokens, too


def register_attention() -> None:
    """Override vLLM's row for CPUs; doing it twice changes nothing."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{Backend.__module__}.{Backend.__qualname__}")


def runs_w4a8(config: VllmConfig) -> bool:
    """Say whether a model's linear layers are ours, as far as its checkpoint tells."""
    if config.model_config is None or config.model_config.quantization is None:
        return False
    return (
        config.model_config.quantization == "qqq"
        or mode() is Mode.ALWAYS
        or checkpoint_declares(config) is not Declared.NONE
    )


class Backend(CPUAttentionBackend):
    """vLLM's attention for CPUs, with our implementation for models that run W4A8."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Return the class of a layer's implementation for the model that is being built."""
        config = get_current_vllm_config_or_none()
        return OwnAttention if config is not None and runs_w4a8(config) else StockAttention

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Return the class that describes batches."""
        return Builder


class Builder(CPUAttentionMetadataBuilder):
    """vLLM's description of batches. With AMX, too, the cache lies as our kernel reads it, if all layers use that."""

    isa: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayer, self.layer_names)
        own = [isinstance(layer.impl, OwnAttention) and not layer.impl.reason for layer in layers.values()]
        if self.isa == TILES and all(own):
            self.isa = PAGES
            self._set_isa_to_layers(self.layer_names)


class StockAttention(CPUAttentionBackendImpl):
    """One layer's attention as vLLM computes it, which writes the new keys and values into the cache before."""

    def write(
        self, layer: Any, key: Tensor | None, value: Tensor | None, kv_cache: Tensor, batch: CPUAttentionMetadata | None
    ) -> None:
        """Put new tokens into the cache, unless the layer reads another's."""
        if batch is None or key is None or value is None or self.kv_sharing_target_layer_name is not None:
            return
        slots = batch.slot_mapping
        self.do_kv_cache_update(layer, key[: len(slots)], value[: len(slots)], kv_cache, slots)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write attention into ``output`` and return it, see vLLM's."""
        self.write(layer, key, value, kv_cache, attn_metadata)
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )


class OwnAttention(StockAttention):
    """One layer's attention; ``reason`` says why it stays with vLLM's code, and is empty if it does not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reason = refuse(self, get_current_vllm_config().model_config.dtype) or ""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write attention into ``output`` and return it, see vLLM's."""
        batch = attn_metadata
        scaled = output_scale is not None or output_block_scale is not None
        if scaled or batch is None or not self.own(layer, batch):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if key is not None and value is not None and self.single(layer, batch):
            self.step(batch).attend(query, key, value, kv_cache, output)
            return output
        self.write(layer, key, value, kv_cache, batch)
        own = slice(batch.num_actual_tokens)
        library.attend(
            query[own], kv_cache, output[own], batch.block_table, batch.query_start_loc, batch.seq_lens, self.scale
        )
        return output

    def own(self, layer: Any, batch: CPUAttentionMetadata) -> bool:
        """Say whether our kernel attends for a batch."""
        return not self.reason and layer.isa == PAGES and takes(batch, self)

    def single(self, layer: Any, batch: CPUAttentionMetadata) -> bool:
        """Say whether our kernel attends for a batch of single tokens and writes them into the layer's own cache."""
        alone = batch.max_query_len == 1 and batch.num_actual_tokens == batch.seq_lens.shape[0]
        return alone and self.kv_sharing_target_layer_name is None and self.own(layer, batch)

    def step(self, batch: Any) -> Step:
        """Return what all layers of a step share; the first one makes it and leaves it with vLLM's description."""
        found: Step | None = getattr(batch, "qtoolkit_step", None)
        if found is None or found.scale != self.scale or found.batch[0] is not batch.block_table:
            lengths, slots = batch.seq_lens, batch.slot_mapping
            found = batch.qtoolkit_step = Step(batch.block_table, batch.query_start_loc, lengths, slots, self.scale)
        return found


def takes(batch: CPUAttentionMetadata, layer: CPUAttentionBackendImpl) -> bool:
    """Say whether a batch is plainly causal, and has a prompt in it or single tokens that occupy all threads.

    vLLM's operator also divides a sequence's keys among threads.
    """
    if batch.causal is not True or batch.dynamic_causal is not None:
        return False
    shares = layer.num_queries_per_kv >= SHARED
    return batch.max_query_len > 1 or (
        shares and batch.seq_lens.shape[0] * layer.num_kv_heads >= torch.get_num_threads()
    )


def refuse(layer: CPUAttentionBackendImpl, dtype: torch.dtype) -> str | None:
    """Return in words why a layer stays with vLLM's attention, or None."""
    if attention() is Attention.VLLM:
        return f"{ATTENTION}={Attention.VLLM.value}"
    if layer.attn_type != AttentionType.DECODER:
        return "it is no decoder's attention to its own tokens"
    extras = {
        "a sliding window": layer.sliding_window != -1,
        "position biases": layer.alibi_slopes is not None,
        "soft caps": bool(layer.logits_soft_cap),
        "sinks": layer.sinks is not None,
        "an fp8 cache": layer.is_fp8_kv_cache,
        "a negative scale": layer.scale <= 0,
    }
    if any(extras.values()):
        return f"it has {' and '.join(name for name, there in extras.items() if there)}"
    reason = library.refuse(layer.num_heads, layer.num_kv_heads, layer.head_size, dtype)
    if reason:
        return reason
    kind = _get_attn_isa(dtype, library.GROUP, layer.head_size, layer.kv_cache_dtype)
    if kind != PAGES and not (kind == TILES and library.tiles() and layer.num_queries_per_kv >= SHARED):
        return f"vLLM has a faster one of its own here ({kind})"
    if not reads_pages(layer.num_kv_heads, layer.head_size):
        return "this vLLM lays its cache out in another way than the kernel reads"
    return None


@cache
def reads_pages(heads: int, dim: int) -> bool:
    """Say whether our kernel finds what vLLM's operator writes, and writes the same itself.

    A few tokens, compared with torch's attention.
    """
    tokens, page = 40, library.GROUP
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, tokens, heads, dim, generator=generator).bfloat16()
    table, output = torch.tensor([[1, 2]], dtype=torch.int32), torch.empty_like(query)
    starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    slots = torch.arange(page, page + tokens)
    pages, own = torch.zeros(2, 3, heads, page, 2 * dim, dtype=torch.bfloat16)
    keys, values = pages.view(3, heads, 2 * page, dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, PAGES)
    library.attend(query, pages, output, table, starts, lengths, dim**-0.5)
    Step(table, starts, lengths, slots, dim**-0.5).attend(query, key, value, own, torch.empty_like(query))
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    near = torch.allclose(output.float().transpose(0, 1), expected, atol=0.05)  # rounding to bfloat16 ends below 0.02
    return near and torch.equal(own, pages)
