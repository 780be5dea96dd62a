"""The second promise, proved with everything real but the machines: nobody notices the reboot of VM1.

masking_lab.py is the laboratory. In one run VM1 is rebooted twice by its cloud under the eyes of 36
clients that never ask twice: with the tool on every VM, and without it, so that we know that the
clients would have noticed. A request has failed when there was no connection, no whole answer, or a
status other than 200.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from conftest import need
from masking_lab import SET_UPS, VMS, Lab, Outcome, Pace, Programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="everybody has an address of 127.0.0.0/8")

PACE = Pace(probe=0.25, health_wait=2, lead=6, out=1.5, pause=0.1)


class Proof(NamedTuple):
    masked: Outcome  # with the tool
    control: Outcome  # without it


# A laboratory is set up once for all its tests; in a parallel run they stay together.
@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group("masking")) for name in SET_UPS]
)
def proof(request: pytest.FixtureRequest) -> Proof:
    programs = Programs(need("haproxy", "haproxy"), need("nginx", "nginx-light"), sys.executable)
    with Lab(request.param, PACE, programs) as lab:
        # The drain takes about three seconds of the seven. Without the tool nobody needs them.
        return Proof(lab.reboot(with_tool=True, notice=7), lab.reboot(with_tool=False, notice=1))


def test_no_request_is_lost_when_the_tool_masks_the_reboot(proof: Proof) -> None:
    assert proof.masked.failures == []


def test_requests_are_lost_without_the_tool_or_the_proof_would_prove_nothing(proof: Proof) -> None:
    assert proof.control.failures


def test_the_clients_of_vm1_are_served_by_the_others_while_it_reboots(proof: Proof) -> None:
    before, meanwhile = proof.masked.before, proof.masked.meanwhile
    assert before["vm1"]
    assert not meanwhile["vm1"]
    assert before["vm1"] <= meanwhile["vm2"] | meanwhile["vm3"]


def test_each_client_keeps_to_its_vm_and_after_the_restore_is_back_at_it(proof: Proof) -> None:
    before, after = proof.masked.before, proof.masked.after
    assert sum(map(len, before.values())) == len(set().union(*before.values()))
    assert after == before


def test_only_the_vm_that_is_hit_is_drained_and_each_thing_is_done_once(proof: Proof) -> None:
    """The tool on VM1 is killed with its VM; the one that starts after the boot knows what is done."""
    words = {vm: [line.split(": ")[1] for line in proof.masked.journals[vm]] for vm in VMS}
    assert [word for word in words["vm1"] if word != "VM Event started"] == [
        "Incoming VM Event",
        "VM drained",
        "VM Event over",
        "VM restored",
    ]
    assert words["vm2"] == words["vm3"] == []
