"""Events of a QEMU that its guest can cause, and how many of them are dealt with."""

from __future__ import annotations

EVENTS_AT_ONCE = 1000
EVENTS_PER_S = 100.0
"""Some events can be caused by the guest at any rate (ACPI_DEVICE_OST by writes to an I/O port), and each costs the supervisor
work. QEMU itself limits only a few (RTC_CHANGE, WATCHDOG, VSERPORT_CHANGE: one a second)."""

_OWN = frozenset({"STOP", "RESUME", "MIGRATION"})
"""What a fork causes does not count."""


class EventBudget:
    """So many events at once, and so many a second in the long run (a token bucket).

    Args:
        now: on the monotonic clock.
    """

    def __init__(self, now: float) -> None:
        self._left = float(EVENTS_AT_ONCE)
        self._last = now

    def allows(self, event: str, now: float) -> bool:
        """Whether there may be one more of this name."""
        if event in _OWN:
            return True
        self._left = min(EVENTS_AT_ONCE, self._left + (now - self._last) * EVENTS_PER_S)
        self._last = now
        self._left -= 1
        return self._left >= 0
