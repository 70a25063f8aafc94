"""Puts the text of a kernel together for one configuration: its numbers, the PTX helpers, and the kernel itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from qtoolkit.kernels.selection import Grid

FOLDER = Path(__file__).parent
SHARED_PER_MULTIPROCESSOR = 233472  # Hopper: 228 KiB, of which each resident block takes 1 KiB for the system
CONSUMERS = 256
K_BLOCK = 128
MAX_STAGES = 12
MAX_SHARE = 16  # k-blocks whose floats a block holds in registers while it quantizes its own tokens


@dataclass(frozen=True)
class Kernel:
    """A kernel's numbers, its text without helpers, and what a launch of it needs."""

    entry: str
    defines: tuple[tuple[str, int], ...]
    files: tuple[str, ...]
    threads: int
    shared_bytes: int

    def text(self, helpers: str | None = None) -> str:
        """Return the whole source; ``helpers`` replaces the PTX helpers (tests pass ones that run on a CPU)."""
        numbers = "".join(f"#define {name} {value}\n" for name, value in self.defines)
        if helpers is None:
            own = dict(self.defines)
            product = wgmma(own["TOKENS"], bool(own["FOLDED"])) if "TOKENS" in own else ""
            helpers = (FOLDER / "ptx.cuh").read_text() + product
        return "\n".join((numbers + helpers, *((FOLDER / file).read_text() for file in self.files)))


@dataclass(frozen=True)
class Tiling:
    """How a linear is cut: ``tokens`` x ``128 * blocks`` tiles, ``split`` blocks share k, ``resident`` fit in an SM.

    With ``fused`` the product quantizes its tokens itself, and there is no other launch. With ``pingpong`` each of a
    block's two consumer warpgroups owns whole tiles, else they share each tile. With ``streamed`` all k-blocks of
    all tiles are dealt out in equal shares, which may begin and end amid a tile.
    """

    tokens: int
    blocks: int
    split: int
    resident: int
    fused: bool = False
    pingpong: bool = False
    streamed: bool = False

    def share(self, k_blocks: int) -> int:
        """Return the most k-blocks that one block of a cluster works on."""
        return -(-k_blocks // self.split)


def wgmma(tokens: int, unsigned: bool = False) -> str:
    """Return the CUDA wrapper of the register-operand int8 product of 64 rows, ``tokens`` columns and 32 inputs.

    ``unsigned``: the left operand's bytes are 0..255 (mixed signs take PTX 8.4, compilers of CUDA 12.4 on).
    """
    parts, kind = tokens // 2, "u8" if unsigned else "s8"
    accumulators = ",".join(f"%{i}" for i in range(parts))
    left = ",".join(f"%{parts + i}" for i in range(4))
    outputs = ",".join(f'"+r"(d[{i}])' for i in range(parts))
    return (
        f"__device__ __forceinline__ void wgmma(int (&d)[{parts}], const unsigned (&a)[4], unsigned long long b, "
        "int accumulate) {\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{parts + 5}, 0;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.{kind}.s8 {{{accumulators}}}, {{{left}}}, '
        f'%{parts + 4}, p;\\n}}"\n'
        f'        : {outputs}\n        : "r"(a[0]),"r"(a[1]),"r"(a[2]),"r"(a[3]),"l"(b),"r"(accumulate));\n}}\n'
    )


def stage_bytes(tokens: int, blocks: int, grouped: bool, folded: bool = False) -> int:
    """Return the shared memory of one k-block of 128 inputs: weights, tokens, and scales or multiples of groups."""
    return blocks * (8192 + 512 * grouped + 128 * folded) + tokens * 128


@lru_cache(maxsize=256)
def linear(tiling: Tiling, grouped: bool, fp16: bool, grid: Grid = Grid.PLAIN, share: int = 0) -> Kernel:
    """Return the W4A8 product for ``tiling``; its split is a launch argument.

    ``grouped``: float32 scales of groups, which folded groups have none of. ``share``: k-blocks of a block that
    quantizes its tokens itself, else 0.
    """
    folded = grid is Grid.FOLDED
    stage = stage_bytes(tiling.tokens, tiling.blocks, grouped, folded) - (tiling.tokens * K_BLOCK if share else 0)
    own = share * K_BLOCK + (12 if folded else 8) if share else 0  # of a token: codes, maximum, scale and their sum
    fixed = own * tiling.tokens
    room = SHARED_PER_MULTIPROCESSOR // tiling.resident - 1024 - 2 * 8 * MAX_STAGES - fixed
    fixed += 16 if tiling.streamed else 0  # the count of parts
    rings = 2 if tiling.pingpong else 1
    stages = min(MAX_STAGES, room // stage) // rings
    defines = {
        "TOKENS": tiling.tokens,
        "BLOCKS": tiling.blocks,
        "STAGES": stages,
        "GROUPED": int(grouped),
        "FP16": int(fp16),
        "MIN_BLOCKS": tiling.resident,
        "CHAINED": int(grid is Grid.CHAINED),
        "FOLDED": int(folded),
        "SHARE": share,
        "PINGPONG": int(tiling.pingpong),
        "STREAM": int(tiling.streamed),
    }
    threads = CONSUMERS + (128 if tiling.resident == 1 else 32)  # a whole warpgroup gives registers back, or one warp
    shared = rings * stages * (stage + 16) + fixed  # and two barriers a stage
    files = ("tokens.cuh", "problem.cuh", "unpack.cuh", "finish.cuh", "linear.cu")
    return Kernel("w4a8_linear", tuple(defines.items()), files, threads, shared)


@lru_cache(maxsize=64)
def quantize(k: int, fp16: bool, grid: Grid = Grid.PLAIN) -> Kernel:
    """Return the token quantizer for rows of ``k`` inputs (a multiple of 8, at most 65536)."""
    vectors_in_row = -(-k // K_BLOCK) * K_BLOCK // 8
    threads = min(1024, -(-vectors_in_row // 32) * 32)
    defines = {
        "VECTORS": -(-vectors_in_row // threads),
        "FP16": int(fp16),
        "CHAINED": int(grid is Grid.CHAINED),
        "FOLDED": int(grid is Grid.FOLDED),
    }
    return Kernel("quantize_tokens", tuple(defines.items()), ("tokens.cuh", "quantize.cu"), threads, 256)
