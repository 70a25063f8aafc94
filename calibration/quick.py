"""Modules of a decoder layer that compute in one pass what transformers takes several for: RMS norms, gated MLPs.

Whether a module is one is seen in what it gives, so that nothing is said here of architectures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit import layers
from qtoolkit.stages import Block

_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
LARGE = (30.0, 3000.0)  # at which gates are far from straight, and limits show
CLOSE = 1e-4  # relative to the largest number of what a module gives for a probe


def hasten(block: Block) -> Block:
    """Let the modules of ``block`` that lie on a CPU, in float32, compute in the fastest way of those here."""
    for module in block.module.modules():
        for kind in (_Norm, _Gated):
            if not isinstance(module, kind) and kind.fits(module) and _same(module, kind):
                module.__class__ = _derived(kind, type(module))
    return block


class _Norm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    @staticmethod
    def fits(module: nn.Module) -> bool:
        names = [name for name, _ in module.named_parameters()]
        return names == ["weight"] and hasattr(module, "variance_epsilon") and _plain(module.weight, 1)

    @staticmethod
    def inputs(module: Any) -> int:
        return len(module.weight)

    def forward(self, *args: Any, **more: Any) -> Any:
        return super().forward(*args, **more) if _odd(args, more) else self.quick(args[0])

    def quick(self, hidden: Tensor) -> Tensor:
        return layers.normed(hidden, self.weight, self.variance_epsilon)


class _Gated(nn.Module):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    @staticmethod
    def fits(module: nn.Module) -> bool:
        found = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        return all(isinstance(layer, nn.Linear) and _plain(layer.weight, 2) for layer in found)

    @staticmethod
    def inputs(module: Any) -> int:
        return int(module.gate_proj.in_features)

    def forward(self, *args: Any, **more: Any) -> Any:
        return super().forward(*args, **more) if _odd(args, more) else self.quick(args[0])

    def quick(self, hidden: Tensor) -> Tensor:
        return self.down_proj(layers.gated(self.gate_proj(hidden), self.up_proj(hidden)))


def _plain(weight: Any, dimensions: int) -> bool:
    known = isinstance(weight, Tensor) and weight.dtype == torch.float32 and layers.runs(weight.device)
    return known and weight.dim() == dimensions


def _odd(args: tuple[Any, ...], more: dict[str, Any]) -> bool:
    """Tell whether a call is another than that of a hidden state in float32 that nobody wants a gradient of."""
    return torch.is_grad_enabled() or len(args) != 1 or bool(more) or args[0].dtype != torch.float32


@torch.inference_mode()
def _same(module: nn.Module, kind: type[_Norm] | type[_Gated]) -> bool:
    """Tell whether ``module`` gives what it would as a ``kind``, for small tokens and for large ones."""
    numbers = torch.linspace(-1.0, 2.0, kind.inputs(module), device="cpu")  # no mean of 0: it may be taken away
    tokens = torch.stack([numbers * size for size in (1.0, *LARGE)]).unsqueeze(0)
    try:
        wanted = module(tokens)
    except (TypeError, ValueError, RuntimeError):  # it wants more than a hidden state
        return False
    found = kind.quick(module, tokens)  # type: ignore[arg-type]
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
        return False
    most = wanted.abs().amax(dim=-1)
    return bool(((most > 0) & ((found - wanted).abs().amax(dim=-1) <= CLOSE * most)).all())


def _derived(kind: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """Return a class that computes as ``kind`` and is one of the module's ``own`` in all else."""
    if (kind, own) not in _made:
        _made[kind, own] = type(own.__name__, (kind, own), {})
    return _made[kind, own]
