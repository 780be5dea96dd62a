"""How many requests are lost when the cloud reboots one of three VMs? With the tool, and without it.

    python3 tests/bench/masking.py

The laboratory of tests/masking_lab.py at the pace of a real one: HAProxy's own default of a probe every
two seconds, HEALTH_WAIT as the hook has it, VM1 down for ten seconds. VM1 is rebooted until there were
so many requests, with the tool and as often without. Prints a table, then the same as JSON. Needs
HAProxy and nginx; takes about four minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "install")]

import environment  # noqa: E402 - found through the line above
from masking_lab import SET_UPS, Lab, Outcome, Pace, Programs, Trouble  # noqa: E402

PACE = Pace(probe=2, health_wait=15, lead=25, out=10, pause=0.02)
NOTICE = 30.0
COLUMNS = "{:<32} {:>7} {:>9} {:>7} {:>12} {:>9}"


def row(set_up: str, outcomes: Sequence[Outcome], *, with_tool: bool) -> dict[str, object]:
    return {
        "set_up": set_up,
        "hook": SET_UPS[set_up].hook,
        "with_tool": with_tool,
        "reboots": len(outcomes),
        "requests": sum(outcome.requests for outcome in outcomes),
        "failed": sum(len(outcome.failures) for outcome in outcomes),
        "longest_wait_seconds": round(max(outcome.longest for outcome in outcomes), 2),
        "vm1_out_seconds": round(max(outcome.out for outcome in outcomes), 1),
    }


def measure(set_up: str, requests: int, programs: Programs) -> list[dict[str, object]]:
    """Reboots VM1 with the tool until there were `requests`, then as often without it."""
    masked: list[Outcome] = []
    with Lab(set_up, PACE, programs) as lab:
        while sum(outcome.requests for outcome in masked) < requests:
            masked.append(lab.reboot(with_tool=True, notice=NOTICE))
        control = [lab.reboot(with_tool=False, notice=NOTICE) for _ in masked]
    return [row(set_up, masked, with_tool=True), row(set_up, control, with_tool=False)]


def line(measured: dict[str, object]) -> str:
    name = f"{measured['set_up']}, {measured['hook']}" if measured["with_tool"] else "  the same without the tool"
    return COLUMNS.format(
        name,
        measured["reboots"],
        f"{measured['requests']:,}",
        measured["failed"],
        f"{measured['longest_wait_seconds']} s",
        f"{measured['vm1_out_seconds']} s",
    )


def find(program: str, package: str) -> str:
    path = shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin:/sbin")
    return path or sys.exit(f"This needs {program}: apt-get install {package}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests lost in the reboot of one of three VMs.")
    parser.add_argument("--requests", type=int, default=20_000, help="of each set-up with the tool, at least (20000)")
    options = parser.parse_args()
    if sys.platform != "linux":
        sys.exit("This needs Linux, where every address of 127.0.0.0/8 is this machine's own.")
    try:
        python = environment.find_or_make(ROOT / ".venv-bench")
        programs = Programs(find("haproxy", "haproxy"), find("nginx", "nginx-light"), str(python))
        print(COLUMNS.format("VMs, hook", "reboots", "requests", "failed", "longest wait", "VM1 out"), flush=True)
        measured = []
        for set_up in SET_UPS:
            rows = measure(set_up, options.requests, programs)
            print("\n".join(map(line, rows)), flush=True)
            measured += rows
    except (environment.CannotMake, Trouble) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
