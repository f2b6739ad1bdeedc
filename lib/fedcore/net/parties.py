"""Who a connection is counted for, and how much each may have: connections at a time, requests in a while.

A party is an IPv4 address, or the first 64 bits of an IPv6 one, which is what one subscriber gets. Behind a carrier's
address translation, or a load balancer that does not say whom it speaks for, thousands of devices are one party: limits
by party are off unless the operator knows better.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address

_PREFIX = (1 << 128) - (1 << 64)


@lru_cache(maxsize=4096)
def party_of(host: str) -> str:
    """Return whom an address is counted for."""
    if ":" not in host:
        return host
    try:
        address = IPv6Address(host)
    except AddressValueError:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) & _PREFIX))


class Headcount:
    """How many connections each party has."""

    def __init__(self, most: int = 0) -> None:
        """Allow each party ``most`` connections, 0 for any number."""
        self._most = most
        self._counts: Counter[str] = Counter()

    def __getitem__(self, party: str) -> int:
        return self._counts[party]

    def full(self, party: str) -> bool:
        """Tell whether a party has all that it may have."""
        return bool(self._most) and self._counts[party] >= self._most

    def enter(self, party: str) -> None:
        """Count a connection."""
        self._counts[party] += 1

    def leave(self, party: str) -> None:
        """Count one less, and forget who has none."""
        self._counts[party] -= 1
        if self._counts[party] <= 0:
            del self._counts[party]


class Allowance:
    """How many requests each party may still send: a bucket that fills at a rate, up to its size.

    Source: the token bucket of RFC 2697, without its second size.
    """

    def __init__(self, rate: float, burst: int) -> None:
        """Allow ``rate`` requests a second, 0 for any number, and ``burst`` at once, >= 1."""
        self._rate = rate
        self._burst = float(burst)
        self._buckets: dict[str, tuple[float, float]] = {}  # party -> requests left, and when that was

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, party: str, now: float) -> bool:
        """Take one request of a party's; False if it has none left. ``now`` is monotonic seconds."""
        if not self._rate:
            return True
        left, then = self._buckets.get(party, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        self._buckets[party] = (left - 1.0 if left >= 1.0 else left), now
        return left >= 1.0

    def forget(self, now: float) -> None:
        """Forget those whose buckets are full again; to be called now and then, so that memory stays bounded."""
        if self._buckets:
            enough = self._burst / self._rate
            self._buckets = {
                party: bucket for party, bucket in self._buckets.items() if now - bucket[1] < enough
            }
