"""The agent's parts without I/O (frames, THAW, netlink), on the host, with ASan and UBSan."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sfparallel
from sfparallel.wire import HEADER, FrameType, pack

AGENT = Path(sfparallel.__file__).parent / "runtime" / "agent"
DRIVER = Path(__file__).parent / "native_agent" / "agent_pure.c"

Pure = Callable[..., str]
FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def pure(tmp_path_factory: pytest.TempPathFactory) -> Pure:
    """Runs the driver: `pure(mode, data, ...) -> what it printed`."""
    folder = tmp_path_factory.mktemp("agent")
    subprocess.run(["make", "-s", "-C", str(AGENT), f"OUT={folder}", f"DRIVER={DRIVER}", f"{folder}/agent_pure"], check=True)

    # A message may announce four thousand million elements: libmsgpack asks for the memory, and must cope with a refusal.
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1"}

    def call(mode: str, data: bytes = b"", *arguments: str) -> str:
        argv = [str(folder / "agent_pure"), mode, *arguments]
        done = subprocess.run(argv, input=data, capture_output=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    return call


def identity(**changes: Any) -> dict[str, Any]:
    return {
        "role": "clone", "time_ns": 1_700_000_000_123_456_789, "entropy": bytes(range(64)), "hostname": "sf-3",
        "machine_id": "0123456789abcdef" * 2, "mac": bytes([10, 83, 70, 0, 0, 9]), "address": "10.83.0.9", "prefix": 16,
        "mtu": 9000, "neighbours": [["10.83.0.1", bytes(6)], ["10.83.0.2", bytes([10, 83, 70, 0, 0, 2])]], **changes,
    }  # fmt: skip


def digest(payload: bytes) -> int:
    result = 0
    for byte in payload:
        result = (result * 31 + byte) & 0xFFFFFFFF
    return result


def test_the_agent_links_with_either_name_of_msgpack(tmp_path: Path) -> None:
    """Debian 13 has only libmsgpack-c.a: the folder searched first has it so, and nothing by the old name."""
    names = ("libmsgpackc.a", "libmsgpack-c.a")
    paths = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
    library = next(path for path in paths if path.startswith("/"))
    (tmp_path / "libmsgpack-c.a").write_bytes(Path(library).read_bytes())
    (tmp_path / "libmsgpackc.a").write_bytes(b"!<arch>\n")
    argv = ["make", "-s", "-C", str(AGENT), f"CC=gcc -B{tmp_path}", f"OUT={tmp_path}", f"{tmp_path}/sfagent"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "sfagent").read_bytes()[:4] == b"\x7fELF"


@FUZZ
@given(
    frames=st.lists(st.tuples(st.integers(32, 39), st.integers(0, 65535), st.binary(max_size=300)), max_size=8),
    piece=st.integers(1, 700),
)
def test_frames_come_out_as_they_went_in(pure: Pure, frames: list[tuple[int, int, bytes]], piece: int) -> None:
    stream = b"".join(HEADER.pack(len(payload), kind, channel) + payload for kind, channel, payload in frames)
    expected = "".join(f"{kind} {channel} {len(payload)} {digest(payload)}\n" for kind, channel, payload in frames)
    assert pure("frames", stream, str(piece)) == expected + "end 0\n"


def test_largest_frames_fit(pure: Pure) -> None:
    payload = b"x" * (1 << 20)
    stream = (HEADER.pack(len(payload), 36, 5) + payload) * 3
    assert pure("frames", stream, "99999").count(f"36 5 {1 << 20} ") == 3


@pytest.mark.parametrize("header", [(1 << 20 | 1, 33, 0), (0, 1, 0), (0, max(FrameType) + 1, 0), (0xFFFFFFFF, 35, 0)])
def test_impossible_headers_are_refused(pure: Pure, header: tuple[int, int, int]) -> None:
    assert pure("frames", HEADER.pack(*header), "8") == "end -71\n"


@FUZZ
@given(data=st.binary(max_size=4000), piece=st.integers(1, 5000))
def test_frame_parser_survives_anything(pure: Pure, data: bytes, piece: int) -> None:
    assert "end " in pure("frames", data, str(piece))


def test_thaw_is_decoded(pure: Pure) -> None:
    message = {"identity": identity(), "channel": 7, "reply": b"12345", "mounts": [[3, "/home/u"], [65535, "/data"]]}
    assert pure("thaw", pack(message)).splitlines() == [
        f"identity 1 1700000000123456789 sf-3 {'0123456789abcdef' * 2} 10.83.0.9 16 9000 63",
        "neighbour 10.83.0.1 00",
        "neighbour 10.83.0.2 02",
        "reply 7 5",
        "mount 3 /home/u",
        "mount 65535 /data",
    ]


def test_thaw_without_identity(pure: Pure) -> None:
    assert pure("thaw", pack({"identity": None, "channel": 0, "reply": None, "mounts": []})) == "reply 0 0\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("role", "boss"), ("time_ns", -1), ("time_ns", "now"), ("entropy", bytes(63)), ("entropy", "x" * 64), ("hostname", ""),
        ("hostname", "h" * 65), ("hostname", "a\0b"), ("machine_id", "g" * 32), ("machine_id", "0" * 31), ("mac", bytes(5)),
        ("address", "10.83.0"), ("address", "::1"), ("prefix", 33), ("prefix", 0), ("mtu", 0), ("mtu", 1 << 40),
        ("neighbours", None),
    ],
)  # fmt: skip
def test_a_wrong_identity_is_refused(pure: Pure, field: str, value: object) -> None:
    assert pure("thaw", pack({"identity": identity(**{field: value})})) == f"bad {field}\n"


def test_a_missing_field_is_refused(pure: Pure) -> None:
    for field in identity():
        who = identity()
        del who[field]
        assert pure("thaw", pack({"identity": who})) == f"bad {field}\n"


@pytest.mark.parametrize("mounts", [[[1, "relative"]], [[1]], [["1", "/a"]], [[65536, "/a"]], [[1, "/" + "a" * 5000]]])
def test_a_wrong_mount_is_refused(pure: Pure, mounts: list[Any]) -> None:
    assert pure("thaw", pack({"identity": None, "mounts": mounts})) == "reply 0 0\nbad mount\n"


JSON = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=70) | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(field=st.sampled_from(sorted(identity())), value=JSON)
def test_thaw_decoder_survives_any_field(pure: Pure, field: str, value: object) -> None:
    assert pure("thaw", pack({"identity": identity(**{field: value}), "channel": 0, "reply": None, "mounts": []}))


@FUZZ
@given(data=st.binary(max_size=300))
def test_decoders_survive_anything(pure: Pure, data: bytes) -> None:
    assert pure("thaw", data)
    assert pure("report", data)
    pure("answers", data)


def test_reports(pure: Pure) -> None:
    assert pure("report", pack({"pid": 77})) == "pid 77\n"
    assert pure("report", pack({"exited": 77, "status": 256})) == "exited 77 256\n"
    assert pure("report", pack({"exited": 77})) == "bad\n"


def test_netlink_messages(pure: Pure) -> None:
    """Against pyroute2, which encodes the same messages independently."""
    rtnl = pytest.importorskip("pyroute2.netlink.rtnl")
    ifinfmsg = pytest.importorskip("pyroute2.netlink.rtnl.ifinfmsg").ifinfmsg
    ifaddrmsg = pytest.importorskip("pyroute2.netlink.rtnl.ifaddrmsg").ifaddrmsg
    ndmsg = pytest.importorskip("pyroute2.netlink.rtnl.ndmsg").ndmsg
    first, full = pure("batch").splitlines()
    result, count, text = first.split()
    assert (result, count) == ("0", "4")
    assert full == "-105 1", "a full batch must say so, and not grow"
    data = bytes.fromhex(text)
    forms = {
        rtnl.RTM_SETLINK: ifinfmsg, rtnl.RTM_NEWADDR: ifaddrmsg, rtnl.RTM_DELADDR: ifaddrmsg, rtnl.RTM_NEWNEIGH: ndmsg,
    }  # fmt: skip
    found = []
    offset = 0
    while offset < len(data):
        length, kind, flags, sequence = struct.unpack_from("<IHHI", data, offset)
        message = forms[kind](data[offset:offset + length])
        message.decode()
        found.append((kind, flags, sequence, message))
        offset += (length + 3) & ~3
    kinds = [rtnl.RTM_DELADDR, rtnl.RTM_SETLINK, rtnl.RTM_NEWADDR, rtnl.RTM_NEWNEIGH]
    assert [entry[0] for entry in found] == kinds
    assert [entry[2] for entry in found] == [42, 43, 44, 45]
    assert [bool(entry[1] & 4) for entry in found] == [False, False, False, True], "only the last is acknowledged"
    assert found[1][3].get_attr("IFLA_ADDRESS") == "0a:53:46:00:00:01"
    assert found[2][3].get_attr("IFA_LOCAL") == "10.83.0.9" and found[2][3]["prefixlen"] == 16
    assert found[1][3].get_attr("IFLA_MTU") == 9000 and found[1][3]["flags"] & 1
    assert found[3][3].get_attr("NDA_DST") == "10.83.0.2" and found[3][3].get_attr("NDA_LLADDR") == "0a:53:46:00:00:02"
    assert found[3][3]["state"] == 0x80
