"""The gradient of the whole model's loss behind every block: what an error there costs the next token.

One block at a time, so that memory holds no model: forward over probe tokens, writing down what every block receives;
at the end a token is drawn from the model's own distribution; then backward through the blocks in turn. With tokens
drawn so, the gradient's second moment is the Fisher information, the curvature of the divergence from this model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qtoolkit.architecture import Skeleton
from qtoolkit.calibration import capture, halves, trial
from qtoolkit.source import Source
from qtoolkit.stages import Block, Probe, Stream

TOKENS = 8192  # that are probed, about
AT_ONCE = 512  # tokens that go through a block at once: autograd keeps a lot
LOGITS = 1 << 23  # that are held at once


class Store(Protocol):
    """Where the probes wait for their blocks: a job."""

    def has(self, part: str) -> bool:
        """Tell whether ``part`` is there."""
        ...

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors as ``part``."""
        ...

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return what was kept."""
        ...


class Gradients:
    """The probes of all blocks of a float model, two bfloat16 numbers a token and channel, in a store."""

    def __init__(
        self, skeleton: Skeleton, source: Source, load: Callable[[Source, int], Block], tokens: Tensor, store: Store
    ) -> None:
        """Take sequences from all of ``tokens`` int64 [sequences, length]; ``load`` gives block i of a source."""
        self.skeleton, self.source, self.load, self.store = skeleton, source, load, store
        start = capture.embed(skeleton, source, tokens[:: -(-tokens.numel() // TOKENS)], at_once=AT_ONCE)
        self.kwargs, self._batches = start.kwargs, list(start.batches)

    def measure(self) -> None:
        """Run forward and backward once, unless a run before this one has."""
        count = len(self.skeleton.blocks)
        stream, self._batches = Stream(self._batches, self.kwargs, device=self.skeleton.device), []
        if self.store.has(_behind(0)):
            return
        for index in range(count):
            self._save(_before(index), stream.batches)
            stream = capture.advance(halves.narrow(self.load(self.source, index)), stream, spent=True)
        found = at_the_end(self.skeleton, self.source, stream)
        for index in reversed(range(count)):
            self._save(_behind(index), found)
            if index:
                block = halves.narrow(self.load(self.source, index))
                found = [each[0] for each in backward(block, self.probe(index), ())]
                del block

    def probe(self, index: int) -> Probe:
        """Return the probe of block ``index``."""
        stream = Stream(self._read(_before(index)), self.kwargs, device=self.skeleton.device)
        return Probe(stream, self._read(_behind(index)))

    def _save(self, part: str, batches: Iterable[Tensor]) -> None:
        self.store.save(part, {f"{i:05d}": batch.to("cpu", torch.bfloat16) for i, batch in enumerate(batches)})

    def _read(self, part: str) -> list[Tensor]:
        return [batch for _, batch in sorted(self.store.tensors(part).items())]  # on the disk until they are used


def at_the_end(skeleton: Skeleton, source: Source, stream: Stream) -> list[Tensor]:
    """Return the gradient of -log p(drawn token) with respect to what the last block gives, batch by batch."""
    norm, head = trial.ending(skeleton, source)
    draw = torch.Generator("cpu").manual_seed(0)
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        rows = max(1, LOGITS // len(head))
        for hidden, _ in stream.calls():
            found.append(torch.cat([_drawn(norm, head, part, draw) for part in hidden.flatten(0, -2).split(rows)]))
            found[-1] = found[-1].view(hidden.shape)
    return found


def _drawn(norm: nn.Module, head: Tensor, states: Tensor, draw: torch.Generator) -> Tensor:
    """Return the gradient of -log p(drawn token) with respect to states [tokens, hidden].

    The head goes by in parts, so that there is no other of it in float32: the gradient at what it reads is p W less
    the row of the token.
    """
    leaf = states.clone().requires_grad_()
    read = norm(leaf)
    with torch.no_grad():
        logits = states.new_empty(len(states), len(head))
        for part, rows in zip(logits.split(trial.VOCABULARY, dim=1), head.split(trial.VOCABULARY), strict=True):
            part.copy_(halves.product(read, rows.to(read.device).T))
        odds = torch.softmax(logits, dim=-1, out=logits)
        token = drawn(odds, draw)
        behind = -head[token.squeeze(1).to(head.device)].to(read)
        for part, rows in zip(odds.split(trial.VOCABULARY, dim=1), head.split(trial.VOCABULARY), strict=True):
            behind += halves.product(part, rows.to(part.device))
    return torch.autograd.grad(read, leaf, behind)[0]


def drawn(odds: Tensor, draw: torch.Generator) -> Tensor:
    """Return a token of every row of ``odds`` [tokens, vocabulary], at random by them: int64 [tokens, 1].

    One random number a row: torch.multinomial takes one for each of the odds, which is most of its time.
    """
    reached = odds.cumsum(dim=1)
    level = torch.rand(len(odds), 1, generator=draw, device="cpu").to(odds) * reached[:, -1:]
    return torch.searchsorted(reached, level, right=True).clamp_max(odds.shape[1] - 1)


def backward(
    block: Block, probe: Probe, names: tuple[str, ...], *, inputs: bool = True
) -> Iterator[tuple[Tensor, ...]]:
    """Yield, batch by batch, the gradient at the block's ``inputs`` and at the output of every layer in ``names``."""
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            caught[name] = out

        return hook

    handles = [block.layer(name).register_forward_hook(catch(name)) for name in names]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            own = {name: _kept(tensor) for name, tensor in block.module.state_dict().items()}
            for (hidden, kwargs), gradient in zip(probe.stream.calls(), probe.gradients, strict=True):
                leaf = hidden.clone().requires_grad_()
                out = functional_call(block.module, own, (leaf,), _cloned(kwargs))
                out = out[0] if isinstance(out, tuple) else out
                wanted = [*([leaf] if inputs else []), *(caught[name] for name in names)]
                yield torch.autograd.grad(out, wanted, grad_outputs=gradient.to(out, copy=True))
    finally:
        for handle in handles:
            handle.remove()


def _kept(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as autograd may keep it: what was made in inference mode must be copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def _before(index: int) -> str:
    return f"probe-{index:05d}"


def _behind(index: int) -> str:
    return f"gradient-{index:05d}"


def _cloned(value: Any) -> Any:
    """Return tensors that autograd may keep, in whatever they are."""
    if isinstance(value, Tensor):
        return _kept(value)
    if isinstance(value, dict):
        return {name: _cloned(part) for name, part in value.items()}
    return tuple(_cloned(part) for part in value) if isinstance(value, tuple) else value
