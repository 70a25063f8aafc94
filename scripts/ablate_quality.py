"""What each part of W4A8 is worth on a model: quantize with one part off at a time, and measure the divergence.

    python scripts/ablate_quality.py tiny --data text.txt --text other.txt --groups 128 channel --seeds 0 1 2

Prints a Markdown table: KL divergence to the float model (in 1e-3 nats a token) and change of perplexity, mean over the
texts and spread over the calibration seeds. KL decides: perplexity of a small model on a small text is mostly noise.
Seeds differ more than parts do, so that rows behind the default also say how much more KL they have, seed by seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import qtoolkit
from qtoolkit import data, recipe, runtime, source
from qtoolkit.evals import divergence, perplexity, texts
from qtoolkit.evals.windows import Windows, cut

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no aim at the float network": {"gptq.aim": False},
    "inputs of the block in float": {"gptq.sequential": False},
    "outputs rounded one by one": {"gptq.couple": False},
    "one start": {"gptq.starts": 1},
    "scales fitted to the codes": {"gptq.refit": True},
    "no shrinkage of the Hessian": {"gptq.shrinkage": 0},
    "no refinement": {"gptq.refine": 0},
    "no random tokens": {"calibration.random": 0},
    "scales above 0": {"gptq.signed": False},
    "min-max scales": {"gptq.scale_search": False},
    "columns in activation order": {"gptq.activation_order": True},
    "plain compensation (GPTQ)": {
        "gptq.aim": False,
        "gptq.sequential": False,
        "gptq.couple": False,
        "gptq.starts": 1,
        "gptq.refine": 0,
        "calibration.random": 0,
    },
    "rounding to nearest": {"gptq.compensate": False, "gptq.scale_search": False},
}


@dataclass(frozen=True)
class Score:
    """One checkpoint's figures on all texts: KL in nats, change of the log-likelihood a token in nats, seconds."""

    kl: float
    nll: float
    seconds: float


def main() -> None:
    """Run the table."""
    wanted = parse(sys.argv[1:])
    torch.set_num_threads(wanted.threads)
    model = source.resolve(wanted.model)
    tokenizer = data.load_tokenizer(model)
    reference: Any = runtime.load(wanted.model, dtype=torch.float32)
    found = [texts.load(name) for name in wanted.text]
    windows = [part(cut(text.name, text.text, tokenizer, wanted.window), wanted.windows) for text in found]
    before = [perplexity.of_model(reference, text).window_nll for text in windows]
    common = dict(recipe.parse_set(wanted.set))
    common |= {"calibration.data": wanted.data, "calibration.samples": wanted.samples}
    common |= {"calibration.length": wanted.length, "outliers.method": wanted.outliers}
    print(f"| part ({wanted.model}) | " + " | ".join(f"{g}: KL 1e-3 | ppl % | s" for g in wanted.groups) + " |")
    print("|---|" + "---|---|---|" * len(wanted.groups), flush=True)
    default: dict[Any, list[Score]] = {}  # by group size
    for label, changes in VARIANTS.items():
        if wanted.only and label not in wanted.only:
            continue
        cells = []
        for group in wanted.groups:
            scores = []
            for seed in wanted.seeds:
                settings = {**common, **changes, "scheme.group_size": group, "calibration.seed": seed}
                scores.append(measure(wanted.model, settings, reference, windows, before))
                say(f"{label}, {group}, seed {seed}: {1e3 * scores[-1].kl:.3f}e-3 nats")
            cells.append(cell(scores, default.get(group)))
            if not changes:
                default[group] = scores
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def say(text: str) -> None:
    """Tell what is known so far, on stderr."""
    print(text, file=sys.stderr, flush=True)


def measure(
    model: str, changes: dict[str, Any], reference: Any, windows: list[Windows], before: list[list[float]]
) -> Score:
    """Quantize ``model`` with ``changes`` to its recipe and compare it with ``reference``."""
    with TemporaryDirectory(prefix="ablate-") as folder:
        began = time.monotonic()
        qtoolkit.quantize(model, "w4a8", Path(folder) / "out", changes=changes)
        seconds = time.monotonic() - began
        made: Any = runtime.load(Path(folder) / "out")
        kl = statistics.fmean(divergence.measure(reference, made, text).kl for text in windows)
        after = [perplexity.of_model(made, text).window_nll for text in windows]
    change = statistics.fmean(statistics.fmean(a) - statistics.fmean(b) for a, b in zip(after, before, strict=True))
    return Score(kl, change, seconds)


def cell(scores: list[Score], default: list[Score] | None = None) -> str:
    """Return mean and spread over the seeds as three cells of the table, with what KL has more than ``default``'s."""

    def over(values: list[float], form: str) -> str:
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return format(statistics.fmean(values), form) + spread

    kl, change = [score.kl * 1e3 for score in scores], [score.nll * 100 for score in scores]
    more = [100 * (score.kl / first.kl - 1) for score, first in zip(scores, default or (), strict=bool(default))]
    apart = f" ({over(more, '+.1f')} %)" if more else ""
    return (
        f"{over(kl, '.2f')}{apart} | {over(change, '+.2f')} | {statistics.fmean(score.seconds for score in scores):.0f}"
    )


def part(windows: Windows, count: int) -> Windows:
    """Return at most ``count`` windows, spread over the text."""
    step = max(1, len(windows) // count)
    return Windows(windows.name, windows.ids[::step][:count], windows.words, windows.utf8_bytes)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, hub name, or tiny")
    parser.add_argument("--data", default="self", help="calibration text, as in qtoolkit quantize")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--text", nargs="+", default=["sample"], help="texts to measure on")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16, help="of each text")
    parser.add_argument("--groups", nargs="+", type=lambda g: g if g == "channel" else int(g), default=[128, "channel"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--outliers", default="none", help="none, smooth, rotate, both or auto")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these rows")
    parser.add_argument("--set", nargs="+", default=[], metavar="STEP.KEY=VALUE", help="changes to every row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
