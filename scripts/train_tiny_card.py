"""Measures the bundled model and lets it write, for its model card (train_tiny_card.md)."""

from __future__ import annotations

import contextlib
import math
import platform
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from train_tiny_text import WINDOW, plain_ids
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PROMPTS = ["The history of the", "In the morning, the captain", "The most important reason for"]
CHATS = ["Tell me about Washington.", "The war had begun in the spring."]


def nats(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of every token, float32 [rows * length]."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits  # [rows, length, vocab]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")


@torch.inference_mode()
def total_nats(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Return the summed cross entropy of int64 [tokens], in windows of 2048 that each start with BOS."""
    total = 0.0
    for part in ids.to(model.device).split(WINDOW):
        inputs = torch.cat([part.new_tensor([model.config.bos_token_id]), part[:-1]])
        total += float(nats(model, inputs[None], part).sum())
    return total


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held: list[str], wikitext: Path | None
) -> dict[str, object]:
    """Return the card's perplexities: exp(nats a token), and exp(nats a whitespace word)."""
    texts = {"held": "\n\n".join(held)}
    if wikitext:
        texts["wiki"] = detokenize(wikitext.read_text("utf-8"))
    facts: dict[str, object] = dict.fromkeys(("wiki_tokens", "wiki_token", "wiki_word"), "not measured")
    for name, text in texts.items():
        ids = plain_ids(tokenizer, text)
        total = total_nats(model, ids)
        facts[f"{name}_tokens"] = f"{len(ids):,}"
        facts[f"{name}_token"] = f"{math.exp(total / len(ids)):.2f}"
        facts[f"{name}_word"] = f"{math.exp(total / len(text.split())):.1f}"
    return facts


def detokenize(text: str) -> str:
    """Undo WikiText's word spacing: joined hyphens and numbers, spaces before punctuation and inside brackets."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", re.sub(r"([(\[$]) ", r"\1", text))
    text = re.sub(r"\" ([^\"\n]*) \"", r'"\1"', re.sub(r" (n't|'\w+)\b", r"\1", text))
    return re.sub(r"\n\s*\n", "\n\n", text).strip()


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return real completions for the card: greedy, at temperature 0.8, and in chat."""
    prompts = [(repr(text), tokenizer(text)["input_ids"]) for text in PROMPTS]
    for text in CHATS:
        turns = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts.append((f"chat: {text!r}", tokenizer(rendered, add_special_tokens=False)["input_ids"]))
    lines = []
    for label, ids in prompts:
        for note, options in [("greedy", {}), ("temperature 0.8", {"do_sample": True, "temperature": 0.8})]:
            torch.manual_seed(0)
            given = torch.tensor([ids], device=model.device)
            written = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=80, **options)[
                0, len(ids) :
            ]
            words = " ".join(tokenizer.decode(written, skip_special_tokens=True).split())
            lines.append(f"- {label}, {note}: {words}")
    return "\n".join(lines)


def hardware(device: torch.device) -> str:
    """Return the kind of processor that trained."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return f"{found[1]}, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
