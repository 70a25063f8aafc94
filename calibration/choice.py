"""Choice by measurement: whether a model is smoothed, rotated, both or neither, judged on held-out text before the run.

A few blocks are quantized in every way, by the recipe's own steps on a part of the calibration text. What comes out is
carried through the float blocks behind, and the way with the least divergence of the next token wins. Rotation harms
some models (published for Qwen3-14B at int4) and saves others, so that no fixed choice is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit import memory
from qtoolkit.architecture import Skeleton
from qtoolkit.calibration import capture, experts, trial
from qtoolkit.calibration.rotation import Rotated
from qtoolkit.checkpoint import Choice
from qtoolkit.source import Source
from qtoolkit.stages import Block, Context, Stream, Transform

LIGHT = {  # options in a trial: what costs most of a step's time and is the same for every candidate
    "smooth": {"grid": 24, "tokens": 256},
    "gptq": {"aim": False, "refine": 0, "starts": 1},
}
MARGIN = 1.05  # a simpler way wins up to so many times the least: trials are short and differ by chance


@dataclass(frozen=True)
class Candidate:
    """One way to treat a model: the float model that its blocks are read from, and the transforms of a block."""

    weights: Source
    transforms: Mapping[str, Transform]

    def enter(self, stream: Stream) -> Stream:
        """Return the float stream as this model has it."""
        return _mapped(stream, self.weights.hidden.turn) if isinstance(self.weights, Rotated) else stream

    def leave(self, stream: Stream) -> Stream:
        """Return a stream of this model as the float model has it."""
        return _mapped(stream, self.weights.hidden.back) if isinstance(self.weights, Rotated) else stream


@torch.inference_mode()
def choose(
    skeleton: Skeleton,
    source: Source,
    candidates: Mapping[str, Candidate],
    load: Callable[[Source, int], Block],
    tokens: Tensor,
    blocks: int,
    context: Context,
) -> Choice:
    """Measure every candidate on held-out text and return the best with the numbers behind it.

    Args:
        skeleton: the empty model.
        source: the float model.
        candidates: the ways, the simplest first.
        load: gives block i of a source with what the recipe says about its layers.
        tokens: int64 [sequences, length], the calibration text.
        blocks: how many blocks are tried.
        context: as in the run.
    """
    fit, held = (capture.embed(skeleton, source, part) for part in trial.split(tokens))
    places = trial.spread(len(skeleton.blocks), blocks)
    carried: dict[tuple[str, int], Stream] = {}
    for index in range(len(skeleton.blocks)):
        block = load(source, index)
        carried = trial.advance_all(block, carried)
        behind = capture.advance(block, fit) if index < places[-1] else fit
        held_behind = capture.advance(block, held)
        del block  # before those that are tried
        if index in places:
            for name, candidate in candidates.items():
                carried[name, index] = _tried(candidate, load(candidate.weights, index), fit, held, context)
                memory.trim()
        fit, held = behind, held_behind
    found = trial.divergence(skeleton, source, held, carried)
    divergences = {name: sum(found[name, index] for index in places) for name in candidates}
    least = min(divergences.values())
    return Choice(
        chosen=next(name for name, value in divergences.items() if value <= least * MARGIN),
        divergence=divergences,
        blocks=tuple(f"{skeleton.architecture.blocks}.{index}" for index in places),
        held_out_tokens=sum(batch.shape[0] * batch.shape[1] for batch in held.batches),
    )


def _tried(candidate: Candidate, block: Block, fit: Stream, held: Stream, context: Context) -> Stream:
    """Return the held-out stream of the float model behind ``block``, quantized in the candidate's way."""
    inputs = candidate.enter(fit)
    for transform in candidate.transforms.values():
        experts.apply(transform, block, inputs, context)
    return candidate.leave(trial.served(block, candidate.enter(held), context.scheme.activation_bits))


def _mapped(stream: Stream, change: Callable[[Tensor], Tensor]) -> Stream:
    return Stream([change(batch) for batch in stream.batches], stream.kwargs, device=stream.device)
