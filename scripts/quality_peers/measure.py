"""The one evaluator: a float model takes a peer's weights, rounds every linear input to int8, and is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from qtoolkit import runtime
from qtoolkit.errors import CheckpointError
from qtoolkit.evals import perplexity, texts, windows
from qtoolkit.evals.run import BATCH
from qtoolkit.kernels.reference import quantize_tokens
from quality_peers.contract import linears

KEPT = 1 << 30  # bytes of the float model's logits that are kept between peers; beyond, they are computed again


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        texts: names or files, see ``qtoolkit.evals.texts.load``; the divergence is taken on the first.
        windows: windows of each text, from its start.
        length: tokens of a window; the model's context where that is shorter.
        tasks: lm-eval tasks.
        task_dir: folder with their rows.
        limit: documents a task.
    """

    texts: tuple[str, ...]
    windows: int
    length: int
    tasks: tuple[str, ...] = ()
    task_dir: str | None = None
    limit: int | None = None


class Evaluator:
    """Scores peers of one float model on the same windows."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        from transformers import AutoTokenizer

        self.folder, self.settings = folder, settings
        self.reference = runtime.load(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        length = min(settings.length, windows.window_length(self.reference.config))
        self.windows = []
        for name in settings.texts:
            text = texts.load(name)
            each = windows.cut(text.name, text.text, self.tokenizer, length)
            first = each.ids[: settings.windows]
            self.windows.append(windows.Windows(each.name, first, each.words, each.utf8_bytes))
        size = self.windows[0].ids.numel() * self.reference.config.vocab_size * 4
        self._logits: dict[int, Tensor] | None = {} if size <= KEPT else None

    def float_scores(self) -> dict[str, Any]:
        """Return what the float model scores."""
        return self._score(self.reference, divergence=False)

    def scores(self, weights: Path) -> dict[str, Any]:
        """Return what the float model scores with ``weights`` instead of its own, under int8 activations."""
        model = runtime.load(self.folder, dtype=torch.float32)
        put(model, load_file(weights))
        round_inputs(model)
        return self._score(model, divergence=True)

    def _score(self, model: Any, *, divergence: bool) -> dict[str, Any]:
        first, *others = self.windows
        total, kl = [], 0.0
        with torch.inference_mode():
            for index, ids in enumerate(first.ids):
                logits = perplexity.logits_of(model, ids)  # [length, vocabulary]
                total.append(F.cross_entropy(logits[:-1], ids[1:], reduction="none").double().mean().item())
                if divergence:
                    kl += _kl(self._reference_logits(index, ids), logits) / len(first)
        found = {first.name: perplexity.summarize(first, total).token}
        found |= {each.name: perplexity.of_model(model, each).token for each in others}
        return {"ppl": found, "kl": kl, "tasks": self._tasks(model)}

    def _reference_logits(self, index: int, ids: Tensor) -> Tensor:
        if self._logits is None:
            return perplexity.logits_of(self.reference, ids)
        if index not in self._logits:
            self._logits[index] = perplexity.logits_of(self.reference, ids)
        return self._logits[index]

    def _tasks(self, model: Any) -> dict[str, float]:
        if not self.settings.tasks:
            return {}
        from qtoolkit.evals import tasks as harness

        plan = harness.plan(self.settings.tasks, self.settings.task_dir)
        found = harness.on_model(plan, model, self.tokenizer, self.settings.limit, BATCH)
        return {name: score.metrics[score.primary] for name, score in found.items()}


def put(model: Any, weights: dict[str, Tensor]) -> None:
    """Replace all weights of ``model``; a head that comes with weights of its own stops being the embedding.

    Raises:
        CheckpointError: names or shapes are not those of the model.
    """
    if "lm_head.weight" in weights and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    own = dict(model.named_parameters())
    if wrong := {name for name in own.keys() | weights.keys() if _shape(own, name) != _shape(weights, name)}:
        raise CheckpointError(f"The peer's weights do not fit: {', '.join(sorted(wrong)[:3])}.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def round_inputs(model: nn.Module) -> None:
    """Let every linear layer but the head see its input rounded to int8 per token, as it would be served."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        codes, scales = quantize_tokens(args[0])
        return (codes.float() * scales,)

    for layer in linears(model).values():
        layer.register_forward_pre_hook(hook)


def _shape(tensors: Any, name: str) -> Sequence[int] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _kl(reference: Tensor, logits: Tensor) -> float:
    """Return the mean KL(reference || model) over positions, in nats; float64, for the values are small."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
