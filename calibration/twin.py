"""Running one block twice: in the network as it will be served and in the float one, up to a layer's input.

What a layer should give is known from the float network; what it gets is known from the one already quantized. The
difference of the two is what compensation can still make up for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.calibration import halves
from qtoolkit.calibration.capture import Reached, finite, quantized_activations, round_tokens, token_codes
from qtoolkit.calibration.sections import Kept, Section, nothing, outputs, section_of, sections, without
from qtoolkit.errors import NumericError
from qtoolkit.stages import Block, QuantizedWeight, Stream, put
from qtoolkit.waiting import Waiting

BEHIND = "behind"  # the block: no norm of it reads what comes out

Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


@dataclass(frozen=True)
class Inputs:
    """What one layer receives in one batch, all float32.

    Attributes:
        seen: [tokens, k] in the quantized network, before rounding; of every batch but the first, after it.
        served: [tokens, k], the same rounded per token as it will be served.
        wanted: [tokens, k] in the float network.
        drift: [tokens, n], what the hidden stream the layer adds to lacks (float minus quantized); None elsewhere.
    """

    seen: Tensor
    served: Tensor
    wanted: Tensor
    drift: Tensor | None

    def cut(self, start: int, count: int) -> Inputs:
        """Return a copy of at most ``count`` tokens from ``start`` on."""
        rows = slice(start, start + count)
        drift = None if self.drift is None else self.drift[rows].clone()
        return Inputs(self.seen[rows].clone(), self.served[rows].clone(), self.wanted[rows].clone(), drift)


def inputs(
    block: Block,
    name: str,
    stream: Stream,
    originals: Mapping[str, Tensor],
    bits: int,
    *,
    both: bool = True,
    waiting: Collection[str] | None = None,
) -> Iterator[Inputs]:
    """Yield what layer ``name`` receives, batch by batch; the block runs no further than it must.

    A stream that moves is brought on: past the parts of the block that hold none of the ``waiting`` layers, and in the
    float network, which waits for nothing, past the part whose last layer ``name`` is. In the quantized network, if all
    of that part but this layer is quantized, what it receives is kept.

    Args:
        block: some of its targets are quantized already.
        name: the layer.
        stream: what the block receives in the quantized network and, in ``floats``, in the float one.
        originals: float weights of the block's targets.
        bits: of the activations.
        both: False leaves the float network out: ``wanted`` is ``seen`` then, without drift.
        waiting: layers that are not quantized yet; None: nothing is known of them, and nothing is passed.

    Raises:
        NumericError: an input holds NaN or Inf.
    """
    known = sections(block)
    place = section_of(known, name)
    norm = known[place].norm if known else block.residual.get(name, "")
    drifts = name in block.residual
    done = waiting is not None and not any(known[i].holds(each) for i in range(place) for each in waiting)
    onwards = stream.way.moves and done and bool(known) and len(stream.way.passed) < place
    through = stream.floats_way.moves and both and bool(known) and waiting is not None and known[place].writer == name
    ending = known[place + 1].norm if place + 1 < len(known) else BEHIND
    behind = ending if through else ""
    left = [each for each in waiting or () if known and known[place].holds(each)]
    keeps = done and stream.way.moves and left == [name] == [known[place].writer]
    folder = stream.batches.folder if keeps and isinstance(stream.batches, Waiting) else None
    kept: Kept | None = None
    zeros: dict[str, Any] = {}
    exacts = stream.floats or stream.batches
    for number, ((hidden, kwargs), exact) in enumerate(zip(stream.calls(), exacts, strict=True)):
        with torch.inference_mode():  # as a decorator it would keep a batch until the next is there
            ready = outputs(block, stream.way, number)
            looks = folder is not None and not number  # on, to where the section ends
            with quantized_activations(block, bits), without(block, ready):
                watched = known if onwards or looks else []
                found = _reach(block, name, norm, hidden, kwargs, ending if looks else "", watched)
            seen, carried = found.seen, found.carried
            if onwards:
                assert carried is not None
                put(stream.batches, number, carried)
                zeros = {each.module: found.zeros[each.module] for each in known[:place]}
            if folder and looks and known[place].module in found.ends:
                kept = Kept(name, found.zeros[known[place].module], folder)
            del found, ready
            if kept is None:
                served = round_tokens(seen, bits)
            else:
                codes, scale = token_codes(seen, bits)
                kept.append(*(part.view(*hidden.shape[:-1], -1) for part in (codes.to(torch.int8), scale)))
                served = codes.mul_(scale)
                del codes, scale
            seen = seen if not number else served  # a sample is taken of the first: no other is kept beside the float's
            if both:
                with weights(block, originals), without(block, stream.floats_way.passed):
                    right = _reach(block, name, norm, exact.to(hidden), kwargs, behind, known if through else [])
                lack = right.carried - carried if drifts and right.carried is not None and carried is not None else None
                if through:
                    assert right.behind is not None
                    put(stream.floats, number, right.behind)
                    passed = {each.module: right.zeros[each.module] for each in known[: place + 1]}
                made = Inputs(seen, served, right.seen, None if lack is None else lack.flatten(0, -2))
                del right, lack
            else:
                made = Inputs(seen, served, seen, None)
        del seen, served, carried, hidden, exact  # nobody but the caller keeps them through the next batch
        yield made
        del made
    if onwards:
        stream.way.passed, stream.way.kept = zeros, {}
    if kept is not None:
        stream.way.kept = {known[place].module: kept}
    if through:
        stream.floats_way.passed, stream.floats_way.behind = passed, behind == BEHIND


@contextmanager
def weights(block: Block, given: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the block's targets compute with the ``given`` weights."""
    before = {name: block.linear(name).weight.data for name in given}
    for name, weight in given.items():
        block.linear(name).weight.data = weight
    try:
        yield
    finally:
        for name, weight in before.items():
            block.linear(name).weight.data = weight


def left_behind(stream: Stream, name: str) -> bool:
    """Tell whether the float network has passed the layer ``name``: its weight is not asked for again there."""
    return any(name.startswith(f"{module}.") for module in stream.floats_way.passed)


def let_go(layer: nn.Linear) -> None:
    """Take the layer's weight away: it gets another before it computes again."""
    layer.weight.data = torch.empty(0, device=layer.weight.device)


@contextmanager
def packed(layer: nn.Linear, weight: QuantizedWeight) -> Iterator[None]:
    """Inside, ``layer`` has its weight only while it computes, made of ``weight``'s codes; afterwards for good.

    It is made in the dtype that the layer multiplies in, which takes half the memory where that is bfloat16.

    Float weights that it is given meanwhile count before that.
    """
    made: list[bool] = []

    def unpack(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not layer.weight.numel():
            layer.weight.data = weight.dequantize(halves.dtype(layer))
            made.append(True)

    def pack(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if made:
            made.clear()
            let_go(layer)

    let_go(layer)
    handles = [layer.register_forward_pre_hook(unpack), layer.register_forward_hook(pack)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        layer.weight.data = weight.dequantize(halves.dtype(layer))


@dataclass
class _Found:
    """What a pass saw: the layer's input [tokens, k], and the hidden stream before and behind its section.

    Of watched sections it has zeros in the form of their outputs, and ``ends``, those that give what their writer does.
    """

    seen: Tensor
    carried: Tensor | None
    behind: Tensor | None
    zeros: dict[str, Any]
    ends: set[str]


def _reach(
    block: Block,
    name: str,
    norm: str,
    hidden: Tensor,
    kwargs: dict[str, Any],
    behind: str = "",
    watched: Sequence[Section] = (),
) -> _Found:
    """Return the layer's input before any rounding, what ``norm`` read, and the stream ``behind`` the layer's section.

    ``behind`` is the next norm, or ``BEHIND`` the block; empty: the pass ends at the layer. Of ``watched`` sections
    what they give is looked at.
    """
    caught: dict[str, Tensor] = {}
    zeros: dict[str, Any] = {}
    ends: set[str] = set()

    def catch(key: str, last: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught[key] = args[0]
            if last:
                raise Reached

        return hook

    with ExitStack() as stack:

        def watch(module: str, key: str, last: bool, first: bool = False) -> None:
            handle = block.layer(module).register_forward_pre_hook(catch(key, last), prepend=first)
            stack.callback(handle.remove)

        watch(name, "input", not behind, first=True)
        if norm:
            watch(norm, "stream", False)
        if behind and behind != BEHIND:
            watch(behind, "behind", True)
        for section in watched:
            for hooked, hook in zip((section.writer, section.module), _note(section, zeros, ends), strict=True):
                stack.callback(block.layer(hooked).register_forward_hook(hook).remove)
        try:
            out = block.module(hidden, **kwargs)
            caught["behind"] = out[0] if isinstance(out, tuple) else out
        except Reached:
            pass
    if not all(finite(each) for key, each in caught.items() if key != "stream"):
        raise NumericError(
            f"The input of {block.name}.{name}, or what comes of it, holds NaN or Inf on the calibration text.",
            "The weights or the calibration data are damaged.",
        )
    return _Found(caught["input"].flatten(0, -2), caught.get("stream"), caught.get("behind"), zeros, ends)


def _note(section: Section, zeros: dict[str, Any], ends: set[str]) -> tuple[Hook, Hook]:
    """Return hooks for the section's writer and module, which write down what ``_Found`` has of it."""
    written: list[Any] = []

    def writer(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        written.append(out)

    def whole(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        zeros[section.module] = nothing(out)
        if written and written.pop() is (out[0] if isinstance(out, tuple) else out):
            ends.add(section.module)

    return writer, whole
