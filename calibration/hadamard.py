"""Hadamard matrices, generated: square matrices of +-1 with orthogonal rows, and products with them.

Sizes are a power of two (Sylvester 1867) times a base that Paley's two constructions (1933) give: 12, 20, 28, 36, 52,
60, 108, 140, 180 and many more. No table of signs is stored. 156 and 172, which no prime power gives, come doubled.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

PART = 64  # powers of two are applied as factors of at most this size: products a BLAS is good at
LARGEST_BASE = 1024  # a base is a dense matrix; a size whose smallest base is larger counts as having none


def fits(n: int) -> bool:
    """Tell whether a Hadamard matrix of size n can be made here."""
    return base(n) is not None


def times(x: Tensor, *, transposed: bool = False) -> Tensor:
    """Return ``x @ H / sqrt(n)`` for x [..., n], in x's dtype and on its device; ``transposed`` takes H.T, the inverse.

    H is the Kronecker product of its factors, so a row takes n times the sum of the factors' sizes products, not n^2.

    Raises:
        ValueError: no Hadamard matrix of size n is known here.
    """
    n = x.shape[-1]
    y, after = x.reshape(-1, n), n
    for factor in factors(n):
        size = len(factor)
        after //= size
        left = (factor if transposed else factor.T).to(x)
        rows = y.reshape(-1, size, after)  # [rows * sizes before, size, after]
        y = rows.squeeze(2) @ left.T if after == 1 else left @ rows  # one product instead of many with a vector
    return y.reshape(x.shape) / n**0.5


def matrix(n: int) -> Tensor:
    """Return the Hadamard matrix of size n, float64 on the CPU, whose product ``times`` computes.

    Raises:
        ValueError: none is known here.
    """
    result = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for factor in factors(n):
        result = torch.kron(result, factor)
    return result


@cache
def factors(n: int) -> tuple[Tensor, ...]:
    """Return the factors of the Hadamard matrix of size n, float64 on the CPU, from the left.

    Raises:
        ValueError: none is known here.
    """
    first = base(n)
    if first is None:
        raise ValueError(
            f"no Hadamard matrix of size {n} can be made: neither a power of two nor one times a Paley size"
        )
    found = [_paley(first)] if first > 1 else []
    rest = n // first
    while rest > 1:
        size = min(rest, PART)
        found.append(_sylvester(size))
        rest //= size
    return tuple(found)


@cache
def base(n: int) -> int | None:
    """Return the smallest base of n: 1 for a power of two, else a Paley size that n is a power of two times of."""
    if n < 1:
        return None
    odd = n // (n & -n)
    sizes = [odd] if odd == 1 else [odd << j for j in range(2, (n // odd).bit_length())]
    return next((m for m in sizes if m <= LARGEST_BASE and (m == 1 or _field_size(m))), None)


def _sylvester(n: int) -> Tensor:
    result = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    while len(result) < n:
        result = torch.kron(result, block)
    return result


def _field_size(m: int) -> int | None:
    """Return the q of the construction that gives size m: m = q + 1 with q = 3 mod 4, or 2 (q + 1) with q = 1 mod 4."""
    for q, remainder in ((m - 1, 3), (m // 2 - 1, 1)):
        if q % 4 == remainder and _prime_power(q):
            return q
    return None


def _paley(m: int) -> Tensor:
    q = _field_size(m)
    assert q is not None
    ones = torch.ones(q, dtype=torch.float64, device="cpu")
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64, device="cpu")  # C C.T = q I, zero diagonal
    conference[0, 1:] = ones
    conference[1:, 0] = -ones if q % 4 == 3 else ones
    conference[1:, 1:] = _characters(q)
    unit = torch.eye(q + 1, dtype=torch.float64, device="cpu")
    if q % 4 == 3:
        return unit + conference  # C is antisymmetric
    return torch.kron(conference, _sylvester(2)) + torch.kron(
        unit, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
    )


def _characters(q: int) -> Tensor:
    """Return the quadratic character of a - b for all elements a, b of the field with q elements: +-1, 0 if a is b.

    The powers of a primitive element run through the field's nonzero elements; even powers are the squares.
    """
    p, degree = _prime_power(q) or (q, 1)
    elements = list(product(range(p), repeat=degree))
    sign = dict.fromkeys(elements, 0.0)
    sign |= {element: (-1.0) ** power for power, element in enumerate(_powers(p, degree))}
    rows = [[sign[tuple((x - y) % p for x, y in zip(a, b, strict=True))] for b in elements] for a in elements]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _powers(p: int, degree: int) -> list[tuple[int, ...]]:
    """Return the powers of a primitive element of the field with p^degree elements, as coefficients of polynomials.

    The element is x modulo a polynomial x^degree - c; polynomials are tried until the powers run through everything.
    """
    one = (1,) + (0,) * (degree - 1)
    for c in product(range(p), repeat=degree):
        found, state = [one], _times_x(one, c, p)
        while state != one and len(found) < p**degree - 1 and any(state):
            found.append(state)
            state = _times_x(state, c, p)
        if state == one and len(found) == p**degree - 1:
            return found
    raise AssertionError(f"every finite field has a primitive element, that of {p}^{degree} too")


def _times_x(a: tuple[int, ...], c: tuple[int, ...], p: int) -> tuple[int, ...]:
    """Return x * a modulo x^degree - c, coefficients from the constant on, modulo p."""
    shifted = (0, *a[:-1])
    return tuple((s + a[-1] * d) % p for s, d in zip(shifted, c, strict=True))


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, degree) with p^degree = q and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    degree = 0
    while q % p == 0:
        q //= p
        degree += 1
    return (p, degree) if q == 1 else None
