"""Says where the time of one step of vLLM goes on this machine: linear layers, output layer, attention, the rest.

    python scripts/profile_step.py FOLDER [--batch 1] [--steps 32] [--prompt 16] [--json]

The engine runs in this process, with the kernels that QTOOLKIT_W4A8, QTOOLKIT_LM_HEAD and QTOOLKIT_ATTENTION ask for.
With --prompt 512 --steps 1 the prefill is what is seen. `graph` is compiled code between the operators: norms,
activations, rotations and the Python that calls them; `framework` is the time in which no operator ran: scheduling,
inputs, detokenizing. Our attention of prompts is called from Python, so its time counts there, too. Steps run as
torch's Python makes them, since repeated ones show no operators (QTOOLKIT_STEPS).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEAD = "output layer"
# Parts of operators' names; the first that fits counts.
KINDS = (
    ("linear", ("w4a8", "bfloat16_linear", "onednn", "wna16", "int4_scaled_mm", "int8_scaled_mm", "scaled_int8_quant")),
    ("attention", ("attention", "attn", "kv_cache", "slot_mapping")),
    ("graph", ("CompiledFxGraph", "Pregraph")),
    ("sampling", ("argmax", "softmax", "sort", "multinomial", "topk", "exponential")),
)


def kind(name: str) -> str:
    """Return what an operator is for."""
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other operators")


def profile(folder: Path, batch: int, prompt: int, steps: int) -> dict[str, Any]:
    """Run ``steps`` tokens of ``batch`` texts and return milliseconds a step by kind, and the slowest operators."""
    from torch.profiler import ProfilerActivity, profile as record
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    LogitsProcessor._apply_head = marked(LogitsProcessor._apply_head)
    engine = LLM(str(folder), max_model_len=2048, max_num_batched_tokens=2048, enable_prefix_caching=False)
    prompts: Any = [{"prompt_token_ids": [3 + (7 * i + 13 * row) % 250 for i in range(prompt)]} for row in range(batch)]

    def run(tokens: int) -> float:
        start = time.perf_counter()
        settings = SamplingParams(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, temperature=0)
        engine.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - start

    run(4)
    plain = run(steps) - (run(1) if steps > 1 else 0.0)
    with record(activities=[ProfilerActivity.CPU]) as seen:
        run(steps)
    spent: dict[str, float] = defaultdict(float)
    rows = [row for row in seen.key_averages() if row.key != HEAD]
    for row in rows:
        spent[kind(row.key)] += row.self_cpu_time_total / 1e3 / steps  # ms
    spent[HEAD] = sum(row.cpu_time_total for row in seen.key_averages() if row.key == HEAD) / 1e3 / steps
    spent["linear"] -= spent[HEAD]  # what it is made of was counted there
    slowest = sorted(rows, key=lambda row: -row.self_cpu_time_total)[:25]
    wall = plain * 1e3 / max(steps - 1, 1)
    return {
        "step_ms": wall,
        "kinds_ms": dict(sorted(spent.items(), key=lambda item: -item[1])),
        "framework_ms": wall - sum(spent.values()),
        "operators": [
            {"name": row.key, "calls": row.count / steps, "ms": row.self_cpu_time_total / 1e3 / steps}
            for row in slowest
        ],
    }


def marked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` under a name that the profiler shows."""
    from torch.profiler import record_function

    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(HEAD):
            return function(*args, **kwargs)

    return run


def main() -> None:
    """Parse the command line, profile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=16, help="tokens before the measured ones")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    own = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("QTOOLKIT_STEPS", "vllm")
    result = profile(own.folder, own.batch, own.prompt, own.steps)
    if own.json:
        print(json.dumps(result))
        return
    print(f"{result['step_ms']:.2f} ms a step of {own.batch} tokens")
    for name, ms in [*result["kinds_ms"].items(), ("framework", result["framework_ms"])]:
        print(f"{ms:9.2f} ms {ms / result['step_ms']:6.1%}  {name}")
    for row in result["operators"]:
        print(f"{row['ms']:9.3f} ms {row['calls']:7.1f} calls  {row['name'][:90]}")


if __name__ == "__main__":
    main()
