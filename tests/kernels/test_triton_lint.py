"""Compiles the Triton kernels ahead of time, without a GPU, and reads the machine code for lost performance."""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qtoolkit.kernels.selection import Grid

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton's compiler"
)

# tokens, rows, split, grouped, warps, stages; as backend.tiling chooses them
SMALL, MIDDLE, LARGE, GROUPED = (16, 128, 4, False, 4, 4), (64, 128, 1, False, 8, 4), (128, 128, 1, False, 8, 3), (
    128, 64, 1, True, 4, 3,
)  # fmt: skip


CARDS = (80, 89, 90, 100, 120)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may have
PRODUCT = {80: "IMMA.16832.S8.S8", 89: "IMMA.16832.S8.S8", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA.16832.S8.S8"}


def compile_for(
    capability: int,
    kernel: Any,
    pointers: tuple[str, ...],
    numbers: dict[str, Any],
    options: dict[str, Any],
    one: bool = False,
    aligned: bool = True,
) -> Any:
    """Return a kernel compiled for a card; its integers are multiples of 16, but for the first, the tokens.

    ``one``: the tokens are 1, which Triton takes for a constant. ``aligned``: False if nothing is known of integers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    integers = [i for i, name in enumerate(names) if i >= len(pointers) and name not in numbers]
    kinds = (*pointers, *["i32"] * len(integers), *["constexpr"] * len(numbers))
    divisible = {(i,): [["tt.divisibility", 16]] for i in (*range(len(pointers)), *(integers[1:] if aligned else ()))}
    signature = dict(zip(names, kinds, strict=True))
    if one and "tokens" in names:
        signature["tokens"], numbers = "constexpr", {**numbers, "tokens": 1}
    source = ASTSource(fn=kernel, signature=signature, constexprs=numbers, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def built(
    capability: int,
    case: tuple[Any, ...],
    grid: Grid = Grid.PLAIN,
    fused: bool = False,
    half_groups: bool = False,
    one: bool = False,
) -> Any:
    """Return one compiled product; that of ``one`` token is of an odd layer, but for those that programs quantize."""
    from qtoolkit.kernels.triton import kernels

    tokens, rows, split, grouped, warps, stages = case
    numbers = {"TOKENS": tokens, "ROWS": rows, "SPLIT": split, "GROUPED": grouped, "HALF_GROUPS": half_groups}
    numbers |= {"BIAS": True, "ASM": True, "FUSED": fused}
    numbers |= {"CHAINED": grid is Grid.CHAINED, "FOLDED": grid is Grid.FOLDED}
    pointers = ("*i8", "*fp32", "*bf16" if fused else "*i8", "*fp32", "*bf16", "*bf16", "*fp32" if grouped else "*i32")
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": not fused}
    return compile_for(capability, kernels.linear, pointers, numbers, options, one, fused or not one)


def listing(kernel: Any, folder: Path) -> str:
    """Return the assembler's resource line with the SASS listing."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton carries no cuobjdump")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run([tool, "-res-usage", "-sass", cubin], capture_output=True, text=True, check=True).stdout


def compiled(capability: int, case: tuple[Any, ...], folder: Path, **how: Any) -> tuple[str, str, int]:
    """Return PTX, SASS and the shared memory of one product."""
    kernel = built(capability, case, **how)
    return kernel.asm["ptx"], listing(kernel, folder), kernel.metadata.shared


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


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("case", [SMALL, MIDDLE, LARGE, GROUPED])
def test_every_card_gets_integer_products_that_fit(case: tuple[Any, ...], capability: int, tmp_path: Path) -> None:
    ptx, sass, shared = compiled(capability, case, tmp_path)
    products = sass.count(PRODUCT[capability])
    assert products
    assert "STL" not in sass  # no register is spilled
    assert shared <= SHARED[capability] * 1024
    if "mma.sync.aligned.m16n8k32.row.col" in ptx:
        assert len(re.findall(r"\b(?:LOP3|PRMT)\b", sass)) <= 2 * products + 60


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize(("case", "half_groups"), [(SMALL, True), (MIDDLE, False), (LARGE, False), (LARGE, True)])
def test_folded_groups_take_the_tiles_of_one_scale_a_row(
    case: tuple[Any, ...], half_groups: bool, capability: int, tmp_path: Path
) -> None:
    """Seven operations for eight weights where plain codes take three; byte by byte it would be several times that."""
    ptx, sass, shared = compiled(capability, case, tmp_path, grid=Grid.FOLDED, half_groups=half_groups)
    assert PRODUCT[capability] in sass
    assert "STL" not in sass
    assert shared <= SHARED[capability] * 1024
    if capability == 90:
        products = len(re.findall(r"wgmma\.mma_async\S*m64n\d+k32\.s32\.s8\.s8", ptx))
        assert len(re.findall(r"wgmma\.mma_async[^;]*\{[^}]*\},\s*\{", ptx)) == products > 0
    _, plain, _ = compiled(capability, case, tmp_path)
    logic = [len(re.findall(r"\b(?:LOP3|PRMT|SHF)\b", text)) for text in (sass, plain)]
    assert logic[0] <= 2 * logic[1] + 24


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("fused", [False, True])
def test_one_token_of_an_odd_layer_compiles(capability: int, fused: bool, tmp_path: Path) -> None:
    for case in (SMALL, (16, 64, 1, True, 4, 4)):
        _, sass, _ = compiled(capability, case, tmp_path, fused=fused, one=True)
        assert PRODUCT[capability] in sass
        assert "STL" not in sass


@pytest.mark.parametrize("capability", CARDS)
def test_groups_of_64_compile(capability: int, tmp_path: Path) -> None:
    _, sass, shared = compiled(capability, GROUPED, tmp_path, half_groups=True)
    assert PRODUCT[capability] in sass
    assert "STL" not in sass
    assert shared <= SHARED[capability] * 1024


@pytest.mark.parametrize("grid", Grid)
@pytest.mark.parametrize("capability", CARDS)
def test_a_program_that_quantizes_its_tokens_keeps_to_registers(capability: int, grid: Grid, tmp_path: Path) -> None:
    for case in (SMALL, (16, 128, 8, grid is not Grid.FOLDED, 4, 4)):
        ptx, sass, shared = compiled(capability, case, tmp_path, grid=grid, fused=True)
        assert PRODUCT[capability] in sass
        assert "STL" not in sass
        assert shared <= SHARED[capability] * 1024
        assert re.search(r"FADD[^;]*12582912", sass)  # the product is rounded before the sum that rounds it to a code
        assert not re.search(r"FFMA[^;]*12582912", sass)
        if capability == 90:
            products = len(re.findall(r"wgmma\.mma_async\S*m64n16k32\.s32\.s8\.s8", ptx))
            in_registers = len(re.findall(r"wgmma\.mma_async[^;]*\{[^}]*\},\s*\{", ptx))
            assert in_registers == (products // 2 if grid is Grid.CHAINED else products) > 0


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_quantizer_rounds_a_product_before_it_rounds_to_a_code(capability: int, dtype: str, tmp_path: Path) -> None:
    from qtoolkit.kernels.triton import kernels

    pointers = (f"*{dtype}", "*i8", "*fp32")
    numbers, options = {"BLOCK": 1024, "CHAINED": False}, {"num_warps": 4, "enable_fp_fusion": False}
    sass = listing(compile_for(capability, kernels.quantize_tokens, pointers, numbers, options), tmp_path)
    assert "STL" not in sass
    assert re.search(r"FADD[^;]*12582912", sass)
    assert not re.search(r"FFMA[^;]*12582912", sass)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_sum_of_shares_compiles(capability: int, grouped: bool, tmp_path: Path) -> None:
    from qtoolkit.kernels.triton import kernels

    pointers = ("*fp32" if grouped else "*i32", "*fp32", "*fp32", "*fp16", "*fp16")
    numbers = {"SPLIT": 8, "GROUPED": grouped, "BIAS": True, "BLOCK": 1024}
    kernel = compile_for(capability, kernels.add_shares, pointers, numbers, {"num_warps": 4})
    assert "STL" not in listing(kernel, tmp_path)


# Case, grid, instructions of inline assembly, and one of them.
JOINED = [(case, Grid.CHAINED, 1, "shl.b32") for case in (SMALL, LARGE, GROUPED)]
JOINED += [(case, Grid.FOLDED, 2, "mad.lo.u32") for case in (SMALL, LARGE)]


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(("case", "grid", "count", "word"), JOINED)
def test_four_bytes_of_a_word_are_neighbours_of_a_row(
    case: tuple[Any, ...], grid: Grid, count: int, word: str, capability: int
) -> None:
    """What joins four bytes of an operand's register wants one row: kWidth 4 are four inputs of it in order."""
    text = built(capability, case, grid=grid).asm["ttgir"]
    joins = [line for line in text.splitlines() if "elementwise_inline_asm" in line]
    assert len(joins) == count
    for join in joins:
        assert "packed_element = 4" in join
        assert word in join
        assert set(re.findall(r"tensor<\d+x64xi\d+, ([^:]*?)>[, ]", join)) == {
            "#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>"
        }


@pytest.mark.parametrize("grid", [Grid.CHAINED, Grid.FOLDED])
def test_four_bytes_of_a_word_are_neighbours_of_a_row_on_blackwell_too(grid: Grid) -> None:
    """Its products read both operands from shared memory; the words pass through registers before."""
    text = built(100, SMALL, grid=grid).asm["ttgir"]
    joins = [line for line in text.splitlines() if "elementwise_inline_asm" in line]
    assert joins
    for join in joins:
        (layout,) = set(re.findall(r"tensor<128x64xi\d+, (#\w+)>", join))
        definition = next(line for line in text.splitlines() if line.startswith(f"{layout} ="))
        assert "register = [[0, 1], [0, 2]" in definition or "sizePerThread = [1, " in definition


@pytest.mark.parametrize("case", [SMALL, LARGE])
def test_chained_weights_reach_hopper_products_with_fewer_operations(case: tuple[Any, ...], tmp_path: Path) -> None:
    """Odd inputs need no register: their products read the words where they were copied to."""

    def logic(grid: Grid) -> int:
        ptx, sass, _ = compiled(90, case, tmp_path, grid=grid)
        products = len(re.findall(r"wgmma\.mma_async\S*m64n\d+k32\.s32\.s8\.s8", ptx))
        in_registers = len(re.findall(r"wgmma\.mma_async[^;]*\{[^}]*\},\s*\{", ptx))
        assert in_registers == (products // 2 if grid is Grid.CHAINED else products) > 0
        assert "STL" not in sass
        return len(re.findall(r"\b(?:LOP3|PRMT|SHF|IMAD\.SHL)\b", sass))

    assert logic(Grid.CHAINED) < logic(Grid.PLAIN)
