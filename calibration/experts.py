"""A mixture's experts, each calibrated as a block of its own on the tokens that are routed to it.

The block around them (attention, router, a shared expert) comes first. What then arrives at the experts is caught once,
with where the router of the network as served sends it; the float network's states of the same tokens go with it,
wherever its own router would have sent them: only so do the two of an expert's inputs belong together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtoolkit.calibration.backward import backward
from qtoolkit.calibration.capture import quantized_activations
from qtoolkit.errors import NumericError, RequestError
from qtoolkit.stages import Block, Context, Probe, Stream, Transform

FEW = 256  # routed tokens below which an expert is calibrated on all tokens: what was routed to it says too little
TOKENS = 4096  # that go through an expert at once


@dataclass
class Arrivals:
    """What a block's experts are given, batch by batch: hidden [tokens, k], and how tokens are routed.

    ``chosen`` are the experts of each token [tokens, top_k], ``weights`` what their outputs are multiplied with.
    """

    hidden: list[Tensor]
    chosen: list[Tensor]
    weights: list[Tensor]

    def rows(self, expert: int, hidden: list[Tensor]) -> list[Tensor]:
        """Return the tokens of ``hidden`` that are routed to an expert, as batches of sequences of one: [n, 1, k]."""
        found = [x[(index == expert).any(dim=-1)] for x, index in zip(hidden, self.chosen, strict=True)]
        return list(torch.cat(found).unsqueeze(1).split(TOKENS))

    def shares(self, expert: int) -> list[Tensor]:
        """Return what an expert's output counts for each token, batch by batch: [tokens, 1]."""
        both = zip(self.weights, self.chosen, strict=True)
        return [(weights * (index == expert)).sum(dim=-1, keepdim=True) for weights, index in both]


def apply(transform: Transform, block: Block, stream: Stream, context: Context) -> dict[str, dict[str, float]]:
    """Apply ``transform`` to ``block``, then to each of its experts; return what it reports, by names in the block.

    Experts' layers get two figures more: ``routed`` tokens, and the calibration ``tokens`` they were fitted to.

    Raises:
        RequestError: the transform gives experts another scheme; engines run them all alike.
    """
    if not block.experts:
        return transform.apply(block, stream, context)
    compared = getattr(transform, "reads_floats", False) and bool(stream.floats)
    floats = Stream(stream.floats, stream.kwargs, device=stream.device)
    wanted = arrivals(block, floats).hidden if compared else []  # before anything is changed
    probe = block.probe if getattr(transform, "reads_gradients", False) else None
    asked = {} if probe is None else _asked(block, probe)
    report = transform.apply(around(block), stream, context)
    with quantized_activations(block, context.scheme.activation_bits):
        seen = arrivals(block, stream)
    for number, expert in parts(block):
        routed = sum(int((index == number).sum()) for index in seen.chosen)
        if routed < FEW:
            batches, exact = ([x.unsqueeze(1) for x in hidden] for hidden in (seen.hidden, wanted))
        else:
            batches, exact = (seen.rows(number, hidden) if hidden else [] for hidden in (seen.hidden, wanted))
        tokens = sum(len(batch) for batch in batches)
        expert.probe = asked.get(number)
        found = transform.apply(expert, Stream(batches, [{}] * len(batches), exact, stream.device), context)
        if expert.schemes:
            raise RequestError(
                f"{expert.name} can have no scheme but {context.scheme.name}: engines run experts alike."
            )
        within = f"{block.experts}.{number}."
        for name, figures in found.items():
            if name in expert.targets:
                report[f"{within}{name}"] = figures | {"routed": float(routed), "tokens": float(tokens)}
            else:
                report[name] = figures
        block.smoothed |= expert.smoothed
        block.quantized |= {f"{within}{name}": weight for name, weight in expert.quantized.items()}
    return report


def around(block: Block) -> Block:
    """Return ``block`` without its experts as targets; what is decided about it is decided about ``block``."""
    if not block.experts:
        return block
    inside = f"{block.experts}."
    return replace(
        block,
        targets=tuple(name for name in block.targets if not name.startswith(inside)),
        groups=tuple(group for group in block.groups if not _within(inside, group.producers)),
        experts="",
    )


def parts(block: Block) -> Iterator[tuple[int, Block]]:
    """Yield number and block of every expert that is to be quantized.

    Its layers that read the block's norm are a group without producers: they share an input, but are not smoothed here.
    """
    children = block.layer(block.experts) if block.experts else nn.ModuleList()
    for number, module in enumerate(children.children()):
        inside = f"{block.experts}.{number}."
        targets = tuple(name for name in block.targets if name.startswith(inside) and name not in block.refused)
        if targets:
            yield (
                number,
                Block(
                    name=f"{block.name}.{block.experts}.{number}",
                    module=module,
                    targets=_local(inside, targets),
                    groups=tuple(
                        replace(
                            group,
                            producers=_local(inside, group.producers) if _within(inside, group.producers) else (),
                            consumers=_local(inside, group.consumers),
                        )
                        for group in block.groups
                        if any(name.startswith(inside) for name in group.consumers)
                    ),
                ),
            )


def refuse_together(block: Block) -> None:
    """Keep all experts of ``block`` in float if one of their layers is: engines run them as one operator.

    Such a checkpoint is for this package and vLLM: transformers 5.19 takes all experts of a quantized model for packed.
    """
    layers = [name for name in block.targets if block.experts and name.startswith(f"{block.experts}.")]
    for name in layers:
        if reason := block.refused.get(name):
            others = f"experts are quantized together (stock transformers loads no others), but not {name}: {reason}"
            block.refused |= {other: others for other in layers if other not in block.refused}
            return


@torch.inference_mode()
def arrivals(block: Block, stream: Stream) -> Arrivals:
    """Return what arrives at the experts of ``block``; it waits on the CPU where the stream's batches do.

    Raises:
        NumericError: it holds NaN or Inf.
    """
    found = Arrivals([], [], [])

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden = args[0]
        if not hidden.isfinite().all():
            raise NumericError(
                f"The input of {block.name}.{block.experts} holds NaN or Inf on the calibration text.",
                "The weights or the calibration data are damaged.",
            )
        for kept, given in zip((found.hidden, found.chosen, found.weights), args, strict=True):
            kept.append(given if stream.device is None else given.to("cpu"))
        raise _Arrived

    handle = block.layer(block.experts).register_forward_pre_hook(catch)
    try:
        for hidden, kwargs in stream.calls():
            try:
                block.module(hidden, **kwargs)
            except _Arrived:
                continue
    finally:
        handle.remove()
    return found


def _asked(block: Block, probe: Probe) -> dict[int, Probe]:
    """Return what the model's loss asks of each expert's output, on the probe's tokens that are routed to it."""
    given = arrivals(block, probe.stream)
    behind = [gradient for (gradient,) in backward(block, probe, (block.experts,), inputs=False)]  # [tokens, hidden]
    found = {}
    for number, _ in parts(block):
        each = [gradient * share for gradient, share in zip(behind, given.shares(number), strict=True)]
        batches = given.rows(number, given.hidden)
        if sum(map(len, batches)):
            found[number] = Probe(Stream(batches, [{}] * len(batches)), given.rows(number, each))
    return found


class _Arrived(Exception):
    """Ends a block's forward pass at its experts."""


def _within(inside: str, names: tuple[str, ...]) -> bool:
    return all(name.startswith(inside) for name in names)


def _local(inside: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.removeprefix(inside) for name in names if name.startswith(inside))
