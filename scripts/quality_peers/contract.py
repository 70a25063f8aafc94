"""What a peer is given and gives back: a job file in, dequantized weights and a few figures out.

Nothing here imports PyTorch before the peer does, so that a peer may set what its libraries read on import.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CHANNEL = -1  # group size of one scale per output channel
JOB, WEIGHTS, FIGURES = "job.json", "weights.safetensors", "figures.json"
SCALE_BITS = 16


@dataclass(frozen=True)
class Job:
    """One quantization: everything that decides its result.

    Attributes:
        peer: name of a row in ``PEERS``.
        module: the file of this folder that runs it.
        model: folder of the float model.
        tokens: safetensors file with ``tokens``, int64 [samples, length].
        group_size: inputs that share a scale, or ``CHANNEL``.
        seed: for whatever the peer draws itself; the tokens were drawn with it, too.
        options: the peer's own.
    """

    peer: str
    module: str
    model: str
    tokens: str
    group_size: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    def calibration(self) -> torch.Tensor:
        """Return the calibration tokens, int64 [samples, length]."""
        from safetensors.torch import load_file

        return load_file(self.tokens)["tokens"]

    def write(self, folder: Path) -> Path:
        """Write the job into ``folder``."""
        path = folder / JOB
        path.write_text(json.dumps(asdict(self), indent=1))
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what ``write`` wrote."""
        return cls(**json.loads(path.read_text()))


class Meter:
    """Measures what happens inside ``with meter:`` in seconds, and the process's peak memory at its end."""

    seconds = 0.0
    peak_rss_bytes = 0

    def __enter__(self) -> Meter:
        """Start."""
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self._start
        self.peak_rss_bytes = peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Return the most memory this process has held, in bytes.

    On Linux from /proc: what getrusage says counts the parent's memory, too, from before the process became itself.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


@dataclass(frozen=True)
class Quantized:
    """What a peer made.

    Attributes:
        tensors: the whole model in float, by the names of the model's own files; ``lm_head.weight`` only where the
            head is not the embedding.
        version: of the peer.
        bits: bits a weight of the quantized layers, with scales.
    """

    tensors: Mapping[str, torch.Tensor]
    version: str
    bits: float

    def write(self, folder: Path, meter: Meter) -> None:
        """Write weights and figures into ``folder``; the figures last, so that where they are all is."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().float().contiguous().clone() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        figures = {
            "version": self.version,
            "bits": self.bits,
            "seconds": meter.seconds,
            "peak_rss_bytes": meter.peak_rss_bytes,
        }
        (folder / FIGURES).write_text(json.dumps(figures, indent=1))


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return the linear layers that are quantized: all but the head."""
    import torch

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights and biases by name, a tied head left out, and nothing a quantizer has added."""
    found = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("weight", "bias")}
    return found  # named_parameters gives a shared parameter once, under its first name


def bits(shapes: Iterable[tuple[int, int]], group_size: int) -> float:
    """Return the bits a weight of int4 layers [n, k] with 16-bit scales."""
    sizes = [(n * k, n * (1 if group_size == CHANNEL else -(-k // group_size))) for n, k in shapes]
    return 4 + SCALE_BITS * sum(scales for _, scales in sizes) / sum(weights for weights, _ in sizes)


def bits_of(model: torch.nn.Module, group_size: int) -> float:
    """Return ``bits`` of a model's quantized layers."""
    return bits(((layer.out_features, layer.in_features) for layer in linears(model).values()), group_size)
