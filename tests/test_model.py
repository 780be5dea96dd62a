"""What a cloud writes becomes a time, a clean text or an impact; what we write can be read back."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from is_vm_in_maint import (
    IMPACT_OF_TYPE,
    MAX_TEXT,
    TYPES_OF_IMPACT,
    Event,
    Provider,
    clean,
    iso_time,
    logfmt,
    parse_time,
)

PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
APRIL = datetime(2026, 4, 11, 22, 26, 58, tzinfo=timezone.utc)

# ---- times ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Sat, 11 Apr 2026 22:26:58 GMT",
        "11 Apr 2026 22:26:58 GMT",
        "11 Apr 2026 22:26:58 +0000",
        "2026-04-11T22:26:58Z",
        "2026-04-11t22:26:58z",
        "2026-04-11 22:26:58Z",
        "2026-04-11T22:26:58+00:00",
        "2026-04-11T22:26:58",
        "4/11/2026 10:26:58 PM",
        "04/11/2026 10:26:58 pm",
        "  2026-04-11T22:26:58Z\r\n",
    ],
)
def test_every_form_of_a_time_is_understood(text: str) -> None:
    assert parse_time(text) == APRIL


@pytest.mark.parametrize(
    ("text", "iso"),
    [
        ("Mon, 11 Apr 2026 22:26:58 GMT", "2026-04-11T22:26:58Z"),  # azure; it was a Saturday
        ("21 Jan 2019 09:00:43 GMT", "2019-01-21T09:00:43Z"),  # ec2
        ("9/15/2015 6:42:51 AM", "2015-09-15T06:42:51Z"),  # azure-v1: month first
        ("2024-12-01T19:00:01Z", "2024-12-01T19:00:01Z"),  # gce
    ],
)
def test_the_examples_of_the_manuals_are_understood_wrong_day_of_the_week_included(text: str, iso: str) -> None:
    assert iso_time(parse_time(text)) == iso


@pytest.mark.parametrize(
    ("clock", "hour"), [("12:00:00 AM", 0), ("12:59:59 AM", 0), ("1:00:00 AM", 1), ("12:00:00 PM", 12)]
)
def test_the_12_hour_clock_begins_its_halves_with_12(clock: str, hour: int) -> None:
    read = parse_time(f"9/15/2015 {clock}")
    assert read is not None
    assert read.hour == hour


@pytest.mark.parametrize("fraction", [".1", ".123", ".123456", ".1234567", ".123456789"])
def test_fractions_of_a_second_of_any_length_are_dropped(fraction: str) -> None:
    assert parse_time(f"2026-04-11T22:26:58{fraction}Z") == APRIL
    assert parse_time(f"2026-04-12T00:26:58{fraction}+02:00") == APRIL


@pytest.mark.parametrize(
    "text",
    [
        "2026-04-12T00:26:58+02:00",
        "2026-04-12T00:26:58+0200",
        "2026-04-11T17:56:58-04:30",
        "12 Apr 2026 00:26:58 +0200",
        "Sat, 11 Apr 2026 14:26:58 -0800",
    ],
)
def test_another_time_zone_becomes_utc(text: str) -> None:
    read = parse_time(text)
    assert read == APRIL
    assert read.utcoffset() == timedelta(0)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "31 Dec 9999 23:59:59 GMT"])
def test_the_first_and_the_last_year_are_years(text: str) -> None:
    read = parse_time(text)
    assert read is not None
    assert read.year in (1, 9999)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+02:00", "9999-12-31T23:59:59-02:00"])
def test_a_time_that_is_outside_the_calendar_in_utc_is_none(text: str) -> None:
    assert parse_time(text) is None


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "soon", "NONE", "null", "/", "//", ":", "T", "Z", "1776032818"),
        *("2026-04-11", "22:26:58", "2026-13-11T22:26:58Z", "2026-04-31T22:26:58Z", "2026-04-11T25:00:00Z"),
        *("2026-04-11T22:26:58+99:99", "2026-04-11T22:26:58.Z", "2026-04-11T22:26:58ZZ", "0000-01-01T00:00:00Z"),
        *("15/9/2015 6:42:51 AM", "9/15/2015 13:42:51 AM", "9/15/2015", "9/15/2015 6:42:51"),
        *(
            "32 Apr 2026 22:26:58 GMT",
            "11 Foo 2026 22:26:58 GMT",
            "Mon, Apr",
            "9" * 400,
            "11 Apr 99999999999 1:2:3 GMT",
        ),
        *("\x00", "2026-04-11T22:26:58Z\x00", "²/²/²", "\ud800"),
        *(None, 0, 1776032818, 1.5, True, [], ["2026-04-11T22:26:58Z"], {}, b"2026-04-11T22:26:58Z"),
    ],
    ids=repr,
)
def test_what_is_no_time_is_none(value: object) -> None:
    assert parse_time(value) is None


@PROPERTY
@given(st.text(max_size=40) | st.text("0123456789 :/+,.()-TZAPMGJanSu", max_size=40))
def test_any_text_is_a_time_in_utc_or_none(text: str) -> None:
    read = parse_time(text)
    assert read is None or read.utcoffset() == timedelta(0)


# Each form that a cloud writes, and how.
WRITERS = {
    "iso": lambda when: when.strftime("%Y-%m-%dT%H:%M:%SZ"),
    "rfc1123": lambda when: f"{when:%a, %d %b} {when.year} {when:%H:%M:%S} GMT",
    "azure-v1": lambda when: (
        f"{when.month}/{when.day}/{when.year} {when.hour % 12 or 12}:{when:%M:%S} {'AM' if when.hour < 12 else 'PM'}"
    ),
}


@PROPERTY
@given(
    st.sampled_from(list(WRITERS)), st.datetimes(timezones=st.just(timezone.utc)).filter(lambda when: when.year >= 1000)
)
def test_whatever_time_a_cloud_writes_is_read_to_the_second(form: str, when: datetime) -> None:
    assert parse_time(WRITERS[form](when)) == when.replace(microsecond=0)


@PROPERTY
@given(st.datetimes(timezones=st.just(timezone.utc)))
def test_what_iso_time_writes_is_read_back(when: datetime) -> None:
    written = iso_time(when)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", written or "")
    assert parse_time(written) == when.replace(microsecond=0)


def test_no_time_is_written_as_none() -> None:
    assert iso_time(None) is None


# ---- text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nasty",
    [
        pytest.param("\n", id="line feed"),
        pytest.param("\r", id="carriage return"),
        pytest.param("\0", id="NUL"),
        pytest.param("\t", id="tab"),
        pytest.param("\v", id="vertical tab"),
        pytest.param("\f", id="form feed"),
        pytest.param("\x1b", id="escape"),
        pytest.param("\x7f", id="delete"),
        pytest.param("\x85", id="next line (C1)"),
        pytest.param("\x9b", id="control sequence introducer (C1)"),
        pytest.param("\u2028", id="line separator"),
        pytest.param("\u2029", id="paragraph separator"),
        pytest.param("\u202e", id="right-to-left override"),
        pytest.param("\u2066", id="isolate"),
        pytest.param("\u200b", id="zero-width space"),
        pytest.param("\ufeff", id="byte order mark"),
        pytest.param("\xad", id="soft hyphen"),
        pytest.param("\ud800", id="lone surrogate"),
        pytest.param("\ue000", id="private use"),
        pytest.param("\U000e0001", id="language tag"),
        pytest.param("\uffff", id="noncharacter"),
        pytest.param("\xa0", id="no-break space"),
    ],
)
def test_a_nasty_character_becomes_a_space(nasty: str) -> None:
    assert clean(f"a{nasty}b") == "a b"


def test_two_lines_of_a_description_become_one() -> None:
    assert (
        clean("Host server\r\nNov 22 10:00:00 web-1 sshd: forged") == "Host server  Nov 22 10:00:00 web-1 sshd: forged"
    )


@pytest.mark.parametrize(
    "text", ["naïve Größe", "保守作業", "обслуживание", "صيانة", "🛠 maintenance", "a\\b\"c'd $(id)"]
)
def test_text_in_any_script_stays_as_it_is(text: str) -> None:
    assert clean(text) == text


def test_text_is_cut_at_256_characters() -> None:
    assert clean("x" * 100_000) == "x" * MAX_TEXT
    assert MAX_TEXT == 256


@PROPERTY
@given(st.text(st.characters(exclude_categories=[]), max_size=400))
def test_clean_text_is_one_short_line_that_utf_8_can_carry(text: str) -> None:
    cleaned = clean(text)
    assert len(cleaned) <= MAX_TEXT
    assert len(cleaned.splitlines()) <= 1
    assert not any(unicodedata.category(character).startswith("C") for character in cleaned)
    cleaned.encode()
    assert clean(cleaned) == cleaned


# ---- the line ------------------------------------------------------------------------------------------

PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^\s"]+)(?: |$)')


def read_logfmt(line: str) -> dict[str, str]:
    """What a reader of logfmt sees; the whole line must be understood."""
    found, place = {}, 0
    while place < len(line):
        pair = PAIR.match(line, place)
        assert pair, f"cannot read {line[place:]!r}"
        value = pair[2]
        found[pair[1]] = json.loads(value) if value.startswith('"') else value
        place = pair.end()
    return found


def test_a_line_is_the_one_of_the_design() -> None:
    fields = {"impact": "reboot", "type": "Reboot", "not_before": "2026-11-22T10:00:00Z"}
    words = {"source": "Platform", "description": "Host server is undergoing maintenance."}
    assert logfmt({**fields, "id": None, **words}) == (
        "impact=reboot type=Reboot not_before=2026-11-22T10:00:00Z source=Platform "
        'description="Host server is undergoing maintenance."'
    )


@pytest.mark.parametrize("value", ["", " ", "a b", 'say "hi"', "a=b", "back\\slash", "\\", '"', "a, b; c", "=", "é 保"])
def test_a_value_that_needs_quotes_can_be_read_back(value: str) -> None:
    assert read_logfmt(logfmt({"id": value, "source": "Platform"})) == {"id": value, "source": "Platform"}


@PROPERTY
@given(st.dictionaries(st.sampled_from(["id", "source", "not_before"]), st.none() | st.text().map(clean)))
def test_whatever_a_cloud_writes_can_be_read_back_from_one_line(fields: dict[str, str | None]) -> None:
    line = logfmt(fields)
    assert len(line.splitlines()) <= 1
    assert read_logfmt(line) == {key: value for key, value in fields.items() if value is not None}


# ---- the event -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "impact"),
    [
        (["Maintenance"], "reboot"),
        (["Freeze"], "freeze"),
        (["Reboot"], "reboot"),
        (["Redeploy"], "redeploy"),
        (["Preempt", "Terminate"], "terminate"),
        (["MIGRATE_ON_HOST_MAINTENANCE"], "migrate"),
        (["TERMINATE_ON_HOST_MAINTENANCE", "UPCOMING_MAINTENANCE"], "stop"),
        (["PREEMPTED"], "terminate"),
        (["instance-reboot", "system-reboot"], "reboot"),
        (["system-maintenance"], "freeze"),
        (["instance-stop"], "stop"),
        (["instance-retirement"], "terminate"),
        (["spot-terminate"], "terminate"),
        (["spot-stop", "spot-hibernate"], "stop"),
        (["rebalance-recommendation"], "rebalance"),
        (["asg-terminated"], "terminate"),
    ],
    ids=str,
)
def test_the_impact_of_a_type_is_that_of_the_table(types: list[str], impact: str) -> None:
    assert impact in TYPES_OF_IMPACT
    assert [IMPACT_OF_TYPE[type] for type in types] == [impact] * len(types)


@pytest.mark.parametrize("type", ["", "reboot", "REBOOT", "Reboot2", "unknown", "保守"])
def test_any_other_type_is_of_unknown_impact(type: str) -> None:
    assert Provider("http://127.0.0.1").new_event(type, "e1").impact == "unknown"


def test_an_event_is_written_with_the_keys_of_the_design() -> None:
    event = Event("azure", "e1", "Reboot", "reboot", "scheduled", APRIL, 9, "Platform", "Host.", ("web-1",))
    document = {
        "provider": "azure",
        "id": "e1",
        "type": "Reboot",
        "impact": "reboot",
        "status": "scheduled",
        "not_before": "2026-04-11T22:26:58Z",
        "duration_seconds": 9,
        "source": "Platform",
        "description": "Host.",
        "resources": ["web-1"],
    }
    assert event.to_json() == document
    logged = ["impact", "type", "status", "not_before", "provider", "id", "source", "description"]
    assert list(event.to_log()) == logged


def test_what_a_cloud_does_not_say_is_null() -> None:
    document = Event("gce", "e1", "PREEMPTED", "terminate", "started").to_json()
    unknown = ("not_before", "duration_seconds", "source", "description")
    assert [document[key] for key in unknown] == [None] * len(unknown)
    assert document["resources"] == []


@pytest.mark.skipif(sys.platform == "win32", reason="time zones are set otherwise there")
def test_a_time_without_a_zone_is_utc_wherever_the_vm_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert parse_time("9/15/2015 6:42:51 AM") == datetime(2015, 9, 15, 6, 42, 51, tzinfo=timezone.utc)
        assert parse_time("2026-04-11T22:26:58") == APRIL
    finally:
        monkeypatch.undo()
        time.tzset()
