#!/usr/bin/env python3
"""Registers the tool with systemd: a service that watches all the time.

    sudo python3 install/systemd.py install -- --drain '/opt/lb drain' --restore '/opt/lb restore'
    sudo python3 install/systemd.py status
    sudo python3 install/systemd.py uninstall

With --timer it is a check every five minutes and at boot instead.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # sudo must not leave root's files in your copy of the project

import registration  # noqa: E402
from registration import NAME, Changes, Surroundings, Trouble  # noqa: E402

SERVICE = registration.REGISTERED_BY["systemd.py"]
TIMER = SERVICE.with_suffix(".timer")
DROP_IN = SERVICE.with_name(f"{SERVICE.name}.d") / "hooks.conf"
RUNS = Path("/run/systemd/system")  # is there where systemd is process 1: sd_booted(3)
AROUND = Surroundings(Path("/"), {"PATH": registration.PATH})
# After its hook the tool may still tell Azure and the webhook, and end a hook that does not want to.
LONGER_THAN_A_HOOK = 120  # seconds

UNIT = """\
# Made by install/systemd.py of {name}; installing again replaces it.
[Unit]
Description=Takes this VM out of service before its cloud maintains it
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
{run}
KillMode=mixed
StateDirectory={name}
StateDirectoryMode=0700
Environment=PATH={path}
UMask=0077

# The tool is root here, because hooks mostly must be, but a root who can do little: read what root
# owns, write in /var, /run and /srv, reach the network and the programs of this machine that obey
# root. A hook that needs more gets it in one file of yours, which installing again leaves alone:
# {drop_in}
#   [Service]
#   # to change what is under /etc, /usr or a home:
#   ReadWritePaths=/etc/nginx
#   # to run something as another user (runuser), and to signal that user's programs:
#   CapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_KILL
#   SystemCallFilter=
#   # a hook's settings:
#   Environment=HAPROXY_SOCKET=/run/haproxy.sock
# Left open on purpose: addresses, for hooks and --notify talk to the world; memory that is written and
# then run, which Java, Node and .NET need; the sight of other processes, for whose end a hook may wait.
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=full
ProtectHome=read-only
PrivateTmp=yes
PrivateMounts=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
"""
# Azure takes up to two minutes to answer the very first time; hooks do not count, the tool is heard of
# meanwhile.
RUN_SERVICE = """\
Type=notify
ExecStart={command}
WatchdogSec=300
Restart=always
RestartSec=5
TimeoutStopSec={patience}"""
# A metadata service that does not answer (status 3) the tool reports once, not every five minutes.
RUN_ONCE = """\
Type=oneshot
ExecStart={command}
SuccessExitStatus=3
TimeoutStartSec={longest}
TimeoutStopSec={patience}"""
INSTALL_SERVICE = """
[Install]
WantedBy=multi-user.target
"""
TIMER_UNIT = f"""\
# Made by install/systemd.py of {NAME}; installing again replaces it.
[Unit]
Description=Looks every five minutes whether the cloud will maintain this VM

[Timer]
OnBootSec=10
OnCalendar=*:0/5
AccuracySec=1

[Install]
WantedBy=timers.target
"""


def unit_word(word: str) -> str:
    """One argument as ExecStart= has it: in quotes, and without specifiers and variables."""
    if re.fullmatch(r"[A-Za-z0-9_@+=:,./-]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def units(command: Sequence[str], options: argparse.Namespace) -> dict[Path, str]:
    """The unit files and their content."""
    words = [*command, *([] if options.timer else ["--watch"]), *options.tool]
    patience = int(options.parsed.hook_timeout) + LONGER_THAN_A_HOOK
    run = (RUN_ONCE if options.timer else RUN_SERVICE).format(
        command=" ".join(map(unit_word, words)), patience=patience, longest=patience + 300
    )
    service = UNIT.format(name=NAME, run=run, path=registration.PATH, drop_in=DROP_IN)
    if options.timer:
        return {SERVICE: service, TIMER: TIMER_UNIT}
    return {SERVICE: service + INSTALL_SERVICE}


def systemctl() -> str:
    """The path of systemctl.

    Raises:
        Trouble: there is no systemd.
    """
    found = shutil.which("systemctl", path=registration.PATH)
    if not found or not SERVICE.parent.is_dir():
        raise Trouble(
            "there is no systemd on this machine; let cron run the tool: sudo python3 install/cron.py install ..."
        )
    return found


def check_hooks(options: argparse.Namespace) -> None:
    """Raises Trouble for what the trial, outside of the service's confines, finds and the service would not."""
    for word in [*(options.parsed.drain or []), *(options.parsed.restore or [])]:
        if word.startswith(("/tmp/", "/var/tmp/")):  # noqa: S108 - it is refused
            raise Trouble(
                f"{word}: the service has a /tmp of its own and would not find it there; put it elsewhere, "
                "/usr/local/sbin say."
            )


def succeeds(*command: str) -> bool:
    return registration.run(command).returncode == 0


def install(options: argparse.Namespace) -> int:
    registration.need_root(options)
    control = systemctl()
    registration.check_alone(options)
    check_hooks(options)
    with Changes(options.dry_run) as changes:
        registration.prepare(changes, registration.FOR_ALL)
        command = registration.copy_tool(changes, registration.FOR_ALL, options, AROUND)
        register(changes, control, units(command, options))
        outcome = "systemd runs it every five minutes and at boot" if options.timer else "systemd keeps it watching"
        status = registration.finish(changes, registration.FOR_ALL, f"Installed: {outcome}.")
    if not RUNS.is_dir():
        print("systemd does not run here (is this an image?), so it begins at the next boot.")
    return status


def register(changes: Changes, control: str, files: dict[Path, str]) -> None:
    """Makes the units known to systemd and starts them."""
    running = RUNS.is_dir()
    unit = list(files)[-1].name  # the timer, if there is one
    was_enabled = succeeds(control, "is-enabled", "--quiet", unit)
    changed = changes.count > 0

    def as_before() -> None:
        if running:
            registration.run([control, "daemon-reload"])
            registration.run([control, "restart" if was_enabled else "stop", unit])

    changes.on_failure(f"what systemd knows of {unit}", as_before)
    other = SERVICE.name if TIMER in files else TIMER.name
    if succeeds(control, "is-enabled", "--quiet", other):
        now = ["--now"] if running else []
        changes.run(control, "disable", *now, other, undo=[control, "enable", *now, other])
    if TIMER not in files:
        changes.remove(TIMER)
    for path, content in files.items():
        changed |= changes.file(path, os.fsencode(content))
    if changed and running:
        changes.run(control, "daemon-reload")
    if changed or not was_enabled:
        changes.run(control, "enable", unit, undo=[] if was_enabled else [control, "disable", unit])
    # Started is what has said that it is ready: so this shows that the tool can work in its confines.
    if running and (changed or not succeeds(control, "is-active", "--quiet", unit)):
        changes.run(control, "restart", unit)


def uninstall(options: argparse.Namespace) -> int:
    registration.need_root(options)
    control = systemctl()
    changes = Changes(options.dry_run)
    there = [path for path in (TIMER, SERVICE) if path.exists()]
    for path in there:
        changes.run(control, "disable", *(["--now"] if RUNS.is_dir() else []), path.name)
    for path in there:
        changes.remove(path)
    if there and RUNS.is_dir():
        changes.run(control, "daemon-reload")
        registration.run([control, "reset-failed", *[path.name for path in there]])  # fails if none has
    if options.purge:
        changes.remove(DROP_IN.parent)
    elif DROP_IN.parent.is_dir():
        print(f"Your own {DROP_IN.parent} stays; --purge takes it too.")
    registration.remove_tool(changes, registration.FOR_ALL, options.purge)
    return registration.uninstalled(changes)


def status(_: argparse.Namespace) -> int:
    control = systemctl()
    unit = (TIMER if TIMER.exists() else SERVICE).name
    good = registration.report(registration.FOR_ALL)
    for question, no in (("is-enabled", "it will not start at boot"), ("is-active", "it does not run")):
        answer = registration.run([control, question, unit])
        print(f"{unit}: {registration.said(answer)}" + (f" ({no}: install it again)" if answer.returncode else ""))
        good &= answer.returncode == 0
    print(f"What it does: systemctl status {unit}; what it says: journalctl -t IsVmInMaint")
    return 0 if good else 1


def add_options(add: Callable[..., Any]) -> None:
    add("--timer", action="store_true", help="check every five minutes instead of watching all the time")


def main(argv: Sequence[str] | None = None) -> int:
    actions = {"install": install, "uninstall": uninstall, "status": status}
    return registration.main("systemd.py", argv, "Registers is_vm_in_maint.py with systemd.", add_options, actions)


if __name__ == "__main__":
    sys.exit(main())
