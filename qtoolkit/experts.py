"""Experts of a mixture as linear layers of their own, which transformers keeps as two tensors for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class ExpertLayers(BaseModel):
    """Where a block's experts are, and what an expert's layers are called in the stored model.

    Attributes:
        module: in a block, the module that holds them.
        gate: layer whose output goes through the activation function.
        up: layer whose output is multiplied with that.
        down: layer that gives the expert's output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    module: str
    gate: str
    up: str
    down: str


class Expert(nn.Module):
    """``down(act(gate(x)) * up(x))`` for x [..., hidden]."""

    def __init__(
        self, names: ExpertLayers, hidden: int, inner: int, act: Callable[[Tensor], Tensor], **made: Any
    ) -> None:
        super().__init__()
        self.names, self.act = names, act
        self.add_module(names.gate, nn.Linear(hidden, inner, bias=False, **made))
        self.add_module(names.up, nn.Linear(hidden, inner, bias=False, **made))
        self.add_module(names.down, nn.Linear(inner, hidden, bias=False, **made))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., hidden]."""
        gate, up, down = (getattr(self, name) for name in (self.names.gate, self.names.up, self.names.down))
        return down(self.act(gate(x)) * up(x))


class Experts(nn.ModuleList):
    """What stands in the place of transformers' fused experts, and computes the same, expert by expert."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, [tokens, hidden].

        Args:
            hidden: [tokens, hidden].
            index: int64 [tokens, top_k], the chosen experts.
            weights: [tokens, top_k], how much each counts.
        """
        out = torch.zeros_like(hidden)
        for number in index.unique().tolist():
            tokens, place = torch.where(index == number)
            found = self[number](hidden[tokens]) * weights[tokens, place, None]
            out.index_add_(0, tokens, found.to(out.dtype))
        return out


def unfuse(blocks: nn.ModuleList, names: ExpertLayers) -> None:
    """Put ``Experts`` without values where ``blocks`` have fused ones; blocks without any are left as they are."""
    for block in blocks:
        try:
            fused: Any = block.get_submodule(names.module)
        except AttributeError:
            continue
        count, hidden, inner = fused.down_proj.shape
        made = {"dtype": fused.down_proj.dtype, "device": "meta"}
        each = (Expert(names, hidden, inner, fused.act_fn, **made) for _ in range(count))
        block.set_submodule(names.module, Experts(each))
