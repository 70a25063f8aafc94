"""Calls of C functions that are made once and then repeated in one call, and memory for what they leave each other."""

from __future__ import annotations

import ctypes
import weakref
from math import prod

import torch
from torch import Tensor

from qtoolkit.kernels.cpu import library

MOST = 24  # arguments of a call, as in repeat.cpp
LINE = 64  # bytes


class Call(ctypes.Structure):
    """The struct ``Call`` of repeat.cpp."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("own", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("arguments", ctypes.c_int64 * MOST),
    ]


class Calls:
    """A list of calls; what their arguments point to must stay where it is as long as they are repeated."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.kept: list[object] = []  # descriptions that calls point to
        self.table: ctypes.Array[Call] | None = None
        self.message = ctypes.create_string_buffer(256)

    def make(self, function: int, arguments: list[int]) -> None:
        """Call a function of addresses and 64-bit integers, and remember that.

        Raises:
            ValueError: there are more arguments than calls can have.
            RuntimeError: it threw.
        """
        if len(arguments) > MOST:
            raise ValueError(f"a call of {len(arguments)} arguments; {MOST} at most can be repeated")
        call = Call(function, None, len(arguments))
        call.arguments[: len(arguments)] = arguments
        self._add(call)

    def make_own(self, function: int, description: ctypes.Structure) -> None:
        """Call one of our functions with a description of its arguments, and remember that.

        Raises:
            RuntimeError: there was no memory for it.
        """
        self.kept.append(description)
        self._add(Call(function, ctypes.addressof(description), 0))

    def repeat(self) -> None:
        """Make all calls again.

        Raises:
            RuntimeError: one threw, or had no memory.
        """
        if self.table is None or len(self.table) != len(self.calls):
            self.table = (Call * len(self.calls))(*self.calls)
        self._run(self.table, len(self.calls))

    def _add(self, call: Call) -> None:
        self._run(call, 1)
        self.calls.append(call)

    def _run(self, calls: Call | ctypes.Array[Call], count: int) -> None:
        repeat = library.load().functions.qtk_repeat
        done = repeat(ctypes.byref(calls), count, self.message, len(self.message))
        if done != count:
            raise RuntimeError(f"call {done} of {count}: {self.message.value.decode(errors='replace')}")


class Memory:
    """Makes tensors whose memory stays; another tensor of that size gets it when nothing refers to the first."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.free: dict[int, list[int]] = {}  # addresses by bytes

    def empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor that starts on a cache line; arguments as of ``torch.empty_strided``."""
        elements = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if prod(size) else 0
        wanted = -(-max(elements * dtype.itemsize, 1) // LINE) * LINE
        free = self.free.setdefault(wanted, [])
        if not free:
            block = torch.empty(wanted + LINE, dtype=torch.uint8)
            self.blocks.append(block)
            free.append(block.data_ptr() + -block.data_ptr() % LINE)
        address = free.pop()
        held = (ctypes.c_uint8 * wanted).from_address(address)  # a tensor's storage refers to it
        weakref.finalize(held, free.append, address).atexit = False
        return torch.frombuffer(held, dtype=torch.uint8).view(dtype).as_strided(size, stride)
