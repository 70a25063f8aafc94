"""Builds and loads the library of rounding loops, and calls it on a block of columns or on a whole weight."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qtoolkit.kernels import build
from qtoolkit.kernels.cpu import library as linear
from qtoolkit.kernels.cpu.vision import library as vision

FOLDER = Path(__file__).parent
SOURCES = ("columns", "grids", "layers", "attention")  # compiled for each instruction set
MOST_COLUMNS, MOST_TRIALS, MOST_SWEPT = 256, 16, 128  # as in job.h
HEAD_STEP, MOST_WIDTH, MOST_LENGTH = 32, 256, 2048  # of attention, as there
HALVES = ("", "upper", "lower")  # of a total, as there
_own = threading.local()  # memory of each thread
FUSED = ("-ffp-contract=fast",)  # a sum may fuse with its product: rounding has no reference bit for bit


class Spread(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("rows", ctypes.c_void_p), ("columns", ctypes.c_int64), ("low", ctypes.c_float), ("high", ctypes.c_float),
    ]  # fmt: skip


class Rounding(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("spread", Spread), *((name, ctypes.c_void_p) for name in ("weight", "steps", "groups")),
        ("n", ctypes.c_int64), ("weight_stride", ctypes.c_int64), ("codes", ctypes.c_void_p), ("lost", ctypes.c_void_p),
    ]  # fmt: skip


class Descent(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("spread", Spread), *((name, ctypes.c_void_p) for name in ("slope", "step", "bend")),
        ("n", ctypes.c_int64), ("codes", ctypes.c_void_p), ("moved", ctypes.c_void_p),
    ]  # fmt: skip


class Grid(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("n", "k", "stride", "size")),
        ("low", ctypes.c_float), ("high", ctypes.c_float),
    ]  # fmt: skip


class Nearest(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("grid", Grid), ("times", ctypes.c_void_p), ("smallest", ctypes.c_float), ("halves", ctypes.c_int64),
        ("made", ctypes.c_void_p),
    ]  # fmt: skip


class Trials(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("grid", Grid), ("matter", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("count", ctypes.c_int64),
        ("errors", ctypes.c_void_p),
    ]  # fmt: skip


class Restored(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "less")),
        *((name, ctypes.c_int64) for name in ("n", "k", "stride", "groups")), ("made", ctypes.c_void_p),
    ]  # fmt: skip


class Factor(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("numbers", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("lines", "line_stride", "step_stride")),
    ]  # fmt: skip


class Sum(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("left", Factor), ("right", Factor), ("steps", ctypes.c_int64), ("keep", ctypes.c_float),
        ("share", ctypes.c_float), ("total", ctypes.c_void_p), ("total_stride", ctypes.c_int64),
        ("half", ctypes.c_int64), ("scratch", ctypes.c_void_p),
    ]  # fmt: skip


class Swept(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("factor", Factor), ("block", ctypes.c_int64), ("ahead", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bend", "corners", "words")),
    ]  # fmt: skip


class Sweep(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("matrix", ctypes.POINTER(Swept)), *((name, ctypes.c_void_p) for name in ("numbers", "steps", "group")),
        ("n", ctypes.c_int64), ("groups", ctypes.c_int64), ("low", ctypes.c_float), ("high", ctypes.c_float),
        ("sweeps", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("codes", "before", "after", "scratch")),
    ]  # fmt: skip


class Norm(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("x", ctypes.c_void_p), ("weight", ctypes.c_void_p), ("n", ctypes.c_int64), ("k", ctypes.c_int64),
        ("epsilon", ctypes.c_float), ("made", ctypes.c_void_p),
    ]  # fmt: skip


class Gate(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("gate", ctypes.c_void_p), ("up", ctypes.c_void_p), ("count", ctypes.c_int64), ("made", ctypes.c_void_p),
    ]  # fmt: skip


class Lanes(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        ("numbers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sequence_stride", "head_stride", "token_stride")),
    ]  # fmt: skip


class Attention(ctypes.Structure):
    """The struct of that name in job.h."""

    _fields_ = [
        *((name, Lanes) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "sources", "length", "width")),
        ("scale", ctypes.c_float), ("made", ctypes.c_void_p), ("scratch", ctypes.c_void_p),
    ]  # fmt: skip


def units() -> tuple[build.Unit, ...]:
    """Return what the library is made of on this architecture; each instruction set is an object file of its own."""

    def path(name: str, *flags: str, optional: bool = True) -> tuple[build.Unit, ...]:
        return tuple(
            build.Unit(
                f"{source}_{name}",
                FOLDER / f"{source}.cpp",
                (*flags, *FUSED, f"-DTABLE={name.upper()}_{source.upper()}"),
                optional,
            )
            for source in SOURCES
        )

    own = (*path("portable", optional=False), build.Unit("driver", FOLDER / "driver.cpp"))
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return own
    sums = (
        build.Unit("sums_amx", FOLDER / "sums_amx.cpp", linear.AMX_BFLOAT16, optional=True),
        build.Unit("sums_vnni", FOLDER / "sums_vnni.cpp", linear.AVX512, optional=True),
        build.Unit("sweeps_vnni", FOLDER / "sweeps_vnni.cpp", linear.AVX512, optional=True),
    )
    return (*path("avx512", *vision.AVX512), *path("avx2", *linear.AVX2), *sums, *own)


def headers() -> tuple[Path, ...]:
    """Return every header that the sources include."""
    return (*sorted(FOLDER.glob("*.h")), linear.FOLDER / "threads.h", linear.FOLDER / "tiles.h")


@lru_cache(maxsize=1)
def load() -> linear.Library:
    """Build the library if need be, load it, and choose a code path as the vision kernels do.

    Raises:
        build.BuildError: it cannot be built or loaded, or QTOOLKIT_CPU_PATH names no path of this CPU.
    """
    file = build.library("rounding", units(), headers(), linear.FLAGS)
    functions = linear.opened(file)
    small = ctypes.c_int
    functions.qtr_path_name.argtypes, functions.qtr_path_name.restype = [small], ctypes.c_char_p
    functions.qtr_path_supported.argtypes = [small]
    functions.qtr_round.argtypes, functions.qtr_round.restype = [small, ctypes.POINTER(Rounding)], None
    functions.qtr_descend.argtypes, functions.qtr_descend.restype = [small, ctypes.POINTER(Descent)], None
    functions.qtr_nearest.argtypes, functions.qtr_nearest.restype = [small, ctypes.POINTER(Nearest)], None
    functions.qtr_trials.argtypes, functions.qtr_trials.restype = [small, ctypes.POINTER(Trials)], None
    functions.qtr_restore.argtypes, functions.qtr_restore.restype = [small, ctypes.POINTER(Restored)], None
    functions.qtr_norm.argtypes, functions.qtr_norm.restype = [small, ctypes.POINTER(Norm)], None
    functions.qtr_gate.argtypes, functions.qtr_gate.restype = [small, ctypes.POINTER(Gate)], None
    functions.qtr_attention_scratch.argtypes = [small, ctypes.POINTER(Attention)]
    functions.qtr_attention_scratch.restype = ctypes.c_int64
    functions.qtr_attend.argtypes, functions.qtr_attend.restype = [small, ctypes.POINTER(Attention)], None
    functions.qtr_sums_name.argtypes, functions.qtr_sums_name.restype = [small], ctypes.c_char_p
    functions.qtr_sums_supported.argtypes = [small]
    functions.qtr_sums_scratch.argtypes = [small, ctypes.POINTER(Sum)]
    functions.qtr_sums_scratch.restype = ctypes.c_int64
    functions.qtr_sum.argtypes, functions.qtr_sum.restype = [small, ctypes.POINTER(Sum)], None
    functions.qtr_sweeps_supported.argtypes = []
    functions.qtr_sweep_bytes.argtypes, functions.qtr_sweep_bytes.restype = [ctypes.POINTER(Swept)], ctypes.c_int64
    functions.qtr_sweep_pack.argtypes, functions.qtr_sweep_pack.restype = [ctypes.POINTER(Swept)], None
    functions.qtr_sweep_scratch.argtypes, functions.qtr_sweep_scratch.restype = [ctypes.POINTER(Sweep)], ctypes.c_int64
    functions.qtr_sweep.argtypes, functions.qtr_sweep.restype = [small, ctypes.POINTER(Sweep)], None
    paths = linear.supported_paths(functions.qtr_path_name, functions.qtr_path_supported)
    return linear.Library(functions, file, paths, vision.choose(os.environ.get(linear.PATH_VARIABLE), tuple(paths)))


@lru_cache(maxsize=1)
def failure() -> str | None:
    """Return why the library cannot be used here, or None; asked once a process."""
    try:
        load()
    except build.BuildError as error:
        return str(error)
    return None


def runs(device: torch.device, columns: int) -> bool:
    """Say whether blocks of ``columns`` columns on ``device`` are its business; the first call may compile it."""
    return device.type == "cpu" and columns <= MOST_COLUMNS and failure() is None


@lru_cache(maxsize=1)
def sums() -> dict[str, int]:
    """Return the ways of ``add_product`` on this CPU by name, the best first; the first call may compile them.

    ``amx`` rounds factors to bfloat16, ``avx512`` to whole numbers: of every 512 steps of a row or column the largest
    becomes 2047. The environment variable of code paths leaves the one that it names.
    """
    if failure() is not None:
        return {}
    functions = load().functions
    found = linear.supported_paths(functions.qtr_sums_name, functions.qtr_sums_supported)
    wanted = os.environ.get(linear.PATH_VARIABLE)
    return {name: path for name, path in found.items() if not wanted or name == wanted}


def add_product(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    keep: float = 1.0,
    share: float = 1.0,
    half: str = "",
    path: str | None = None,
) -> Tensor:
    """Return ``keep * total + share * left @ right`` in the total's place, factors rounded as ``sums`` says.

    The same on any number of threads.

    Args:
        total: float32 [m, n], its rows dense.
        left: float32 [m, steps], dense along one dimension.
        right: float32 [steps, n], dense along one dimension.
        keep: with 0, what the total holds is not read.
        share: of the product.
        half: "upper": what is below the diagonal may stay as it is; "lower": what is above it does.
        path: one of ``sums``; the first of them without.

    Raises:
        ValueError: a shape, stride or dtype is another, or there are no ``sums``.
    """
    check([total, left, right], torch.float32)
    ways = sums()
    if not ways:
        raise ValueError("products of rounded factors need AMX or AVX512-VNNI")
    own = ways[path or next(iter(ways))]
    (m, n), (steps, columns) = total.shape, right.shape
    dense = all(1 in each.stride() for each in (left, right)) and total.stride(1) == 1
    if left.shape != (m, steps) or columns != n or not dense:
        shapes = ", ".join(f"{list(each.shape)} with strides {list(each.stride())}" for each in (total, left, right))
        raise ValueError(f"no product and its total: {shapes}")
    if not steps:
        return total.mul_(keep) if keep else total.zero_()
    job = Sum(
        Factor(left.data_ptr(), m, *left.stride()), Factor(right.data_ptr(), n, right.stride(1), right.stride(0)),
        steps, keep, share, total.data_ptr(), total.stride(0), HALVES.index(half), 0,
    )  # fmt: skip
    functions = load().functions
    scratch = _scratch(functions.qtr_sums_scratch(own, job) + 64)
    job.scratch = scratch.data_ptr() + (-scratch.data_ptr()) % 64
    functions.qtr_sum(own, job)
    return total


def _scratch(size: int) -> Tensor:
    """Return at least ``size`` bytes, the same in a thread's every call: new ones come from the system page by page."""
    kept: Tensor | None = getattr(_own, "scratch", None)
    if kept is None or len(kept) < size:
        _own.scratch = None  # before there is another
        _own.scratch = kept = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept


@lru_cache(maxsize=1)
def sweeps() -> bool:
    """Say whether this CPU runs whole sweeps: it has AVX512-VNNI, and no code path without it was asked for."""
    if failure() is not None or not load().functions.qtr_sweeps_supported():
        return False
    return os.environ.get(linear.PATH_VARIABLE) in (None, "", "avx512")


class Packed:
    """A matrix [k, k] packed for sweeps over all columns of weights: 2 bytes an entry, of either half those wanted.

    Attributes:
        k: columns.
        block: how many are decided before others are told.
        ahead: True: of an upper factor, whose columns leave something to those behind them; False: a symmetric matrix.
    """

    def __init__(self, matrix: Tensor, *, ahead: bool, block: int = MOST_SWEPT) -> None:
        """Pack float32 ``matrix`` [k, k], dense along one dimension; ``block`` is 128, 64 or 32.

        Raises:
            ValueError: a shape, stride, dtype or block is another.
        """
        check([matrix], torch.float32)
        k = len(matrix)
        if matrix.shape != (k, k) or not k or 1 not in matrix.stride() or block not in (32, 64, MOST_SWEPT):
            raise ValueError(
                f"no sweeps by {list(matrix.shape)} with strides {list(matrix.stride())}, blocks of {block}"
            )
        self.k, self.block, self.ahead = k, block, ahead
        self._bend = torch.empty(k, dtype=torch.float32, device="cpu")
        self._corners = torch.empty(-(-k // block) * block * block, dtype=torch.float32, device="cpu")
        lines = matrix.T if ahead else matrix  # what a column gets of others is a line
        self.job = Swept(
            Factor(matrix.data_ptr(), k, *lines.stride()), block, int(ahead),
            self._bend.data_ptr(), self._corners.data_ptr(), 0,
        )  # fmt: skip
        functions = load().functions
        self._words = torch.empty(functions.qtr_sweep_bytes(self.job) + 64, dtype=torch.uint8, device="cpu")
        self.job.words = self._words.data_ptr() + (-self._words.data_ptr()) % 64
        functions.qtr_sweep_pack(self.job)
        self.job.factor.numbers = 0  # it may go


def sweep_rounding(
    matrix: Packed, weight: Tensor, steps: Tensor, groups: Tensor, code_range: tuple[int, int], path: str | None = None
) -> Tensor:
    """Return codes for a weight whose columns are rounded in turn, each making up for those before.

    Args:
        matrix: the upper factor, ``ahead``; its diagonal divides what a column lost.
        weight: float32 [n, k].
        steps: float32 [n, groups].
        groups: int64 [k], the group of each column.
        code_range: least and largest code.
        path: forces a code path of blocks (tests).

    Returns:
        int8 [n, k].

    Raises:
        ValueError: a shape or dtype is another.
    """
    check([weight, steps], torch.float32)
    check([groups], torch.int64)
    n, k = weight.shape
    right = matrix.ahead and matrix.k == k and len(steps) == n and groups.shape == (k,)
    if not right or int(groups.min()) < 0 or int(groups.max()) >= steps.shape[1]:
        raise ValueError(f"no sweep over {list(weight.shape)} with steps {list(steps.shape)} by {matrix.k} columns")
    weight, steps, groups = weight.contiguous(), steps.contiguous(), groups.contiguous()
    codes = torch.empty(n, k, dtype=torch.int8, device="cpu")
    job = Sweep(
        ctypes.pointer(matrix.job), weight.data_ptr(), steps.data_ptr(), groups.data_ptr(), n, steps.shape[1],
        *code_range, 1, codes.data_ptr(),
    )  # fmt: skip
    _sweep(job, path)
    return codes


def sweep_descent(
    matrix: Packed,
    gap: Tensor,
    steps: Tensor,
    codes: Tensor,
    code_range: tuple[int, int],
    *,
    sweeps: int = 1,
    slopes: bool = False,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes that lower ``gap matrix gap^T``: every column visited in turn, ``sweeps`` times.

    Args:
        matrix: symmetric, not ``ahead``.
        gap: float32 [n, k], what codes stand for less what they should.
        steps: float32 [n, groups], of neighbouring columns; a group is a multiple of the matrix's blocks.
        codes: int8 [n, k].
        code_range: least and largest code.
        sweeps: over all columns, at least one.
        slopes: whether ``gap matrix`` is wanted, before and after.
        path: forces a code path of blocks (tests).

    Returns:
        Codes int8 [n, k], and the two slopes float32 [n, k], or [0].

    Raises:
        ValueError: a shape or dtype is another.
    """
    check([gap, steps], torch.float32)
    check([codes], torch.int8)
    (n, k), count = gap.shape, steps.shape[1]
    right = not matrix.ahead and matrix.k == k and codes.shape == gap.shape and len(steps) == n and count and sweeps > 0
    if not right or k % count or (count > 1 and k // count % matrix.block):
        raise ValueError(f"no descent of {list(gap.shape)} with steps {list(steps.shape)} by {matrix.k} columns")
    gap, steps, codes = gap.contiguous(), steps.contiguous(), codes.clone(memory_format=torch.contiguous_format)
    before, after = (torch.empty(gap.shape if slopes else 0, dtype=torch.float32, device="cpu") for _ in range(2))
    job = Sweep(
        ctypes.pointer(matrix.job), gap.data_ptr(), steps.data_ptr(), 0, n, count, *code_range, sweeps,
        codes.data_ptr(), *(each.data_ptr() if slopes else 0 for each in (before, after)),
    )  # fmt: skip
    _sweep(job, path)
    return codes, before, after


def swept_product(matrix: Packed, numbers: Tensor) -> Tensor:
    """Return ``numbers matrix`` float32 [n, k], rounded as sweeps do, for a symmetric matrix that is not ``ahead``.

    Raises:
        ValueError: a shape or dtype is another.
    """
    check([numbers], torch.float32)
    n, k = numbers.shape
    if matrix.ahead or matrix.k != k:
        raise ValueError(f"no product of {list(numbers.shape)} by {matrix.k} columns")
    numbers = numbers.contiguous()
    made = torch.empty(n, k, dtype=torch.float32, device="cpu")
    _sweep(Sweep(ctypes.pointer(matrix.job), numbers.data_ptr(), 0, 0, n, 0, 0, 0, 0, 0, made.data_ptr(), 0), None)
    return made


def _sweep(job: Sweep, path: str | None) -> None:
    own = load()
    scratch = _scratch(own.functions.qtr_sweep_scratch(job) + 64)
    job.scratch = scratch.data_ptr() + (-scratch.data_ptr()) % 64
    own.functions.qtr_sweep(own.paths[path] if path else own.path_id, job)


def round_columns(
    weight: Tensor, steps: Tensor, groups: Tensor, spread: Tensor, code_range: tuple[int, int], path: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes and what rounding left of a block of columns, each of which makes up for those before.

    Args:
        weight: float32 [columns, n], its rows dense.
        steps: float32 [groups, n].
        groups: int64 [columns], the group of each column.
        spread: float32 [columns, columns]: entry (j, i) times what column i left is taken from column j > i.
        code_range: least and largest code.
        path: forces a code path (tests).

    Returns:
        int8 and float32 [columns, n].

    Raises:
        ValueError: a shape or dtype is another.
    """
    columns, n = weight.shape
    check([weight, steps, spread], torch.float32, columns)
    check([groups], torch.int64)
    if spread.shape != (columns, columns) or groups.shape != (columns,) or steps.shape[1:] != (n,):
        raise ValueError(
            f"a block {list(weight.shape)} with steps {list(steps.shape)}, groups {list(groups.shape)} and spread "
            f"{list(spread.shape)}"
        )
    if int(groups.min()) < 0 or int(groups.max()) >= len(steps):
        raise ValueError(f"groups of columns are beyond the {len(steps)} that have steps")
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    steps, groups, spread = steps.contiguous(), groups.contiguous(), spread.contiguous()
    codes = torch.empty(columns, n, dtype=torch.int8, device="cpu")
    lost = torch.empty(columns, n, dtype=torch.float32, device="cpu")
    job = Rounding(
        Spread(spread.data_ptr(), columns, *code_range), weight.data_ptr(), steps.data_ptr(), groups.data_ptr(),
        n, weight.stride(0), codes.data_ptr(), lost.data_ptr(),
    )  # fmt: skip
    own = load()
    own.functions.qtr_round(own.paths[path] if path else own.path_id, job)
    return codes, lost


def descend_columns(
    slope: Tensor,
    step: Tensor,
    bend: Tensor,
    spread: Tensor,
    codes: Tensor,
    code_range: tuple[int, int],
    path: str | None = None,
) -> Tensor:
    """Give every column of a block the code that lowers its error most, one after another; return what that moved.

    Args:
        slope: float32 [columns, n], dense: the gradient before the first column moves.
        step: float32 [n], the scale of all these columns.
        bend: float32 [columns], the second derivative of each column.
        spread: float32 [columns, columns]: entry (j, i) is by what the wish of column j > i falls a code of column i.
        codes: float32 [columns, n], dense, whole numbers; they become the new ones.
        code_range: least and largest code.
        path: forces a code path (tests).

    Returns:
        float32 [columns, n]: how far the weights moved.

    Raises:
        ValueError: a shape, stride or dtype is another.
    """
    columns, n = codes.shape
    check([slope, step, bend, spread, codes], torch.float32, columns)
    if (
        spread.shape != (columns, columns)
        or slope.shape != codes.shape
        or step.shape != (n,)
        or bend.shape != (columns,)
    ):
        raise ValueError(
            f"a block {list(codes.shape)} with slope {list(slope.shape)}, step {list(step.shape)}, bend "
            f"{list(bend.shape)} and spread {list(spread.shape)}"
        )
    if not (slope.is_contiguous() and codes.is_contiguous()):
        raise ValueError("slope and codes must be dense")
    step, bend, spread = step.contiguous(), bend.contiguous(), spread.contiguous()
    moved = torch.empty(columns, n, dtype=torch.float32, device="cpu")
    job = Descent(
        Spread(spread.data_ptr(), columns, *code_range), slope.data_ptr(), step.data_ptr(), bend.data_ptr(),
        n, codes.data_ptr(), moved.data_ptr(),
    )  # fmt: skip
    own = load()
    own.functions.qtr_descend(own.paths[path] if path else own.path_id, job)
    return moved


def round_rows(
    weight: Tensor,
    size: int,
    code_range: tuple[int, int],
    smallest: float,
    times: Tensor | None = None,
    out: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Round every number of a weight to the nearest code of a scale that is its group's absmax over the largest code.

    Args:
        weight: float32 [n, k], its rows dense.
        size: inputs of a group.
        code_range: least and largest code.
        smallest: least scale.
        times: float32 [k], what inputs are multiplied with first.
        out: takes the result, float32 or bfloat16 [n, k], dense; without it there is a new one in float32.
        path: forces a code path (tests).

    Returns:
        What the codes stand for.

    Raises:
        ValueError: a shape or dtype is another.
    """
    n, k = weight.shape
    check([weight, *([] if times is None else [times])], torch.float32)
    made = torch.empty(n, k, dtype=torch.float32, device="cpu") if out is None else out
    check([made], torch.bfloat16 if made.dtype == torch.bfloat16 else torch.float32)
    fits = made.shape == (n, k) and made.is_contiguous()
    if not fits or (times is not None and times.shape != (k,)) or size < 1:
        raise ValueError(f"a weight {list(weight.shape)} in groups of {size}, into {list(made.shape)}")
    times = None if times is None else times.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    job = Nearest(
        Grid(weight.data_ptr(), n, k, weight.stride(0), size, *code_range),
        0 if times is None else times.data_ptr(), smallest, int(made.dtype == torch.bfloat16), made.data_ptr(),
    )  # fmt: skip
    own = load()
    own.functions.qtr_nearest(own.paths[path] if path else own.path_id, job)
    return made


def trial_errors(
    weight: Tensor, matter: Tensor, scales: Tensor, code_range: tuple[int, int], path: str | None = None
) -> Tensor:
    """Return how far rounding to the nearest code leaves every group for each of some scales.

    Args:
        weight: float32 [n, k], its rows dense.
        matter: float32 [k], by how much an input's squared error counts.
        scales: float32 [n, groups, trials], above 0.
        code_range: least and largest code.
        path: forces a code path (tests).

    Returns:
        float32 [n, groups, trials].

    Raises:
        ValueError: a shape or dtype is another.
    """
    n, k = weight.shape
    check([weight, matter, scales], torch.float32)
    groups, trials = scales.shape[1:]
    if len(scales) != n or matter.shape != (k,) or not 1 <= trials <= MOST_TRIALS or groups < 1 or k % groups:
        raise ValueError(f"a weight {list(weight.shape)} with scales {list(scales.shape)}")
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    matter, scales = matter.contiguous(), scales.contiguous()
    errors = torch.empty_like(scales)
    job = Trials(
        Grid(weight.data_ptr(), n, k, weight.stride(0), k // groups, *code_range),
        matter.data_ptr(), scales.data_ptr(), trials, errors.data_ptr(),
    )  # fmt: skip
    own = load()
    own.functions.qtr_trials(own.paths[path] if path else own.path_id, job)
    return errors


def restored(codes: Tensor, scales: Tensor, less: Tensor | None = None, path: str | None = None) -> Tensor:
    """Return what codes stand for, less a weight.

    Args:
        codes: int8 [n, k].
        scales: float32 [n, groups], of neighbouring inputs.
        less: float32 [n, k], or None.
        path: forces a code path (tests).

    Returns:
        float32 [n, k].

    Raises:
        ValueError: a shape or dtype is another.
    """
    n, k = codes.shape
    check([codes], torch.int8)
    check([scales, *([] if less is None else [less])], torch.float32)
    groups = scales.shape[1]
    if len(scales) != n or not groups or k % groups or (less is not None and less.shape != codes.shape):
        raise ValueError(f"codes {list(codes.shape)} with scales {list(scales.shape)}")
    codes, scales = codes.contiguous(), scales.contiguous()
    less = less if less is None or less.stride(1) == 1 else less.contiguous()
    made = torch.empty(n, k, dtype=torch.float32, device="cpu")
    job = Restored(
        codes.data_ptr(), scales.data_ptr(), 0 if less is None else less.data_ptr(),
        n, k, 0 if less is None else less.stride(0), groups, made.data_ptr(),
    )  # fmt: skip
    own = load()
    own.functions.qtr_restore(own.paths[path] if path else own.path_id, job)
    return made


def normed(x: Tensor, weight: Tensor, epsilon: float, path: str | None = None) -> Tensor:
    """Return x [..., k] over the root of its mean square and ``epsilon``, times weight [k]: all float32.

    Raises:
        ValueError: a shape or dtype is another.
    """
    check([x, weight], torch.float32)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"no norm of {list(x.shape)} by {list(weight.shape)}")
    x, weight = x.contiguous(), weight.contiguous()
    made = torch.empty_like(x)
    k = max(1, x.shape[-1])
    job = Norm(x.data_ptr(), weight.data_ptr(), x.numel() // k, k, epsilon, made.data_ptr())
    own = load()
    own.functions.qtr_norm(own.paths[path] if path else own.path_id, job)
    return made


def gated(gate: Tensor, up: Tensor, path: str | None = None) -> Tensor:
    """Return silu(gate) times up, of one shape and float32.

    Raises:
        ValueError: a shape or dtype is another.
    """
    check([gate, up], torch.float32)
    if gate.shape != up.shape:
        raise ValueError(f"no gate {list(gate.shape)} of {list(up.shape)}")
    gate, up = gate.contiguous(), up.contiguous()
    made = torch.empty_like(gate)
    own = load()
    job = Gate(gate.data_ptr(), up.data_ptr(), gate.numel(), made.data_ptr())
    own.functions.qtr_gate(own.paths[path] if path else own.path_id, job)
    return made


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Say whether ``attend`` takes these."""
    tensors = (query, key, value)
    dense = all(each.dtype == torch.float32 and each.stride(3) == 1 for each in tensors)
    width, length = query.shape[3], query.shape[2]
    sizes = width % HEAD_STEP == 0 and 0 < width <= MOST_WIDTH and 0 < length <= MOST_LENGTH
    heads = key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0 and key.shape == value.shape
    same = (query.shape[0], *query.shape[2:]) == (key.shape[0], *key.shape[2:])
    return dense and sizes and heads and same and all(runs(each.device, 1) for each in tensors)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, path: str | None = None) -> Tensor:
    """Return the attention of tokens to themselves and those before them.

    Args:
        query: float32 [sequences, heads, tokens, width], dense in its last dimension.
        key: float32 [sequences, sources, tokens, width], as dense; the heads are a multiple of the sources.
        value: of its shape, as dense.
        scale: of the products of queries and keys.
        path: forces a code path (tests).

    Returns:
        float32 [sequences, tokens, heads, width].

    Raises:
        ValueError: they are none that ``attends`` takes.
    """
    if not attends(query, key, value):
        raise ValueError(f"no attention of {[list(each.shape) for each in (query, key, value)]}")
    sequences, heads, length, width = query.shape
    made = torch.empty(sequences, length, heads, width, dtype=torch.float32, device="cpu")
    lanes = (Lanes(each.data_ptr(), *each.stride()[:3]) for each in (query, key, value))
    job = Attention(*lanes, sequences, heads, key.shape[1], length, width, scale, made.data_ptr(), 0)
    own = load()
    number = own.paths[path] if path else own.path_id
    scratch = _scratch(4 * own.functions.qtr_attention_scratch(number, job) + 64)
    job.scratch = scratch.data_ptr() + (-scratch.data_ptr()) % 64
    own.functions.qtr_attend(number, job)
    return made


def check(tensors: list[Tensor], dtype: torch.dtype, columns: int = 1) -> None:
    """Refuse what the library cannot read.

    Raises:
        ValueError: a tensor has another dtype, or is not on the CPU, or has more columns than a block may have.
    """
    if any(each.dtype != dtype or each.device.type != "cpu" for each in tensors):
        raise ValueError(f"rounding loops take {dtype} on the CPU")
    if columns > MOST_COLUMNS:
        raise ValueError(f"a block has {columns} columns, more than {MOST_COLUMNS}")
