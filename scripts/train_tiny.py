"""Trains the bundled Llama from plain text, tokenizer included, and writes a Hugging Face folder with a model card.

    python scripts/train_tiny.py --data train.txt --out qtoolkit/models/tiny --minutes 60

The text is one paragraph a line. The last part is held out; the weights with the lowest held-out loss are kept.
Every batch is a function of the seed and the step, so a run that was stopped goes on exactly where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from train_tiny_card import hardware, measure, nats, samples, total_nats
from train_tiny_text import END, WINDOW, encode, make_tokenizer, plain_ids, replace, split
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHORT = 512  # tokens; three steps of four cut each window into rows of this length, which is faster


@dataclass(frozen=True)
class Size:
    """Shape of a Llama; heads are grouped two to one key/value head, embeddings are tied."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int = 4096
    rate: float = 3e-3  # peak learning rate


SIZES = {
    "micro": Size(32, 64, 2, 4, vocab=384),  # for tests
    "tiny": Size(256, 768, 6, 8),  # 5.8 M parameters
    "small": Size(512, 1536, 8, 8, rate=2e-3),  # 27 M parameters
}


def main() -> None:
    """Read the arguments, train or go on training, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="training text, one paragraph a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; checkpoints go to OUT.train")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="length of the run in optimizer steps: reproducible")
    budget.add_argument("--minutes", type=float, help="length of the run in minutes of training")
    parser.add_argument("--windows", type=int, default=2, help=f"windows of {WINDOW} tokens a step (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=200, help="steps between held-out checks and checkpoints")
    parser.add_argument("--stop-after", type=int, help="stop at this step, as if interrupted; run again to go on")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler on CPU)")
    parser.add_argument("--wikitext", type=Path, help="WikiText-2 validation file, measured for the card")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = args.out.with_name(args.out.name + ".train")
    work.mkdir(parents=True, exist_ok=True)

    train_text, held_text = split(args.data.read_text("utf-8"))
    tokenizer = make_tokenizer(train_text, SIZES[args.size].vocab, work / "tokenizer")
    stream = encode(tokenizer, train_text, args.seed, work / f"stream-{args.seed}.pt")
    held = plain_ids(tokenizer, "\n\n".join(held_text))
    torch.manual_seed(args.seed)
    model = make_model(SIZES[args.size], tokenizer).to(device)
    state = train(model, stream, held, tokenizer.bos_token_id, args, work / "last.pt")
    if state.step == args.stop_after:
        print(f"stopped at step {state.step}; the same command goes on from there")
        return
    model.load_state_dict(torch.load(work / "best.pt", map_location=device, weights_only=True))
    save(model.to(torch.bfloat16), tokenizer, args.out)
    facts = measure(model, tokenizer, held_text, args.wikitext)
    facts |= {"parameters": f"{model.num_parameters():,}", "train_bytes": f"{sum(map(len, train_text)):,}"}
    facts |= {"train_tokens": f"{len(stream):,}", "size": args.size, "seed": args.seed, "hardware": hardware(device)}
    facts |= {"steps": f"{state.step:,}", "tokens": f"{state.step * args.windows * WINDOW:,}"}
    facts |= {"epochs": f"{state.step * args.windows * WINDOW / len(stream):.1f}"}
    facts |= {"minutes": f"{state.seconds / 60:.0f}", "best_step": f"{state.best_step:,}"}
    facts["samples"] = samples(model, tokenizer)
    card = Template(Path(__file__).with_name("train_tiny_card.md").read_text("utf-8"))
    (args.out / "README.md").write_text(card.substitute(facts), "utf-8")
    print(f"{args.out}: held-out perplexity {facts['held_token']} a token, {facts['held_word']} a word")


def make_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama with fresh weights; writers to the residual stream start smaller (GPT-2, sec. 2.3)."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight /= math.sqrt(2 * size.layers)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def batch(stream: Tensor, step: int, windows: int, seed: int, bos: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of one step, int64 [rows, length] each; every epoch shows every token once.

    Every other row starts with BOS, as a prompt does; the rest start in mid-text, as perplexity windows do.
    """
    count = (len(stream) - 1) // WINDOW - 1
    if count < windows:
        raise SystemExit(f"The text has {len(stream)} tokens; {windows} windows a step take {WINDOW * (windows + 2)}.")
    epoch, place = divmod(step, count // windows)
    draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shift = int(torch.randint(WINDOW, (1,), generator=draw))
    chosen = torch.randperm(count, generator=draw)[place * windows : (place + 1) * windows]
    rows = torch.stack([stream[start : start + WINDOW + 1] for start in (chosen * WINDOW + shift).tolist()])
    length = WINDOW if step % 4 == 3 else SHORT
    inputs, targets = rows[:, :-1].reshape(-1, length).clone(), rows[:, 1:].reshape(-1, length)
    inputs[::2, 0] = bos
    return inputs, targets


@dataclass
class State:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf  # held-out loss, nats a token
    best_step: int = 0


def train(
    model: LlamaForCausalLM, stream: Tensor, held: Tensor, bos: int, args: argparse.Namespace, file: Path
) -> State:
    """Train ``model`` in place, going on from the checkpoint ``file`` if there is one; best weights go to best.pt."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    rate = SIZES[args.size].rate
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = [muon, adam]
    state = State()
    if file.is_file():
        saved = torch.load(file, map_location=model.device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        state = State(**saved["state"])
    forward = torch.compile(model, dynamic=False) if args.compile else model
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=1.0)
        done = state.step / args.steps if args.steps else state.seconds / 60 / args.minutes
        while done < 1:
            began = time.monotonic()
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate * schedule(state.step, done)
            inputs, targets = batch(stream, state.step, args.windows, args.seed, bos)
            loss = nats(forward, inputs.to(model.device), targets.to(model.device)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            state.step += 1
            state.seconds += time.monotonic() - began
            done = state.step / args.steps if args.steps else state.seconds / 60 / args.minutes
            progress.update(bar, completed=done, description=f"step {state.step} loss {loss.item():.3f}")
            stop = state.step == args.stop_after
            if state.step % args.every == 0 or done >= 1 or stop:
                held_loss = check(model, held, state, file.with_name("best.pt"))
                progress.console.print(f"step {state.step}: loss {loss.item():.3f}, held out {held_loss:.3f}")
                saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
                replace(file, lambda path, saved=saved: torch.save({**saved, "state": asdict(state)}, path))
            if stop:
                break
    return state


def schedule(step: int, done: float, warmup: int = 100) -> float:
    """Return the factor of the learning rate: linear warm-up, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def check(model: LlamaForCausalLM, held: Tensor, state: State, best: Path) -> float:
    """Return the held-out loss; note it in ``state`` and keep the weights in ``best`` when it is the lowest so far."""
    loss = total_nats(model, held) / len(held)
    if loss < state.best:
        state.best, state.best_step = loss, state.step
        replace(best, lambda path: torch.save(model.state_dict(), path))
    return loss


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder beside ``out``, then put it in its place."""
    fresh = out.with_name(out.name + ".new")
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    file = fresh / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 and 5 both know this name
    file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    if out.exists():
        shutil.rmtree(out)
    fresh.rename(out)


if __name__ == "__main__":
    main()
