"""Which path the vision kernels take, what is said where they cannot be built, and calls from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qtoolkit.kernels import build, vision_layout as layout, vision_ops as ops
from qtoolkit.kernels.cpu.vision import library

ALL = ("avx512", "avx2", "portable")


def test_the_best_path_runs_unless_one_is_forced() -> None:
    assert library.choose(None, ALL) == "avx512"
    assert library.choose("portable", ALL) == "portable"
    assert library.choose("amx", ALL) == "avx512"  # only the W4A8 kernels have these two
    assert library.choose("avxvnni", ALL) == "avx2"
    assert library.choose("avxvnni", ("portable",)) == "portable"


@pytest.mark.parametrize("wanted", ["avx512", "neon"])
def test_a_path_that_this_cpu_does_not_have_is_refused_with_those_it_has(wanted: str) -> None:
    with pytest.raises(build.BuildError, match=r"no path of this CPU; it has avx2, portable"):
        library.choose(wanted, ("avx2", "portable"))


def test_every_source_and_header_is_part_of_the_build() -> None:
    used = {unit.source for unit in library.units()} | set(library.headers())
    assert {file for file in library.FOLDER.iterdir() if file.suffix in (".cpp", ".h")} <= used


@pytest.mark.skipif(library.failure() is not None, reason=f"no vision kernels here: {library.failure()}")
def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    words, ones = layout.binary_conv(torch.randn(24, 9 * 40, generator=torch.Generator().manual_seed(0)), 9)
    images = torch.randn(16, 1, 40, 12, 12, generator=torch.Generator().manual_seed(1))

    def run(x: torch.Tensor) -> torch.Tensor:
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
        return ops.binary_conv2d(x, words, ones, torch.ones(24), None, None, *geometry)

    alone = [run(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, images))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
