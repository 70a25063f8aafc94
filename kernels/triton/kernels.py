"""The W4A8 product, the sum of its shares, and the token quantizer, written in Triton.

The product is computed transposed, ``out^T = W @ X^T``: weights are the left operand, which Hopper's warpgroup product
takes from registers, so unpacked nibbles are not written back to shared memory, and few tokens waste little.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _grid_of(absmax, finite):  # type: ignore[no-untyped-def]
    """Return what tokens' floats are multiplied with, and their scales, by their largest magnitudes."""
    zero = absmax < 7.888609052210118e-31  # 2^-100
    plain = finite & (absmax >= 7.888609052210118e-31)
    usable = tl.where(plain, absmax, 1.0)
    inverse = tl.where(plain, tl.math.div_rn(127.0, usable), 0.0)
    scale = tl.where(finite, tl.where(zero, 0.0, tl.math.div_rn(usable, 127.0)), float("nan"))
    return inverse, scale


@triton.jit
def _codes_of(x, inverse):  # type: ignore[no-untyped-def]
    """Return the codes of floats; those of a token that is not finite are 0, as its ``inverse`` is.

    To be compiled without fused multiply-add: a product that is not rounded before the sum gives other codes.
    """
    scaled = tl.where(tl.abs(x) <= 3.4028234663852886e38, x, 0.0) * inverse
    return ((scaled + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23: the sum rounds half to even


@triton.jit
def quantize_tokens(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, k, k_padded, BLOCK: tl.constexpr, CHAINED: tl.constexpr
):  # fmt: skip
    """Quantize row ``program_id(0)`` of x [tokens, k] to int8 [tokens, k_padded]; see ``reference.quantize_tokens``.

    With CHAINED each 128 codes are the even inputs and then the odd ones.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    top = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, k, BLOCK):
        x = tl.load(x_ptr + row * k + start + at, mask=start + at < k, other=0.0).to(tl.float32)
        magnitude = tl.abs(x)
        bad |= (magnitude <= 3.4028234663852886e38).to(tl.int32) ^ 1  # NaN and Inf fail the comparison
        top = tl.maximum(top, magnitude)
    finite = tl.max(bad, 0) == 0
    inverse, scale = _grid_of(tl.max(top, 0), finite)
    tl.store(scales_ptr + row, scale)
    source = at // 128 * 128 + at % 64 * 2 + at % 128 // 64 if CHAINED else at
    for start in range(0, k_padded, BLOCK):
        x = tl.load(x_ptr + row * k + start + source, mask=start + source < k, other=0.0).to(tl.float32)
        tl.store(codes_ptr + row * k_padded + start + at, _codes_of(x, inverse), mask=start + at < k_padded)


@triton.jit
def _unpack(weight, ASM: tl.constexpr, CHAINED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load bytes and return 16 times the codes in their low and in their high nibbles, four bytes an instruction.

    On the chained grid the bytes are the weights as they are, and so is each word shifted by a nibble. Four bytes that
    pack=4 puts together are then four of a row that follow each other: loads of 16 bytes and operands of products
    both hold rows so (the lint looks at the layouts it is compiled with).
    """
    q = tl.load(weight)
    if CHAINED:
        high = q
        if ASM:
            low = tl.inline_asm_elementwise("shl.b32 $0, $1, 4;", "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4)
        else:
            inside = tl.arange(0, 64)[None, :] % 4 > 0
            below = tl.load(weight - 1, mask=inside & (q == q), other=0)  # the byte below, of the same word
            low = ((q << 4) | ((below >> 4) & 15)).to(tl.int8)
    elif ASM:
        high = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xf0f0f0f0;", "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4
        )
        low = tl.inline_asm_elementwise(
            "{.reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xf0f0f0f0;}",
            "=r,r",
            [q],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        high = q & -16
        low = (q << 4).to(tl.int8)
    return low, high


# Four bytes are one register, $1; the row's multiple and offset are four alike each, $2 to $5 and $6 to $9.
FOLD_LOW = tl.constexpr("{.reg .b32 t; and.b32 t, $1, 0x0f0f0f0f; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080;}")
FOLD_HIGH = tl.constexpr(
    "{.reg .b32 t; shr.u32 t, $1, 4; and.b32 t, t, 0x0f0f0f0f; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080;}"
)


@triton.jit
def _fold(q, multiple, HIGH: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return int8 code * multiple of bytes' low or HIGH nibbles, codes + 8; ``multiple`` [ROWS] is -15..16.

    A word of four nibbles times the multiple, plus 128 - 8 multiples in each byte, is 128 + code * multiple four times,
    0..248: one multiply-add modulo 2^32, and no byte lends to another. Turning the top bits makes that signed: both
    sides of a dot are of one type here.
    """
    m = multiple.to(tl.int32)[:, None]
    if ASM:
        offset = -2139062144 - m * 0x08080808  # 0x80808080
        text: tl.constexpr = FOLD_HIGH if HIGH else FOLD_LOW
        return tl.inline_asm_elementwise(
            text, "=r,r,r,r,r,r,r,r,r,r", [q, m, offset], dtype=tl.int8, is_pure=True, pack=4
        )
    nibble = (q >> 4) & 15 if HIGH else q & 15
    return ((nibble.to(tl.int32) - 8) * m).to(tl.int8)


@triton.jit
def _largest(x_ptr, columns, tokens, k, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the largest magnitude of each of the tokens ``columns`` of x [tokens, k], and whether all are finite."""
    at = tl.arange(0, BLOCK)
    row = x_ptr + columns[None, :].to(tl.int64) * k + at[:, None]
    top = tl.zeros((BLOCK, TOKENS), tl.float32)
    bad = tl.zeros((BLOCK, TOKENS), tl.int32)
    for start in range(0, k, BLOCK):
        present = (columns[None, :] < tokens) & (start + at[:, None] < k)
        magnitude = tl.abs(tl.load(row + start, mask=present, other=0.0).to(tl.float32))
        bad |= (magnitude <= 3.4028234663852886e38).to(tl.int32) ^ 1
        top = tl.maximum(top, magnitude)
    return tl.max(top, 0), tl.max(bad, 0) == 0


@triton.jit
def linear(  # type: ignore[no-untyped-def]
    weight_ptr, scales_ptr, codes_ptr, token_scales_ptr, bias_ptr, out_ptr, parts_ptr,
    tokens, n, n_padded, k_padded, k, group_size,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, GROUPED: tl.constexpr, HALF_GROUPS: tl.constexpr,
    BIAS: tl.constexpr, ASM: tl.constexpr, CHAINED: tl.constexpr, FOLDED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Compute a ROWS x TOKENS tile of out^T, or with SPLIT > 1 the share ``program_id(1)`` of its sum into parts.

    weight int8 [n_padded, k_padded / 2], see layout; scales fp32 [groups, n_padded]; codes int8 [tokens, k_padded];
    token_scales fp32 [tokens]; parts [SPLIT, tokens, n], int32 per channel, fp32 per group. HALF_GROUPS: groups of 64.
    CHAINED: weights of the chained grid, and codes in the quantizer's order for it. FOLDED: groups whose multiples
    stand behind the scales of rows, as bytes [groups, n_padded]; not with GROUPED. FUSED: codes are floats [tokens, k]
    that each program quantizes for itself; with shares the first one writes the tokens' scales.
    """
    row_tiles = n_padded // ROWS
    tile = tl.program_id(0)
    rows = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    columns = (tile // row_tiles) * TOKENS + tl.arange(0, TOKENS)
    inside = tl.arange(0, 64)
    blocks = k_padded // 128
    first = blocks * tl.program_id(1) // SPLIT
    last = blocks * (tl.program_id(1) + 1) // SPLIT
    weight = weight_ptr + rows[:, None].to(tl.int64) * (k_padded // 2) + first * 64 + inside[None, :]
    present = columns[None, :] < tokens
    total = tl.zeros((ROWS, TOKENS), tl.float32 if GROUPED else tl.int32)
    if FUSED:
        top, finite = _largest(codes_ptr, columns, tokens, k, TOKENS, 128)
        inverse, token_scale = _grid_of(top, finite)
        step = 2 if CHAINED else 1  # low nibbles are the even inputs of a block, or its first half
        low_at = first * 128 + inside[:, None] * step
        high_at = low_at + (1 if CHAINED else 64)
        x = codes_ptr + columns[None, :].to(tl.int64) * k
    else:
        x = codes_ptr + columns[None, :].to(tl.int64) * k_padded + first * 128 + inside[:, None]
    if FOLDED:
        multiples = (scales_ptr + n_padded).to(tl.pointer_type(tl.int8)) + rows
    for block in range(first, last):
        if FOLDED:
            q = tl.load(weight)
            multiple = multiples + (block * 128 // group_size) * n_padded
            low = _fold(q, tl.load(multiple), False, ASM)
            high = _fold(q, tl.load(multiple + n_padded if HALF_GROUPS else multiple), True, ASM)
        else:
            low, high = _unpack(weight, ASM, CHAINED)
        if FUSED:
            floats = tl.load(x + low_at, mask=present & (low_at < k), other=0.0).to(tl.float32)
            x_low = _codes_of(floats, inverse[None, :])
            floats = tl.load(x + high_at, mask=present & (high_at < k), other=0.0).to(tl.float32)
            x_high = _codes_of(floats, inverse[None, :])
            low_at += 128
            high_at += 128
        else:
            x_low = tl.load(x, mask=present, other=0)
            x_high = tl.load(x + 64, mask=present, other=0)
            x += 128
        if GROUPED:
            scale = scales_ptr + (block * 128 // group_size) * n_padded + rows
            part = tl.dot(low, x_low, out_dtype=tl.int32)
            if HALF_GROUPS:
                total += part.to(tl.float32) * tl.load(scale)[:, None]
                part = tl.dot(high, x_high, out_dtype=tl.int32)
                total += part.to(tl.float32) * tl.load(scale + n_padded)[:, None]
            else:
                part = tl.dot(high, x_high, part, out_dtype=tl.int32)
                total += part.to(tl.float32) * tl.load(scale)[:, None]
        else:
            total = tl.dot(low, x_low, total, out_dtype=tl.int32)
            total = tl.dot(high, x_high, total, out_dtype=tl.int32)
        weight += 64
    stored = present & (rows[:, None] < n)
    at = columns[None, :].to(tl.int64) * n + rows[:, None]
    if SPLIT > 1:
        share = tl.program_id(1).to(tl.int64) * tokens * n
        tl.store(parts_ptr + share + at, total, mask=stored)
        if FUSED:
            first_tile = columns < tokens - tokens * tl.minimum(tl.program_id(1) + tile, 1)  # none for the others
            tl.store(token_scales_ptr + columns, token_scale, mask=first_tile)
    else:
        y = total.to(tl.float32)
        if not GROUPED:
            y *= tl.load(scales_ptr + rows)[:, None]
        if FUSED:
            y *= token_scale[None, :]
        else:
            y *= tl.load(token_scales_ptr + columns, mask=columns < tokens, other=0.0)[None, :]
        if BIAS:
            y += tl.load(bias_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def add_shares(  # type: ignore[no-untyped-def]
    parts_ptr, scales_ptr, token_scales_ptr, bias_ptr, out_ptr, tokens, n,
    SPLIT: tl.constexpr, GROUPED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the SPLIT shares of BLOCK outputs of one token in ascending order, then scale them and add the bias."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    total = tl.load(parts_ptr + token * n + columns, mask=inside, other=0)
    for share in tl.static_range(1, SPLIT):
        total += tl.load(parts_ptr + (share * tokens + token) * n + columns, mask=inside, other=0)
    y = total.to(tl.float32)
    if not GROUPED:
        y *= tl.load(scales_ptr + columns, mask=inside, other=0.0)
    y *= tl.load(token_scales_ptr + token)
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * n + columns, y.to(out_ptr.dtype.element_ty), mask=inside)
