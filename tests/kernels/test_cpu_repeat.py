"""Calls that are made once and then repeated, and the memory between them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from qtoolkit.kernels.cpu import backend, library
from qtoolkit.kernels.cpu.repeat import MOST, Calls, Memory
from qtoolkit.kernels.selection import Problem

needs_library = pytest.mark.skipif(library.failure() is not None, reason="no C++ compiler")
K, N = 256, 130


def again() -> int:
    return ctypes.cast(library.load().functions.qtk_linear_again, ctypes.c_void_p).value or 0


def packed(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, generator=generator)
    scales = torch.rand(n, k // 128, generator=generator) + 0.5
    return backend.prepare(words, scales, Problem(k, n, 128, torch.bfloat16, "cpu"))


@needs_library
@pytest.mark.parametrize("gated", [False, True])
def test_a_repeated_product_is_that_of_what_its_input_then_holds(gated: bool) -> None:
    weight, scales = packed(N, K, 0)
    x = torch.randn(3, 2 * K if gated else K).bfloat16()
    y = torch.empty(3, N, dtype=torch.bfloat16)
    calls = Calls()
    calls.make_own(again(), backend.described(x, weight, scales, None, N, 128, gated, y))
    assert torch.equal(y, backend.run(x, weight, scales, None, N, 128, gated=gated))
    x.copy_(torch.randn_like(x))
    calls.repeat()
    assert torch.equal(y, backend.run(x, weight, scales, None, N, 128, gated=gated))


@needs_library
def test_calls_are_repeated_in_their_order_with_all_their_arguments() -> None:
    seen: list[tuple[int, ...]] = []
    face = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * MOST)
    functions = [face(lambda *given, own=own: seen.append((own, *given))) for own in range(2)]
    calls = Calls()
    arguments = [[-1 - i for i in range(MOST)], [2**40 + i for i in range(MOST)]]
    for function, own in zip(functions, arguments, strict=True):
        calls.make(ctypes.cast(function, ctypes.c_void_p).value or 0, own)
    first = list(seen)
    calls.repeat()
    assert seen == first * 2 == [(0, *arguments[0]), (1, *arguments[1])] * 2


@needs_library
def test_more_arguments_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=f"{MOST} at most"):
        Calls().make(0, [0] * (MOST + 1))


@needs_library
def test_a_call_without_memory_ends_the_repetition() -> None:
    answers, made = [0, 0, 1], []
    face = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    function = face(lambda description: (made.append(1), answers.pop(0))[1])
    calls = Calls()
    for _ in range(2):
        calls.make_own(ctypes.cast(function, ctypes.c_void_p).value or 0, backend.Linear())
    with pytest.raises(RuntimeError, match="call 0 of 2: no memory"):
        calls.repeat()
    assert len(made) == 3


@needs_library
def test_what_a_call_throws_is_told() -> None:
    try:
        throws = ctypes.CDLL("libstdc++.so.6")["_ZSt20__throw_length_errorPKc"]
    except (OSError, AttributeError):
        pytest.skip("another C++ library")
    text = ctypes.create_string_buffer(b"too long")
    with pytest.raises(RuntimeError, match="too long"):
        Calls().make(ctypes.cast(throws, ctypes.c_void_p).value or 0, [ctypes.addressof(text)])


@needs_library
def test_activations_that_are_not_dense_are_refused() -> None:
    weight, scales = packed(N, K, 0)
    x, y = torch.zeros(2, 2 * K).bfloat16(), torch.empty(2, N, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="not dense"):
        backend.described(x[:, :K], weight, scales, None, N, 128, False, y)


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    memory = Memory()
    first = memory.empty((3, 5), (5, 1), torch.float32)
    view, place = first.view(15)[:2], first.data_ptr()
    assert place % 64 == 0
    del first
    second = memory.empty((15,), (1,), torch.float32)
    assert second.data_ptr() != place  # the view still refers to it
    del view
    assert memory.empty((5, 3), (1, 5), torch.float32).data_ptr() == place
    assert len(memory.blocks) == 2


def test_memory_has_the_strides_asked_for() -> None:
    made = Memory().empty((2, 3), (1, 2), torch.bfloat16)
    assert made.shape == (2, 3)
    assert made.stride() == (1, 2)
    assert Memory().empty((0, 4), (4, 1), torch.float32).shape == (0, 4)
