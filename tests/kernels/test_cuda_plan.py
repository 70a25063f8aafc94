"""The choice of tiles: every size gets one the kernel supports, and a measured table goes before the cost model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qtoolkit.kernels import tables
from qtoolkit.kernels.cuda import plan
from qtoolkit.kernels.cuda.source import Tiling

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (136, 8), (1000, 2048)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_size_has_a_tiling_that_is_not_refused(n: int, k: int, grouped: bool) -> None:
    for tokens in (1, 7, 16, 33, 64, 65, 100, 128, 200, 512, 5000):
        assert plan.refuse(plan.choose(tokens, n, k, grouped), tokens, n, k, grouped) is None


# Tiling, tokens, n, k, grouped, and a word of the reason.
REFUSED = [
    (Tiling(40, 1, 1, 2), 40, 4096, 4096, False, "no such tile"),
    (Tiling(16, 1, 3, 2), 16, 4096, 4096, False, "no such tile"),
    (Tiling(128, 2, 1, 1), 128, 384, 4096, False, "whole number"),
    (Tiling(256, 1, 1, 1), 256, 4096, 4096, True, "registers"),
    (Tiling(8, 1, 4, 2), 8, 4096, 256, False, "cannot share"),
    (Tiling(64, 1, 1, 2), 9, 4096, 4096, False, "mostly empty"),
    (Tiling(8, 1, 4, 2, fused=True), 9, 4096, 4096, False, "one tile of 8"),
    (Tiling(8, 1, 1, 2, fused=True), 8, 4096, 4096, False, "share of 4096"),
    (Tiling(160, 1, 1, 1, pingpong=True), 160, 4096, 4096, True, "registers"),
    (Tiling(128, 1, 2, 1, pingpong=True), 128, 4096, 4096, False, "whole tiles"),
    (Tiling(128, 2, 1, 1, pingpong=True), 128, 4096, 4096, False, "no such tile"),
    (Tiling(8, 1, 2, 2, streamed=True), 8, 4096, 4096, False, "no cluster"),
    (Tiling(64, 1, 1, 1, streamed=True), 65, 4096, 4096, False, "few tokens"),
]


@pytest.mark.parametrize(("tiling", "tokens", "n", "k", "grouped", "word"), REFUSED, ids=lambda v: str(v)[:20])
def test_what_cannot_be_run_is_refused_in_words(
    tiling: Tiling, tokens: int, n: int, k: int, grouped: bool, word: str
) -> None:
    assert word in (plan.refuse(tiling, tokens, n, k, grouped) or "")
    assert tiling not in plan.candidates(tokens, n, k, grouped)


def test_few_tokens_take_one_launch_where_a_cluster_can_hold_their_inputs() -> None:
    assert plan.choose(1, 4096, 4096, False).fused
    assert plan.choose(16, 4096, 14336, True).fused
    assert not plan.choose(16, 4096, 28672, False).fused
    assert not plan.choose(17, 4096, 4096, False).fused


def test_few_tokens_fill_the_card_by_sharing_the_inputs() -> None:
    tiling = plan.choose(1, 4096, 4096, False)
    assert tiling.tokens == 8
    assert 4096 // (128 * tiling.blocks) * tiling.split >= 128


def test_many_tokens_take_the_largest_tiles() -> None:
    assert plan.choose(4096, 8192, 8192, False) == Tiling(128, 2, 1, 1)


@pytest.mark.parametrize("grouped", [False, True])
def test_only_a_measured_table_chooses_ping_pong_or_a_stream(grouped: bool) -> None:
    for tokens, new in [(1, "streamed"), (16, "streamed"), (64, "streamed"), (65, "pingpong"), (4096, "pingpong")]:
        assert any(getattr(tiling, new) for tiling in plan.candidates(tokens, 8192, 8192, grouped))
        assert not getattr(plan.estimate(tokens, 8192, 8192, grouped), new)


CARD = "NVIDIA Test 80GB"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("QTOOLKIT_TUNING", str(tmp_path))
    for cached in (plan.table, plan.choose):
        cached.cache_clear()
    yield tmp_path
    for cached in (plan.table, plan.choose):
        cached.cache_clear()


def write(folder: Path, rows: dict[tables.Point, tuple[int, ...]], name: str = "cuda-nvidia_test.json") -> Path:
    tables.write(folder / name, "cuda", CARD, {"date": "2026-11-21"}, plan.COLUMNS, rows)
    return folder / name


@pytest.mark.parametrize("name", ["cuda-nvidia_test.json", "cuda-sm_90.json"])
def test_a_measured_choice_is_taken(folder: Path, name: str) -> None:
    estimated = plan.choose(9, 8192, 4096, False, CARD)
    plan.table.cache_clear()
    plan.choose.cache_clear()
    write(folder, {tables.Point(16, 4096, 4096, False): (16, 1, 2, 2, 1, 0, 0)}, name)
    assert plan.choose(9, 4096, 4096, False, CARD) == Tiling(16, 1, 2, 2, fused=True)
    assert plan.choose(9, 4096, 4096, True, CARD) != Tiling(16, 1, 2, 2, fused=True)
    assert plan.choose(9, 8192, 4096, False, CARD) == estimated


def damaged(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = [
    ({"schema": 2}, "schema is 2, not 1"),
    ({"backend": "triton"}, "backend is 'triton'"),
    ({"columns": ["tokens"]}, "columns is"),
    ({"more": 1}, "its keys must be"),
    ({"tilings": {}}, "no tilings"),
    ({"tilings": {"16,4096,4096,channel": [16, 1, 2]}}, "not the 7 integers"),
    ({"tilings": {"16,4096,channel": [16, 1, 2, 2, 0, 0, 0]}}, "is no point"),
    ({"tilings": {"16,4096,4096,both": [16, 1, 2, 2, 0, 0, 0]}}, "neither 'group' nor 'channel'"),
    ({"tilings": {"16,4096,4096,channel": [16, 1, 3, 2, 0, 0, 0]}}, "there is no such tile"),
    ({"tilings": {"32,4096,4096,channel": [16, 1, 4, 2, 1, 0, 0]}}, "one tile of 16 tokens, not 32"),
]


@pytest.mark.parametrize(("changes", "words"), DAMAGE, ids=lambda v: str(v)[:24])
def test_a_damaged_table_is_set_aside_with_a_sentence(folder: Path, changes: dict[str, object], words: str) -> None:
    estimated = plan.choose(9, 4096, 4096, False, "")
    path = write(folder, {tables.Point(16, 4096, 4096, False): (16, 1, 2, 2, 1, 0, 0)})
    damaged(path, **changes)
    with pytest.warns(RuntimeWarning, match="cuda-nvidia_test.json cannot be used") as seen:
        assert plan.choose(9, 4096, 4096, False, CARD) == estimated
    assert words in str(seen[0].message)


def test_half_a_file_is_set_aside_too(folder: Path) -> None:
    path = write(folder, {tables.Point(16, 4096, 4096, False): (16, 1, 2, 2, 1, 0, 0)})
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="it is not JSON"):
        tables.read(path, "cuda", plan.COLUMNS, lambda point, row: None)


def test_what_is_written_is_read_back(folder: Path) -> None:
    rows = {tables.Point(m, 4096, 4096, g): (8, 1, 4, 2, 0, 0, 0) for m in (8, 1, 4) for g in (False, True)}
    path = write(folder, rows)
    assert tables.read(path, "cuda", plan.COLUMNS, lambda point, row: None) == rows
    assert len(path.read_text().splitlines()) == 2 + len(rows)
    assert [entry.name for entry in folder.iterdir()] == [path.name]


def test_every_shipped_table_can_be_used() -> None:
    for path in tables.SHIPPED.glob("cuda-*.json"):
        assert tables.read(path, "cuda", plan.COLUMNS, plan.refuse_row)
