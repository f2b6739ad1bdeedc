"""Secrets in shares, so that any t of them give the secret and fewer tell nothing (Shamir 1979), over a prime field.

A secret is one number below 2**256; a share is the value of a random polynomial of degree t - 1 at a small number from
1 on, its value at 0 being the secret. Shares beyond t tell whether all are good, and with two of them for each bad
one, which are bad: ``decode``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from fedcore.errors import CryptoError

# The largest safe prime below 2**264 (both it and (PRIME - 1) / 2 are primes), so nobody can have chosen it to their
# advantage, and anybody can find it again. Devices take it from the server; 33 bytes with the top bit set, as those
# that the original draws at each start. Being fixed it is the same on all servers and after every restart.
PRIME = 2**264 - 22649
PRIME_BYTES = 33
SECRET_BYTES = 32
_REDUCED_EVERY = 8  # steps of a polynomial between two remainders: the number grows by 10 bits a step or so

Point = tuple[int, int]


class BadShare(CryptoError):
    """Shares that cannot be used: a number out of range, the same index twice, or a result that is no secret."""


def split(
    secret: int, t: int, n: int, randbelow: Callable[[int], int], prime: int = PRIME
) -> list[tuple[int, int]]:
    """Make n shares of which any t give the secret.

    Args:
        secret: 0..prime-1.
        t: 1..n.
        n: below the prime.
        randbelow: k -> a number 0..k-1, fit for keys (secrets.randbelow).
        prime: of the field.

    Returns:
        (index, share) for the indices 1..n.

    Raises:
        ValueError: t, n or the secret is out of range.
    """
    if not 1 <= t <= n < prime or not 0 <= secret < prime:
        raise ValueError(f"no {n} shares of which {t} give the secret, or the secret is not in the field")
    # The protocol draws from 1..prime-1; a zero among them would tell nothing either.
    coefficients = [1 + randbelow(prime - 1) for _ in range(t - 1)]
    return [(x, _value(secret, coefficients, x, prime)) for x in range(1, n + 1)]


def combine(points: Sequence[Point], prime: int = PRIME) -> int:
    """Return the number that shares give, all of which are used.

    Raises:
        BadShare: an index or a share is out of range, or an index is there twice.
    """
    _check(points, prime)
    weights = weights_at_zero([x for x, _ in points], prime)
    return sum(weight * y for weight, (_, y) in zip(weights, points, strict=True)) % prime


def weights_at_zero(xs: Sequence[int], prime: int = PRIME) -> list[int]:
    """Return what each share is multiplied with: for all secrets whose shares have the same indices, in this order.

    Raises:
        BadShare: an index is below 1, or there twice.
    """
    if len(set(xs)) != len(xs) or min(xs, default=1) < 1 or max(xs, default=1) >= prime:
        raise BadShare("Shares must have indices from 1 on, each its own")
    everything = math.prod(xs) % prime
    below = [x * _differences(x, xs) % prime for x in xs]
    return [everything * inverse % prime for inverse in _inverses(below, prime)]


def agreed(points: Sequence[Point], t: int, weights: Sequence[int], prime: int = PRIME) -> int | None:
    """Return the number that shares give if all of them are on one polynomial of degree t - 1, else None.

    Args:
        points: at least t, each with its own index. With t of them there is nothing that could contradict.
        t: shares that the number needs.
        weights: ``weights_at_zero`` of their indices.
        prime: of the field.
    """
    # v_i = weights_i * x_i are, but for a factor, the multipliers of the dual code: the sum of v_i * x_i**k * y_i is 0
    # for all k below m - t if and only if the degree is below t.
    terms = [weight * y % prime for weight, (_, y) in zip(weights, points, strict=True)]
    number = sum(terms) % prime
    for _ in range(len(points) - t):
        terms = [term * x % prime for term, (x, _) in zip(terms, points, strict=True)]
        if sum(terms) % prime:
            return None
    return number


def each_left_out(points: Sequence[Point], weights: Sequence[int], prime: int = PRIME) -> list[int]:
    """Return the numbers that all shares but one give, each left out once in turn; as quick as ``combine``.

    Args:
        points: t + 1 of them, each with its own index.
        weights: ``weights_at_zero`` of their indices.
        prime: of the field.
    """
    # Without share j the weight of share i is weights_i * (x_j - x_i) / x_j.
    terms = [weight * y % prime for weight, (_, y) in zip(weights, points, strict=True)]
    total, moment = sum(terms), sum(term * x for term, (x, _) in zip(terms, points, strict=True))
    return [(total - moment * inverse) % prime for inverse in _inverses([x for x, _ in points], prime)]


def secret_bytes(number: int) -> bytes:
    """Return a secret as the 32 bytes it was, zeros in front included.

    Raises:
        BadShare: it is no number of 32 bytes, so a share was wrong.
    """
    if not 0 <= number < 1 << 8 * SECRET_BYTES:
        raise BadShare("Shares give no secret of 32 bytes: one of them is wrong")
    return number.to_bytes(SECRET_BYTES, "big")


def value_at(polynomial: Sequence[int], x: int, prime: int = PRIME) -> int:
    """Return the value of a polynomial, its constant first."""
    return _value(polynomial[0], polynomial[1:], x, prime) if polynomial else 0


def decode(points: Sequence[Point], t: int, prime: int = PRIME) -> list[int] | None:
    """Find the polynomial that all but a few of the points lie on.

    With m points it is found, and is the only one, if at most (m - t) // 2 are wrong. Costs m * m multiplications,
    half a second for m = 700: for when something is wrong. Source: S. Gao, A new algorithm for decoding Reed-Solomon
    codes, 2003.

    Args:
        points: as many as there are, at least t; indices from 1 on, each its own.
        t: shares that a secret needs.
        prime: of the field.

    Returns:
        At most t coefficients, the constant (the secret) first; None if there are too many wrong ones.

    Raises:
        BadShare: an index or a share is out of range, or an index is there twice.
    """
    _check(points, prime)
    product = _product_of_roots([x for x, _ in points], prime)
    above, below = product, _interpolated(points, prime)
    factor_above, factor_below = [0], [1]
    while 2 * (len(below) - 1) >= len(points) + t:
        quotient, rest = _divided(above, below, prime)
        above, below = below, rest
        factor_above, factor_below = factor_below, _minus_product(factor_above, quotient, factor_below, prime)
    polynomial, rest = _divided(below, factor_below, prime)
    return polynomial if not rest and len(polynomial) <= t else None


# ---- numbers


def _value(constant: int, others: Sequence[int], x: int, prime: int) -> int:
    """Return the value of a polynomial by Horner's rule; remainders only now and then, as they cost most of it."""
    value = 0
    for step, coefficient in enumerate(reversed(others), 1):
        value = value * x + coefficient
        if step % _REDUCED_EVERY == 0:
            value %= prime
    return (value * x + constant) % prime


def _check(points: Sequence[Point], prime: int) -> None:
    if any(not 1 <= x < prime or not 0 <= y < prime for x, y in points):
        raise BadShare("A share or its index is out of range")
    if len({x for x, _ in points}) != len(points):
        raise BadShare("Two shares have the same index")


def _differences(x: int, xs: Sequence[int]) -> int:
    """Return the product of (other - x) over all others; indices are small, so most of it fits into machine words."""
    if max(xs) >= 1 << 15:
        return math.prod(other - x for other in xs if other != x)
    differences = np.array(xs, np.int64) - x
    differences[differences == 0] = 1
    differences = np.concatenate([differences, np.ones(-len(xs) % 4, np.int64)])
    return math.prod(differences.reshape(4, -1).prod(axis=0).tolist())


def _inverses(numbers: Sequence[int], prime: int) -> list[int]:
    """Return the inverses of numbers, none of them 0, at the cost of one and a few multiplications each."""
    products = [1]
    for number in numbers:
        products.append(products[-1] * number % prime)
    inverse = pow(products[-1], -1, prime)
    inverses = []
    for number, before in zip(reversed(numbers), reversed(products[:-1]), strict=True):
        inverses.append(inverse * before % prime)
        inverse = inverse * number % prime
    return inverses[::-1]


# ---- polynomials: coefficients, the constant first, no zeros at the end; 0 is []


def _trimmed(polynomial: list[int]) -> list[int]:
    while polynomial and not polynomial[-1]:
        polynomial.pop()
    return polynomial


def _product_of_roots(xs: Sequence[int], prime: int) -> list[int]:
    """Return the polynomial with these roots and 1 in front of the highest power."""
    product = [1]
    for x in xs:
        product = _times_root(product, x, prime)
    return product


def _times_root(polynomial: list[int], x: int, prime: int) -> list[int]:
    """Return a polynomial times (X - x)."""
    shifted, same = [0, *polynomial], [*polynomial, 0]
    return [(a - x * b) % prime for a, b in zip(shifted, same, strict=True)]


def _interpolated(points: Sequence[Point], prime: int) -> list[int]:
    """Return the polynomial of least degree through all points (Newton's form, multiplied out)."""
    xs = [x for x, _ in points]
    heights = [y for _, y in points]
    for order in range(1, len(points)):
        inverses = _inverses([(xs[i] - xs[i - order]) % prime for i in range(order, len(points))], prime)
        heights[order:] = [
            (heights[i] - heights[i - 1]) * inverse % prime
            for i, inverse in zip(range(order, len(points)), inverses, strict=True)
        ]
    polynomial = [heights[-1]]
    for x, height in zip(reversed(xs[:-1]), reversed(heights[:-1]), strict=True):
        polynomial = _times_root(polynomial, x, prime)
        polynomial[0] = (polynomial[0] + height) % prime
    return _trimmed(polynomial)


def _divided(polynomial: list[int], divisor: list[int], prime: int) -> tuple[list[int], list[int]]:
    """Return quotient and rest."""
    rest, inverse = list(polynomial), pow(divisor[-1], -1, prime)
    quotient = [0] * max(len(polynomial) - len(divisor) + 1, 0)
    for power in reversed(range(len(quotient))):
        factor = quotient[power] = rest[power + len(divisor) - 1] * inverse % prime
        if factor:
            for i, coefficient in enumerate(divisor, power):
                rest[i] = (rest[i] - factor * coefficient) % prime
    return _trimmed(quotient), _trimmed(rest)


def _minus_product(a: list[int], b: list[int], c: list[int], prime: int) -> list[int]:
    """Return a - b * c."""
    result = a + [0] * (len(b) + len(c) - 1 - len(a))
    for i, left in enumerate(b):
        for j, right in enumerate(c, i):
            result[j] = (result[j] - left * right) % prime
    return _trimmed(result)
