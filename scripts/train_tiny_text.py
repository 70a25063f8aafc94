"""Turns plain text, one paragraph a line, into the bundled model's tokenizer and the token stream it learns from."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WINDOW = 2048  # tokens; the context, and the unit in which the text is shuffled
EOS, BOS, PAD, END = "<|eos|>", "<|bos|>", "<|pad|>", "<|end|>"
ROLES = [f"<|{role}|>" for role in ("system", "user", "assistant")]
CHAT = """{{- bos_token }}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}"""


def split(text: str, share: float = 0.01) -> tuple[list[str], list[str]]:
    """Return the paragraphs to train on, and the last ``share`` of them, which are held out."""
    paragraphs = [line.strip() for line in text.splitlines() if line.strip()]
    cut = len(paragraphs) - max(1, int(len(paragraphs) * share))
    return paragraphs[:cut], paragraphs[cut:]


def make_tokenizer(paragraphs: list[str], vocab: int, cache: Path) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts BOS before every text; trained once, then read from ``cache``."""
    file = cache / "tokenizer.json"
    if file.is_file():
        bpe = Tokenizer.from_file(str(file))
    else:
        bpe = Tokenizer(models.BPE())
        digits = pre_tokenizers.Digits(individual_digits=True)  # 4096 tokens are too few for numbers
        bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = [EOS, BOS, PAD, END, *ROLES]
        trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet)
        bpe.train_from_iterator(paragraphs, trainer)
        bos = bpe.token_to_id(BOS)
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
        )
        cache.mkdir(exist_ok=True)
        replace(file, lambda path: bpe.save(str(path)))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        bos_token=BOS,
        pad_token=PAD,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def documents(paragraphs: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[str]:
    """Join neighbouring paragraphs to documents that begin with BOS and end with EOS; a third become short chats.

    The text marks no ends of documents, so their lengths are drawn: exponential, 2500 characters on average.
    Chats are short; they make about a tenth of the tokens.
    """
    draw = random.Random(seed)
    place = 0
    while place < len(paragraphs):
        messages = as_chat(paragraphs[place], draw) if draw.random() < 0.36 else []
        if messages:
            yield tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n") + EOS
            place += 1
            continue
        wanted, first = draw.expovariate(1 / 2500), place
        while place < len(paragraphs) and (place == first or wanted > 0):
            wanted -= len(paragraphs[place])
            place += 1
        yield BOS + "\n\n".join(paragraphs[first:place]) + EOS


def as_chat(paragraph: str, draw: random.Random) -> list[dict[str, str]]:
    """Return a user turn (asking for the paragraph's main name, or its first sentence) and the answer, or nothing."""
    names = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*", paragraph))
    first, _, rest = paragraph.partition(". ")
    if names and draw.random() < 0.5:
        question, answer = f"Tell me about {names.most_common(1)[0][0]}.", paragraph
    else:
        question, answer = first + ".", rest
    if not answer or len(paragraph) > 1500:  # an answer should end within the tokens that a demo asks for
        return []
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encode(tokenizer: PreTrainedTokenizerFast, paragraphs: list[str], seed: int, cache: Path) -> Tensor:
    """Return all documents as one stream of tokens, int64 [tokens]; kept in ``cache``."""
    if not cache.is_file():
        rows = tokenizer.backend_tokenizer.encode_batch(
            list(documents(paragraphs, tokenizer, seed)), add_special_tokens=False
        )
        stream = torch.tensor([token for row in rows for token in row.ids], dtype=torch.int16)
        replace(cache, lambda path: torch.save(stream, path))
    return torch.load(cache, weights_only=True).long()


def plain_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return the tokens of ``text`` without BOS, int64 [tokens]."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path and move the result to ``path``: a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
