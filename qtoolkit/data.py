"""Text for calibration and evaluation: files, chat transcripts, hub data sets, and what the model writes itself."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtoolkit import architecture
from qtoolkit.device import CPU
from qtoolkit.errors import DataError, ModelError, RequestError, said
from qtoolkit.lightly import load_transformers
from qtoolkit.recipe import Calibration
from qtoolkit.registry import suggest
from qtoolkit.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# name -> (hub data set, configuration, training split, text column)
HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "wikitext2-test": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "pile": ("mit-han-lab/pile-val-backup", None, "validation", "text"),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", "messages"),
}
HUB_DOCUMENTS = 4000  # enough for 128 windows of 2048 tokens from any of the sets above
SMALL = 50_000_000  # parameters; tiny writes five times faster on one thread than on two
PIECE = 1 << 18  # characters, at least, that are tokenized at once
PLENTY = 64  # characters for each token wanted: of longer text only what windows need is tokenized
GENEROUS = 8  # characters that a token rarely exceeds on the mean
CUT = 16  # tokens at the end of a piece that another end might change
LINES = re.compile(r"\n+")  # tokenizers split behind line ends, but not between them
BATCH = 128  # sequences that a model writes at once, at most
CACHE = 8 << 30  # bytes of keys and values that they may take
SURROGATES = re.compile(r"[\ud800-\udfff]")  # halves of characters, which JSON can say and UTF-8 cannot
LARGE = 1_000_000_000  # parameters: from here on a model writes in the dtype that is stored, in half the memory


def calibration_tokens(
    source: Source,
    wanted: Calibration,
    longest: int,
    vocabulary: int,
    say: Callable[[str], None],
    device: torch.device = CPU,
) -> tuple[Tensor, Tensor]:
    """Return the tokens that a recipe asks to calibrate on: windows of text, and windows of random tokens.

    What inputs have in common on one text, a solver takes for granted of all text. Random tokens have nothing in common
    but what the network itself makes of them.

    Args:
        source: the float model; it writes the text itself when ``wanted.data`` is "self".
        wanted: the recipe's part about calibration.
        longest: the longest text that the model is calibrated on, such as its context; windows are cut to it.
        vocabulary: rows of the model's embedding.
        say: is told what happens.
        device: where the model writes.

    Returns:
        int64 [windows, length] each, ``wanted.samples`` together, or fewer of both where the text is short.

    Raises:
        DataError: the text is empty, too short or cannot be read.
        NumericError: the model holds NaN or Inf, so that it cannot write.
    """
    count = int(wanted.samples * wanted.random)
    text = text_tokens(source, wanted.model_copy(update={"samples": wanted.samples - count}), longest, say, device)
    count = min(count, round(len(text) * wanted.random / (1 - wanted.random)))  # of a short text a share, too
    found = random_tokens(load_tokenizer(source), vocabulary, count, text.shape[1], wanted.seed)
    if len(text) + count < wanted.samples:
        say(f"the text gives {len(text)} windows of {text.shape[1]} tokens, with {count} of random tokens beside them")
    return text, found


def text_tokens(
    source: Source, wanted: Calibration, longest: int, say: Callable[[str], None], device: torch.device
) -> Tensor:
    """Return ``wanted.samples`` windows of text, int64 [samples, length], as ``calibration_tokens`` describes them."""
    tokenizer = load_tokenizer(source)
    length = min(wanted.length, longest)
    if wanted.data != "self":
        return windows(documents(wanted.data, tokenizer), tokenizer, wanted.samples, length, wanted.seed)
    large = sum(math.prod(shape) for shape in source.shapes().values()) >= LARGE
    model = architecture.load(source, device, architecture.stored_dtype(source) if large else torch.float32)
    say(f"the model writes {wanted.samples} x {length} tokens to calibrate on")
    if large:
        say("for that it is held in memory as a whole; with --data TEXT no more than a block of it is")
    start = start_tokens(tokenizer)
    first = int(start[0]) if len(start) else int(tokenizer.eos_token_id or 0)
    return self_written(model, first, wanted.samples, length, wanted.seed)


def random_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int, count: int, length: int, seed: int) -> Tensor:
    """Return ``count`` windows of tokens that are all as likely, but for special and added ones.

    Returns:
        int64 [count, length], below ``vocabulary``; each begins with what the tokenizer puts before a text. None where
        the tokenizer has nothing but such tokens.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None)
    special = {*tokenizer.all_special_ids, *(added if isinstance(added, Mapping) else ())}  # Mistral's own has none
    known = {index for index in tokenizer.get_vocab().values() if index < vocabulary}
    plain = torch.tensor(sorted(known - special), dtype=torch.int64, device="cpu")
    start, draw = start_tokens(tokenizer), torch.Generator("cpu").manual_seed(seed)
    count = count if len(plain) else 0
    places = torch.randint(max(1, len(plain)), (count, length - len(start)), generator=draw, device="cpu")
    return torch.cat([start.expand(count, -1), plain[places]], dim=1)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer.

    Raises:
        ModelError: the folder has none that can be read.
    """
    load_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{source.name} has no usable tokenizer: {said(error)}", "Is the folder complete?") from None


def documents(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Return the documents of a text file, a .jsonl file, or a hub data set.

    A .jsonl line holds ``text``, ``messages`` (rendered with the tokenizer's chat template) or ``prompt`` and
    ``completion``. A hub data set is one of ``HUB``, or ``org/name[:configuration[:split]]`` with a text column.

    Raises:
        RequestError: no such file or data set name.
        DataError: the file is empty, a line is malformed, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        found = list(_jsonl(path, tokenizer)) if path.suffix == ".jsonl" else [_read_text(path)]
    elif name in HUB:
        found = list(_hub(*HUB[name], tokenizer))
    elif _on_hub(name):
        repo, configuration, split, *_ = (*name.split(":"), "", "")
        found = list(_hub(repo, configuration or None, split or "train", None, tokenizer))
    else:
        raise _unknown(name)
    found = [SURROGATES.sub("\ufffd", text) for text in found if text and not text.isspace()]
    if not found:
        raise DataError(f"The data {name} holds no text.", "Give a .txt or .jsonl file, or a data set's name.")
    return found


def check(name: str) -> None:
    """Refuse what is no calibration text by its name alone; whether the hub has it is seen when it is read.

    Raises:
        RequestError: no such file or data set name.
    """
    if name != "self" and name not in HUB and not _on_hub(name) and not Path(name).expanduser().is_file():
        raise _unknown(name)


def _on_hub(name: str) -> bool:
    """Tell whether a name has the form of a hub data set's, ``org/name[:configuration[:split]]``."""
    return name.split(":")[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def _unknown(name: str) -> RequestError:
    return RequestError(f"There is no data {name!r}: no such file or data set.", suggest(name, {*HUB, "self"}))


def windows(texts: list[str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int) -> Tensor:
    """Cut ``samples`` windows of ``length`` tokens at random places of the joined texts.

    Each window starts with the tokenizer's own first token (BOS) where it adds one, as every served request does. In
    much more text than windows take, one lies in each of so many equal stretches and begins with a line where one is
    near.

    Returns:
        int64 [samples, length]; fewer rows when a short text does not hold that many windows without overlap.

    Raises:
        RequestError: a window has no room for text.
        DataError: the text is shorter than one window.
    """
    start = start_tokens(tokenizer)
    room = length - len(start)
    if room < 1:
        raise RequestError(f"A window of {length} tokens has no room for text.", "Raise --length.")
    draw = torch.Generator("cpu").manual_seed(seed)
    joined = "\n\n".join(texts)
    if len(joined) > PLENTY * samples * length:
        order = torch.randperm(samples, generator=draw, device="cpu")  # the first windows are not the first text
        parts = order + torch.rand(samples, generator=draw, device="cpu", dtype=torch.float64)
        places = (parts * (len(joined) / samples)).long().tolist()  # one in each of so many equal stretches
        return torch.stack([torch.cat([start, _tokens_from(joined, place, room, tokenizer)]) for place in places])
    ids = encoded(joined, tokenizer)
    if len(ids) < room:
        raise _too_short(len(ids), room)
    samples = min(samples, max(1, len(ids) // room))
    places = torch.randint(0, len(ids) - room + 1, (samples,), generator=draw, device="cpu").tolist()
    return torch.stack([torch.cat([start, ids[place : place + room].long()]) for place in places])


def _tokens_from(text: str, place: int, wanted: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return ``wanted`` tokens from the beginning of the line on that holds a ``place`` in the text, int64 [wanted].

    Where that is far they begin behind the next blank; where the text ends before there are so many they are its last.
    """
    size = GENEROUS * wanted
    line = text.rfind("\n", max(0, place - size), place) + 1
    if not line and place > size:
        line = text.find(" ", place, place + size) + 1 or place
    begin, stop = line, line + size
    while True:
        ids = tokenizer(text[begin:stop], add_special_tokens=False, verbose=False)["input_ids"]
        if stop < len(text) and len(ids) >= wanted + CUT:
            return torch.tensor(ids[:wanted], dtype=torch.int64, device="cpu")
        if stop >= len(text) and len(ids) >= wanted:
            found = ids[:wanted] if begin == line else ids[-wanted:]
            return torch.tensor(found, dtype=torch.int64, device="cpu")
        if stop < len(text):
            stop += stop - begin
        elif begin:
            begin = max(0, 2 * begin - stop)
        else:
            raise _too_short(len(ids), wanted)


def _too_short(found: int, wanted: int) -> DataError:
    return DataError(
        f"The calibration text has {found} tokens, but one window takes {wanted}.",
        "Give more text, or lower --length.",
    )


def encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens of a text, int32 [tokens], without special ones.

    Long text goes by in pieces that end with a line: a tokenizer takes 140 times the size of a text.
    """
    found, start = [], 0
    while start < len(text):
        lines = LINES.search(text, start + PIECE)
        stop = lines.end() if lines else len(text)
        ids = tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
        found.append(torch.tensor(ids, dtype=torch.int32, device="cpu"))
        start = stop
    return torch.cat(found)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return what the tokenizer puts before every text: int64 [1] with BOS, or [0]."""
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return torch.tensor([tokenizer.bos_token_id] if adds else [], dtype=torch.int64, device="cpu")


@torch.inference_mode()
def self_written(model: PreTrainedModel, first: int, samples: int, length: int, seed: int) -> Tensor:
    """Let the model write its own calibration text: ``samples`` sequences drawn at temperature 1 after token ``first``.

    Source: data-free calibration of LLM-QAT (Liu et al. 2023, section 3.1), without its greedy prefix.

    Returns:
        int64 [samples, length].
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    batches, most = [], max(1, min(BATCH, CACHE // (length * _cached_bytes(model))))
    with _one_thread_if_small(model):
        for start in range(0, samples, most):
            token = torch.full((min(most, samples - start), 1), first, device="cpu")
            written, past = [token], None
            while len(written) < length:
                out = model(input_ids=token.to(model.device), past_key_values=past, use_cache=True)
                past = out.past_key_values
                odds = out.logits[:, -1].float().softmax(-1).cpu()  # drawn here: one generator, wherever the model is
                token = torch.multinomial(odds, 1, generator=generator)
                written.append(token)
            batches.append(torch.cat(written, dim=1))
    return torch.cat(batches)


def _cached_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * int(config.num_hidden_layers * heads * width) * model.dtype.itemsize


@contextmanager
def _one_thread_if_small(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a small model computes on one thread: its steps are so short that waiting for others costs more."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.", "Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _jsonl(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    from jinja2 import TemplateError

    for number, line in enumerate(_read_text(path).split("\n"), 1):  # a JSON text may hold the other line separators
        if line.strip():
            try:
                yield _render(json.loads(line), tokenizer)
            except (ValueError, TypeError, TemplateError) as error:  # the chat template reads what is not there
                raise DataError(
                    f"{path}, line {number}: {said(error)}.",
                    "A line holds text, messages, or prompt and completion.",
                ) from None


def _render(row: Any, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(messages := row.get("messages"), list):
        if not all(isinstance(message, dict) and "role" in message for message in messages):
            raise ValueError("a message has no role")
        messages = [_plain(message) for message in messages]
        if tokenizer is None or not tokenizer.chat_template:
            return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"] + row["completion"]
    raise ValueError(f"no text among the keys {', '.join(sorted(map(str, row)))}")


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return a chat message whose content is one text, where it is a list of typed parts."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise ValueError("a part of a message has no text")
    return {**message, "content": "".join(part["text"] for part in parts)}


def _hub(
    repo: str, configuration: str | None, split: str, column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(repo, configuration, split=split, streaming=not os.environ.get("HF_DATASETS_OFFLINE"))
        for number, row in enumerate(rows):
            if number >= HUB_DOCUMENTS:
                break
            yield _render({"text": row[column]} if column == "text" else row, tokenizer)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
    ) as error:  # offline, unknown set, unknown split, no text column
        raise DataError(
            f"The data set {repo} could not be read: {said(error)}",
            "Without network, give a local .txt or .jsonl file, or `--data self`.",
        ) from None
