"""Trying settings out before a run: held-out text, streams that go on through float blocks, divergence at the end."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from qtoolkit.architecture import Skeleton
from qtoolkit.calibration import capture, halves
from qtoolkit.source import Source
from qtoolkit.stages import Block, Stream

FIT, HELD_OUT = 4096, 2048  # tokens that a trial is calibrated on, and those it is judged on
VOCABULARY = 2048  # rows of the head that are multiplied at once
AT_ONCE = 256  # tokens whose logits for those rows are held
K = TypeVar("K", bound=Hashable)


def split(tokens: Tensor, fit: int = FIT, held_out: int = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Return two disjoint parts of ``tokens`` [sequences, length], of about ``fit`` and ``held_out`` tokens at most.

    A short calibration takes less, so that trials stay cheap beside it: a quarter and an eighth of the text, or what
    is there up to a quarter of those bounds. A single sequence is cut in two.
    """
    if len(tokens) == 1:
        half = tokens.shape[1] // 2
        return tokens[:, :half], tokens[:, half:]
    rows, length = tokens.shape
    held = min(-(-held_out // length), max(rows // 8, -(-held_out // (4 * length))), max(1, rows // 4))
    fitted = min(-(-fit // length), max(rows // 4, -(-fit // (4 * length))), rows - held)
    return tokens[:fitted], tokens[-held:]


def spread(blocks: int, wanted: int) -> list[int]:
    """Return the indices of ``wanted`` blocks in the middle of as many equal parts of the depth."""
    wanted = min(wanted, blocks)
    return [(2 * i + 1) * blocks // (2 * wanted) for i in range(wanted)]


def served(block: Block, stream: Stream, bits: int) -> Stream:
    """Return the stream behind a quantized block that rounds its inputs as when served."""
    return capture.advance(block, stream, bits=bits)


def advance_all(block: Block, streams: Mapping[K, Stream]) -> dict[K, Stream]:
    """Return every stream behind ``block``."""
    return {key: capture.advance(block, stream) for key, stream in streams.items()}


@torch.inference_mode()
def divergence(skeleton: Skeleton, source: Source, truth: Stream, streams: Mapping[K, Stream]) -> dict[K, float]:
    """Return, for each stream behind the last block, the mean KL divergence of its next token from ``truth``'s in nats.

    Tokens and vocabulary go by in parts, so that memory holds neither all logits nor a float32 head:
    ``KL = sum p (zp - zq) - lse(zp) + lse(zq)`` for logits zp and zq.
    """
    norm, head = ending(skeleton, source)
    sums = dict.fromkeys(streams, 0.0)
    tokens = 0

    def read(batch: Tensor) -> tuple[Tensor, ...]:
        return norm(batch.to(skeleton.device).flatten(0, 1)).split(AT_ONCE)

    for number, batch in enumerate(truth.batches):
        before = read(batch)
        behind = {key: read(stream.batches[number]) for key, stream in streams.items()}
        for place, states in enumerate(before):
            found = _divergence(head, states, {key: parts[place] for key, parts in behind.items()})
            sums = {key: total + found[key] for key, total in sums.items()}
            tokens += len(states)
    return {key: total / tokens for key, total in sums.items()}


def _divergence(head: Tensor, before: Tensor, hidden: Mapping[K, Tensor]) -> dict[K, float]:
    """Return the sum over tokens for what the head reads, float32 [tokens, hidden] each.

    Logits may be rough, because their differences are computed from those of the states: what is rounded is a part of
    the difference, and the truth is the same for all.
    """
    bottom = before.new_full(before.shape[:1], -torch.inf)
    lse_p, lse_q = bottom, dict.fromkeys(hidden, bottom)
    gap = {key: torch.zeros_like(bottom) for key in hidden}  # sum of p (zp - zq), by the p of the rows seen so far
    for rows in head.split(VOCABULARY):
        weight = rows.to(before.device).T
        zp = halves.product(before, weight)  # [tokens, rows]
        seen = torch.logaddexp(lse_p, zp.logsumexp(dim=-1))
        p = (zp - seen.unsqueeze(-1)).exp()
        for key, states in hidden.items():
            apart = halves.product(states - before, weight)  # zq - zp
            gap[key] = gap[key] * (lse_p - seen).exp() - (p * apart).sum(dim=-1)
            lse_q[key] = torch.logaddexp(lse_q[key], apart.add_(zp).logsumexp(dim=-1))
        lse_p = seen
    return {key: float((gap[key] - lse_p + lse_q[key]).sum()) for key in hidden}


def ending(skeleton: Skeleton, source: Source) -> tuple[nn.Module, Tensor]:
    """Return what comes behind the last block: the norm in float32, and the head's weight [vocabulary, hidden]."""
    residual = skeleton.architecture.residual
    empty = skeleton.model.get_submodule(residual.norm)
    stored = {local: source.read_finite(f"{residual.norm}.{local}") for local in empty.state_dict()}
    norm = copy.deepcopy(empty)
    norm.load_state_dict(stored, assign=True)
    tied = skeleton.tied and source.config.get("tie_word_embeddings", True)  # rotation unties
    weight = source.read(f"{residual.embedding if tied else residual.head}.weight")
    return norm.to(skeleton.device, torch.float32).requires_grad_(False), weight
