"""The guest agent and the zygote, in a real guest, without engine or supervisor: raw QEMU, its port and its monitor.

A guest is booted once and its state kept in a file (QEMU's own migration); every test gets a VM that wakes up from there.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sfparallel.errors import ImageMissing
from sfparallel.vmm import image
from sfparallel.vmm.files import FileServer
from sfparallel.wire import Frame, FrameParser, FrameType, pack, unpack

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.needs("image")]

PATIENCE_S = 120.0
QUIET_S = 0.3
COMMAND_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/root"}


class Monitor:
    """A QMP connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb", 0)
        self._file.readline()
        self.events: list[dict[str, Any]] = []
        self("qmp_capabilities")

    def __call__(self, command: str, descriptor: int | None = None, **arguments: object) -> Any:
        message = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._connection, [message], [] if descriptor is None else [descriptor])
        while True:
            answer = self._read()
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise EOFError("QEMU is gone")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        self._file.close()
        self._connection.close()

    def event(self, name: str, **data: object) -> None:
        """Wait for an event with this data."""
        while not any(event["event"] == name and data.items() <= event["data"].items() for event in self.events):
            self._read()

    def migrate(self, command: str, descriptor: int) -> None:
        """Write the VM's state to a file, or read it from there, to the end."""
        self("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self("getfd", descriptor, fdname="state")
        self(command, uri="fd:state")
        self.event("MIGRATION", status="completed")


class Guest:
    """A VM on sockets."""

    def __init__(self, chosen: image.Image, console: Path, state: int | None = None) -> None:
        self.console = console
        port, their_port = socket.socketpair()
        monitor, their_monitor = socket.socketpair()
        self._port = port
        self._parser = FrameParser()
        self._frames: list[Frame] = []
        self.taken = 0
        self.answer_fuse: Callable[[int, bytes], bytes | None] | None = None
        passed = [their_port.fileno(), their_monitor.fileno()]
        argv = [
            "qemu-system-x86_64", "-M", "q35,usb=off,suppress-vmdesc=on", "-accel", "tcg", "-cpu", "max,la57=off", "-m", "384",
            "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-S",
            "-chardev", f"socket,id=agent,fd={passed[0]}", "-device", "virtio-serial-pci,addr=0x1",
            "-device", "virtserialport,nr=1,chardev=agent,name=sf.agent",
            "-blockdev", f"driver=file,filename={chosen.root},node-name=root,read-only=on",
            "-device", "virtio-blk-pci,drive=root,addr=0x2",
            "-netdev", "user,id=net0,restrict=on", "-device", "virtio-net-pci,netdev=net0,addr=0x3,romfile=",
            "-device", "pvpanic", "-chardev", f"socket,id=monitor,fd={passed[1]}", "-mon", "chardev=monitor,mode=control",
            "-serial", f"file:{console}",
        ]  # fmt: skip
        if state is None:
            argv += ["-kernel", str(chosen.kernel), "-initrd", str(image.guest_half(chosen))]
            argv += ["-append", image.KERNEL_COMMAND_LINE]
        else:
            argv += ["-incoming", "defer"]
        self.process = subprocess.Popen(argv, pass_fds=passed, stderr=subprocess.DEVNULL)
        their_port.close()
        their_monitor.close()
        self.monitor = Monitor(monitor)
        if state is not None:
            os.lseek(state, 0, os.SEEK_SET)
            self.monitor.migrate("migrate-incoming", state)
        self.monitor("cont")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._port.close()
        self.monitor.close()

    # -- frames --

    def send(self, kind: FrameType, payload: bytes = b"", channel: int = 0) -> None:
        self._port.settimeout(PATIENCE_S)
        self._port.sendall(Frame(kind, payload, channel).encode())

    def _receive(self, timeout_s: float) -> None:
        self._port.settimeout(timeout_s)
        data = self._port.recv(1 << 16)
        if not data:
            raise EOFError(f"QEMU is gone; console:\n{self.console.read_text(errors='replace')[-3000:]}")
        for frame in self._parser.feed(data):
            if frame.type is FrameType.FUSE and self.answer_fuse:
                answer = self.answer_fuse(frame.channel, frame.payload)
                if answer is not None:
                    self.send(FrameType.FUSE_REPLY, answer, frame.channel)
            elif frame.type is FrameType.TAKEN:
                self.taken += 1
            else:
                self._frames.append(frame)

    def frame(self) -> Frame:
        while not self._frames:
            self._receive(PATIENCE_S)
        return self._frames.pop(0)

    def expect(self, kind: FrameType) -> Frame:
        """The next frame, which must be of this type."""
        frame = self.frame()
        assert frame.type is kind, frame
        return frame

    def skip_to(self, kind: FrameType) -> Frame:
        """The next frame of this type; output before it is dropped."""
        while (frame := self.frame()).type is not kind:
            assert frame.type is FrameType.OUTPUT, frame
        return frame

    def assert_silent(self) -> None:
        """Nothing comes for a while: this is the one wait that has no event to wait for."""
        with pytest.raises(TimeoutError):
            self._receive(QUIET_S)
        assert not self._frames and not self._parser.pending_bytes

    # -- the protocol --

    def thaw(self, who: dict[str, Any] | None = None, channel: int = 0, reply: bytes | None = None,
             mounts: list[list[Any]] | None = None) -> dict[str, Any]:  # fmt: skip
        self.send(FrameType.THAW, pack({"identity": who, "channel": channel, "reply": reply, "mounts": mounts or []}))
        return unpack(self.expect(FrameType.WOKEN).payload)

    def freeze(self) -> dict[str, Any]:
        self.send(FrameType.FREEZE)
        return unpack(self.skip_to(FrameType.FROZEN).payload)

    def run(self, code: str, *arguments: str, mode: str = "command", cwd: str = "/", path0: str = "") -> None:
        self.send(FrameType.RUN, pack({"argv": [code, *arguments], "mode": mode, "cwd": cwd, "env": COMMAND_ENVIRONMENT,
                                       "path0": path0}))  # fmt: skip

    def signal(self, number: int) -> None:
        self.send(FrameType.SIGNAL, number.to_bytes(4, "little"))

    def output_until(self, text: str) -> str:
        """Standard output up to a text."""
        seen = ""
        while text not in seen:
            frame = self.expect(FrameType.OUTPUT)
            seen += frame.payload.decode()
        return seen

    def ended(self) -> Ended:
        """All output until the program ends."""
        result = Ended()
        while (frame := self.frame()).type is not FrameType.EXITED:
            if frame.type is FrameType.OUTPUT:
                result.text[frame.channel] += frame.payload
            else:
                assert frame.type in (FrameType.GONE, FrameType.REQUEST), frame
        result.report = unpack(frame.payload)
        return result

    def execute(self, code: str, *arguments: str, **options: str) -> Ended:
        self.run(code, *arguments, **options)
        return self.ended()


@dataclass
class Ended:
    """A program that has ended."""

    text: dict[int, bytes] = field(default_factory=lambda: {1: b"", 2: b""})
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> str:
        return self.text[1].decode()

    @property
    def err(self) -> str:
        return self.text[2].decode()

    @property
    def status(self) -> int:
        """Exit status, or minus the signal."""
        return os.waitstatus_to_exitcode(self.report["status"])


def identity(role: str = "parent", number: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "role": role, "time_ns": time.time_ns(), "entropy": secrets.token_bytes(64), "hostname": f"sf-{number}",
        "machine_id": secrets.token_hex(16), "mac": bytes([10, 83, 70, 0, 0, number]), "address": f"10.83.0.{number}",
        "prefix": 16, "mtu": 9000, "neighbours": [["10.83.0.77", bytes([10, 83, 70, 0, 0, 77])]], **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[image.Image, int]]:
    """A guest that has booted to its first FROZEN, as the descriptor of a state file."""
    try:
        chosen = image.find()
    except ImageMissing as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("booted")
    guest = Guest(chosen, folder / "console")
    state = os.open(folder / "state", os.O_RDWR | os.O_CREAT)
    try:
        assert unpack(guest.expect(FrameType.FROZEN).payload) == {"oom_kills": 0, "agent": "1"}
        guest.assert_silent()
        guest.monitor("stop")
        guest.monitor.migrate("migrate", state)
        assert "sfagent" not in (folder / "console").read_text(errors="replace")
        guest.close()
        yield chosen, state
    finally:
        guest.close()
        os.close(state)


@pytest.fixture
def frozen(booted: tuple[image.Image, int], tmp_path: Path) -> Iterator[Guest]:
    """A VM resumed from there: it waits for THAW."""
    chosen, state = booted
    guest = Guest(chosen, tmp_path / "console", state)
    try:
        yield guest
    finally:
        guest.close()


@pytest.fixture
def guest(frozen: Guest) -> Guest:
    """The same as a parent, thawed."""
    frozen.thaw(identity())
    return frozen


# -- programs ----------------------------------------------------------------------------------------------------------


def test_program_runs_as_main(guest: Guest) -> None:
    code = "import sys, os; print(__name__, sys.argv, os.getcwd(), sys.path[0], file=sys.stderr); print(os.environ['HOME'])"
    ended = guest.execute(code, "one", "two", cwd="/usr", path0="/first")
    assert ended.out == "/root\n"
    assert ended.err == "__main__ ['-c', 'one', 'two'] /usr /first\n"
    assert ended.report == {"status": 0, "oom_kills": 0}


def test_input_is_acknowledged_when_the_program_has_read_it(guest: Guest) -> None:
    guest.run("import sys, time; time.sleep(1); print(len(sys.stdin.read()))")
    before = guest.taken
    for _ in range(8):  # more than a pipe holds
        guest.send(FrameType.STDIN, b"x" * (32 << 10))
    guest.send(FrameType.STDIN)
    assert guest.ended().out == f"{8 * (32 << 10)}\n"
    assert guest.taken > before


def test_stdin_reaches_the_program(guest: Guest) -> None:
    big = secrets.token_hex(300_000).encode()  # more than a pipe holds
    guest.run("import sys, hashlib, time; time.sleep(0.2); print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())")
    for start in range(0, len(big), 50_000):
        guest.send(FrameType.STDIN, big[start:start + 50_000])
    guest.send(FrameType.STDIN)
    import hashlib

    assert guest.ended().out == hashlib.sha256(big).hexdigest() + "\n"


def test_output_is_complete_and_in_order(guest: Guest) -> None:
    ended = guest.execute("import sys\nfor i in range(60000): sys.stdout.write(f'{i}\\n')\nsys.stderr.write('e' * 200000)")
    assert ended.out == "".join(f"{i}\n" for i in range(60000))
    assert ended.err == "e" * 200_000


@pytest.mark.parametrize("channel", [1, 2])
def test_output_that_nobody_reads_is_a_broken_pipe(guest: Guest, channel: int) -> None:
    guest.run(
        "import os, subprocess\nprint('ready'); input()\n"
        f"died = subprocess.run(['cat', '/proc/version'], stdout={channel}).returncode\n"
        f"try: os.write({channel}, b'x')\nexcept BrokenPipeError: os.write({3 - channel}, b'broken %d' % died)\n"
    )
    guest.output_until("ready")
    guest.send(FrameType.CLOSE, channel=channel)
    guest.send(FrameType.STDIN, b"\n")
    assert guest.ended().text[3 - channel].endswith(f"broken {-signal.SIGPIPE}".encode())


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit('sorry')", 1, "sorry\n"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_exit_status(guest: Guest, code: str, status: int, message: str) -> None:
    ended = guest.execute(code)
    assert (ended.status, ended.err) == (status, message)


def test_traceback_is_that_of_the_program_alone(guest: Guest) -> None:
    ended = guest.execute("def f():\n    1 / 0\n\nf()")
    assert ended.status == 1
    lines = ended.err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == '  File "<string>", line 4, in <module>'
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert guest.execute("x = (").err.splitlines()[0] == '  File "<string>", line 1'


def test_script_and_module(guest: Guest) -> None:
    script = "/usr/lib/python3.11/this.py"
    ended = guest.execute(script, mode="script", path0="/usr/lib/python3.11")
    assert ended.status == 0 and "Beautiful is better than ugly." in ended.out
    guest.run("json.tool", "--compact", mode="module")
    guest.send(FrameType.STDIN, b'{"a": [1, 2]}')
    guest.send(FrameType.STDIN)
    assert guest.ended().out == '{"a":[1,2]}\n'
    assert guest.execute("no.such.module", mode="module").status == 1
    assert guest.execute("/no/such/script.py", mode="script").status == 2
    assert guest.execute("1", cwd="/no/such/folder").status == 2


def test_interrupt_ends_it_like_python(guest: Guest) -> None:
    guest.run("import atexit, time\natexit.register(print, 'tidied up')\nprint('ready')\nwhile True: time.sleep(.1)")
    guest.output_until("ready\n")
    guest.signal(signal.SIGINT)
    ended = guest.ended()
    assert ended.status == -signal.SIGINT
    assert ended.out == "tidied up\n" and ended.err.endswith("KeyboardInterrupt\n") and "zygote" not in ended.err


def test_signal_reaches_the_whole_group(guest: Guest) -> None:
    guest.run("import subprocess; p = subprocess.Popen(['/bin/sleep', '1000']); print('ready', flush=True); print(p.wait())")
    guest.output_until("ready\n")
    guest.signal(signal.SIGTERM)
    assert guest.ended().status == -signal.SIGTERM


def test_programs_do_not_share_random_numbers(guest: Guest) -> None:
    code = "import random, numpy, tempfile, os; print(random.random(), numpy.random.rand(), tempfile.mktemp(), os.urandom(8))"
    first, second = (guest.execute(code).out.split() for _ in range(2))
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_out_of_memory_kills_the_program_only(guest: Guest) -> None:
    ended = guest.execute("print(open('/proc/self/oom_score_adj').read())\nx = [bytes(1 << 20) + b'x' for i in range(900)]")
    assert ended.out.strip() == "0"
    assert ended.status == -signal.SIGKILL and ended.report["oom_kills"] >= 1
    assert guest.execute("print('alive')").out == "alive\n"


# -- local clients -----------------------------------------------------------------------------------------------------

CONNECT = """
import socket, sys, msgpack, time, os, threading
agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
agent.connect('/run/sfparallel/agent.sock')
def say(*words): print(*words, flush=True)
def ask(**message): agent.send(msgpack.packb(message))
def hear(): return msgpack.unpackb(agent.recv(1 << 18))
"""


def test_requests_and_replies(guest: Guest) -> None:
    guest.run(CONNECT + "ask(op='x', id=1, data=bytes(130000)); say(len(hear()['data'])); ask(op='y', id=2); say(hear(), hear())")
    request = guest.expect(FrameType.REQUEST)
    assert unpack(request.payload) == {"op": "x", "id": 1, "data": bytes(130_000)}
    guest.send(FrameType.REPLY, pack({"id": 1, "data": bytes(131_000)}), request.channel)
    assert guest.output_until("\n") == "131000\n"
    assert guest.expect(FrameType.REQUEST).channel == request.channel
    guest.send(FrameType.REPLY, pack({"event": "e"}), request.channel)
    guest.send(FrameType.REPLY, pack({"id": 2}), 999)  # no such client: dropped
    guest.send(FrameType.REPLY, pack({"id": 2}), request.channel)
    assert guest.output_until("\n") == "{'event': 'e'} {'id': 2}\n"
    gone = guest.frame()
    assert (gone.type, gone.channel) == (FrameType.GONE, request.channel)
    assert guest.ended().status == 0


def test_oversized_request_ends_its_connection_only(guest: Guest) -> None:
    ended = guest.execute(CONNECT + "agent.send(bytes(131073)); say(agent.recv(10))")
    assert ended.out == "b''\n"
    assert guest.execute("print(1)").out == "1\n"


def test_replies_wait_for_a_slow_client(guest: Guest) -> None:
    guest.run(CONNECT + "ask(op='x', id=1); sys.stdin.read(); say(sum(len(agent.recv(1 << 18)) for i in range(40)))")
    channel = guest.expect(FrameType.REQUEST).channel
    for _ in range(40):
        guest.send(FrameType.REPLY, bytes(100_000), channel)
    guest.send(FrameType.STDIN)
    assert guest.ended().out == "4000000\n"


# -- freeze and identity -----------------------------------------------------------------------------------------------

BUSY = CONNECT + """
def spin():
    while True: sum(range(1000))
def talk():
    while True: say('x' * 500)
for work in (spin, spin, talk, talk): threading.Thread(target=work, daemon=True).start()
"""


def test_freeze_stops_a_busy_program(guest: Guest) -> None:
    guest.run(BUSY + "sys.stdin.readline(); os._exit(3)")
    guest.output_until("xxx")
    for _ in range(3):
        guest.freeze()
        guest.assert_silent()
        guest.thaw()
        guest.output_until("xxx")
    guest.send(FrameType.STDIN, b"\n")
    assert guest.ended().status == 3


CLONE = CONNECT + """
import zmq
server = socket.create_server(('10.83.0.1', 5000))
near = socket.create_connection(('10.83.0.1', 5000))
far, _ = server.accept()
local = socket.create_server(('127.0.0.1', 5001)); here = socket.create_connection(('127.0.0.1', 5001)); there, _ = local.accept()
datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); datagram.connect(('10.83.0.1', 7))
context = zmq.Context()
router = context.socket(zmq.ROUTER); router.bind('tcp://10.83.0.1:6000')
dealer = context.socket(zmq.DEALER); dealer.connect('tcp://10.83.0.1:6000'); dealer.send(b'x'); router.recv_multipart()
def state(connection):
    try:
        connection.send(b'x')
        return 'alive'
    except OSError:
        return 'dead'
read = lambda path: open(path).read().strip()
ask(op='other', id=7); ask(op='clone', id=8)
answers = sorted((hear() for _ in range(2)), key=lambda answer: answer['id'])
say(answers)
say(*[state(s) for s in (near, far, here, datagram)])
say(socket.gethostname(), read('/etc/hostname'), read('/etc/machine-id'), socket.gethostbyname(socket.gethostname()))
neighbour = [line for line in open('/proc/net/arp') if '10.83.0.88' in line][0].split()[3]
say(read('/sys/class/net/eth0/address'), read('/sys/class/net/eth0/mtu'), neighbour)
routes = read('/proc/net/fib_trie')
say('10.83.0.1\\n' in routes, '10.83.0.9\\n' in routes, read('/run/sfparallel/role'))
say(int(time.time()), repr(sys.stdin.read()))
again = context.socket(zmq.DEALER); other = context.socket(zmq.ROUTER); other.bind('tcp://10.83.0.9:6001')
again.connect('tcp://10.83.0.9:6001'); again.send(b'y'); say(other.recv_multipart()[1])
os._exit(0)
"""


def test_clone_takes_its_own_identity(guest: Guest) -> None:
    guest.run(CLONE)
    guest.send(FrameType.STDIN, b"what the parent's user typed")
    guest.expect(FrameType.REQUEST)
    channel = guest.expect(FrameType.REQUEST).channel
    guest.freeze()
    who = identity("clone", 9, time_ns=2_000_000_000 * 10**9, neighbours=[["10.83.0.88", bytes([10, 83, 70, 0, 0, 88])]])
    woken = guest.thaw(who, channel, pack({"id": 8, "rank": 1}))
    assert woken["cpu_ns"] > 0 and woken["wall_ns"] > 0
    ended = guest.ended()
    lines = ended.out.splitlines()
    assert "'id': 7, 'error': 'cancelled'" in lines[0] and lines[0].endswith("{'id': 8, 'rank': 1}]")
    assert lines[1] == "dead dead alive dead"
    assert lines[2] == f"sf-9 sf-9 {who['machine_id']} 10.83.0.9"
    assert lines[3] == "0a:53:46:00:00:09 9000 0a:53:46:00:00:58"
    assert lines[4] == "False True clone"
    seconds, typed = lines[5].split(" ", 1)
    assert 2_000_000_000 <= int(seconds) < 2_000_000_060 and typed == "''"
    assert lines[6:] == ["b'y'"] and ended.status == 0, ended.err


def test_kernel_random_numbers_follow_the_entropy(frozen: Guest, booted: tuple[image.Image, int], tmp_path: Path) -> None:
    """Two VMs from one state draw different numbers: the kernel's generator was reseeded in between."""
    chosen, state = booted
    twin = Guest(chosen, tmp_path / "twin", state)
    try:
        numbers = []
        for vm in (frozen, twin):
            vm.thaw(identity(time_ns=10**18))
            numbers.append(vm.execute("import os; print(os.urandom(16).hex())").out)
        assert numbers[0] != numbers[1]
    finally:
        twin.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropy": bytes(5)}, "cannot read the field entropy of THAW"),
        ({"mac": bytes([1, 0, 0, 0, 0, 1])}, "cannot set the MAC address of eth0: Cannot assign requested address"),
        ({"neighbours": [["10.83.0.2"]]}, "cannot set the neighbours: Protocol error"),
        ({"time_ns": -1}, "cannot read the field time_ns of THAW"),
    ],
)
def test_failed_identity_runs_no_user_code(guest: Guest, change: dict[str, Any], message: str) -> None:
    guest.run(BUSY + "sys.stdin.readline()")
    guest.output_until("xxx")
    guest.freeze()
    guest.send(FrameType.THAW, pack({"identity": identity("clone", 9, **change), "channel": 0, "reply": None, "mounts": []}))
    assert guest.expect(FrameType.FAILED).payload.decode() == message
    with pytest.raises(EOFError):
        guest.frame()  # not one byte of output: QEMU ends with the guest
    assert guest.process.wait(PATIENCE_S) == 0
    assert message in guest.console.read_text()


def test_thaw_of_a_running_guest_fails(guest: Guest) -> None:
    guest.send(FrameType.THAW, pack({"identity": None, "channel": 0, "reply": None, "mounts": []}))
    assert b"not frozen" in guest.expect(FrameType.FAILED).payload


# -- what the hypervisor sees ------------------------------------------------------------------------------------------


def test_kernel_panic_is_seen(guest: Guest) -> None:
    guest.run("open('/proc/sysrq-trigger', 'w').write('c')")
    guest.monitor.event("GUEST_PANICKED")
    assert guest.process.wait(PATIENCE_S) is not None


def test_death_of_the_zygote_ends_the_guest(guest: Guest) -> None:
    guest.run("import os; os.kill(os.getppid(), 9)")
    with pytest.raises(EOFError):
        while True:
            guest.frame()
    assert "sfagent: the zygote ended" in guest.console.read_text()


def test_garbage_from_the_host_ends_the_guest(frozen: Guest) -> None:
    frozen._port.sendall(b"\xff" * 8)
    with pytest.raises(EOFError):
        frozen.frame()
    assert "Protocol error" in frozen.console.read_text()


# -- host folders ------------------------------------------------------------------------------------------------------


def test_host_folders(frozen: Guest, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "deep").mkdir(parents=True)
    data = secrets.token_bytes(3 << 20)
    (shared / "deep" / "data").write_bytes(data)
    (shared / "helper.py").write_text("def answer(): return 42\n")
    (shared / "main.py").write_text(
        CONNECT + "import helper, hashlib, threading\n"
        "say(helper.answer(), __file__, sorted(os.listdir('.')))\n"
        "def read(): say('sum', hashlib.sha256(open('deep/data', 'rb').read()).hexdigest())\n"
        "thread = threading.Thread(target=read); thread.start()\n"
        "ask(op='freeze me', id=1); hear(); thread.join()\n"
        "open('deep/new', 'w').write('made in the guest'); os.remove('helper.py'); say(sorted(os.listdir('.')))\n"
    )
    with ExitStack() as stack:
        server = stack.enter_context(FileServer({4: shared}))
        frozen.answer_fuse = server.handle
        frozen.thaw(identity(), mounts=[[4, str(shared)]])
        frozen.run(str(shared / "main.py"), mode="script", cwd=str(shared), path0=str(shared))
        assert "42 " in frozen.output_until("\n")
        channel = frozen.skip_to(FrameType.REQUEST).channel
        frozen.freeze()
        frozen.assert_silent()  # requests that were under way have been answered
        frozen.thaw(None, channel, pack({"id": 1}))
        text = b""
        while (frame := frozen.frame()).type is not FrameType.EXITED:
            text += frame.payload if frame.type is FrameType.OUTPUT else b""
            if frame.type is FrameType.REQUEST:  # the copy-back of the files
                frozen.send(FrameType.REPLY, pack({"id": unpack(frame.payload)["id"]}), frame.channel)
    import hashlib

    assert f"sum {hashlib.sha256(data).hexdigest()}" in text.decode()
    assert "['__pycache__', 'deep', 'main.py']" in text.decode()
    assert not (shared / "deep" / "new").exists(), "the server is read-only"


def test_unmountable_host_folder_fails_closed(frozen: Guest) -> None:
    frozen.answer_fuse = lambda tag, request: None if request[4:8] == b"\x26\0\0\0" else _error(request)
    frozen.send(FrameType.THAW, pack({"identity": identity(), "channel": 0, "reply": None, "mounts": [[1, "/proc/not/here"]]}))
    assert b"cannot mount the host folder /proc/not/here" in frozen.expect(FrameType.FAILED).payload


def _error(request: bytes) -> bytes:
    """-EIO for a FUSE request (struct fuse_out_header)."""
    return (16).to_bytes(4, "little") + (-5).to_bytes(4, "little", signed=True) + request[8:16]
