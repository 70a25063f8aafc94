"""Hessian compensation (GPTQ): round one input's weights at a time and let the inputs still to come make up for it.

Sources: GPTQ (Frantar et al. 2022, algorithm 1), with static groups, so that the packed layout needs no permutation
whatever the order of the inputs; the weight it aims at is that of ``target``. The grid's scales are fixed before the
first column is rounded, in the dtype they are stored in; afterwards codes, and on request scales, are refined
(``refine``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from qtoolkit import columns, memory, sweeps
from qtoolkit.calibration import chained, folded, grid, halves, losses, outputs, products, rows, starts, triangles, twin
from qtoolkit.calibration.hessian import Hessian, shared_inputs
from qtoolkit.calibration.moments import Seen
from qtoolkit.calibration.options import Options
from qtoolkit.calibration.refine import refitted_scales
from qtoolkit.calibration.sweep import COLUMNS
from qtoolkit.calibration.target import Choice, aims, combinations
from qtoolkit.errors import NumericError, RequestError
from qtoolkit.scheme import CHANNEL, INT8, Scheme
from qtoolkit.stages import Block, Context, QuantizedWeight, Stream

ROWS = 1024  # of a layer that are rounded together: bounds the memory of what goes with them
FOLDED = 128  # groups below lose more: scales vary within a row, and a row's multiples end at 16
REPORTED = 128  # combinations of many outputs that the error in the report is taken on
RETRIES = 5  # times the damping is raised tenfold when the Hessian is not positive definite


class CompensateOptions(Options):
    """Options of the step ``gptq``."""

    compensate: bool = Field(True, description="false: round to nearest")
    scale_search: bool = Field(True, description="search each scale by Hessian-weighted error; false: absmax / 7")
    signed: bool = Field(True, description="searched scales may be negative: -8 is for a group's larger end")
    damping: float = Field(
        0.01, gt=0, allow_inf_nan=False, description="added to the Hessian's diagonal, as a part of its mean"
    )
    shrinkage: float = Field(0.25, ge=0, lt=1, description="of what inputs have in common, against other text: 0 to 1")
    activation_order: bool = Field(False, description="round the inputs with the largest Hessian diagonal first")
    sequential: bool = Field(True, description="a layer sees its block's earlier layers quantized; false: in float")
    aim: bool = Field(True, description="aim at the float network's outputs, as far as held-out tokens support it")
    refine: int = Field(2, ge=0, description="rounds of new codes after compensation, column by column")
    refit: bool = Field(False, description="refinement fits scales of small layers, too; of the chained grid always")
    starts: int = Field(2, ge=1, description="orders of the inputs that a small layer is rounded in; the best is kept")
    couple: bool = Field(True, description="round a layer's outputs together, as the loss of the whole model asks")
    fold: bool = Field(True, description="scales of groups of 128 and more are multiples of one a channel: faster")
    chained: bool = Field(False, description="int8 weights of the chained grid, which a GPU kernel holds in four bits")


class Compensate:
    """The transform: replaces every target's weight by what its int4 codes stand for."""

    Options = CompensateOptions
    rounds = True  # what a block's weights become is settled behind it

    def __init__(self, options: CompensateOptions) -> None:
        self.options = options
        self.reads_floats = options.aim and options.compensate
        self.reads_gradients = options.couple and options.compensate and not options.chained

    @torch.inference_mode()
    def apply(self, block: Block, stream: Stream, context: Context) -> dict[str, dict[str, float]]:
        """Quantize the targets of ``block``; return errors, damping and the way to the aim of each.

        ``error`` is |(A - Q) x|^2 / |A x|^2 over the calibration inputs x as served, for the weight A aimed at and the
        stored Q; the other errors are those of ``losses.parts``.
        """
        originals = {name: layer.weight.data for name, layer in block.linears()}
        metrics = outputs.metrics(block) if self.reads_gradients else {}
        block.metrics, block.probe = {}, None  # whatever is used up goes
        with ExitStack() as stack:
            return self._solve_all(block, stream, context, originals, metrics, stack)

    def _solve_all(
        self,
        block: Block,
        stream: Stream,
        context: Context,
        originals: dict[str, Tensor],
        metrics: dict[str, Tensor],
        stack: ExitStack,
    ) -> dict[str, dict[str, float]]:
        report: dict[str, dict[str, float]] = {}
        bits, tokens = context.scheme.activation_bits, sum(size * length for size, length in stream.shapes())
        waiting = shared_inputs(block)
        for first, names in list(waiting.items()):
            with twin.weights(block, {} if self.options.sequential else originals):
                unfinished = [name for names in waiting.values() for name in names] if self.options.sequential else None
                batches = twin.inputs(block, first, stream, originals, bits, both=self.reads_floats, waiting=unfinished)
                weights = [originals[name] for name in names]
                seen = Seen(weights, batches, tokens, self.options.shrinkage, lacking=self.reads_floats)
                del weights
            memory.trim()  # what batches have left in pieces
            del waiting[first]
            if not waiting:  # the float network is not run again
                for name in {*originals} - {*names}:
                    del originals[name]
            aimed = self._aims(seen)
            hessian, sample = seen.fit.hessian, seen.sample
            del seen
            if sample is not None:
                report |= {name: losses.inherited(sample, originals[name], aimed[i][0]) for i, name in enumerate(names)}
            if not waiting:
                originals.clear()
            solved = Solved(hessian, self.options)
            del hessian  # it goes as soon as nobody needs it
            for name in names:
                aim, choice = aimed.pop(0)
                solved.last = not aimed
                scheme = block.schemes.get(name, context.scheme)
                twin.let_go(block.linear(name))
                if self.options.chained and scheme.weight_bits == 4:
                    quantized = solved.quantize_chained(aim, scheme, context.scale_dtype)
                    block.schemes[name] = INT8
                else:
                    several = rows.parts(len(aim), aim.shape[1], outputs.heads(block, name), aim.device)
                    quantized = solved.quantize(aim, scheme, context.scale_dtype, metrics.pop(name, None), several)
                gap = quantized.gap(aim)
                if not all(end.isfinite() for end in gap.aminmax()):
                    raise NumericError(f"The scales of {block.name}.{name} overflow {context.scale_dtype}.")
                report[name] = report.get(name, {}) | {
                    "error": solved.relative_error(aim, gap),
                    "damping": solved.damping,
                    "dead_inputs": float(solved.dead.sum()),
                    "aim_damping": choice.damping,
                    "aim_strength": choice.strength,
                }
                if sample is not None:
                    report[name] |= losses.parts(sample, aim, gap)
                block.quantized[name] = quantized
                del aim, gap
                stack.enter_context(twin.packed(block.linear(name), quantized))
                if name in originals:  # from now on the float network alone multiplies with it
                    originals[name] = originals[name].to(halves.dtype(block.linear(name)))
            del solved
            needed = {name for names in waiting.values() for name in names}
            for name in [each for each in originals if each not in needed and twin.left_behind(stream, each)]:
                del originals[name]
        return report

    def _aims(self, seen: Seen) -> list[tuple[Tensor, Choice]]:
        if self.reads_floats:
            return aims(seen)
        return [(weight, Choice()) for weight in seen.all().weights]


class Solved:
    """A Hessian made invertible and factored once, for all layers that share the input."""

    def __init__(self, hessian: Hessian, options: CompensateOptions) -> None:
        self.options = options
        self.hessian: Hessian | None = hessian
        self.diagonal = hessian.matrix.diagonal().clone()
        self.dead = hessian.dead  # nothing is known of these inputs, so nothing is compensated there
        self.order = torch.argsort(self.diagonal, descending=True, stable=True) if options.activation_order else None
        if options.chained and self.order is not None and len(self.diagonal) % chained.WORD == 0:
            self.order = chained.in_words(self.order)
        self.damping = options.damping
        self.factor = self._factor(self.order) if options.compensate else None
        self._halved: Tensor | None = None  # the damped matrix, where products are rough
        self._packed: dict[tuple[int, float], sweeps.Packed | None] = {}  # for sweeps, by group size and damping: one
        self.last = False  # whether the layer that comes is the last: what it needs no more then goes at once
        self._more: list[tuple[Tensor, Tensor | sweeps.Packed]] = []  # further orders, made when a layer wants them

    def _factor(self, order: Tensor | None) -> Tensor | sweeps.Packed:
        """Return the upper Cholesky factor of the inverse of the damped Hessian in ``order``, as sweeps take it.

        Raises:
            NumericError: it is singular even with a large damping.
        """
        for _ in range(RETRIES):
            assert self.hessian is not None
            with self.hessian.under(self.damping) as damped:
                turned = damped.flip(0, 1) if order is None else triangles.ordered(damped, order.flip(0))
            found = triangles.inverse_factor(turned, rough=self.hessian.may_be_rough)
            if found is not None:
                with products.rough():
                    packed = None if self.options.chained else products.packed_factor(found)
                    return products.halved(found, columns=True) if packed is None else packed
            self.damping *= 10
        raise NumericError(f"A Hessian of {len(self.diagonal)} inputs is singular even with damping {self.damping:g}.")

    def quantize(
        self,
        weight: Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        metric: Tensor | None = None,
        several: Sequence[Tensor] = (),
    ) -> QuantizedWeight:
        """Return codes and scales for weight float32 [n, k]; scales are in ``dtype``.

        ``metric`` [n, n] says how errors of the outputs add up, and ``several`` in which parts they are rounded then;
        without one each output counts alone.
        """
        weight = weight.masked_fill(self.dead, 0.0) if self.dead.any() else weight
        if self.options.scale_search:
            signed = self.options.signed and scheme.weight_bits == 4
            scales = grid.searched_scales(weight, self.diagonal, scheme, dtype, signed=signed)
        else:
            scales = grid.minmax_scales(weight, scheme, dtype)
        fold = self.options.fold and scheme.weight_bits == 4 and scheme.group_size >= FOLDED
        if fold:
            costs = grid.stiffness(weight, self.diagonal, scales, scheme)
            scales = folded.stored(scales, dtype, fold, costs)
        if not self.options.compensate:
            return QuantizedWeight(grid.to_codes(weight, scales, scheme), scales)
        rounds = self.options.refine
        orders, stretches = starts.count(weight.shape[0], weight.shape[1], self.options.starts)
        over = [partial(round_in_order, *each, scheme) for each in self._orders(orders)]
        with self._damped() as matrix:
            packed = self._pack(matrix, scheme) if rounds else None
            refit = self.options.refit and starts.affordable(*weight.shape) > 1
            begin = partial(
                starts.best, matrix=matrix, scheme=scheme, sweeps=over, stretches=stretches, fold=fold, refit=refit,
                packed=packed,
            )  # fmt: skip
            if metric is None:
                rows_each = even(len(weight), ROWS)
                both = zip(weight.split(rows_each), scales.split(rows_each), strict=True)
                return QuantizedWeight.joined([begin(*part, rounds=rounds) for part in both])
            once = partial(begin, rounds=min(rounds, 1))  # every part is refined again below
            found = rows.rounded(weight, metric, several, scales, once)
            if not rounds:
                return found
            del over, begin, once
            if self.last:
                self.factor, self._more = None, []
            for _ in range(max(1, rounds - 1)):
                found = rows.refined(weight, matrix, metric, several, found, scheme, packed)
            return found

    @contextmanager
    def _damped(self) -> Iterator[Tensor]:
        """Inside, products may be rough; the damped matrix is given as they take it."""
        with products.rough(), ExitStack() as stack:
            if self._halved is None:
                assert self.hessian is not None
                matrix = stack.enter_context(self.hessian.under(self.damping))
                made = products.halved(matrix)
                if made is matrix:
                    yield matrix
                    return
                self._halved = made
                stack.close()
                del matrix
            if self.last:
                self.hessian = None
            yield self._halved

    def _pack(self, matrix: Tensor, scheme: Scheme) -> sweeps.Packed | None:
        """Return the damped ``matrix`` for whole sweeps, where they run; layers that share the input share it."""
        size = 0 if scheme.group_size == CHANNEL else scheme.group_size
        key = size, self.damping
        if key not in self._packed:
            self._packed.clear()  # before there is another
            self._packed[key] = products.packed(matrix, size)
        return self._packed[key]

    def _orders(self, wanted: int) -> list[tuple[Tensor | None, Tensor | sweeps.Packed]]:
        """Return so many orders of the inputs, None as they lie, with the factor in each."""
        assert self.factor is not None
        if len(self._more) < wanted - 1:
            self._more = [(order, self._factor(order)) for order in starts.orders(self.diagonal, wanted - 1)]
        return [(self.order, self.factor), *self._more[: wanted - 1]]

    def quantize_chained(self, weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
        """Return int8 weights of the chained grid, and their scales in ``dtype``: sixteenths of int4 steps.

        Raises:
            RequestError: the scheme has groups, or the layer's inputs are no whole number of words.
        """
        k = weight.shape[1]
        if scheme.group_size != CHANNEL or k % chained.WORD:
            raise RequestError(
                f"The chained grid wants one scale a channel and inputs in words of 8, not {scheme.name} of {k}.",
                "Add --group-size channel, or drop gptq.chained.",
            )
        weight = weight.masked_fill(self.dead, 0.0)
        if self.options.scale_search:
            steps = grid.searched_scales(weight, self.diagonal, scheme, dtype, chained.rounded)
        else:
            steps = grid.minmax_scales(weight, scheme, dtype)
        if self.factor is None:
            found = chained.integers(weight, steps.float())
        else:
            order = torch.arange(k, device=weight.device) if self.order is None else self.order
            assert isinstance(self.factor, Tensor)
            found = chained.round_in_order(weight, self.factor.float(), steps.float(), order)
        quantized = QuantizedWeight(found, steps / chained.STEP)  # a power of two: exact
        if self.factor is None or not self.options.refine:
            return quantized
        with self._damped() as matrix:
            return QuantizedWeight(found, refitted_scales(weight, matrix, quantized, INT8))

    def relative_error(self, weight: Tensor, gap: Tensor) -> float:
        """Return |D x|^2 / |W x|^2 over the calibration inputs x, from the Hessian; D is the ``gap`` Q - W.

        Of many outputs it is taken on random combinations, as for the aim: within a few percent of itself.
        """
        mix = combinations(len(weight), REPORTED).to(weight)
        matrix = self._halved if self.hessian is None else self.hessian.matrix
        assert matrix is not None
        added = matrix.diagonal() - self.diagonal  # the damping, where it is there
        with products.rough():
            several = (products.times(mix, each) for each in (gap, weight))
            lost, total = ((products.times(each, matrix) * each - each.square() * added).sum() for each in several)
        return float(lost / total) if total > 0 else 0.0


def even(n: int, most: int) -> int:
    """Return the rows of a part, ``most`` at most, where possible so that n of them make equal parts.

    oneDNN makes code for every size of a product.
    """
    return next((part for part in range(most, most // 2, -1) if n % part == 0), most) if n > most else n


def round_in_order(
    order: Tensor | None, factor: Tensor | sweeps.Packed, scheme: Scheme, weight: Tensor, scales: Tensor
) -> Tensor:
    """Round weight [n, k] column by column in ``order``, spreading each error over the columns still to come.

    Args:
        order: int64 [k] permutation of the inputs; None: as they lie.
        factor: upper Cholesky factor of the inverse Hessian in ``order``: float32 [k, k], ``halved`` or packed.
        scheme: gives group size and code range.
        weight: float32 [n, k].
        scales: [n, groups], fixed.

    Returns:
        int8 codes [n, k], in the weight's own column order.
    """
    n, k = weight.shape
    size = k if scheme.group_size == CHANNEL else scheme.group_size
    groups = (torch.arange(k, device=weight.device) if order is None else order) // size
    if isinstance(factor, sweeps.Packed):
        work = weight if order is None else weight.index_select(1, order)
        made = sweeps.rounded(factor, work, scales.float(), groups, scheme.code_range)
        return made if order is None else made.index_select(1, torch.argsort(order))
    work = weight.T.clone(memory_format=torch.contiguous_format)  # [k, n]: a column of the weight lies in a row here
    work = work if order is None else work.index_select(0, order)
    steps = scales.float().T  # [groups, n]
    codes = torch.empty(k, n, dtype=torch.int8, device=weight.device)
    diagonal = factor.diagonal().float().unsqueeze(1)
    for first, last in columns.spans(k):
        errors = work.new_empty(last - first, n)
        for start, stop, end in columns.steps(first, last, COLUMNS):
            here = slice(start, stop)
            if end > stop:
                products.add(work[stop:end], factor[here, stop:end].T, errors[start - first : stop - first], alpha=-1.0)
                continue
            spread = factor[here, here].float() / diagonal[here]
            codes[here], lost = columns.rounded(work[here], steps, groups[here], spread, scheme.code_range)
            torch.div(lost, diagonal[here], out=errors[start - first : stop - first])
        told = errors.to(factor.dtype)
        for begin, end in columns.spans(k, last):
            products.add(work[begin:end], factor[first:last, begin:end].T, told, alpha=-1.0)
    return (codes if order is None else codes[torch.argsort(order)]).T.contiguous()
