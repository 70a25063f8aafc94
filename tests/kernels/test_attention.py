"""Attention of prompts equals attention in float64, for any shape of batch, and refuses what it cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtoolkit.kernels import build
from qtoolkit.kernels.cpu.attention import library
from qtoolkit.kernels.cpu.attention.step import Step

needs_library = pytest.mark.skipif(library.failure() is not None, reason=f"no attention here: {library.failure()}")


@pytest.fixture(params=["amx", "avx512"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every test run with and without AMX, where this CPU has it."""
    if request.param == "amx" and (library.failure() is not None or not library.tiles()):
        pytest.skip("no AMX here")
    if request.param == "avx512":
        monkeypatch.setattr(library, "tiles", lambda: False)


@dataclass(frozen=True)
class Batch:
    """Sequences with keys and values in a cache, in pages that lie in no order."""

    query: Tensor  # [all queries, heads, dim]
    keys: list[Tensor]  # of each sequence, [length, key heads, dim]
    values: list[Tensor]
    cache: Tensor
    table: Tensor
    starts: Tensor
    lengths: Tensor

    def attended(self) -> Tensor:
        """Return the kernel's answer."""
        output = torch.full_like(self.query, torch.nan)
        scale = self.query.shape[2] ** -0.5
        library.attend(self.query, self.cache, output, self.table, self.starts, self.lengths, scale)
        return output

    def expected(self) -> Tensor:
        """Return attention in float64."""
        answers = []
        queries = self.query.split(self.starts.diff().tolist())
        for own, keys, values in zip(queries, self.keys, self.values, strict=True):
            share = own.shape[1] // keys.shape[1]
            wide_keys, wide_values = (x.double().repeat_interleave(share, dim=1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", own.double(), wide_keys) * own.shape[2] ** -0.5
            later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(keys.shape[0] - own.shape[0] + 1)
            weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
            answers.append(torch.einsum("hqk,khd->qhd", weights, wide_values))
        return torch.cat(answers)


def make(
    sequences: list[tuple[int, int]], heads: int, key_heads: int, dim: int, page: int = 32, spread: float = 1.0
) -> Batch:
    """Return sequences of (queries, tokens) of random numbers; memory that is no token of theirs is NaN."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * spread).bfloat16()

    counts = [-(-length // page) for _, length in sequences]
    free = torch.randperm(sum(counts) + 3, generator=generator).int()  # some pages stay unused
    cache = torch.full((len(free), key_heads, page, 2 * dim), torch.nan, dtype=torch.bfloat16)
    table = torch.full((len(sequences), max(counts)), -1, dtype=torch.int32)
    keys, values = ([random(length, key_heads, dim) for _, length in sequences] for _ in range(2))
    for row, count in enumerate(counts):
        table[row, :count], free = free[:count], free[count:]
        for place, own in enumerate(table[row, :count].tolist()):
            part = slice(place * page, (place + 1) * page)
            taken = keys[row][part].shape[0]
            halves = cache[own].view(key_heads, 2, page * dim)
            halves[:, 0].view(key_heads, dim, page)[:, :, :taken] = keys[row][part].permute(1, 2, 0)
            halves[:, 1].view(key_heads, page, dim)[:, :taken] = values[row][part].transpose(0, 1)
    starts = torch.tensor([0, *(queries for queries, _ in sequences)]).cumsum(0).int()
    query = random(int(starts[-1]), heads, dim)
    return Batch(query, keys, values, cache, table, starts, torch.tensor([n for _, n in sequences], dtype=torch.int32))


def assert_close(batch: Batch) -> None:
    """Demand bfloat16's accuracy: half a step of rounding weights and half of rounding results, 2**-9 each."""
    attended, expected = batch.attended().double(), batch.expected()
    largest = max(values.abs().max() for values in batch.values).double()
    assert (attended - expected).abs().max() < 2**-8 * largest


SEQUENCES = {
    "one token": [(1, 1)],
    "odd": [(7, 7)],
    "a tile, a group, a block of keys and one more": [(6, 6), (33, 33), (257, 257)],
    "several blocks of queries": [(613, 613)],
    "behind a prefix": [(65, 300), (3, 515)],
    "prompts among single tokens": [(1, 40), (50, 50), (1, 1), (1, 300), (20, 77)],
    "no queries between": [(5, 5), (0, 64), (2, 2)],
}


@needs_library
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 1), (6, 2), (2, 2)])
def test_it_is_attention(name: str, heads: int, key_heads: int, threads: int) -> None:
    assert_close(make(SEQUENCES[name], heads, key_heads, 64))


@needs_library
@pytest.mark.parametrize("dim", [32, 96, 128, 160, 256, 512])
@pytest.mark.parametrize("page", [32, 128])
def test_every_size_of_heads_and_pages(dim: int, page: int) -> None:
    assert_close(make([(70, 70), (9, 290)], 4, 2, dim, page))


@needs_library
def test_more_heads_than_a_task_has_rows() -> None:
    assert_close(make([(3, 40)], 500, 1, 32))


@needs_library
@pytest.mark.parametrize("spread", [0.001, 8.0])
def test_flat_and_steep_softmax(spread: float) -> None:
    assert_close(make([(300, 300)], 4, 2, 64, spread=spread))


@needs_library
def test_any_number_of_threads_gives_the_same_bits() -> None:
    batch, before = make([(200, 500), (40, 40)], 8, 2, 64), torch.get_num_threads()
    torch.set_num_threads(1)
    alone = batch.attended()
    torch.set_num_threads(2)
    together = batch.attended()
    torch.set_num_threads(before)
    assert torch.equal(alone, together)


@needs_library
def test_tokens_may_lie_apart_and_pages_too() -> None:
    batch = make([(40, 90), (2, 2)], 4, 2, 64)
    beside = torch.zeros(batch.query.shape[0], 3, 4, 64, dtype=torch.bfloat16)  # as of one product for q, k and v
    beside[:, 1] = batch.query
    of_layers = torch.stack([batch.cache, batch.cache.new_zeros(batch.cache.shape)], dim=1)
    apart = Batch(beside[:, 1], batch.keys, batch.values, of_layers[:, 0], batch.table, batch.starts, batch.lengths)
    output = torch.zeros_like(beside)
    library.attend(apart.query, apart.cache, output[:, 2], apart.table, apart.starts, apart.lengths, 64**-0.5)
    assert torch.equal(output[:, 2], batch.attended())
    assert not output[:, :2].any()


def taken_out(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a cache without a batch's queries' own tokens, those tokens' keys and values, and their slots."""
    cache, page = batch.cache.clone(), batch.cache.shape[2]
    keys, values, slots = [], [], []
    counts = batch.starts.diff().tolist()
    for row, (count, own_keys, own_values) in enumerate(zip(counts, batch.keys, batch.values, strict=True)):
        length = len(own_keys)
        for token in range(length - count, length):
            slots.append(int(batch.table[row, token // page]) * page + token % page)
            halves = cache[slots[-1] // page].view(cache.shape[1], 2, -1)
            halves[:, 0].view(cache.shape[1], -1, page)[:, :, token % page] = torch.nan
            halves[:, 1].view(cache.shape[1], page, -1)[:, token % page] = torch.nan
        keys.append(own_keys[length - count :])
        values.append(own_values[length - count :])
    return cache, torch.cat(keys), torch.cat(values), torch.tensor(slots)


@needs_library
@pytest.mark.parametrize("page", [32, 128])
@pytest.mark.parametrize("sequences", [[(1, 1)], [(1, 77)], [(1, 129), (1, 64), (1, 1)], [(3, 40), (1, 300)]])
def test_a_step_writes_its_tokens_before_it_attends(sequences: list[tuple[int, int]], page: int) -> None:
    batch = make(sequences, 8, 2, 64, page)
    cache, keys, values, slots = taken_out(batch)
    step = Step(batch.table, batch.starts, batch.lengths, slots, 64**-0.5)
    beside = torch.stack([keys, values, keys], dim=1)  # as of one product for q, k and v
    for own in (cache, cache.clone()):  # two layers
        output = torch.full_like(batch.query, torch.nan)
        step.attend(batch.query, beside[:, 0], beside[:, 1], own, output)
        assert torch.equal(output, batch.attended())
        assert torch.equal(own.view(torch.int16), batch.cache.view(torch.int16))


@needs_library
def test_tokens_that_belong_nowhere_are_not_written() -> None:
    batch = make([(1, 5)], 4, 2, 64)
    before = batch.cache.clone()
    step = Step(batch.table, batch.starts, batch.lengths, torch.tensor([-1]), 64**-0.5)
    step.attend(batch.query, *torch.ones(2, 1, 2, 64).bfloat16(), batch.cache, batch.query.clone())
    assert torch.equal(batch.cache.view(torch.int16), before.view(torch.int16))


@needs_library
def test_a_step_refuses_what_does_not_belong_together() -> None:
    batch = make([(1, 5), (1, 7)], 4, 2, 64)
    rest = (batch.table, batch.starts, batch.lengths)
    for slots in (torch.zeros(1, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="slots"):
            Step(*rest, slots, 1.0)
    step, new = Step(*rest, torch.zeros(2, dtype=torch.int64), 1.0), torch.zeros(2, 2, 64).bfloat16()
    step.attend(batch.query, new, new, batch.cache, batch.query.clone())
    for wrong in (new[:1], new.float(), new[:, :1], new.transpose(1, 2)):
        with pytest.raises(ValueError, match="keys and values"):
            step.attend(batch.query, wrong, new, batch.cache, batch.query.clone())
    with pytest.raises(ValueError, match="do not belong together"):
        step.attend(batch.query, new, new, batch.cache, batch.query[:, :2].clone())


@needs_library
def test_what_does_not_belong_together_is_refused() -> None:
    batch = make([(5, 5)], 4, 2, 64)
    rest = (batch.table, batch.starts, batch.lengths, 1.0)
    with pytest.raises(ValueError, match="do not belong together"):
        library.attend(batch.query[:, :3], batch.cache, batch.query[:, :3].clone(), *rest)
    with pytest.raises(ValueError, match="not dense"):
        library.attend(batch.query, batch.cache, batch.query.transpose(0, 1).contiguous().transpose(0, 1), *rest)
    with pytest.raises(ValueError, match="not bfloat16"):
        library.attend(batch.query.float(), batch.cache, batch.query, *rest)
    with pytest.raises(ValueError, match="int32"):
        library.attend(batch.query, batch.cache, batch.query, batch.table.long(), *rest[1:])
    with pytest.raises(ValueError, match="1 sequences have 1 starts"):
        library.attend(batch.query, batch.cache, batch.query, batch.table, batch.starts[:1], *rest[2:])


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 2, 64, torch.float16), "not bfloat16"),
        ((8, 2, 80, torch.bfloat16), "not a multiple of 32"),
        ((8, 2, 1024, torch.bfloat16), "up to 512"),
        ((8, 3, 64, torch.bfloat16), "evenly"),
    ],
)
def test_shapes_are_refused_in_words(shape: tuple[int, int, int, torch.dtype], words: str) -> None:
    assert words in (library.refuse(*shape) or "")


def test_another_code_path_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_CPU_PATH", "avx2")
    with pytest.raises(build.BuildError, match="QTOOLKIT_CPU_PATH=avx2 is asked for"):
        library.load.__wrapped__()


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("QTOOLKIT_CPU_PATH", raising=False)
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    with pytest.raises(build.BuildError, match="no AVX512 with bfloat16"):
        library.load.__wrapped__()
