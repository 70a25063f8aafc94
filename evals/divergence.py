"""Kullback-Leibler divergence: how far a model's next-token distribution is from the reference's, and from noise."""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from qtoolkit.errors import NumericError, RequestError
from qtoolkit.evals.perplexity import CausalModel, logits_of
from qtoolkit.evals.windows import Windows

CHUNK = 128  # positions held in float64 at once: 128 x 152k vocabulary is 156 MB


class Divergence(BaseModel):
    """How far a model is from its reference on one text.

    Attributes:
        text: the text's name.
        kl: mean over all positions of KL(reference || model), in nats.
        stderr: standard error of ``kl``, from the spread between windows; None with one window.
        p99: the 99th percentile over positions, in nats: how bad the bad ones are.
        top1: share of positions where both find the same token the likeliest.
        tokens: positions compared.
        floor: the same for the reference against itself in another dtype; no model can be told from it below that.
        floor_dtype: that dtype.
    """

    model_config = ConfigDict(extra="forbid")

    text: str
    kl: float
    stderr: float | None
    p99: float
    top1: float = Field(ge=0, le=1)
    tokens: int
    floor: Divergence | None = None
    floor_dtype: str | None = None


@torch.inference_mode()
def measure(
    reference: CausalModel, model: CausalModel, windows: Windows, device: str | torch.device = "cpu"
) -> Divergence:
    """Compare the two models' distributions at every position of ``windows``.

    Raises:
        RequestError: the two have different vocabularies.
        NumericError: one of them computed NaN or Inf.
    """
    positions, agreed = [], 0
    for ids in windows.ids.to(device):
        p, q = logits_of(reference, ids), logits_of(model, ids)  # [length, vocabulary] each
        if p.shape != q.shape:
            raise RequestError(
                f"The reference has a vocabulary of {p.shape[-1]}, the model one of {q.shape[-1]}.",
                "A divergence needs the model that was quantized as --reference.",
            )
        positions.append(torch.cat([_kl(a, b) for a, b in zip(p.split(CHUNK), q.split(CHUNK), strict=True)]))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    kl = torch.stack(positions).cpu()  # float64 [windows, length]
    if not torch.isfinite(kl).all():
        raise NumericError(f"The divergence on {windows.name} is not finite.", "One of the models computed NaN or Inf.")
    spread = kl.mean(1).std().item() / math.sqrt(len(kl)) if len(kl) > 1 else None
    return Divergence(
        text=windows.name,
        kl=kl.mean().item(),
        stderr=spread,
        p99=torch.quantile(kl.flatten()[: 1 << 24], 0.99).item(),  # quantile takes at most 2^24 values
        top1=agreed / kl.numel(),
        tokens=kl.numel(),
    )


def _kl(reference: Tensor, model: Tensor) -> Tensor:
    """Return KL(reference || model) of each row of two logits [tokens, vocabulary], float64 [tokens].

    float64, because the noise floor is near the rounding of a float32 sum over the vocabulary.
    """
    p, q = reference.double().log_softmax(-1), model.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
