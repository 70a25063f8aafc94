"""The gradient of the whole model's loss behind every block: what an error there costs the next token.

One block at a time, so that memory holds no model: forward over probe tokens, writing down what every block receives;
at the end a token is drawn from the model's own distribution; then backward through the blocks in turn. With tokens
drawn so, the gradient's second moment is the Fisher information, the curvature of the divergence from this model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from qtoolkit import memory
from qtoolkit.architecture import Skeleton
from qtoolkit.calibration import capture, halves, outputs, trial
from qtoolkit.calibration.backward import backward, passed_back
from qtoolkit.source import Source
from qtoolkit.stages import Block, Probe, Stream

TOKENS = 8192  # that are probed, about
AT_ONCE = 512  # tokens that go through a block at once: autograd keeps a lot
LOGITS = 1 << 23  # that are held at once


class Store(Protocol):
    """Where what was measured waits for its block: a job."""

    def has(self, part: str) -> bool:
        """Tell whether ``part`` is there."""
        ...

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors as ``part``."""
        ...

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return what was kept."""
        ...

    def drop(self, part: str) -> None:
        """Keep ``part`` no longer."""
        ...


class Gradients:
    """What the loss of a float model asks of all its blocks, in a store.

    Of a block that is a whole these are its metrics, float32; of one with experts, which see the tokens that are routed
    to them when it is quantized, the probe itself, two bfloat16 numbers a token and channel.
    """

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
        if self.store.has(_asked(0)):
            return
        for index in range(count):
            self._save(_before(index), stream.batches)
            block = halves.narrow(self.load(self.source, index))
            stream = capture.advance(block, stream, spent=True)
            if index + 1 < count:
                del block  # before the next is read
        found = at_the_end(self.skeleton, self.source, stream)
        del stream
        for index in reversed(range(count)):
            memory.trim()  # what the passes before have left in pieces
            if index + 1 < count:
                block = halves.narrow(self.load(self.source, index))
            found = self._ask(index, block, found)
            del block

    def tell(self, block: Block, index: int) -> None:
        """Give ``block``, the one of that ``index``, what was measured of it."""
        if block.experts:
            block.probe = self.probe(index)
        else:
            kept = self.store.tensors(_asked(index))
            block.metrics = {name: metric.to(self.skeleton.device) for name, metric in kept.items()}

    def forget(self, index: int) -> None:
        """Keep no longer what was measured of block ``index``, which is done; the first one's says that all was."""
        if index:
            self.store.drop(_before(index))
            self.store.drop(_asked(index))

    def probe(self, index: int) -> Probe:
        """Return the probe of block ``index``, one with experts."""
        return Probe(self._before(index), self._read(_asked(index)))

    def _ask(self, index: int, block: Block, behind: list[Tensor]) -> list[Tensor]:
        """Keep what the loss asks of ``block``, by the gradients ``behind`` it; return those before it, if any is."""
        probe = Probe(self._before(index), behind)
        if block.experts:
            found = [each[0].bfloat16() for each in backward(block, probe, ())] if index else []
            self._save(_asked(index), behind)
        else:
            found, metrics = outputs.measured(block, probe, inputs=index > 0)
            self.store.save(_asked(index), {name: metric.cpu() for name, metric in metrics.items()})
            self.store.drop(_before(index))
        return found

    def _before(self, index: int) -> Stream:
        return Stream(self._read(_before(index)), self.kwargs, device=self.skeleton.device)

    def _save(self, part: str, batches: Iterable[Tensor]) -> None:
        self.store.save(part, {f"{i:05d}": batch.to("cpu", torch.bfloat16) for i, batch in enumerate(batches)})

    def _read(self, part: str) -> list[Tensor]:
        return [batch for _, batch in sorted(self.store.tensors(part).items())]  # on the disk until they are used


def at_the_end(skeleton: Skeleton, source: Source, stream: Stream) -> list[Tensor]:
    """Return the gradient of -log p(drawn token) at what the last block gives, batch by batch in bfloat16."""
    norm, head = trial.ending(skeleton, source)
    draw = torch.Generator("cpu").manual_seed(0)
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        rows = min(AT_ONCE, max(1, LOGITS // len(head)))
        for hidden, _ in stream.calls():
            found.append(torch.cat([_drawn(norm, head, part, draw) for part in hidden.flatten(0, -2).split(rows)]))
            found[-1] = found[-1].view(hidden.shape).bfloat16()
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
    return passed_back(read, [leaf], behind)[0]


def drawn(odds: Tensor, draw: torch.Generator) -> Tensor:
    """Return a token of every row of ``odds`` [tokens, vocabulary], at random by them: int64 [tokens, 1].

    One random number a row: torch.multinomial takes one for each of the odds, which is most of its time.
    """
    reached = odds.cumsum(dim=1)
    level = torch.rand(len(odds), 1, generator=draw, device="cpu").to(odds) * reached[:, -1:]
    return torch.searchsorted(reached, level, right=True).clamp_max(odds.shape[1] - 1)


def _before(index: int) -> str:
    return f"probe-{index:05d}"


def _asked(index: int) -> str:
    return f"asked-{index:05d}"
