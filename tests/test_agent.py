"""The guest agent and keeper, in a real guest."""

from __future__ import annotations

import secrets
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sfparallel.vmm import image
from sfparallel.vmm.files import FileServer
from sfparallel.wire import FrameType, pack, unpack
from tests.agent_guest import PATIENCE_S, Guest, identity
from tests.agent_guest import booted_fixture as booted_fixture
from tests.agent_guest import frozen_fixture as frozen_fixture
from tests.agent_guest import guest_fixture as guest_fixture
from tests.host_folders import handle

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.needs("image")]


# -- programs ----------------------------------------------------------------------------------------------------------


def test_program_runs_as_main(guest: Guest) -> None:
    code = "import sys, os; print(__name__, sys.argv, os.getcwd(), sys.path[0], file=sys.stderr); print(os.environ['HOME'])"
    ended = guest.execute(code, "one", "two", cwd="/usr")
    assert ended.out == "/root\n"
    assert ended.err == "__main__ ['-c', 'one', 'two'] /usr \n"
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
    script = guest.execute("import sysconfig; print(sysconfig.get_path('stdlib'), end='/this.py')").out
    ended = guest.execute(script, mode="script")
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
    assert ended.out == "tidied up\n" and ended.err.endswith("KeyboardInterrupt\n")
    assert "sitecustomize" not in ended.err and "keeper" not in ended.err


def test_signal_reaches_the_whole_group(guest: Guest) -> None:
    guest.run("import subprocess; p = subprocess.Popen(['/bin/sleep', '1000']); print('ready', flush=True); print(p.wait())")
    guest.output_until("ready\n")
    guest.signal(signal.SIGTERM)
    assert guest.ended().status == -signal.SIGTERM


def test_programs_do_not_share_random_numbers(guest: Guest) -> None:
    code = ("import random, numpy, tempfile, os\n"
            "print(random.random(), numpy.random.rand(), tempfile.mktemp(), os.urandom(8).hex())")
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


def test_freeze_waits_for_no_end_of_output(guest: Guest) -> None:
    """What is in the pipes when it begins is passed on, not what a process goes on to write."""
    guest.run("import subprocess; subprocess.Popen(['yes']).wait()")
    for _ in range(3):
        guest.output_until("y\ny")
        guest.send(FrameType.FREEZE)
        guest.wait_until_taken()  # what is printed on the way there says nothing
        printed = 0
        while (frame := guest.frame()).type is not FrameType.FROZEN:
            printed += len(frame.payload)
        assert printed < 2 << 20, "two pipes of 64 KiB, and what lay in the sockets"
        guest.assert_silent()
        guest.thaw()


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


LEAVE = """
import ctypes, os
os.makedirs("/tmp/cg", exist_ok=True)
assert ctypes.CDLL(None, use_errno=True).mount(b"x", b"/tmp/cg", b"cgroup2", 0, None) == 0
os.mkdir("/sys/fs/cgroup/user/below")
def attempt(path, text):
    try:
        with open(path, "w") as file:
            file.write(text)
        return "done"
    except OSError as error:
        return error.strerror
for path in ("/sys/fs/cgroup/cgroup.procs", "/proc/1/root/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/user/cgroup.freeze",
             "/tmp/cg/cgroup.freeze", "/tmp/cg/below/cgroup.procs", "/tmp/cg/cgroup.procs"):
    print(attempt(path, "0"))
print(open("/proc/1/cgroup").read().strip(), *[open(f"/proc/{pid}/cgroup").read().strip() for pid in (os.getpid(), os.getppid())])
print("there", flush=True)
while True:
    print(".", end="", flush=True)
"""


def test_root_cannot_leave_what_is_frozen(guest: Guest) -> None:
    """What runs on while the VM is saved would write into the copy, and run in clones that are not themselves yet."""
    guest.run(LEAVE)
    told = guest.output_until("there\n").splitlines()
    assert told[:6] == ["No such file or directory"] * 2 + ["Operation not permitted"] * 2 + ["done", "done"]
    assert told[6] == "0::/.. 0::/ 0::/../keeper"  # the agent, the program and the keeper, as the program sees them
    guest.freeze()
    guest.assert_silent()
    guest.thaw()
    assert guest.output_until(".")
    guest.signal(signal.SIGKILL)
    while guest.frame().type is not FrameType.EXITED:
        pass
    assert guest.execute("print(open('/proc/self/cgroup').read())").out.strip() == "0::/"  # the next program is inside, too


def test_halt_fails(guest: Guest) -> None:
    """A halted guest would look like one that computes. Nothing else of a guest's end needs this capability."""
    code = ("import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "for how in (0xcdef0123, 0x4321fedc, 0x01234567): print(libc.reboot(ctypes.c_int(how)), ctypes.get_errno())\n"
            "print(int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16) >> 22 & 1)")
    assert guest.execute(code).out == "-1 1\n" * 3 + "0\n"


@pytest.mark.parametrize(("key", "reason"), [("o", "guest-shutdown"), ("b", "guest-reset")])
def test_the_end_of_a_guest_is_seen(guest: Guest, key: str, reason: str) -> None:
    guest.run(f"open('/proc/sysrq-trigger', 'w').write({key!r})\nwhile True: pass")
    guest.monitor.event("SHUTDOWN", reason=reason)


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


def test_death_of_the_keeper_ends_the_guest(guest: Guest) -> None:
    guest.run("import os; os.kill(os.getppid(), 9)")
    with pytest.raises(EOFError):
        while True:
            guest.frame()
    assert "sfagent: the keeper ended" in guest.console.read_text()


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
        frozen.answer_fuse = partial(handle, server)
        frozen.thaw(identity(), mounts=[[4, str(shared)]])
        frozen.run(str(shared / "main.py"), mode="script", cwd=str(shared))
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
