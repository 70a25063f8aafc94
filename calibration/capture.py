"""Streaming calibration text through a model one block at a time: what each block and each layer receives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit import nearest
from qtoolkit.architecture import Skeleton
from qtoolkit.calibration.sections import outputs, without
from qtoolkit.errors import NumericError
from qtoolkit.source import Source
from qtoolkit.stages import Block, Stream, put
from qtoolkit.vision.matrix import Geometry
from qtoolkit.waiting import Waiting

TOKENS = 1024  # tokens that go through a block at once: bounds the memory of activations inside a block
STREAMS = 4  # that exist at once: float and quantized, before and behind a block


class Reached(Exception):
    """Ends a forward pass at a module behind which nothing is wanted."""


@torch.inference_mode()
def embed(
    skeleton: Skeleton, source: Source, tokens: Tensor, at_once: int = TOKENS, folder: Path | None = None
) -> Stream:
    """Return what the first block receives for ``tokens`` int64 [sequences, length], with its keyword arguments.

    A batch has about ``at_once`` tokens. With a ``folder`` those that are not on a GPU wait on its disk.

    Only the embedding's rows of these tokens are loaded; everything else the decoder computes before its first block
    (positions, masks) is computed by the decoder itself, so no architecture is described twice.
    """
    decoder = skeleton.decoder
    embedding = decoder.get_input_embeddings()
    name = next(key for key, module in skeleton.model.named_modules() if module is embedding)
    device = skeleton.device
    known, tokens = tokens.unique(return_inverse=True)
    empty, rows = embedding.weight, source.read_finite(f"{name}.weight", known)
    embedding.weight = nn.Parameter(rows.to(device), requires_grad=False)
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(skeleton.config)  # its tables are not stored
    waits = None if fits(tokens.numel() * embedding.weight.shape[1], device) else torch.device("cpu")
    batches: list[Tensor] | Waiting = Waiting(folder) if folder and (waits or device.type == "cpu") else []
    stream = Stream(batches, [], device=device if waits else None)

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        batches.append(args[0].to(waits) if waits else args[0])
        kwargs = {**kwargs, "use_cache": False, "past_key_values": None}
        stream.kwargs.append(shared(kwargs, stream.kwargs[-1]) if stream.kwargs else kwargs)
        raise Reached

    handle = skeleton.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in tokens.split(max(1, at_once // tokens.shape[1])):
            try:
                decoder(input_ids=batch.to(device), use_cache=False)
            except Reached:
                continue
    finally:
        handle.remove()
        embedding.weight = empty
    return stream


def shared(value: Any, before: Any) -> Any:
    """Return ``value`` with the tensors of ``before`` that are equal: rotary tables, which most batches share."""
    if isinstance(value, Tensor):
        same = isinstance(before, Tensor) and value.dtype == before.dtype and torch.equal(value, before)
        return before if same else value
    if isinstance(value, dict) and isinstance(before, dict):
        return {name: shared(part, before.get(name)) for name, part in value.items()}
    if isinstance(value, tuple) and isinstance(before, tuple) and len(value) == len(before):
        return tuple(shared(part, old) for part, old in zip(value, before, strict=True))
    return value


def fits(numbers: int, device: torch.device) -> bool:
    """Return whether streams of float32 ``numbers`` each may stay on ``device`` beside a block and its statistics."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return STREAMS * 4 * numbers < free / 2


@torch.inference_mode()
def advance(block: Block, stream: Stream, *, bits: int = 0, spent: bool = False) -> Stream:
    """Return the stream behind ``block``; if ``stream`` is ``spent``, its batches are overwritten.

    With ``bits`` inputs are rounded as when served. Sections that the stream has passed do not run again, and of those
    that it has passed but for their last layer, only that layer does.

    Raises:
        NumericError: an output is NaN or Inf.
    """
    batches = []
    for number, (hidden, kwargs) in enumerate(stream.calls()):
        given = outputs(block, stream.way, number)
        with quantized_activations(block, bits) if bits else nullcontext(), without(block, given):
            out = block.module(hidden, **kwargs)
        del given
        out = out[0] if isinstance(out, tuple) else out
        if not finite(out):
            raise NumericError(
                f"The output of {block.name} holds NaN or Inf on the calibration text.",
                "The weights or the calibration data are damaged.",
            )
        if spent:
            put(stream.batches, number, out)
        else:
            batches.append(out if stream.device is None else out.to("cpu"))
    return Stream(stream.batches if spent else batches, stream.kwargs, stream.floats, stream.device)


@torch.inference_mode()
def layer_inputs(
    block: Block, stream: Stream, seen: Mapping[str, Callable[[Tensor], None]], *, raw: bool = False, once: bool = False
) -> None:
    """Run ``block`` over ``stream`` and hand every input of the named layers to its callback as [tokens, in].

    A convolution's tokens are its output places, and what one sees is a kernel's patch; ``raw`` hands over the
    input as it is. ``once``: no layer runs twice in a pass, which therefore ends where all have been seen.

    Raises:
        NumericError: an input holds NaN or Inf; the layer is named.
    """

    def watcher(name: str, to: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not finite(args[0]):
                raise NumericError(
                    f"The input of {block.name}.{name} holds NaN or Inf on the calibration text.",
                    "The weights or the calibration data are damaged.",
                )
            to(args[0] if raw else Geometry.of(module).patches(args[0]))
            left.discard(name)
            if once and not left:
                raise Reached

        return hook

    left: set[str] = set()
    with ExitStack() as stack:
        for name, callback in seen.items():
            stack.callback(block.layer(name).register_forward_pre_hook(watcher(name, callback)).remove)
        for hidden, kwargs in stream.calls():
            left.update(seen)
            with suppress(Reached):
                block.module(hidden, **kwargs)


@contextmanager
def quantized_activations(block: Block, bits: int) -> Iterator[None]:
    """Inside this context every quantized target of ``block`` sees its input rounded per token, as when served."""
    last: list[Tensor] = []  # input and the same rounded: layers that share an input follow one another

    def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if not last or last[0] is not args[0]:
            last[:] = args[0], round_tokens(args[0], bits)
        return (last[1],)

    with ExitStack() as stack:
        for _, linear in block.linears():
            stack.callback(linear.register_forward_pre_hook(rounded).remove)
        yield


def finite(x: Tensor) -> bool:
    """Tell whether ``x`` holds no NaN and no Inf; its sum says so as a rule, sooner than its extremes."""
    if not x.numel() or math.isfinite(x.sum()):  # an expert may get no token
        return True
    return all(math.isfinite(extreme) for extreme in x.aminmax())


def round_tokens(x: Tensor, bits: int = 8, times: Tensor | None = None) -> Tensor:
    """Return x [..., k] rounded to ``bits`` integers per token (last dimension), symmetric, scale from its absmax.

    ``times`` [k] multiplies the inputs first.
    """
    return nearest.tokens(x, _top(bits), times)


def token_codes(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return the integers of ``round_tokens``, in x's dtype [..., k], and their scales [..., 1]."""
    return nearest.token_codes(x, _top(bits))


def _top(bits: int) -> int:
    return (1 << (bits - 1)) - 1
