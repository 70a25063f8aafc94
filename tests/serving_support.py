"""Helpers of the serving tests: a running server as an object, and what our own runtime thinks of a text."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEY = "sk-test"
PROMPT = "The quick brown fox jumps over the lazy dog."


def descendants(pid: int) -> list[psutil.Process]:
    """Return every process below ``pid``; none if it has ended."""
    return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []


@dataclass(frozen=True)
class Served:
    """A running `qtoolkit serve`: its process, what it printed when ready, and the file with its messages."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    messages: Path

    def client(self, key: str = KEY) -> openai.OpenAI:
        """Return a client that does not try again."""
        return openai.OpenAI(base_url=self.ready["url"], api_key=key, max_retries=0, timeout=120)

    def family(self) -> list[psutil.Process]:
        """Return the launcher and everything below it."""
        return [psutil.Process(self.process.pid), *descendants(self.process.pid)]

    def prompt_logprobs(self, tokens: list[int]) -> Tensor:
        """Return what the server thinks of each token after the first."""
        answer = self.client().completions.create(
            model=self.ready["model"], prompt=tokens, max_tokens=1, temperature=0, logprobs=1, echo=True
        )
        return torch.tensor(answer.choices[0].logprobs.token_logprobs[1 : len(tokens)])

    def start_up_line(self) -> str:
        """Return the line in the engine's log that says which kernel runs how many layers."""
        (line,) = [line for line in self.messages.read_text().splitlines() if "qtoolkit: of " in line]
        return line.partition("qtoolkit: ")[2]


Start = Callable[..., AbstractContextManager[Served]]


@torch.inference_mode()
def own_logprobs(model: nn.Module, tokens: list[int]) -> Tensor:
    """Return what a model in this process thinks of each token after the first."""
    logits = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)


@torch.inference_mode()
def own_greedy(model: Any, tokens: list[int], length: int) -> list[int]:
    """Return a model's likeliest continuation."""
    prompt = torch.tensor([tokens])
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, min_new_tokens=length, do_sample=False
    )
    return answer[0, len(tokens) :].tolist()


def rewrite(
    packed: Path,
    folder: Path,
    quantization: Mapping[str, Any],
    layer: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> Path:
    """Write a checkpoint of ours in another layout: another quantization_config, other tensors a layer."""
    folder.mkdir()
    for file in packed.iterdir():
        if file.suffix != ".safetensors" and file.name != "qtoolkit.json":
            shutil.copyfile(file, folder / file.name)
    config = json.loads((packed / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(quantization)}))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    stored: dict[str, Tensor] = {}
    for file in packed.glob("*.safetensors"):
        stored |= load_file(file)
    names = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    out = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in names}
    for name in names:
        local = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.rpartition(".")[0] == name}
        out |= {f"{name}.{key}": tensor.contiguous() for key, tensor in layer(local).items()}
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
