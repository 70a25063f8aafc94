"""Rotation: turn the hidden stream and the value heads by random Hadamard matrices, so that no channel stands out.

Sources: QuIP# (Tseng et al. 2024, randomized Hadamard), QuaRot (Ashkboos et al. 2024, section 4, stages 1a and 1c). A
rotation of the whole float model: with an orthogonal Q the stream h becomes h Q, whoever reads it gets W Q, whoever
writes it Q.T W, and every logit stays. Norms must commute with Q, so their gains go into the layers that read them.
Nothing is computed online: every engine serves the result.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from qtoolkit.architecture import Skeleton, stored_dtype
from qtoolkit.calibration import hadamard
from qtoolkit.calibration.options import Options
from qtoolkit.source import Source

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
ROWS = 128  # rows, or columns, of a weight that are turned at once: they stay in caches
HALVES = (torch.bfloat16, torch.float16)  # stored in these, a weight is turned in float32, else in float64


class RotateOptions(Options):
    """Options of the step ``rotate``."""

    heads: bool = Field(True, description="turn the value heads as well: the inputs of o_proj")


class Rotate:
    """The rewrite: gives a source whose tensors are those of the rotated model, turned one by one as they are read."""

    Options = RotateOptions

    def __init__(self, options: RotateOptions) -> None:
        self.options = options

    def rewrite(self, source: Source, skeleton: Skeleton, seed: int) -> Rotated:
        """Return ``source`` rotated; the same seed turns it the same way."""
        return Rotated(
            path=source.path,
            name=source.name,
            revision=source.revision,
            float_source=source,
            skeleton=skeleton,
            seed=seed,
            heads=self.options.heads,
        )


class Rotation:
    """A random orthogonal Q: random signs, then a Hadamard matrix; where no Hadamard size fits, drawn as a whole.

    Works on the last dimension, or on every ``size`` channels of it.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        draw = torch.Generator("cpu").manual_seed(seed)
        self.signs = self.dense = None
        if hadamard.fits(size):
            self.signs = torch.randint(0, 2, (size,), generator=draw, device="cpu", dtype=torch.float64) * 2 - 1
        else:  # QR of a Gaussian matrix with R's diagonal made positive is uniform over the rotations (Stewart 1980)
            gaussian = torch.randn(size, size, generator=draw, device="cpu", dtype=torch.float64)
            q, r = torch.linalg.qr(gaussian)
            self.dense = q * r.diagonal().sign()

    def turn(self, x: Tensor) -> Tensor:
        """Return ``x @ Q`` for x [..., multiple of size]."""
        rows = x.unflatten(-1, (-1, self.size))
        if self.dense is not None:
            return (rows @ self.dense.to(x)).flatten(-2)
        assert self.signs is not None
        return hadamard.times(rows * self.signs.to(x)).flatten(-2)

    def back(self, x: Tensor) -> Tensor:
        """Return ``x @ Q.T``: what ``turn`` was given."""
        rows = x.unflatten(-1, (-1, self.size))
        if self.dense is not None:
            return (rows @ self.dense.T.to(x)).flatten(-2)
        assert self.signs is not None
        return (hadamard.times(rows, transposed=True) * self.signs.to(x)).flatten(-2)


@dataclass(frozen=True)
class Part:
    """What happens to one module: the gain it takes over, what its inputs and its outputs are turned by."""

    gain: str = ""  # norm whose gain is multiplied into the weight's columns
    inputs: Rotation | None = None
    outputs: Rotation | None = None
    ones: bool = False  # a norm whose gain others have taken over


@dataclass(frozen=True, kw_only=True)
class Rotated(Source):
    """A float model read rotated: tensor by tensor, in more digits than are stored, rounded once.

    Tied embeddings are untied. Blocks come in float32; what is outside them in the dtype that is stored, so that the
    stream sees what is served.
    """

    float_source: Source
    skeleton: Skeleton
    seed: int
    heads: bool

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return config.json with the embeddings untied: the head took the final norm's gain, the embedding did not."""
        config = dict(self.float_source.config)
        return {**config, "tie_word_embeddings": False} if self.skeleton.tied else config

    @property
    def notes(self) -> tuple[str, ...]:
        """Say that the embeddings were untied, and where a rotation is not a Hadamard matrix."""
        rotations = [self.hidden, *([Rotation(self.skeleton.head_dim, 0)] if self.heads else [])]
        found = [
            f"no Hadamard matrix of size {rotation.size} can be made: a random orthogonal one is used"
            for rotation in rotations
            if rotation.dense is not None
        ]
        if self.skeleton.tied:
            head = self.skeleton.architecture.residual.head
            found.insert(0, f"the embeddings are untied: rotation stores {head} as a tensor of its own")
        return tuple(found)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Return the file of every tensor; an untied head is made from the embedding's."""
        files = dict(self.float_source.files)
        residual = self.skeleton.architecture.residual
        if self.skeleton.tied:
            files[f"{residual.head}.weight"] = files[f"{residual.embedding}.weight"]
        return files

    def digest(self) -> str:
        """Return the digest of the float model."""
        return self.float_source.digest()

    @cached_property
    def hidden(self) -> Rotation:
        """Return the rotation of the hidden stream."""
        return Rotation(int(self.skeleton.config.hidden_size), self.seed)

    @cached_property
    def _parts(self) -> dict[str, Part]:
        """Return what happens to each module: outside the blocks by full name, inside by its name in the block.

        Names have a ``*`` where the architecture's have one, as for experts.
        """
        architecture = self.skeleton.architecture
        residual = architecture.residual
        parts = {
            residual.embedding: Part(inputs=self.hidden),  # a row is a hidden vector
            residual.norm: Part(ones=True),
            residual.head: Part(gain=residual.norm, inputs=self.hidden),
        }
        gains: dict[str, str] = {}
        for group in architecture.groups:
            for norm in group.producers:
                if norm in residual.norms:
                    parts[norm] = Part(ones=True)
                    gains |= dict.fromkeys((*group.consumers, *group.floats), norm)
        inputs = dict.fromkeys(gains, self.hidden)
        outputs = dict.fromkeys((*residual.writers, *residual.weighted), self.hidden)
        for group in architecture.groups:
            if group.heads and self.heads:  # attention mixes tokens, not the channels of a head: Q passes through it
                head = Rotation(self.skeleton.head_dim, self.seed + 1)
                outputs |= dict.fromkeys(group.producers, head)
                inputs |= dict.fromkeys(group.consumers, head)
        for name in {**inputs, **outputs}:
            parts[name] = Part(gains.get(name, ""), inputs.get(name), outputs.get(name))
        return parts

    def read(self, name: str) -> Tensor:
        """Return one tensor of the rotated model.

        Raises:
            ModelError: the model has no tensor of that name.
        """
        residual = self.skeleton.architecture.residual
        module, _, kind = name.rpartition(".")
        stem = f"{self.skeleton.architecture.blocks}."
        block, local = "", module
        if module.startswith(stem):
            index, _, local = module.removeprefix(stem).partition(".")
            block = f"{stem}{index}."
            local = NUMBER.sub("*", self.skeleton.architecture.loaded(f".{local}"))[1:]
        part = self._parts.get(local)
        tied = self.skeleton.tied and module == residual.head
        stored = self.float_source.read(f"{residual.embedding}.{kind}" if tied else name)
        if part is None:
            return stored
        dtype = torch.float32 if block else stored_dtype(self.float_source)
        working = torch.float32 if block and stored.dtype in HALVES else torch.float64
        if part.ones:
            return torch.ones_like(stored, dtype=dtype)
        if kind == "bias":
            return (part.outputs.turn(stored.to(working)) if part.outputs else stored).to(dtype)
        gain = self.float_source.read(f"{block}{part.gain}.weight").to(working) if part.gain else None
        # a part of the rows at a time: in float64 the embedding of a large vocabulary is the largest thing of all
        rows = (_columns(part, some.to(working), gain) for some in stored.split(ROWS))
        if part.outputs is None:
            return torch.cat([some.to(dtype) for some in rows])
        whole = torch.cat(tuple(rows)) if part.inputs or part.gain else stored
        made = torch.empty_like(whole, dtype=dtype)
        for some, to in zip(whole.split(ROWS, dim=1), made.split(ROWS, dim=1), strict=True):
            to.copy_(part.outputs.turn(some.to(working).T).T)
        return made


def _columns(part: Part, rows: Tensor, gain: Tensor | None) -> Tensor:
    rows = rows if gain is None else rows * gain
    return part.inputs.turn(rows) if part.inputs else rows
