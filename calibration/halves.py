"""Forward passes of calibration on a CPU: bfloat16 where the processor has units for it, else whole numbers.

What is rounded are the factors and results of linear layers and of attention (bfloat16), or the factors of linear
layers (12 bits, by AVX512-VNNI); sums, norms and the hidden stream stay in float32. A network served in bfloat16 rounds
as much, and int8 inputs round much more away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtoolkit import layers
from qtoolkit.calibration import processor, products, quick
from qtoolkit.stages import Block

ATTENTION = "qtoolkit_bfloat16"  # transformers' name for attention that multiplies in bfloat16
PARTED = "qtoolkit_float32"  # and for one that stays in float32
ROWS, KEYS = 128, 512  # PyTorch's attention passes over 512 keys at once, those of later tokens among them
SMALLEST = 128  # inputs and outputs of a layer that takes part: routers, which decide by small differences, do not


def pays(device: torch.device) -> bool:
    """Tell whether products of bfloat16 are faster on ``device`` than those of float32: on CPUs with units for them."""
    return device.type == "cpu" and processor.has_bfloat16()


def hasten(block: Block, device: torch.device) -> Block:
    """Let ``block``, which computes on ``device``, do so in the fastest way of those here."""
    if device.type == "cpu":
        quick.hasten(block)
    if pays(device):
        return halve(block)
    if device.type == "cpu":
        _attend_by(block, PARTED)
        for layer in _layers(block):
            layer.__class__ = _Rough
    return block


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` in float32, multiplied in bfloat16 where that pays: for sums that a sample stands for."""
    if not pays(left.device):
        with products.rough():
            return products.times(left.float(), right.float())
    return (left.bfloat16() @ right.bfloat16()).float()


def halve(block: Block) -> Block:
    """Let attention and every linear layer of ``block`` but small ones compute in bfloat16, float32 around them."""
    _attend_by(block, ATTENTION)
    for layer in _layers(block):
        layer.__class__ = _Halved  # a forward of its own would be a cycle of references: memory that stays
    return block


def _layers(block: Block) -> list[nn.Linear]:
    """Return the layers of ``block`` that may round what they multiply."""
    return [m for m in block.module.modules() if type(m) is nn.Linear and min(m.weight.shape) >= SMALLEST]


def dtype(layer: nn.Linear) -> torch.dtype:
    """Return in which dtype ``layer`` multiplies: its weight may be given in that one."""
    return torch.bfloat16 if isinstance(layer, _Halved) else torch.float32


def narrow(block: Block) -> Block:
    """Let ``block``, which nobody changes any more, hold weights as they are multiplied: not rounded in every pass."""
    for layer in block.module.modules():
        if isinstance(layer, _Halved):
            layer.weight.data = layer.weight.data.to(dtype(layer))
    return block


@contextmanager
def narrowed(module: nn.Module, but: Collection[nn.Linear] = ()) -> Iterator[None]:
    """Inside, layers of ``module`` hold weights as they are multiplied, all ``but`` some."""
    layers = [each for each in module.modules() if isinstance(each, _Halved) and not any(each is one for one in but)]
    before = [(layer, layer.weight.data) for layer in layers]
    for layer, weight in before:
        layer.weight.data = weight.to(dtype(layer))
    try:
        yield
    finally:
        for layer, weight in before:
            layer.weight.data = weight


def _attend_by(block: Block, name: str) -> None:
    """Let attention be ours of that ``name`` in all of the model's blocks, which share their config.

    Where it is not PyTorch's fused one it stays.
    """
    for module in block.module.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            _register_attention()
            config._attn_implementation = name  # type: ignore[union-attr]


@cache
def _register_attention() -> None:
    """Tell transformers of our attention, and that its masks are those of PyTorch's."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, function in ((ATTENTION, _attend), (PARTED, _attend_in_parts)):
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend in bfloat16 and return float32; where a gradient is wanted, which is slower so, in float32."""
    if query.dtype != torch.float32 or (torch.is_grad_enabled() and query.requires_grad):
        return _attend_at_once(module, query, key, value, attention_mask, **options), None
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.clamp_min(torch.finfo(torch.bfloat16).min).bfloat16()
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    return _attend_in_parts(module, query, key, value, attention_mask, **options)[0].float(), None


def _attend_in_parts(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend by our own loops where tokens attend to those before them and no gradient is wanted.

    Where these do not run, and in bfloat16, in parts of rows if tokens are few.
    """
    ordered = attention_mask is None and not options.get("dropout") and _causal(module, options.get("is_causal"))
    plain = options.get("position_bias") is None and options.get("cache") is None
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    alone = query.shape[2] == key.shape[2] and not wanted
    if ordered and plain and alone:
        if layers.attends(query, key, value):
            return layers.causal(query, key, value, options.get("scaling")), None
        if ROWS < query.shape[2] <= KEYS:
            return _attend_back(query, key, value, options.get("scaling")), None
    return _attend_at_once(module, query, key, value, attention_mask, **options), None


def _attend_at_once(*args: Any, **options: Any) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: Tensor = sdpa_attention_forward(*args, **options)[0]
    return found


def _causal(module: nn.Module, asked: bool | None) -> bool:
    return asked if asked is not None else getattr(module, "is_causal", True)


def _attend_back(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attend to a token and those before it, in parts of rows that do not pass over the keys behind them."""
    length = query.shape[2]
    mask = _lower(KEYS, query.dtype, query.device)
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], mask[start:stop, :stop],
            scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
        for start, stop in ((start, min(start + ROWS, length)) for start in range(0, length, ROWS))
    ]  # fmt: skip
    return torch.cat(parts, dim=1)


@cache
def _lower(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd may keep it
        return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu(1)


class _Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input.bfloat16(), self.weight.bfloat16()).float()
        return out if self.bias is None else out + self.bias


class _Rough(nn.Linear):
    """Multiplies as ``products`` may where that is rough: whole numbers, on CPUs with AVX512-VNNI."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.float32 or input.dim() < 2:
            return super().forward(input)
        flat = input.flatten(0, -2)
        if torch.is_grad_enabled() and input.requires_grad and not self.weight.requires_grad:
            out: Tensor = _Product.apply(flat, self.weight)
        elif torch.is_grad_enabled():
            return super().forward(input)
        else:
            out = _multiplied(flat, self.weight.T)
        out = out.view(*input.shape[:-1], out.shape[1])
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """Rows times a weight that nobody wants a gradient of, multiplied roughly both ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _multiplied(rows, weight.T)

    @staticmethod
    def backward(ctx: Any, behind: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _multiplied(behind.contiguous(), weight), None


def _multiplied(left: Tensor, right: Tensor) -> Tensor:
    with products.rough():
        return products.times(left, right)
