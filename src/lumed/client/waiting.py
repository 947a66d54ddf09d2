"""What one can wait for at a VM, and for how long."""

from __future__ import annotations

import math
import time
from typing import Literal

from lumed.client.calls import LONGEST_WAIT_S
from lumed.client.models import Vm
from lumed.errors import MachineFailed, TimedOut

Goal = Literal["stopped", "running", "ip", "ssh", "agent"]

PROGRESS_EVERY_S = 0.5
# A stream that has been silent for so long is left, and the VM looked at anew: whether ssh
# answers is found out by looking.
LOOK_AGAIN_S = 2.0
# The server says at least every 15 s that it is still there.
SILENCE_S = 45.0

_WORDS = {
    "stopped": "off",
    "running": "running",
    "ip": "reachable",
    "ssh": "reachable by ssh",
    "agent": "there with its guest agent",
}


class Deadline:
    """A point in time; one without a time-out never comes."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._at = math.inf if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """How long until then, 0 afterwards."""
        return max(0.0, self._at - time.monotonic())

    @property
    def is_over(self) -> bool:
        """Whether it has passed."""
        return self.left_s == 0

    def turn_s(self) -> float:
        """How long the server may be asked to wait before it answers."""
        return min(self.left_s, LONGEST_WAIT_S / 2)

    def check(self, what: str) -> None:
        """Raise TimedOut once it has passed."""
        if self.is_over:
            raise TimedOut(f"{what} within {self._timeout_s:g} s")


def check_goal(vm: Vm, goal: Goal) -> bool:
    """Whether a VM is there. Raises MachineFailed if it will not get there by itself."""
    may_still_run = vm.is_alive or vm.is_in_the_making
    if goal == "stopped":
        return not may_still_run
    if not may_still_run:
        why = f": {vm.last_end.detail}" if vm.last_end is not None else ""
        raise MachineFailed(f"{vm.name} is {vm.state}{why}")
    return {
        "running": vm.state == "running",
        "ip": vm.ip_address is not None,
        "ssh": vm.ip_address is not None and bool(vm.ssh_available),
        "agent": vm.guest_agent,
    }[goal]


def not_reached(vm: Vm, goal: Goal, timeout_s: float) -> TimedOut:
    """The error for a VM that took too long."""
    return TimedOut(f"{vm.name} was not {_WORDS[goal]} within {timeout_s:g} s: it is {vm.state}")
