"""Compiles the Triton kernels ahead of time, without a GPU, and reads the machine code for lost performance."""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton's compiler"
)

# tokens, rows, split, grouped, warps, stages; as backend.tiling chooses them
SMALL, MIDDLE, LARGE, GROUPED = (16, 128, 4, False, 4, 4), (64, 128, 1, False, 8, 4), (128, 128, 1, False, 8, 3), (
    128, 64, 1, True, 4, 3,
)  # fmt: skip


def built(capability: int, case: tuple[Any, ...], chained: bool = False) -> Any:
    """Return one compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qtoolkit.kernels.triton import kernels

    tokens, rows, split, grouped, warps, stages = case
    numbers = {"TOKENS": tokens, "ROWS": rows, "SPLIT": split, "GROUPED": grouped, "HALF_GROUPS": False}
    numbers |= {"BIAS": True, "ASM": True, "CHAINED": chained}
    pointers = ("*i8", "*fp32", "*i8", "*fp32", "*bf16", "*bf16", "*fp32" if grouped else "*i32")
    signature = dict(zip(kernels.linear.arg_names, (*pointers, *["i32"] * 5, *["constexpr"] * 8), strict=True))
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(12) if i != 7}  # all but the number of tokens
    source = ASTSource(fn=kernels.linear, signature=signature, constexprs=numbers, attrs=divisible)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compiled(capability: int, case: tuple[Any, ...], folder: Path, chained: bool = False) -> tuple[str, str, int]:
    """Return PTX, the assembler's resource line with the SASS listing, and the shared memory of one kernel."""
    import triton

    kernel = built(capability, case, chained)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton carries no cuobjdump")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([str(tool), "-res-usage", "-sass", str(cubin)], capture_output=True, text=True, check=True)
    return kernel.asm["ptx"], listing.stdout, kernel.metadata.shared


@pytest.mark.parametrize("case", [SMALL, MIDDLE, LARGE, GROUPED])
def test_hopper_products_take_weights_from_registers(case: tuple[Any, ...], tmp_path: Path) -> None:
    ptx, sass, shared = compiled(90, case, tmp_path)
    products = len(re.findall(r"wgmma\.mma_async\S*m64n\d+k32\.s32\.s8\.s8", ptx))
    in_registers = len(re.findall(r"wgmma\.mma_async[^;]*\{[^}]*\},\s*\{", ptx))  # a second brace list
    assert in_registers == products > 0
    assert "mma.sync" not in ptx
    assert "STL" not in sass
    assert shared <= 227 * 1024
    logic = len(re.findall(r"\b(?:LOP3|PRMT)\b", sass))
    assert logic <= 24 * products + 40  # the plain form, byte by byte, needs several hundred


@pytest.mark.parametrize("case", [SMALL, LARGE])
def test_ampere_products_use_the_integer_tensor_cores(case: tuple[Any, ...], tmp_path: Path) -> None:
    ptx, sass, shared = compiled(80, case, tmp_path)
    assert "mma.sync.aligned.m16n8k32.row.col" in ptx
    assert "IMMA.16832.S8.S8" in sass
    assert "STL" not in sass
    assert shared <= 163 * 1024


@pytest.mark.parametrize("capability", [89, 100, 120])
def test_other_cards_compile(capability: int, tmp_path: Path) -> None:
    _, sass, shared = compiled(capability, MIDDLE, tmp_path)
    assert "MMA" in sass
    assert shared <= 99 * 1024


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("case", [SMALL, LARGE, GROUPED])
def test_chained_words_are_four_neighbours_of_a_row(case: tuple[Any, ...], capability: int) -> None:
    """The shift joins the four bytes of one register of the product's operand: kWidth 4 are four inputs in order."""
    listing = built(capability, case, chained=True).asm["ttgir"]
    shifts = [line for line in listing.splitlines() if "elementwise_inline_asm" in line]
    assert len(shifts) == 1
    assert "packed_element = 4" in shifts[0]
    assert "shl.b32" in shifts[0]
    assert shifts[0].count("#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>") == 2


@pytest.mark.parametrize("case", [SMALL, LARGE])
def test_chained_weights_reach_hopper_products_with_fewer_operations(case: tuple[Any, ...], tmp_path: Path) -> None:
    """Odd inputs need no register: their products read the words where they were copied to."""

    def logic(chained: bool) -> int:
        ptx, sass, _ = compiled(90, case, tmp_path, chained)
        products = len(re.findall(r"wgmma\.mma_async\S*m64n\d+k32\.s32\.s8\.s8", ptx))
        in_registers = len(re.findall(r"wgmma\.mma_async[^;]*\{[^}]*\},\s*\{", ptx))
        assert in_registers == (products // 2 if chained else products) > 0
        assert "STL" not in sass
        return len(re.findall(r"\b(?:LOP3|PRMT|SHF|IMAD\.SHL)\b", sass))

    assert logic(chained=True) < logic(chained=False)
