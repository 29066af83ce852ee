"""What a QEMU says on its monitor and console, which a guest that has taken it over may choose: it ends its VM at most."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sfparallel.errors import ProtocolError, QmpError
from sfparallel.text import in_one_line, printable
from sfparallel.vmm.console import KEPT_BYTES, TAIL_BYTES, Console
from sfparallel.vmm.qmp import MAX_LINE_BYTES, decode
from tests.hostile_guest import hostile_guest

ANY = settings(deadline=None, derandomize=True, max_examples=200)

names = st.sampled_from(["event", "data", "QMP", "return", "error", "desc", "reason", "status", "timestamp"])
events = st.sampled_from(["STOP", "RESUME", "MIGRATION", "SHUTDOWN", "GUEST_PANICKED", "ACPI_DEVICE_OST", "", "x" * 5000])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | events | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=3), inner, max_size=3), max_leaves=6)
messages = (st.dictionaries(names, values, max_size=4) | values
            | st.builds(lambda event, data: {"event": event, "data": data}, events, values)
            | st.builds(lambda text: {"error": {"class": "GenericError", "desc": text}}, values))
lines = messages.map(lambda each: json.dumps(each).encode()) | st.binary(max_size=60) | st.sampled_from([
    b"[" * 3000, b'{"a":' * 3000, b"1" * 5000, b'{"return": ' + b"9" * 5000 + b"}", b'"\\ud800"', b"\xff\xfe{}", b"NaN"])


@ANY
@given(lines)
@example(b'{"event": []}')
@example(b'{"error": 7}')
@example(b'{"event": "SHUTDOWN", "data": null}')
def test_any_line_of_a_monitor(line: bytes) -> None:
    try:
        message = decode(line)
    except ProtocolError as error:
        assert len(str(error)) < 300
        return
    if "event" in message:
        assert 0 < len(message["event"]) <= 100
        assert type(message["data"]) is dict
    elif "error" in message:
        assert len(message["error"]) <= 1000
    else:
        assert "QMP" in message or "return" in message


def ended_by(*data: bytes, failures: list[Any] | None = None) -> str:
    """How a VM ends whose QEMU sends this, with a command of ours under way; the loop meets no exception."""
    failures = [] if failures is None else failures

    async def scenario() -> str:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with hostile_guest() as guest:
            status = guest.vm.qmp.send("query-status")
            loaded = guest.vm.qmp.expect(lambda event: event["event"] == "MIGRATION" and
                                         event["data"].get("status") in ("completed", "failed"))  # fmt: skip
            for each in data:
                await guest.say(each, to_monitor=True)
            cause = await guest.end()
            for future in (status, loaded):
                if future.done() and (error := future.exception()):
                    assert isinstance(error, QmpError)
                    assert len(str(error)) < 2000
            return cause

    cause = asyncio.run(scenario())
    assert failures == []
    assert len(cause) < 2000
    return cause


@settings(ANY, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(lines, max_size=6))
def test_any_stream_of_a_monitor_ends_its_vm_at_most(stream: list[bytes]) -> None:
    cause = ended_by(*(line + b"\n" for line in stream), b"\nno line of a QEMU's\n")
    assert "broke the protocol of its monitor" in cause or "guest" in cause


@pytest.mark.parametrize(("line", "says"), [
    (b"\xff\n", "not JSON"), (b"[]\n", "a list where"), (b"{}\n", "neither greeting"), (b'{"event": {}}\n', "an event without"),
    (b'{"error": {}}\n', "a refusal without"), (b"[" * 100_000 + b"\n", "not JSON"),
], ids=lambda each: str(each)[:20])  # fmt: skip
def test_a_vm_whose_qemu_lies_is_ended_with_what_it_said(line: bytes, says: str) -> None:
    cause = ended_by(line)
    assert "its QEMU broke the protocol of its monitor" in cause
    assert says in cause


def test_a_monitors_line_without_end() -> None:
    """Not an event that is counted, and not a byte of it may be kept for ever."""
    assert f"a line of more than {MAX_LINE_BYTES >> 20} MiB" in ended_by(*[b"x" * 65536] * (MAX_LINE_BYTES // 65536 + 2))


OBEYED = {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), *"\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069"}
texts = st.text(st.characters() | st.sampled_from(sorted(OBEYED)) | st.characters(categories=["Cs"]), max_size=60)


@ANY
@given(texts)
def test_no_text_of_a_guests_drives_a_terminal(text: str) -> None:
    for shown, passes in ((printable(text), "\t\n"), (in_one_line(text), "")):
        assert not (OBEYED - set(passes)) & set(shown)
        shown.encode()
        assert printable(shown) == shown
        assert len(shown) <= 10 * len(text)


many = st.binary(min_size=1, max_size=8).map(lambda each: each * 300_000)


@settings(ANY, max_examples=50)
@given(st.lists(st.binary(max_size=300) | many, max_size=6))
def test_a_console_of_any_bytes(prints: list[bytes]) -> None:
    file = os.memfd_create("console")
    console = Console(os.dup(file))
    try:
        for each in prints:
            os.write(file, each)
            console.trim()
        os.lseek(file, 0, os.SEEK_END)
        tail = console.tail()
        assert not (OBEYED - set("\t\n")) & set(tail)
        assert len(tail) <= 10 * TAIL_BYTES
        assert len(console._kept) <= KEPT_BYTES
        assert printable(tail) == tail
    finally:
        console.close()
        os.close(file)
