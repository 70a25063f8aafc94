"""Measures what W4A8 costs a model in the hands of every quantizer: same tokens, same texts, one evaluator, one table.

    python scripts/bench_quality.py --install all
    python scripts/bench_quality.py --models tiny --calibrate TEXT --texts TEXT... --json quality.json

Each peer quantizes in its own process and virtual environment and hands back dequantized weights; the evaluator puts
them into the float model and rounds every linear input to int8 per token. Results are kept under --cache by a digest of
model, peer and settings, so that a run that stopped goes on. `qtoolkit:RECIPE` is a row for another recipe of ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quality_peers import PEERS
from quality_peers.contract import CHANNEL, FIGURES, WEIGHTS, Job
from quality_peers.environments import PeerError, install, own_code, run
from quality_peers.measure import Evaluator, Settings
from quality_peers.table import Row, markdown
from safetensors.torch import save_file

from qtoolkit import data, source
from qtoolkit.errors import QToolkitError

HOME = Path("~/.cache/qtoolkit").expanduser()
TASKS = ("lambada_openai", "piqa", "winogrande", "arc_challenge")


def say(text: str) -> None:
    """Tell what happens, on stderr."""
    print(text, file=sys.stderr, flush=True)


def digest(*parts: Any) -> str:
    """Return 12 hex digits of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


class Bench:
    """One model with its peers; finished parts lie under the cache folder."""

    def __init__(self, model: str, own: argparse.Namespace) -> None:
        self.source, self.own = source.resolve(model), own
        self.identity = self.source.digest()
        self.settings = Settings(tuple(own.texts), own.windows, own.window, own.tasks, own.task_dir, own.limit)
        self._evaluator: Evaluator | None = None

    def rows(self, group_size: int) -> list[Row]:
        """Return one row a peer."""
        return [self.row(name, group_size) for name in self.own.peers]

    def row(self, name: str, group_size: int) -> Row:
        """Return a peer's row: all seeds, or the reason why one of them could not run."""
        try:
            return Row(name, [self.result(name, group_size, seed) for seed in self.own.seeds])
        except PeerError as error:
            say(f"{name} cannot run: {error}")
            return Row(name, reason=str(error))

    def result(self, name: str, group_size: int, seed: int) -> dict[str, Any]:
        """Return scores and figures of one quantization, computed or found in the cache."""
        row, _, recipe = name.partition(":")
        peer = PEERS[row]
        options = {**peer.options, **({"recipe": recipe} if recipe else {})}
        if peer.module == "qqq":
            options["checkout"] = str(self.own.qqq or "")
            if not self.own.qqq:
                raise PeerError("give a checkout of github.com/HandH1998/QQQ with --qqq")
        job = Job(name, peer.module, str(self.source.path.resolve()), self.tokens(seed), group_size, seed, options)
        text = Path(recipe).read_text() if recipe.endswith((".yaml", ".yml")) else ""
        key = digest(self.identity, job.tokens, group_size, seed, options, own_code(peer.module), text)
        folder = self.own.cache / f"{name.replace('/', '_').replace(':', '_')}-{key}"
        if not (folder / FIGURES).is_file():
            say(f"{name} quantizes {self.source.name}, group size {group_size}, seed {seed}")
            run(job, folder, self.own.venvs)
        scores = self._cached(folder / f"scores-{digest(asdict(self.settings))}.json", folder / WEIGHTS)
        return json.loads((folder / FIGURES).read_text()) | scores | {"seed": seed}

    def reference(self) -> dict[str, Any]:
        """Return the float model's scores."""
        self.own.cache.mkdir(parents=True, exist_ok=True)
        return self._cached(self.own.cache / f"float-{digest(self.identity, asdict(self.settings))}.json", None)

    def tokens(self, seed: int) -> str:
        """Return the file of the calibration tokens, drawn from the text when it is not there yet."""
        own, length = self.own, min(self.own.length, self.source.config["max_position_embeddings"])
        size = Path(own.calibrate).stat().st_size
        path = own.cache / f"tokens-{digest(self.identity, own.calibrate, size, own.samples, length, seed)}.safetensors"
        if not path.is_file():
            tokenizer = data.load_tokenizer(self.source)
            ids = data.windows(data.documents(own.calibrate), tokenizer, own.samples, length, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"tokens": ids}, path)
        return str(path.resolve())

    def _cached(self, path: Path, weights: Path | None) -> dict[str, Any]:
        if not self.settings.texts:
            return {"ppl": {}, "kl": None, "tasks": {}}
        if not path.is_file():
            self._evaluator = self._evaluator or Evaluator(self.source.path, self.settings)
            say(f"measuring {weights.parent.name if weights else 'float'}")
            found = self._evaluator.scores(weights) if weights else self._evaluator.float_scores()
            path.write_text(json.dumps(found, indent=1))
        return json.loads(path.read_text())


def group_size(text: str) -> int:
    """Read ``128`` or ``channel``."""
    return CHANNEL if text == "channel" else int(text)


def peer_names(text: str) -> list[str]:
    """Read a list of peers; ``all`` is every one."""
    names = list(PEERS) if text == "all" else text.split(",")
    for name in names:
        if name.partition(":")[0] not in PEERS:
            raise argparse.ArgumentTypeError(f"no peer {name!r}; there are {', '.join(PEERS)}")
    return names


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["tiny"], help="folders, hub names, or tiny")
    add("--peers", type=peer_names, default=list(PEERS), help="names with commas between, or all")
    add("--groups", type=lambda text: [group_size(word) for word in text.split(",")], default=[128, CHANNEL])
    add("--seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1, 2])
    add("--calibrate", help="text to calibrate on")
    add("--samples", type=int, default=128, help="calibration windows")
    add("--length", type=int, default=2048, help="tokens of a calibration window")
    add("--texts", nargs="*", default=["wikitext2", "sample"],
        help="texts to score; the first is that of the KL; none: only seconds and memory")  # fmt: skip
    add("--windows", type=int, default=1 << 30, help="windows of each text, from its start")
    add("--window", type=int, default=2048, help="tokens of a window")
    add("--tasks", nargs="*", default=(), type=str, help=f"lm-eval tasks, such as {' '.join(TASKS)}")
    add("--task-dir", help="folder with NAME.jsonl of the tasks")
    add("--limit", type=int, help="documents a task")
    add("--qqq", type=lambda text: Path(text).expanduser().resolve(), help="a checkout of HandH1998/QQQ")
    add("--venvs", type=lambda text: Path(text).expanduser(), default=HOME / "peers")
    add("--cache", type=lambda text: Path(text).expanduser(), default=HOME / "quality")
    add("--json", type=Path, help="writes everything that was measured into this file")
    add("--install", metavar="PEER", help="only makes the environment of a peer, or of all")
    own = parser.parse_args(words)
    own.tasks = tuple(own.tasks)
    if not own.install and not own.calibrate:
        parser.error("--calibrate TEXT is needed")
    return own


def install_all(wanted: str, venvs: Path) -> int:
    """Install the environments of ``wanted``; what cannot be installed is said."""
    failed = 0
    for module in sorted({PEERS[name].module for name in peer_names(wanted)}):
        try:
            install(module, venvs)
            say(f"{module}: ready")
        except PeerError as error:
            say(f"{module}: {error}")
            failed = 1
    return failed


def main(words: Sequence[str] | None = None) -> int:
    """Install, or measure and print the tables."""
    own = arguments(words)
    if own.install:
        return install_all(own.install, own.venvs)
    found = []
    try:
        for model in own.models:
            bench = Bench(model, own)
            for size in own.groups:
                layout = "channel" if size == CHANNEL else f"g{size}"
                reference, rows = bench.reference(), bench.rows(size)
                print(markdown(bench.source.name, layout, reference, rows) + "\n", flush=True)
                found.append({"model": bench.source.name, "model_digest": bench.identity, "layout": layout,
                              "float": reference, "peers": [asdict(row) for row in rows]})  # fmt: skip
                if own.json:
                    settings = {key: str(value) for key, value in vars(own).items()}
                    own.json.write_text(json.dumps({"settings": settings, "results": found}, indent=1))
    except QToolkitError as error:
        say(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
