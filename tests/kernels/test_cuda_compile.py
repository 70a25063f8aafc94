"""Compiles every CUDA kernel ahead of time and reads what the assembler made of it; needs nvcc, no GPU."""

import ctypes
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from qtoolkit.kernels.cuda import compiler, plan, source
from qtoolkit.kernels.cuda.source import Tiling
from qtoolkit.kernels.selection import Grid

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
GROUPED = [shape for shape in plan.SHAPES if shape.tokens <= 128]
# Tiling, scales per group, grid; a fused product has the largest share that it may have.
Variant = tuple[Tiling, bool, Grid]
VARIANTS: list[Variant] = [(shape, False, Grid.PLAIN) for shape in plan.SHAPES]
VARIANTS += [(shape, True, Grid.PLAIN) for shape in GROUPED]
VARIANTS += [(shape, False, Grid.FOLDED) for shape in plan.SHAPES]  # groups in the tiles of one scale a channel
VARIANTS += [(Tiling(*shape), False, Grid.CHAINED) for shape in ((16, 1, 1, 2), (256, 1, 1, 1), (128, 2, 1, 1))]
VARIANTS += [(shape, True, Grid.CHAINED) for shape in (Tiling(16, 1, 1, 2, fused=True), Tiling(128, 2, 1, 1))]
VARIANTS += [(Tiling(160, 1, 1, 1, pingpong=True), False, Grid.CHAINED)]
VARIANTS += [(Tiling(128, 1, 1, 1, pingpong=True), True, Grid.CHAINED)]


def kernel_of(tiling: Tiling, grouped: bool, grid: Grid) -> source.Kernel:
    return source.linear(tiling, grouped, False, grid, source.MAX_SHARE if tiling.fused else 0)


def cuobjdump() -> str | None:
    """Return the disassembler: on PATH, or the one that Triton carries."""
    spec = find_spec("triton")
    own = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (str(own) if own and own.exists() else None)


def assemble(kernel: source.Kernel, folder: Path) -> tuple[str, Path]:
    """Return the assembler's report and the cubin."""
    text, cubin = folder / "kernel.cu", folder / "kernel.cubin"
    text.write_text(kernel.text())
    target = "-gencode=arch=compute_90a,code=sm_90a"
    command = ["nvcc", "-std=c++17", target, "-cubin", "-Xptxas", "-v", "-o", str(cubin), str(text)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, cubin


def instructions(cubin: Path) -> list[str]:
    """Return the machine code, a line an instruction."""
    listing = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line)]


LEFT_IN_REGISTERS = r"IGMMA\.64x{}x32\.{}\.S8 R\d+, R\d+, gdesc"


@needs_nvcc
@pytest.mark.parametrize(
    ("tiling", "grouped", "grid"),
    VARIANTS,
    ids=lambda v: (
        f"{v.tokens}x{128 * v.blocks}{' fused' * v.fused}{' ping-pong' * v.pingpong}{' stream' * v.streamed}"
        if isinstance(v, Tiling)
        else str(v)
    ),
)
def test_products_keep_to_registers_and_run_asynchronously(
    tiling: Tiling, grouped: bool, grid: Grid, tmp_path: Path
) -> None:
    kernel = kernel_of(tiling, grouped, grid)
    report, cubin = assemble(kernel, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    assert "C75" not in report, report  # the assembler's warnings that it waits after every product
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert registers * kernel.threads * tiling.resident <= 65536
    if cuobjdump():
        products = [line for line in instructions(cubin) if "GMMA" in line]
        assert len(products) >= 4
        kind = LEFT_IN_REGISTERS.format(tiling.tokens, "U8" if grid is Grid.FOLDED else "S8")
        assert all(re.search(kind, line) for line in products)


@needs_nvcc
@pytest.mark.parametrize("tiling", [Tiling(8, 1, 1, 2, fused=True), Tiling(64, 1, 1, 2), Tiling(128, 2, 1, 1)], ids=str)
def test_float16_products_keep_to_registers_too(tiling: Tiling, tmp_path: Path) -> None:
    for grouped, grid in ((False, Grid.PLAIN), (True, Grid.PLAIN), (False, Grid.FOLDED)):
        kernel = source.linear(tiling, grouped, True, grid, source.MAX_SHARE if tiling.fused else 0)
        report, _ = assemble(kernel, tmp_path)
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
        assert "C75" not in report, report


def test_every_kernel_fits_into_shared_memory() -> None:
    for variant in VARIANTS:
        kernel = kernel_of(*variant)
        assert dict(kernel.defines)["STAGES"] >= 4
        assert kernel.shared_bytes <= 227 * 1024
        assert variant[0].resident * (kernel.shared_bytes + 1024) <= source.SHARED_PER_MULTIPROCESSOR


@needs_nvcc
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("grid", [Grid.PLAIN, Grid.FOLDED])
@pytest.mark.parametrize("k", [64, 4096, 14336, 65536])
def test_the_quantizer_keeps_a_row_in_registers(k: int, grid: Grid, fp16: bool, tmp_path: Path) -> None:
    kernel = source.quantize(k, fp16, grid)
    report, _ = assemble(kernel, tmp_path)
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    assert "0 bytes spill stores" in report
    assert registers * kernel.threads <= 65536


def operations_between_products(kernel: source.Kernel, folder: Path) -> int:
    """Return how many operations on whole words stand between the products of a k-block of a 128 x 256 tile."""
    _, cubin = assemble(kernel, folder)
    lines = instructions(cubin)
    products = [i for i, line in enumerate(lines) if re.search(r"IGMMA\.64x128x32\.[SU]8\.S8", line)]
    assert len(products) == 8
    between = lines[products[0] : products[-1]]
    return sum(bool(re.search(r"\b(LOP3|SHF|IMAD|PRMT|MOV|IADD3|VIADD|LEA)\b", line)) for line in between)


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump")
@pytest.mark.parametrize(("grid", "each"), [(Grid.PLAIN, 3), (Grid.CHAINED, 1), (Grid.FOLDED, 5)])
def test_unpacking_takes_few_operations_for_eight_weights(grid: Grid, each: int, tmp_path: Path) -> None:
    """A k-block is 4 steps of 2 products; between the first and the last are 3 steps, 12 words of a thread."""
    kernel = source.linear(Tiling(128, 2, 1, 1), False, False, grid)
    assert operations_between_products(kernel, tmp_path) <= 12 * each + 8


def test_a_cubin_is_kept_and_a_damaged_one_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def compile_once(text: str) -> bytes:
        made.append(text)
        return b"\x7fELF" + text.encode()

    monkeypatch.setenv("QTOOLKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "version", lambda: "nvcc 13.0")
    monkeypatch.setattr(compiler, "_nvcc_cubin", compile_once)
    assert compiler.cubin("a") == compiler.cubin("a") == b"\x7fELFa"
    assert made == ["a"]
    (kept,) = (tmp_path / "cuda").glob("*.cubin")
    kept.write_bytes(b"half a file")
    assert compiler.cubin("a") == b"\x7fELFa"
    assert kept.read_bytes() == b"\x7fELFa"
    assert made == ["a", "a"]
    assert not list((tmp_path / "cuda").glob("*.part"))


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "version", lambda: None)
    with pytest.raises(RuntimeError, match="nvidia-cuda-nvrtc"):
        compiler.cubin("a")


@pytest.mark.skipif(compiler.nvrtc() is None, reason="needs NVRTC")
def test_nvrtc_compiles_every_kernel_without_any_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLKIT_CACHE", str(tmp_path))
    kernels = [kernel_of(*variant) for variant in VARIANTS] + [source.linear(Tiling(16, 1, 1, 2), True, True)]
    kernels += [source.quantize(k, fp16, grid) for k in (64, 65536) for fp16 in (False, True) for grid in Grid]
    for kernel in kernels:
        assert compiler.cubin(kernel.text()).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match="refused"):
        compiler.cubin("this is no CUDA")


@needs_gxx
def test_nvrtcs_second_library_is_loaded_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for by name only; a package of 13.0 whose folder is not on the loader's path failed here."""
    folder = tmp_path / "nvidia" / "cu99" / "lib"
    folder.mkdir(parents=True)
    stub = """extern "C" int nvrtcVersion(int* major, int* minor) { *major = 99; *minor = 7; return 0; }
              extern "C" const char* nvrtcGetErrorString(int) { return 0; }"""
    for name, content in (("libnvrtc.so.19", stub), ("libnvrtc-builtins.so.99.7", "int nothing;")):
        stub_file = tmp_path / "stub.cpp"
        stub_file.write_text(content)
        command = ["g++", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(stub_file)]
        subprocess.run(command, check=True)
    monkeypatch.setattr(compiler, "NAMES", ())
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    compiler.nvrtc.cache_clear()
    try:
        assert compiler.nvrtc() is not None
        ctypes.CDLL("libnvrtc-builtins.so.99.7")  # by name: only what is loaded already is found so
    finally:
        compiler.nvrtc.cache_clear()
