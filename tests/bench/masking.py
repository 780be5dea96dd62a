"""How many requests are lost when the cloud reboots one of three VMs? With the tool, and without it.

    python3 tests/bench/masking.py          about three and a half minutes

The laboratory of tests/masking_lab.py at the pace of real life: HAProxy's own default of a probe every
two seconds, HEALTH_WAIT as the hook has it, half a minute's notice, VM1 down for ten seconds. VM1 is
rebooted until there were so many requests, then as often without the tool. Needs HAProxy and nginx.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

import common

from masking_lab import SET_UPS, Lab, Outcome, Pace, Programs, Trouble

PACE = Pace(probe=2, health_wait=15, lead=25, out=10, pause=0.02)
NOTICE = 30.0
HEADINGS = ("set-up", "reboots", "requests", "failed", "longest wait of a client", "without VM1")


class Measured(NamedTuple):
    """Some reboots of VM1 in one set-up."""

    set_up: str
    hook: str  # empty without the tool
    reboots: int
    requests: int
    failed: int
    longest_wait: float  # seconds
    without_vm1: float  # seconds in which VM1 answered nobody, at most

    def row(self) -> tuple[str, ...]:
        name = f"{self.set_up}, hook {self.hook}" if self.hook else f"{self.set_up}, without the tool"
        figures = (str(self.reboots), f"{self.requests:,}", str(self.failed))
        return (name, *figures, f"{self.longest_wait:.2f} s", f"{self.without_vm1:.0f} s")


def weigh(set_up: str, hook: str, outcomes: Sequence[Outcome]) -> Measured:
    return Measured(
        set_up,
        hook,
        reboots=len(outcomes),
        requests=sum(outcome.requests for outcome in outcomes),
        failed=sum(len(outcome.failures) for outcome in outcomes),
        longest_wait=round(max(outcome.longest for outcome in outcomes), 3),
        without_vm1=round(max(outcome.out for outcome in outcomes), 1),
    )


def measure(set_up: str, requests: int, programs: Programs) -> list[Measured]:
    """Reboots VM1 with the tool until there were `requests`, then as often without it."""
    masked: list[Outcome] = []
    with Lab(set_up, PACE, programs) as lab:
        while sum(outcome.requests for outcome in masked) < requests:
            masked.append(lab.reboot(with_tool=True, notice=NOTICE))
        control = [lab.reboot(with_tool=False, notice=NOTICE) for _ in masked]
    return [weigh(set_up, SET_UPS[set_up].hook, masked), weigh(set_up, "", control)]


def find(program: str, package: str) -> str:
    """Path of a daemon; they live where a user's PATH does not look."""
    path = shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin:/sbin")
    return path or sys.exit(f"This needs {program}: apt-get install {package}")


def main() -> None:
    options = common.parse(__doc__, requests=(20_000, "requests of each set-up with the tool, at least"))
    if sys.platform != "linux":
        sys.exit("This needs Linux, where every address of 127.0.0.0/8 is this machine's own.")
    python = common.find_python()
    programs = Programs(find("haproxy", "haproxy"), find("nginx", "nginx-light"), python)
    try:
        measured = [each for set_up in SET_UPS for each in measure(set_up, options.requests, programs)]
    except Trouble as trouble:
        sys.exit(str(trouble))
    except KeyboardInterrupt:
        sys.exit(130)
    common.show("Clients before HAProxy, `balance source`, and three VMs", HEADINGS, [each.row() for each in measured])
    common.finish(python, {"masking": [each._asdict() for each in measured]})


if __name__ == "__main__":
    main()
