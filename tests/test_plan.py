"""The plan keeps the rules of DESIGN.md: one test for each promise, then properties over random histories."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from functools import reduce
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from is_vm_in_maint import TYPES_OF_IMPACT, Action, Boot, Event, Reading, Rules, State, imminent, plan, record

NOW = datetime(2026, 11, 22, 10, 0, tzinfo=timezone.utc)
BOOT = Boot("this-boot", NOW - timedelta(days=9))
REBOOTED = Boot("next-boot", NOW + timedelta(minutes=20))
DRAINS = Rules(drains=True)
APPROVES = Rules(drains=True, approves=True)
# A slow machine is no failure.
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def minutes(number: float) -> datetime:
    """So many minutes from NOW."""
    return NOW + timedelta(minutes=number)


def an_event(id: str = "e1", at: float | None = 60, impact: str = "reboot", **fields: Any) -> Event:
    """An Azure event of this VM alone, `at` minutes from NOW."""
    given: dict[str, Any] = {"provider": "azure", "type": "Reboot", "status": "scheduled", "resources": ("web-1",)}
    not_before = None if at is None else minutes(at)
    return Event(id=id, impact=impact, not_before=not_before, **{**given, **fields})


def started(event: Event) -> Event:
    """The same event once Azure has begun: the time is gone."""
    return event._replace(status="started", not_before=None)


def ec2_event(at: float | None = 10, **fields: Any) -> Event:
    return an_event("instance-event-1", at, provider="ec2", type="system-reboot", **fields)


def words(action: Action) -> str:
    """What an action is, for a human: `over e1 ended`."""
    return " ".join(filter(None, [action.verb, action.event and action.event.id, action.note]))


def begun(state: State, action: Action) -> State:
    """The state while the action is performed: that a drain begins is recorded before it does."""
    return state._replace(drained_for=action.event, draining=True) if action.verb == "drain" else state


class Vm:
    """One VM's state, from check to check."""

    def __init__(self, rules: Rules = DRAINS) -> None:
        self.rules = rules
        self.state = State(boot=BOOT.id)
        self.boot = BOOT

    def plan(self, *events: Event, at: float = 0, doubts: Sequence[str] = ()) -> list[Action]:
        return plan(self.state, Reading(events, tuple(doubts)), minutes(at), self.rules, self.boot)

    def check(self, *events: Event, at: float = 0, doubts: Sequence[str] = ()) -> list[str]:
        """Do all that is planned when these events are announced; say what that was."""
        actions = self.plan(*events, at=at, doubts=doubts)
        self.state = reduce(record, actions, self.state)
        return [words(action) for action in actions]

    def check_that_fails_at(self, verb: str, *events: Event, at: float = 0) -> None:
        """A check that goes as far as this action and does not get it done: a hook that fails, or a SIGKILL."""
        for action in self.plan(*events, at=at):
            if action.verb == verb:
                self.state = begun(self.state, action)
                return
            self.state = record(self.state, action)
        pytest.fail(f"no {verb} was planned")


# ---- what happens to an event is said once -------------------------------------------------------------


def test_nothing_announced_is_nothing_to_do() -> None:
    assert Vm().check() == []


def test_each_thing_that_happens_to_an_event_is_said_once() -> None:
    vm = Vm()
    event = an_event(at=60)
    assert [vm.check(event) for _ in range(3)] == [["announced e1"], [], []]
    moved = an_event(at=120)
    assert [vm.check(moved) for _ in range(3)] == [["moved e1"], [], []]
    begun = started(moved)
    assert [vm.check(begun, at=120) for _ in range(3)] == [["started e1", "drain e1"], [], []]
    assert [vm.check(at=125) for _ in range(3)] == [["over e1 ended", "restore e1"], [], []]


def test_an_event_first_seen_as_started_is_announced_and_not_said_to_start_as_well() -> None:
    vm = Vm()
    assert vm.check(started(an_event())) == ["announced e1", "drain e1"]
    assert vm.check(started(an_event())) == []


def test_an_event_that_had_started_is_over_as_ended() -> None:
    vm = Vm(Rules())
    vm.check(started(an_event(at=60)))
    assert vm.check() == ["over e1 ended"]


def test_an_event_whose_time_had_come_is_over_as_ended() -> None:
    vm = Vm(Rules())
    vm.check(an_event(at=60))
    assert vm.check(at=60) == ["over e1 ended"]


def test_an_event_that_disappears_before_its_time_is_over_as_cancelled() -> None:
    vm = Vm(Rules())
    vm.check(an_event(at=60))
    assert vm.check(at=59) == ["over e1 cancelled"]


def test_an_event_without_a_time_may_have_begun_so_it_is_over_as_ended() -> None:
    vm = Vm(Rules())
    vm.check(an_event(at=None))
    assert vm.check() == ["over e1 ended"]


def test_an_event_that_starts_early_is_started_and_not_moved() -> None:
    vm = Vm(Rules())
    vm.check(an_event(at=60))
    assert vm.check(an_event(at=10, status="started")) == ["started e1"]


def test_an_event_that_is_put_off_after_it_started_is_moved() -> None:
    vm = Vm()
    vm.check(started(an_event()))
    assert vm.check(an_event(at=600)) == ["moved e1", "restore e1"]


def test_an_event_that_reads_scheduled_again_at_its_old_time_is_moved_once() -> None:
    vm = Vm(Rules())
    vm.check(an_event(at=60, status="started"))
    assert [vm.check(an_event(at=60)) for _ in range(2)] == [["moved e1"], []]


def test_a_time_that_can_be_read_no_more_moves_nothing() -> None:
    vm = Vm()
    vm.check(an_event(at=60))
    assert vm.check(an_event(at=None)) == []
    assert vm.check(an_event(at=None), at=45) == ["drain e1"], "the time that was known still counts"


def test_an_event_that_comes_back_is_announced_anew() -> None:
    vm = Vm(Rules())
    vm.check(an_event())
    vm.check()
    assert vm.check(an_event()) == ["announced e1"]


def test_events_are_logged_one_by_one() -> None:
    vm = Vm(Rules())
    assert vm.check(an_event("e1"), an_event("e2")) == ["announced e1", "announced e2"]
    assert vm.check(an_event("e1", at=90), started(an_event("e2"))) == ["moved e1", "started e2"]
    assert vm.check(an_event("e3")) == ["announced e3", "over e1 cancelled", "over e2 ended"]


# ---- draining is about the VM --------------------------------------------------------------------------


def test_a_far_event_is_logged_at_once_and_drains_when_the_lead_begins() -> None:
    vm = Vm()
    event = an_event(at=7 * 24 * 60)
    assert vm.check(event) == ["announced e1"]
    assert vm.check(event, at=7 * 24 * 60 - 15.1) == []
    assert vm.check(event, at=7 * 24 * 60 - 15) == ["drain e1"]


def test_the_lead_is_the_administrators() -> None:
    vm = Vm(Rules(lead=timedelta(hours=2), drains=True))
    assert vm.check(an_event(at=119)) == ["announced e1", "drain e1"]


def test_an_event_without_a_time_drains_at_once() -> None:
    assert Vm().check(an_event(at=None)) == ["announced e1", "drain e1"]


def test_an_event_that_is_late_stays_imminent() -> None:
    vm = Vm()
    event = an_event(at=5)
    vm.check(event)
    assert vm.check(event, at=600) == []
    assert vm.state.drained_for


def test_overlapping_events_drain_once_and_restore_after_the_last() -> None:
    vm = Vm()
    assert vm.check(an_event("e1", at=5)) == ["announced e1", "drain e1"]
    assert vm.check(an_event("e1", at=5), an_event("e2", at=8), at=1) == ["announced e2"]
    assert vm.check(an_event("e2", at=8), at=6) == ["over e1 ended"], "e2 is still pending"
    assert vm.check(at=9) == ["over e2 ended", "restore e1"]


def test_a_far_event_does_not_keep_the_vm_out_of_service() -> None:
    vm = Vm()
    far = an_event("far", at=10_000)
    assert vm.check(far, an_event("near", at=5)) == ["announced far", "announced near", "drain near"]
    assert vm.check(far, at=10) == ["over near ended", "restore near"]


def test_the_event_that_comes_first_is_the_reason_to_drain() -> None:
    assert Vm().check(an_event("later", at=9), an_event("first", at=3))[-1] == "drain first"


def test_an_event_put_off_beyond_the_lead_restores_the_vm_until_it_is_near_again() -> None:
    vm = Vm()
    vm.check(an_event(at=5))
    assert vm.check(an_event(at=500)) == ["moved e1", "restore e1"]
    assert vm.check(an_event(at=500), at=490) == ["drain e1"]


def test_a_cancelled_event_restores_the_vm() -> None:
    vm = Vm()
    vm.check(an_event(at=5))
    assert vm.check() == ["over e1 cancelled", "restore e1"]


@pytest.mark.parametrize("impact", ["freeze", "rebalance"])
def test_an_ignored_impact_is_logged_and_never_drains(impact: str) -> None:
    vm = Vm()
    event = an_event(at=1, impact=impact)
    assert vm.check(event) == ["announced e1"]
    assert vm.check(started(event)) == ["started e1"]
    assert vm.check() == ["over e1 ended"]


def test_an_ignored_event_does_not_keep_the_vm_out_of_service() -> None:
    vm = Vm()
    freeze = an_event("freeze", at=1, impact="freeze")
    vm.check(freeze, an_event("e1", at=1))
    assert vm.check(freeze) == ["over e1 cancelled", "restore e1"]


def test_what_is_ignored_is_the_administrators() -> None:
    assert Vm(Rules(ignore=frozenset(), drains=True)).check(an_event(at=1, impact="freeze"))[-1] == "drain e1"
    assert Vm(Rules(ignore=frozenset(["reboot"]), drains=True)).check(an_event(at=1)) == ["announced e1"]


def test_an_unknown_impact_drains() -> None:
    assert Vm().check(an_event(at=1, impact="unknown")) == ["announced e1", "drain e1"]


def test_without_a_drain_command_nothing_is_drained() -> None:
    vm = Vm(Rules())
    assert vm.check(an_event(at=1)) == ["announced e1"]
    assert vm.check() == ["over e1 cancelled"]


def test_a_failed_drain_is_tried_again_as_long_as_it_is_wanted() -> None:
    vm = Vm()
    for _ in range(3):
        vm.check_that_fails_at("drain", an_event(at=5))
    assert vm.check(an_event(at=5)) == ["drain e1"]
    vm.check_that_fails_at("restore")
    assert vm.check() == ["restore e1"]


def test_a_failed_drain_is_undone_when_the_event_is_over_for_it_may_have_had_its_effect() -> None:
    vm = Vm()
    vm.check_that_fails_at("drain", an_event(at=5))
    assert vm.check() == ["over e1 cancelled", "restore e1"]
    assert vm.check() == []


def test_a_drain_that_was_cut_short_by_the_reboot_is_undone_after_it() -> None:
    vm = Vm()
    vm.check_that_fails_at("drain", ec2_event(at=10))
    vm.boot = REBOOTED
    assert vm.check(ec2_event(at=10), at=21)[-1] == "restore instance-event-1"


def test_a_drain_that_was_cut_short_is_done_again_for_the_event_that_is_imminent_now() -> None:
    vm = Vm()
    vm.check_that_fails_at("drain", an_event("e1", at=5))
    assert vm.check(an_event("e2", at=5)) == ["announced e2", "over e1 cancelled", "drain e2"]
    assert vm.check(an_event("e2", at=5)) == []


def test_with_a_doubt_a_drain_that_was_cut_short_is_done_again_and_not_undone() -> None:
    vm = Vm()
    vm.check_that_fails_at("drain", an_event(at=5))
    assert vm.check(doubts=["refused"]) == ["unreachable refused", "drain e1"]


def test_a_check_without_hooks_does_not_take_a_drained_vm_for_restored() -> None:
    vm = Vm()
    vm.check(an_event(at=5))
    vm.rules = Rules()
    assert vm.check() == ["over e1 cancelled"]
    vm.rules = DRAINS
    assert vm.check() == ["restore e1"]


def test_a_failed_restore_is_given_up_when_the_next_event_is_imminent() -> None:
    vm = Vm()
    vm.check(an_event("e1", at=5))
    vm.check_that_fails_at("restore")
    assert vm.check(an_event("e2", at=5)) == ["announced e2"]
    assert vm.state.drained_for


# ---- fail static ---------------------------------------------------------------------------------------


def test_failing_is_said_once_and_so_is_recovering() -> None:
    vm = Vm()
    assert [vm.check(doubts=["refused"]) for _ in range(3)] == [["unreachable refused"], [], []]
    assert [vm.check() for _ in range(3)] == [["reachable"], [], []]
    assert vm.check(doubts=["refused"]) == ["unreachable refused"]


def test_with_a_doubt_nothing_is_over_and_nothing_is_restored() -> None:
    vm = Vm()
    vm.check(an_event(at=5))
    assert vm.check(doubts=["refused"], at=600) == ["unreachable refused"]
    assert vm.check(doubts=["refused"], at=1200) == []
    assert vm.check(at=1205) == ["reachable", "over e1 ended", "restore e1"]


def test_with_a_doubt_a_known_event_still_drains_when_its_time_comes() -> None:
    vm = Vm()
    vm.check(an_event(at=60))
    assert vm.check(doubts=["refused"], at=10) == ["unreachable refused"]
    assert vm.check(doubts=["refused"], at=45) == ["drain e1"]


def test_with_a_doubt_what_was_understood_is_still_news() -> None:
    vm = Vm()
    vm.check(an_event("e1"))
    assert vm.check(an_event("e2", at=5), doubts=["half of it"]) == [
        "unreachable half of it",
        "announced e2",
        "drain e2",
    ]
    assert vm.check(started(an_event("e1")), doubts=["half of it"]) == ["started e1"]


def test_with_a_doubt_an_event_that_is_put_off_does_not_restore_the_vm() -> None:
    vm = Vm()
    vm.check(an_event(at=5))
    assert "restore e1" not in vm.check(an_event(at=500), doubts=["half of it"])
    assert vm.check(an_event(at=500)) == ["reachable", "restore e1"]


def test_the_very_first_check_may_fail_too() -> None:
    vm = Vm()
    vm.state = State()
    assert vm.check(doubts=["refused"]) == ["unreachable refused"]
    assert vm.check(an_event()) == ["reachable", "announced e1", "booted this-boot"]


# ---- the reboot itself ---------------------------------------------------------------------------------


def test_the_first_check_after_the_reboot_restores_the_vm() -> None:
    vm = Vm()
    vm.check(an_event(at=10))
    vm.boot = REBOOTED
    assert vm.check(at=21) == ["over e1 ended", "booted next-boot", "restore e1"]


def test_an_ec2_event_that_reads_active_after_its_reboot_is_over_once_and_never_new() -> None:
    vm = Vm()
    event = ec2_event(at=10)
    assert vm.check(event) == ["announced instance-event-1", "drain instance-event-1"]
    vm.boot = REBOOTED
    assert vm.check(event, at=21) == [
        "over instance-event-1 ended",
        "booted next-boot",
        "restore instance-event-1",
    ]
    assert [vm.check(event, at=21 + 5 * number) for number in range(3)] == [[], [], []]
    assert vm.check(at=600) == []


def test_an_ec2_event_without_a_time_is_over_after_the_reboot_too() -> None:
    vm = Vm(Rules())
    vm.check(ec2_event(at=None))
    vm.boot = REBOOTED
    assert vm.check(ec2_event(at=None), at=21) == ["over instance-event-1 ended", "booted next-boot"]


def test_an_ec2_event_is_pending_after_a_reboot_before_its_time() -> None:
    vm = Vm()
    vm.check(ec2_event(at=60))
    vm.boot = REBOOTED
    assert vm.check(ec2_event(at=60), at=21) == ["booted next-boot"]
    assert vm.check(ec2_event(at=60), at=50) == ["drain instance-event-1"]


def test_an_ec2_event_given_a_new_time_after_its_reboot_is_news() -> None:
    vm = Vm()
    vm.check(ec2_event(at=10))
    vm.boot = REBOOTED
    vm.check(ec2_event(at=10), at=21)
    assert vm.check(ec2_event(at=40), at=30) == ["announced instance-event-1", "drain instance-event-1"]


def test_with_a_doubt_after_the_reboot_the_ec2_event_is_over_as_soon_as_the_doubt_is_gone() -> None:
    vm = Vm()
    vm.check(ec2_event(at=10))
    vm.boot = REBOOTED
    assert vm.check(ec2_event(at=10), doubts=["half of it"], at=21) == ["unreachable half of it"]
    assert vm.check(ec2_event(at=10), at=26)[:2] == ["reachable", "over instance-event-1 ended"]
    assert vm.check(ec2_event(at=10), at=31) == []


def test_an_ec2_event_that_a_new_tool_finds_is_not_taken_for_one_that_the_reboot_was() -> None:
    vm = Vm()
    vm.state = State()
    late = ec2_event(at=-10_000_000)  # its time came before this boot, and it still reads active
    assert vm.check(late, doubts=["half of it"])[:2] == ["unreachable half of it", "announced instance-event-1"]
    assert vm.check(late) == ["reachable", "booted this-boot"]
    assert vm.check(late) == []


def test_an_event_of_another_cloud_that_is_listed_after_a_reboot_is_not_over() -> None:
    vm = Vm()
    vm.check(started(an_event()))
    vm.boot = REBOOTED
    assert vm.check(started(an_event()), at=21) == ["booted next-boot"]


def test_a_spot_interruption_after_a_reboot_is_not_over() -> None:
    vm = Vm()
    spot = an_event("spot-stop/2026-11-22T10:02:00Z", at=2, provider="ec2", type="spot-stop", impact="stop")
    vm.check(spot)
    vm.boot = REBOOTED
    assert vm.check(spot, at=21) == ["booted next-boot"]


# ---- approve -------------------------------------------------------------------------------------------


def test_an_imminent_event_of_this_vm_alone_is_approved_once_and_after_the_drain() -> None:
    vm = Vm(APPROVES)
    assert vm.check(an_event(at=10)) == ["announced e1", "drain e1", "approve e1"]
    assert vm.check(an_event(at=10)) == []


def test_a_second_imminent_event_is_approved_though_the_vm_is_drained_already() -> None:
    vm = Vm(APPROVES)
    vm.check(an_event("e1", at=10))
    assert vm.check(an_event("e1", at=10), an_event("e2", at=12)) == ["announced e2", "approve e2"]


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(an_event(at=10, resources=("web-1", "web-2")), id="names another VM as well"),
        pytest.param(an_event(at=10, resources=()), id="names nobody"),
        pytest.param(an_event(at=60), id="is not imminent"),
        pytest.param(an_event(at=10, impact="freeze"), id="is ignored"),
        pytest.param(an_event(at=10, status="started"), id="has started"),
        pytest.param(an_event(at=10, provider="azure-v1"), id="is not of Scheduled Events"),
    ],
)
def test_nothing_is_approved_that(event: Event) -> None:
    assert "approve e1" not in Vm(APPROVES).check(event)


def test_without_approve_nothing_is_approved() -> None:
    assert "approve e1" not in Vm(DRAINS).check(an_event(at=10))


def test_nothing_is_approved_before_the_drain_has_succeeded() -> None:
    vm = Vm(APPROVES)
    vm.check_that_fails_at("drain", an_event(at=10))
    assert vm.check(an_event(at=10)) == ["drain e1", "approve e1"]


def test_a_failed_approval_is_tried_again() -> None:
    vm = Vm(APPROVES)
    vm.check_that_fails_at("approve", an_event(at=10))
    assert vm.check(an_event(at=10)) == ["approve e1"]


# ---- the edges of time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("year", [1, 9999])
def test_a_time_at_the_edge_of_the_calendar_is_planned_for(year: int) -> None:
    event = an_event()._replace(not_before=datetime(year, 1, 1, tzinfo=timezone.utc))
    assert Vm().check(event)[0] == "announced e1"
    assert imminent(event, NOW, timedelta(minutes=15)) == (year == 1)


def test_the_state_does_not_grow_for_ever() -> None:
    vm = Vm(APPROVES)
    for number in range(500):
        vm.check(an_event(f"e{number}", at=1))
    assert len(vm.state.events) == 1
    assert len(vm.state.finished) < 100
    assert len(vm.state.approved) < 100


# ---- properties ----------------------------------------------------------------------------------------


# Times before, at, just after and long after NOW, with the lead of 15 minutes in between.
CONDITIONS = [
    {"at": at, "impact": impact, "status": status, "resources": resources}
    for at in (None, -200, -10, 0, 10, 20, 200)
    for impact in ("reboot", "freeze", "unknown")
    for status in ("scheduled", "started")
    for resources in (("web-1",), ("web-1", "web-2"))
]


class Step(NamedTuple):
    """What one check of a random life finds."""

    reading: Reading
    now: datetime
    boot: Boot


@st.composite
def lives(draw: st.DrawFn) -> list[Step]:
    """Whatever a service says from check to check, with doubts and reboots, as time goes forward."""
    provider, prefix = draw(st.sampled_from([("azure", "e"), ("ec2", "instance-event-"), ("ec2", "spot-stop/")]))
    seen = st.tuples(*3 * [st.none() | st.sampled_from(CONDITIONS)])
    pauses = st.sampled_from([(minutes, reboots) for minutes in (0, 1, 10, 100) for reboots in (False, True)])
    steps, at, boot = [], -50, BOOT
    for conditions, doubts, (pause, reboots) in draw(
        st.lists(st.tuples(seen, st.sampled_from([(), (), ("refused",)]), pauses), min_size=1, max_size=6)
    ):
        at += pause
        boot = Boot(f"boot at {at}", minutes(at)) if reboots else boot
        events = [an_event(f"{prefix}{i}", provider=provider, **each) for i, each in enumerate(conditions) if each]
        steps.append(Step(Reading(tuple(events), doubts), minutes(at), boot))
    return steps


rules_of_any_kind = st.builds(
    Rules,
    lead=st.sampled_from([timedelta(), timedelta(minutes=15), timedelta(hours=2)]),
    ignore=st.sampled_from([frozenset(), frozenset(["freeze"]), frozenset(TYPES_OF_IMPACT)]),
    drains=st.booleans(),
    approves=st.booleans(),
)


def planned(state: State, step: Step, rules: Rules) -> list[Action]:
    return plan(state, step.reading, step.now, rules, step.boot)


@PROPERTY
@given(lives(), rules_of_any_kind)
def test_every_event_is_announced_first_and_over_last_and_each_only_once(life: list[Step], rules: Rules) -> None:
    state, alive = State(), set()
    for step in life:
        for action in planned(state, step, rules):
            state = record(state, action)
            id = action.event.id if action.event else ""
            if action.verb == "announced":
                assert id not in alive
                alive.add(id)
            elif action.verb in ("started", "moved"):
                assert id in alive
            elif action.verb == "over":
                alive.remove(id)
        assert alive == set(state.events)


@PROPERTY
@given(lives(), rules_of_any_kind)
def test_no_notice_is_lost(life: list[Step], rules: Rules) -> None:
    state = State()
    for step in life:
        state = reduce(record, planned(state, step, rules), state)
        for event in step.reading.events:
            # The one exception: what EC2 still lists as active after the reboot that it was.
            before_this_boot = event.not_before is None or event.not_before <= step.boot.at
            lived_through = event.provider == "ec2" and event.id in state.finished and before_this_boot
            assert event.id in state.events or lived_through


@PROPERTY
@given(lives(), rules_of_any_kind)
def test_a_doubt_ends_nothing_and_restores_nothing(life: list[Step], rules: Rules) -> None:
    state = State()
    for step in life:
        actions = planned(state, step, rules)
        if step.reading.doubts:
            assert not {action.verb for action in actions} & {"over", "restore", "reachable", "booted"}
        state = reduce(record, actions, state)


@PROPERTY
@given(lives(), rules_of_any_kind)
def test_drained_is_the_vm_exactly_as_long_as_something_that_counts_is_imminent(life: list[Step], rules: Rules) -> None:
    state, drained = State(), False
    for step in life:
        for action in planned(state, step, rules):
            if action.verb in ("drain", "restore"):
                assert drained == (action.verb == "restore"), "never drained twice, never restored twice"
                drained = not drained
            state = record(state, action)
        counts = [event for event in state.events.values() if event.impact not in rules.ignore]
        wanted = rules.drains and any(imminent(event, step.now, rules.lead) for event in counts)
        if not step.reading.doubts or not drained:
            assert drained == wanted


@PROPERTY
@given(lives(), rules_of_any_kind)
def test_what_is_done_is_not_done_again(life: list[Step], rules: Rules) -> None:
    state = State()
    for step in life:
        state = reduce(record, planned(state, step, rules), state)
        assert planned(state, step, rules) == []


@PROPERTY
@given(lives(), rules_of_any_kind, st.data())
def test_killed_after_any_action_the_next_run_goes_on_with_the_one_that_followed(
    life: list[Step], rules: Rules, data: st.DataObject
) -> None:
    state = State()
    for step in life:
        actions = planned(state, step, rules)
        for done in range(len(actions) + 1):
            assert planned(reduce(record, actions[:done], state), step, rules) == actions[done:]
            if actions[done : done + 1]:
                in_the_midst = begun(reduce(record, actions[:done], state), actions[done])
                assert planned(in_the_midst, step, rules) == actions[done:]
        # Some runs are killed for real, and the service says something else at the next.
        survived = data.draw(st.integers(0, len(actions)), label="actions before the kill")
        state = reduce(record, actions[:survived], state)
        if data.draw(st.booleans(), label="killed in the midst of the next"):
            state = reduce(begun, actions[survived : survived + 1], state)


@PROPERTY
@given(lives(), rules_of_any_kind)
def test_failing_and_recovering_alternate(life: list[Step], rules: Rules) -> None:
    state, failing = State(), False
    for step in life:
        for action in planned(state, step, rules):
            if action.verb in ("unreachable", "reachable"):
                assert failing == (action.verb == "reachable")
                failing = not failing
            state = record(state, action)
        assert failing == bool(step.reading.doubts)


@PROPERTY
@given(lives(), rules_of_any_kind)
def test_only_what_hits_this_vm_alone_is_approved_and_once(life: list[Step], rules: Rules) -> None:
    state, approved = State(), []
    for step in life:
        for action in planned(state, step, rules):
            if action.verb == "approve":
                assert action.event is not None
                assert rules.approves
                assert action.event.resources == ("web-1",)
                assert imminent(action.event, step.now, rules.lead)
                assert action.event.impact not in rules.ignore
                approved.append(action.event.id)
            state = record(state, action)
    assert len(approved) == len(set(approved))
