"""Float32 matrix products on a CPU by the faster of two libraries.

PyTorch's own choice, MKL, is at home on Intel's CPUs (oneDNN takes up to 2.4 times its time there) and keeps AMD's at
AVX2. PyTorch asks oneDNN only where products may be less precise than float32. oneDNN makes use of that on CPUs with
units for it (AMX), whose products of factors rounded to bfloat16 take a third of the time; on AMD's its float32
products are what they were, at twice the speed (Zen 5, AVX-512). Which it is shows in a product. Rounded factors are
good enough for sums over thousands of tokens, for what only makes a choice, and for corrections of a weight that is
rounded to int4 next, the solution of a linear system among them; the system's factor, which may not exist then, stays
exact unless whole numbers are asked for. Sums over tokens are made by our own code then (``qtoolkit.sums``), for narrow
models, too; products below 1e-38 are 0. Without AMX that code multiplies whole numbers by AVX512-VNNI, which rounds
less than bfloat16 does and is faster than float32: it then makes every product that may be rough. Where 512 factors in
a row are all below 1e-30 they count as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

from qtoolkit import sums, sweeps
from qtoolkit.calibration import processor

EXACT, RELAXED = "highest", "medium"  # PyTorch's names
SHAPE = (256, 512, 256)  # of the product that is looked at: large enough for oneDNN
SQUARE = 512  # rows and columns of a product in ``take_square``: those of one size share what oneDNN makes
WIDE = 1024  # channels of a hidden state from which it pays: oneDNN's code takes 60 MB, and narrow models gain a tenth
ERROR = 4e-6  # relative, of float32 sums of so many products; bfloat16's would be 2e-3

_rounds = ContextVar("_rounds", default=False)  # whether oneDNN's products are quicker for being less than exact
_native = ContextVar(
    "_native", default=""
)  # the units of ``qtoolkit.sums``, where sums may be those; they round factors
_rough = ContextVar("_rough", default=False)  # whether products may be its, too


@contextmanager
def fast(device: torch.device, width: int) -> Iterator[None]:
    """Inside, float32 products on a CPU not Intel's are oneDNN's, if these are exact and nobody has asked for others.

    Where they are not, only those are that may be ``rough``, and what is ``accumulated`` is summed by our own code.
    ``width`` is that of the model's hidden states; below ``WIDE`` no product is oneDNN's.
    """
    if device.type != "cpu" or _precision() != EXACT:
        yield
        return
    own = _native.set(sums.native_on(device))
    try:
        with _onednn() if width >= WIDE else nullcontext():
            yield
    finally:
        _native.reset(own)


@contextmanager
def _onednn() -> Iterator[None]:
    torch.set_float32_matmul_precision(RELAXED)
    rounds = _rounds.set(not exact())
    try:
        if _rounds.get() or processor.is_intel():
            torch.set_float32_matmul_precision(EXACT)
        yield
    finally:
        torch.set_float32_matmul_precision(EXACT)
        _rounds.reset(rounds)


@contextmanager
def rough() -> Iterator[None]:
    """Inside, factors may be rounded, where ``fast`` has found that to be quicker; sums stay in float32.

    To bfloat16 it is 0.2 % of a factor at most and has no direction, so over many tokens it averages out; a Gram
    matrix stays one.
    """
    if not _rounds.get() or _native.get() == sums.VNNI:
        with in_whole_numbers(True):
            yield
        return
    torch.set_float32_matmul_precision(RELAXED)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(EXACT)


@contextmanager
def in_whole_numbers(wanted: bool) -> Iterator[bool]:
    """Inside, products are in whole numbers of 12 bits if that is ``wanted`` and they may be; tell whether they are."""
    may = wanted and _native.get() == sums.VNNI
    before = _rough.set(may)
    try:
        yield may
    finally:
        _rough.reset(before)


def accumulated(
    total: Tensor, left: Tensor, right: Tensor, *, keep: float = 1.0, share: float = 1.0, half: str = ""
) -> Tensor:
    """Return ``keep * total + share * left @ right`` in the total's place [m, n], all float32; it may be rough.

    With ``keep`` 0 what the total holds is not read; ``half`` "upper": what is below its diagonal may stay.
    """
    if _native.get():
        return sums.accumulated(total, left, right, keep, share, half=half)
    with rough():
        return total.addmm_(left, right, beta=keep, alpha=share)


def skips_lower() -> bool:
    """Tell whether ``accumulated`` saves the work below a diagonal where only the upper half is wanted."""
    return bool(_native.get())


def halved(matrix: Tensor, columns: bool = False) -> Tensor:
    """Return ``matrix`` in bfloat16 where its products may be ``rough``, elsewhere itself: for ``times`` and ``add``.

    oneDNN is faster with such factors than with those that it has to round in every product. ``columns`` are dense
    afterwards, instead of rows, for a matrix whose transpose is multiplied.
    """
    if not (_rounds.get() and _precision() == RELAXED):
        return matrix
    if not columns:
        return matrix.bfloat16()
    found = torch.empty(matrix.T.shape, dtype=torch.bfloat16, device=matrix.device)
    for part, rows in zip(found.split(SHAPE[1], dim=1), matrix.split(SHAPE[1]), strict=True):
        part.copy_(rows.bfloat16().T.contiguous())
    return found.T


def times(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` in float32; where one of them is ``halved``, the other becomes so and so does the sum."""
    if left.dtype == right.dtype == torch.float32:
        if _rough.get() and sums.worthwhile(left.shape[0], left.shape[1], right.shape[1]):
            return sums.accumulated(left.new_empty(len(left), right.shape[1]), left, right, 0.0, 1.0)
        return left @ right
    return (left.bfloat16() @ right.bfloat16()).float()


def add(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """Add ``alpha * left @ right``, multiplied as in ``times``, to float32 ``total`` in its place."""
    if left.dtype == right.dtype == torch.float32:
        if _rough.get() and total.stride(1) == 1:
            return sums.accumulated(total, left, right, 1.0, alpha)
        return total.addmm_(left, right, alpha=alpha)
    return total.add_(left.bfloat16() @ right.bfloat16(), alpha=alpha)


def add_beside(
    total: Tensor, left: Tensor, right: Tensor, spans: Sequence[tuple[int, int]], alpha: float = 1.0
) -> None:
    """``add`` in neighbouring ``spans`` of the columns of ``total`` and ``right``: oneDNN makes code for each size."""
    if _rough.get() and spans:
        spans = [(spans[0][0], spans[-1][1])]
    for first, last in spans:
        add(total[:, first:last], left, right[:, first:last], alpha)


def take_square(total: Tensor, left: Tensor) -> None:
    """Take ``left left^T`` from the lower triangle of float32 ``total`` [m, m], in its place; above it all stays."""
    if _rough.get() and sums.worthwhile(len(left), left.shape[1], len(left)):
        sums.accumulated(total, left, left.T, 1.0, -1.0, half="lower")
        return
    for first in range(0, len(left), SQUARE):
        last = first + SQUARE
        right = left[first:last].T
        total[first:last, first:last].sub_((left[first:last] @ right).tril_())
        for start in range(last, len(left), SQUARE):
            total[start : start + SQUARE, first:last].addmm_(left[start : start + SQUARE], right, alpha=-1.0)


def packed(matrix: Tensor, size: int = 0) -> sweeps.Packed | None:
    """Return symmetric ``matrix`` for whole sweeps over weights in groups of ``size``, where they may be ``rough``."""
    return sweeps.packed(matrix, size) if _rough.get() else None


def packed_factor(factor: Tensor) -> sweeps.Packed | None:
    """Return the upper ``factor`` for whole sweeps, where they may be ``rough``."""
    return sweeps.packed_factor(factor) if _rough.get() else None


@torch.inference_mode()
def exact() -> bool:
    """Tell whether products, as they are set now, have float32's precision."""
    draw = torch.Generator("cpu").manual_seed(0)
    rows, inner, columns = SHAPE
    left, right = (torch.randn(shape, generator=draw, device="cpu") for shape in ((rows, inner), (inner, columns)))
    wanted = left.double() @ right.double()
    return bool((left @ right - wanted).norm() < ERROR * wanted.norm())


def _precision() -> str:
    """Return what products are allowed; nothing where it was said by the newer of PyTorch's two ways, or differs."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""
