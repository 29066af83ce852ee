"""A clone reaches its parent and its siblings, and nothing else; it cannot pretend to be another."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from tests.conftest import Sfrun

pytestmark = pytest.mark.needs("qemu", "image", "root")


def test_the_hosts_addresses_cannot_be_reached(sfrun: Sfrun) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        ended = sfrun(
            f"""
            import socket
            import sfparallel as sf

            def attempt(address):
                try:
                    socket.create_connection((address, {port}), timeout=1).close()
                    return "reached"
                except OSError as error:
                    return "not reached"

            @sf.parallel(n=2)
            def look():
                hosts = ["10.83.255.254", "192.168.0.1", "10.0.2.2", "172.17.0.1", "8.8.8.8"] + {_addresses()!r}
                return {{address: attempt(address) for address in hosts}}

            print(set().union(*(answer.values() for answer in look())), set(map(attempt, ["10.83.255.254", "8.8.8.8"])))
            """
        ).ok()
    assert ended.out.strip() == "{'not reached'} {'not reached'}"


def _addresses() -> list[str]:
    found = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    return sorted(found - {"127.0.0.1", "127.0.1.1"})


def test_clones_reach_each_other_but_cannot_speak_for_each_other(sfrun: Sfrun) -> None:
    ended = sfrun(
        """
        import fcntl, json, os, socket, struct, time
        import sfparallel as sf

        def own():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect(("10.83.255.1", 9))
                return probe.getsockname()[0]

        def checksum(data):
            total = sum(struct.unpack(f"!{len(data) // 2}H", data))
            total = (total & 0xffff) + (total >> 16)
            return ~(total + (total >> 16)) & 0xffff

        def datagram(source, target, payload):
            udp = struct.pack("!HHHH", 7777, 7777, 8 + len(payload), 0) + payload
            head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0,
                               socket.inet_aton(source), socket.inet_aton(target))
            return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + udp

        def mac_of(address):
            last = [int(part) for part in address.split(".")]
            return bytes((0x0a, 0x53, 0x46, 0)) + struct.pack("!H", last[2] * 256 + last[3] - 1)

        @sf.parallel(n=3)
        def talk():
            comm = sf.comm()
            mine = own()
            addresses = [comm.bcast(mine if comm.rank == root else None, root=root) for root in range(comm.size)]
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            receiver.bind(("", 7777))
            receiver.settimeout(1.0)
            comm.barrier()
            heard = []
            if comm.rank == 0:
                deadline = time.time() + 6
                while time.time() < deadline:
                    try:
                        heard.append(receiver.recv(100).decode())
                    except TimeoutError:
                        pass
            elif comm.rank == 1:
                wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
                wire.bind(("eth0", 0x0800))
                target = addresses[0]
                def frame(mac, source, text):
                    wire.send(mac_of(target) + mac + b"\\x08\\x00" + datagram(source, target, text))
                for _ in range(3):
                    frame(mac_of(mine), mine, b"honest")
                    frame(mac_of(addresses[2]), mine, b"forged MAC")
                    frame(mac_of(mine), addresses[2], b"forged IP")
                    frame(mac_of(addresses[2]), addresses[2], b"both forged")
                    frame(mac_of(mine), "10.83.0.1", b"as the parent")
                    frame(mac_of(mine), "8.8.8.8", b"as the world")
            comm.barrier()
            return sorted(set(heard))

        print(json.dumps(talk()[0]))
        """
    ).ok()
    assert json.loads(ended.out) == ["honest"]


def test_two_jobs_at_the_same_time_do_not_see_each_other(sfrun: Sfrun, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Both jobs use the same addresses; each hears only its own clones, and its answers are its own."""
    program = """
        import socket, sys, time
        import sfparallel as sf

        word = sys.argv[1]

        @sf.parallel(n=3)
        def shout():
            comm = sf.comm()
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.bind(("", 7777))
            sock.settimeout(0.5)
            comm.barrier()
            heard, deadline = set(), time.time() + 4
            while time.time() < deadline:
                sock.sendto(word.encode(), ("10.83.255.255", 7777))
                try:
                    heard.add(sock.recv(100).decode())
                except TimeoutError:
                    pass
            return word, sorted(heard)

        for _ in range(2):
            print(shout(), flush=True)
        """
    other = Sfrun(tmp_path_factory.mktemp("other"))
    ended: dict[str, str] = {}

    def run(job: Sfrun, word: str) -> None:
        ended[word] = job(program, args=(word,)).ok().out

    threads = [threading.Thread(target=run, args=pair) for pair in ((sfrun, "alpha"), (other, "beta"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for word in ("alpha", "beta"):
        assert ended[word].splitlines() == [str([(word, [word])] * 3)] * 2


HOSTILE = {
    "output to a descriptor of the supervisor's": "frame(6, b'x', 999)",
    "an impossible exit status": "frame(8, b'\\x81\\xa6status\\xcf\\0\\0\\1\\0\\0\\0\\0\\0')",
    "no frames at all": "os.urandom(4096)",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_clone_that_lies_to_the_supervisor_ends_alone(sfrun: Sfrun, what: str) -> None:
    """Root in a clone can take the agent's port (pidfd_getfd) and send anything."""
    ended = sfrun(
        f"""
        import ctypes, os, struct, time
        import sfparallel as sf

        libc = ctypes.CDLL(None, use_errno=True)

        def port():
            agent = libc.syscall(434, 1, 0)
            for fd in os.listdir("/proc/1/fd"):
                try:
                    if "vport" in os.readlink(f"/proc/1/fd/{{fd}}"):
                        return libc.syscall(438, agent, int(fd), 0)
                except OSError:
                    pass

        def frame(kind, payload, channel=0):
            return struct.pack("<IHH", len(payload), kind, channel) + payload

        @sf.parallel(n=2, timeout=120)
        def lie():
            if sf.comm().rank == 1:
                os.write(port(), {HOSTILE[what]})
                time.sleep(1000)
            return sf.comm().rank

        try:
            lie()
        except sf.CloneLost as error:
            print(error.rank, sf.parallel(n=2)(lambda: sf.comm().rank)())
        """
    ).ok()
    assert ended.out.strip() == "1 [0, 1]"
