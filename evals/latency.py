"""Times one small generation in transformers: a sanity figure beside the scores, not a benchmark of serving."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT, NEW, REPEATS = 64, 32, 3  # tokens, tokens, runs


class Latency(BaseModel):
    """How long a greedy generation of ``new_tokens`` after ``prompt_tokens`` takes, batch 1.

    Attributes:
        first_token_seconds: prompt to first token, the median run.
        tokens_per_second: the further tokens, the median run.
        spread: (slowest - fastest) / median of the whole generation.
    """

    model_config = ConfigDict(extra="forbid")

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    spread: float


@torch.inference_mode()
def measure(model: PreTrainedModel, ids: torch.Tensor) -> Latency:
    """Generate after the first tokens of ids [length], once unmeasured and then three times."""
    prompt = ids[:PROMPT].unsqueeze(0).to(model.device)
    _generate(model, prompt, 2)  # compiles, allocates, warms the caches
    first = [_generate(model, prompt, 1) for _ in range(REPEATS)]
    whole = [_generate(model, prompt, NEW) for _ in range(REPEATS)]
    first_seconds, seconds = statistics.median(first), statistics.median(whole)
    return Latency(
        prompt_tokens=prompt.shape[1],
        new_tokens=NEW,
        first_token_seconds=first_seconds,
        tokens_per_second=(NEW - 1) / max(seconds - first_seconds, 1e-9),
        spread=(max(whole) - min(whole)) / seconds,
    )


def _generate(model: PreTrainedModel, prompt: torch.Tensor, new: int) -> float:
    from transformers import GenerationConfig

    how = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    out: Any = model.generate(prompt, generation_config=how)  # type: ignore[operator]  # transformers types it a buffer
    int(out[0, -1])  # waits for the device
    return time.perf_counter() - start
