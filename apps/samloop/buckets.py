"""How often something may be done, counted for each of many, in bounded memory."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict

#: Those that are remembered; the ones that have been quiet for longest are forgotten first.
REMEMBERED = 4096


class Buckets:
    """A token bucket for each key. To be used from one thread, the event loop's.

    Args:
        per_minute: How fast a bucket fills.
        burst: How much it holds.
    """

    def __init__(self, *, per_minute: float, burst: float) -> None:
        self._rate = per_minute / 60
        self._burst = burst
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, key: str, cost: float = 1.0) -> float:
        """Seconds until ``cost`` can be taken; 0 where it can be now."""
        return max(0.0, (cost - self._level(key)) / self._rate)

    def take(self, key: str, cost: float = 1.0) -> float:
        """Take ``cost`` where there is as much; otherwise nothing, and the seconds until there is."""
        seconds = self.wait(key, cost)
        if not seconds:
            self._levels[key] = (self._level(key) - cost, time.monotonic())
            self._levels.move_to_end(key)
            if len(self._levels) > REMEMBERED:
                self._levels.popitem(last=False)
        return seconds

    def _level(self, key: str) -> float:
        if key not in self._levels:
            return self._burst
        level, at = self._levels[key]
        return min(self._burst, level + (time.monotonic() - at) * self._rate)


def client_key(client: tuple[str, int] | None) -> str:
    """What stands for a client: its IPv4 address, or the /64 of its IPv6 address, of which one has many."""
    host = client[0] if client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.ip_network((address.packed[:8] + bytes(8), 64)))


def is_local(client: tuple[str, int] | None) -> bool:
    """Whether a client is on this computer; one without an address is."""
    try:
        return ipaddress.ip_address(client[0] if client else "").is_loopback
    except ValueError:
        return True
