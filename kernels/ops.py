"""The W4A8 operators, defined once for every device: schema, shape rule for torch.compile, and dispatch by layout."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qtoolkit.kernels import chained, folded, reference

LIBRARY = torch.library.Library("qtoolkit", "DEF")  # the operators live as long as this object
LIBRARY.define("quantize_tokens(Tensor x) -> (Tensor codes, Tensor scales)")
LIBRARY.define(
    "w4a8_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias, SymInt n, int group_size, str layout) -> Tensor"
)


class Run(Protocol):
    """A backend's product: arguments as in ``w4a8_linear``; ``weight`` and ``scales`` are in its own layout."""

    def __call__(
        self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int
    ) -> Tensor:
        """Return [..., n] in the dtype of x."""
        ...


_RUN: dict[str, Run] = {}
_OPERATOR: dict[str, torch._ops.OpOverload] = {}
_GATED: dict[str, torch._ops.OpOverload] = {}


def register_layout(
    layout: str,
    run: Run,
    operator: torch._ops.OpOverload | None = None,
    gated: torch._ops.OpOverload | None = None,
) -> None:
    """Make ``run`` the implementation for prepared weights of ``layout``; a backend calls this when it is imported.

    A backend with an operator of its own, with the arguments of ``Run``, names it: ``w4a8_linear`` then calls that
    one directly, which saves the way through Python (5 microseconds a call). ``gated``: likewise for
    ``w4a8_gated_linear``.
    """
    _RUN[layout] = run
    if operator is not None:
        _OPERATOR[layout] = operator
    if gated is not None:
        _GATED[layout] = gated


def _run_neutral(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int) -> Tensor:
    return reference.w4a8_linear(x, reference.unpack_int4(weight, x.shape[-1]), scales, bias, group_size)


def _run_neutral_chained(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    return chained.w4a8_linear(x, reference.unpack_int4(weight, x.shape[-1]), scales, bias, group_size)


def _run_neutral_folded(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int
) -> Tensor:
    return folded.w4a8_linear(x, reference.unpack_int4(weight, x.shape[-1]), scales, bias, group_size)


register_layout("neutral", _run_neutral)
register_layout("neutral chained", _run_neutral_chained)
register_layout("neutral folded", _run_neutral_folded)


def _w4a8_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int, layout: str
) -> Tensor:
    try:
        run = _RUN[layout]
    except KeyError:
        raise ValueError(f"no backend is loaded for weight layout {layout!r}; loaded: {', '.join(_RUN)}") from None
    return run(x, weight, scales, bias, n, group_size)


def _fake_w4a8_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int, layout: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _fake_quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


LIBRARY.impl("w4a8_linear", _w4a8_linear, "CompositeExplicitAutograd")
LIBRARY.impl("quantize_tokens", reference.quantize_tokens, "CompositeExplicitAutograd")
torch.library.register_fake("qtoolkit::w4a8_linear", _fake_w4a8_linear, lib=LIBRARY)
torch.library.register_fake("qtoolkit::quantize_tokens", _fake_quantize_tokens, lib=LIBRARY)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations per token; see ``reference.quantize_tokens`` for the exact rule."""
    return torch.ops.qtoolkit.quantize_tokens(x)


def w4a8_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int, layout: str = "neutral"
) -> Tensor:
    """Apply an int4 linear layer to activations that are quantized to int8 per token on the way.

    Args:
        x: bfloat16, float16 or float32 [..., k].
        weight: int4 codes in ``layout``; for "neutral" int32 [n, ceil(k / 8)], low nibble first, stored with +8.
        scales: for "neutral" float [n, groups]; other layouts say their own.
        bias: [n] or None.
        n: output features.
        group_size: inputs that share a scale; -1 for per-channel.
        layout: name of the weight layout, as ``selection.choose`` returned it with the prepared tensors.

    Returns:
        [..., n] in the dtype of x; the arithmetic is that of ``reference.w4a8_linear``.

    Raises:
        ValueError: no backend for ``layout`` is loaded.
    """
    operator = _OPERATOR.get(layout)
    if operator is not None:
        return operator(x, weight, scales, bias, n, group_size)
    return torch.ops.qtoolkit.w4a8_linear(x, weight, scales, bias, n, group_size, layout)


def fuses_gate(layout: str) -> bool:
    """Say whether a backend takes gate and up in one operator with the product."""
    return layout in _GATED


def w4a8_gated_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, group_size: int, layout: str = "neutral"
) -> Tensor:
    """Apply an int4 linear layer to ``silu(gate) * up``: activation, quantization and product in one operator.

    Args:
        x: bfloat16, float16 or float32 [..., 2 k], gate before up; the others as in ``w4a8_linear``.

    Returns:
        [..., n] in the dtype of x, bit for bit ``w4a8_linear`` of ``reference.silu_and_mul(x)``.
    """
    operator = _GATED.get(layout)
    if operator is not None:
        return operator(x, weight, scales, bias, n, group_size)
    return w4a8_linear(reference.silu_and_mul(x), weight, scales, bias, n, group_size, layout)
