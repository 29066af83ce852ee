"""One job of `sfrun`: parent, clones, network and pool, from the first to the last.

Everything a job has is a descriptor, a child process or a file in a mount namespace of its own, so that nothing is left when
this process ends in whatever way.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from sfparallel import bootstrap
from sfparallel.config import LIBVIRT_REMEDY, QEMU
from sfparallel.errors import EnvironmentProblem, GuestError, ProtocolError, SfError, UsageError, VMError
from sfparallel.net.addresses import address_of, mac_of
from sfparallel.net.network import CloneNetwork
from sfparallel.text import printable
from sfparallel.vmm import arguments, imports, job_control, locks, native_parts, pausing, signals, statistics, terminal, time_zone
from sfparallel.vmm import image as images
from sfparallel.vmm import manifest as manifests
from sfparallel.vmm.checkpoint import LayerStore
from sfparallel.vmm.confinement import Places
from sfparallel.vmm.data import data_image_in_time
from sfparallel.vmm.exits import EXIT_OUTPUT_LOST, EXIT_PARENT_LOST, EXIT_TIMEOUT, exit_code
from sfparallel.vmm.exports import exports_for
from sfparallel.vmm.file_service import FileService
from sfparallel.vmm.guest_frames import Exited
from sfparallel.vmm.initramfs import GUEST_PACKAGE
from sfparallel.vmm.kvm import accelerator
from sfparallel.vmm.launcher import Launcher
from sfparallel.vmm.machine import DATA_SLOTS, Accelerator, Boot, MachineSpec
from sfparallel.vmm.options import JobOptions
from sfparallel.vmm.output import STDERR, STDOUT, LabelledOutput, Output
from sfparallel.vmm.pool import ImageAhead, Pool
from sfparallel.vmm.record import ForkReport
from sfparallel.vmm.regions import Regions
from sfparallel.vmm.registry import JobStatus, announce
from sfparallel.vmm.replies import RegionSettings, identity
from sfparallel.vmm.shells import plug_data_disks, start_launcher, start_parent, start_shell
from sfparallel.vmm.template import ensure_template, open_template
from sfparallel.vmm.trace import TraceFile
from sfparallel.vmm.vm import Vm, VmState
from sfparallel.vmm.waiting import FILES_LIMIT_S, in_thread, step_limit_s, within
from sfparallel.wire import Frame, FrameType, pack_names

log = logging.getLogger("sfparallel")

GUEST_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "USER": "root", "LOGNAME": "root",
    "SHELL": "/bin/sh", "LANG": "C.UTF-8",
}  # fmt: skip
"""What a program finds in its environment, with TZ and what describes the terminal; the rest comes in only if --env says so."""

GUEST_BOOTSTRAP = f"{GUEST_PACKAGE}/bootstrap"

KNOWN_NEIGHBOURS = 100
"""Clones whose addresses the parent knows from the start; it asks for those of others when it needs them."""

_END_GRACE_S = 5.0
_LAST_WORDS_S = 0.5


class Job:
    """A job; `run` does all of it.

    Args:
        places: folders of the job.
        pid: the process id by which the world knows it.
    """

    def __init__(self, options: JobOptions, places: Places, pid: int) -> None:
        if len(options.data) > DATA_SLOTS:
            raise UsageError(f"--data and --venv can be given at most {DATA_SLOTS} times together, not {len(options.data)}")
        self.name = f"sf{pid}"
        self._pid = pid
        self._options = options
        self._places = places
        self._exports: list[tuple[int, Path]] = []
        self._files: FileService
        self._parent: Vm | None = None
        self._pool: Pool | None = None
        self._regions: Regions | None = None
        self._trace: TraceFile | None = None
        self._output = Output(self._output_has_room, self._output_lost)
        self._outputs: dict[Vm, LabelledOutput] = {}
        self._held: set[Vm] = set()
        self._unread: set[int] = set()
        self._closed: set[tuple[Vm, int]] = set()
        self._vms: set[Vm] = set()
        self._forks = 0
        self._started = time.monotonic()
        self._interrupted = False
        self._guest_told = False
        self._ending = False
        self._changes_told = False
        self._reader: Vm | None = None
        self._stdin_taken = asyncio.Event()
        self._terminal = terminal.streams()
        self._modes = terminal.Modes()
        self._paused: list[Vm] = []
        self._next_number = 1
        self._free_numbers: list[int] = []
        # What the program ended with; and with what the job is stopped, without waiting for anything.
        self._done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    # -- the whole -------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Run the program in a parent VM; returns its exit code.

        Raises:
            SfError: the job could not be started.
        """
        async with contextlib.AsyncExitStack() as stack:
            self._watch_signals(stack)
            if self._options.timeout_s:
                timer = asyncio.get_running_loop().call_later(self._options.timeout_s, self._timed_out)
                stack.callback(timer.cancel)
            stack.push_async_callback(self._say_last_words)
            async with contextlib.AsyncExitStack() as machines:
                await self._start_and_wait(machines)
            # The VMs are gone, but a slow reader may want hours for what they printed.
            await self._unless_stopped(asyncio.create_task(self._output.written()))
            return (self._stopped if self._stopped.done() else self._done).result()

    async def _start_and_wait(self, stack: contextlib.AsyncExitStack) -> None:
        """The start may be cut short by a signal, or by the parent's death."""
        starting = asyncio.create_task(self._start(stack))
        try:
            await self._unless_stopped(starting, self._done)
            if starting.done():
                await starting
                await self._unless_stopped(self._done)
        finally:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, SfError):
                await starting

    async def _unless_stopped(self, *awaited: asyncio.Future[Any]) -> None:
        """Wait for the first of these, or until the job is stopped."""
        await asyncio.wait((*awaited, self._stopped), return_when=asyncio.FIRST_COMPLETED)

    def _stop(self, code: int) -> None:
        if not self._stopped.done():
            self._stopped.set_result(code)

    def _timed_out(self) -> None:
        if not self._stopped.done():
            self._say(f"sfrun: stopped after {self._options.timeout_s:g} s (--timeout)")
            self._stop(EXIT_TIMEOUT)

    def _say(self, line: str) -> None:
        """Show the user a line. May be called in any thread."""
        self._output.write(STDERR, f"{printable(line)}\n".encode())

    def _note(self, line: str) -> None:
        """Show the user a line that is no error, unless only errors are printed. May be called in any thread."""
        if log.isEnabledFor(logging.WARNING):
            self._say(line)

    async def _say_last_words(self) -> None:
        """What we have to say ourselves is to be seen, but nobody who does not read can keep us."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._output.written()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        options = self._options
        native_parts.require(native_parts.LIBRARY)
        async with within(FILES_LIMIT_S, f"the current folder {options.program.cwd} to be opened", error=EnvironmentProblem):
            await in_thread(self._open_files)
        if options.trace:
            self._trace = TraceFile(options.trace, self._started, self._say)
            stack.callback(self._trace.close)
        stack.callback((await announce(self._pid, self.status)).close)
        spec, template, manifest = await self._find_template()
        store = LayerStore()
        stack.callback(store.close)
        network = CloneNetwork(mtu=spec.mtu, vnet_header=False)
        stack.callback(network.close)
        stack.push_async_callback(self._end_files)
        stack.push_async_callback(self._end)
        for host_port, guest_port in options.forwards:
            await network.forward(host_port, address_of(0), guest_port)
        async with within(FILES_LIMIT_S, f"the template {template} to be read", error=EnvironmentProblem):
            checkpoint = await in_thread(open_template, template, manifest, store)
        stack.callback(checkpoint.close)
        launcher = start_launcher(spec)
        stack.callback(launcher.close)
        self._pool = Pool(lambda: self._start_clone_shell(spec, network, launcher), ImageAhead(store))
        settings = RegionSettings(
            job=self.name, default_n=options.default_n, labels=options.labels,
            statistics=options.statistics or options.trace is not None, seed=options.seed,
            world=options.ranks > 0,
        )  # fmt: skip
        self._regions = Regions(
            settings, spec, self._pool, store,
            on_clone=self._clone_starts, on_world=self._world_starts, on_report=self._report,
        )  # fmt: skip
        parent = await self._start_parent(spec, network, launcher, stack)
        self._parent = parent
        self._watch(parent)
        store.hold(parent, checkpoint.layers)
        async with within(step_limit_s(), "the parent to load the template"):
            await parent.load(checkpoint.plan(), checkpoint.device_state)
            await parent.resume()
        mounts = [[tag, str(path)] for tag, path in self._exports]
        # The parent knows its clones' addresses before there are any: no clone has to answer an ARP request for it.
        neighbours = [[address_of(number), mac_of(number)] for number in range(1, KNOWN_NEIGHBOURS + 1)]
        who = identity("parent", 0, self.name, spec.mtu, neighbours)
        parent.thaw({"identity": who, "channel": 0, "reply": None, "mounts": mounts})
        # A processor state that does not fit makes a guest that runs and does nothing: QEMU says no word about it.
        async with within(step_limit_s(), "the parent's guest to wake up", error=GuestError, detail=parent.console_tail,
                          hint="run `sf clean` to remove the template; raise SF_START_LIMIT on a slow machine"):
            await parent.woken
        async with within(step_limit_s(), "QEMU to plug the parent's data disks"):
            await plug_data_disks(parent, spec.data_images)
        log.info("the parent VM is ready (%d MiB, processors: %d, %s); the program starts",
                 spec.memory_bytes >> 20, spec.cpus, spec.accelerator.value)
        self._run_program(parent)
        if parent.memory:  # else it is gone already
            self._pool.follow(parent.memory)
        self._pool.aim(options.pool if options.pool is not None else options.default_n)

    async def _find_template(self) -> tuple[MachineSpec, Path, dict[str, object]]:
        """What the job's VMs are, and where their template is. In threads: Ctrl-C is to work meanwhile."""
        async with within(FILES_LIMIT_S, "the guest image to be looked up", error=EnvironmentProblem):
            image = await in_thread(images.find, self._options.image)
            options = self._options = await in_thread(imports.supplied, self._options, image, self._note)
        shown = [*(folder for _, folder in self._exports), *options.data]
        async with within(FILES_LIMIT_S, "the files that the arguments name to be looked up", error=EnvironmentProblem):
            await in_thread(arguments.tell, options.program, shown, self._note)
        data = [await data_image_in_time(folder, self._note) for folder in options.data]

        def find() -> tuple[MachineSpec, Boot, str]:
            if options.venv:
                options.venv.check(image.name, image.python_magic)
            _use(image.root, f"the guest image {image.name!r}")
            initramfs = images.guest_half(image)
            _use(initramfs, "the initramfs")
            spec = MachineSpec(
                accelerator=Accelerator(accelerator()), cpus=options.cpus, memory_bytes=options.memory_bytes,
                root_image=image.root, data_images=tuple(data), data_slots=DATA_SLOTS if data else options.data_slots,
                qemu=QEMU.get(),
            )  # fmt: skip
            return spec, Boot(image.kernel, initramfs, images.KERNEL_COMMAND_LINE), image.key

        async with within(FILES_LIMIT_S, "the guest image to be read, and its initramfs to be made", error=EnvironmentProblem):
            spec, boot, key = await in_thread(find)
        log.info("guest image %r: %s", options.image, spec.root_image.parent)
        template, manifest = await ensure_template(spec, boot, key, self._note)
        async with within(FILES_LIMIT_S, f"the template {template} to be opened", error=EnvironmentProblem):
            await in_thread(_use, template / manifests.NAME, "the template")
        log.info("template: %s", template)
        return spec, template, manifest

    async def _start_parent(
        self, spec: MachineSpec, network: CloneNetwork, launcher: Launcher, stack: contextlib.AsyncExitStack
    ) -> Vm:
        if self._options.connect is None:
            return await start_parent(spec, network, launcher)
        # Late: libvirt is loaded only where it is asked for.
        try:
            from sfparallel.vmm.libvirt_parent import start_domain
        except ImportError as error:
            raise EnvironmentProblem(f"--connect needs libvirt's binding for Python: {error}", hint=LIBVIRT_REMEDY) from error

        return await start_domain(spec, self._options.connect, self._places, network, self.name, stack)

    def _run_program(self, parent: Vm) -> None:
        program, zone = self._options.program, time_zone.of_host()
        if self._terminal:
            parent.send(FrameType.TERMINAL, terminal.described(self._terminal))
        environment = program.environment_over({**GUEST_ENVIRONMENT, **zone.variables, **terminal.environment()})
        orders = {**self._options.bootstrap_orders, "image": self._options.image}
        parent.send(FrameType.RUN, pack_names({
            "argv": program.words, "cwd": str(program.cwd),
            "env": bootstrap.environment(environment, orders, GUEST_BOOTSTRAP),
            "data": [[f"sfdata{slot}", str(path)] for slot, path in enumerate(self._options.data)],
            "zone": [[path, content] for path, content in zone.files(environment.get("TZ")).items()],
        }))  # fmt: skip
        if not self._options.ranks:
            self._feed_stdin(parent)

    async def _end(self) -> None:
        """End all VMs and wait until the kernel has let go of them."""
        self._ending = True
        # First of all: who saves or loads one of them waits for its answers, even when cancelled.
        for vm in list(self._vms):
            vm.kill()
        if self._regions:
            await self._regions.close()
        if self._pool:
            self._pool.close()
        for vm in list(self._vms):
            vm.kill()
        deadline = time.monotonic() + _END_GRACE_S
        while self._vms and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    def status(self) -> JobStatus:
        """What `sf ps` shows."""
        words = ["-m" if self._options.program.mode == "module" else "", *self._options.program.argv]
        return JobStatus(
            self._pid, " ".join(filter(None, words)), len(self._outputs), self._forks, time.monotonic() - self._started,
            self._options.image,
        )

    def _open_files(self) -> None:
        self._exports = exports_for(self._options.program.cwd, self._options.program.folder)
        self._files = FileService(dict(self._exports), self._say)

    async def _end_files(self) -> None:
        changed, problems = await self._files.end()
        # A guest that came to its end has told its user what could not be written.
        if changed and not self._guest_told:
            self._say("\n  ".join(["sfrun: the job ended while changed files were being written to the host; the rest is lost",
                                   *problems]))
        elif problems and not self._guest_told:
            self._say("\n  ".join(["sfrun: the job ended while it waited for files of the host", *problems]))

    # -- VMs -------------------------------------------------------------------------------------------------------

    async def _start_clone_shell(self, spec: MachineSpec, network: CloneNetwork, launcher: Launcher) -> Vm:
        number = self._free_numbers.pop(0) if self._free_numbers else self._next_number
        self._next_number = max(self._next_number, number + 1)
        try:
            vm = await start_shell(spec, number, network, launcher=launcher)
            self._watch(vm)
        except BaseException:
            self._free_numbers.append(number)
            raise
        return vm

    def _watch(self, vm: Vm) -> None:
        """Take a VM that has started in.

        Raises:
            VMError: it has ended already, and nobody else would tell.
        """
        if vm.state is VmState.GONE:
            raise VMError(f"{vm.name} ended as soon as it had started: {vm.cause}")
        self._vms.add(vm)
        vm.events.on_frame = self._frame
        vm.events.on_exited = self._exited
        vm.events.on_room = self._files.go_on
        vm.events.on_gone = self._gone
        vm.events.waits_for = self._files.hanging

    def _clone_starts(self, vm: Vm, label: str) -> None:
        if vm.state is not VmState.GONE:  # else nobody would take it out again
            self._outputs[vm] = LabelledOutput(label, self._output.write)

    def _print(self, vm: Vm, stream: int, data: bytes) -> None:
        if stream in self._unread:
            # As where the reader of a pipe has gone: who prints again gets SIGPIPE or EPIPE. It is done when a VM prints, because
            # clones of an earlier state do not know of it.
            if (vm, stream) not in self._closed:
                self._closed.add((vm, stream))
                vm.send(FrameType.CLOSE, channel=stream)
            return
        output = self._outputs.get(vm)
        if output:
            output.feed(stream, data)
        else:
            self._output.write(stream, data)
        if self._output.full(stream):
            # Its programs' prints will block, as in a pipe. A VM that prints nothing is not held.
            vm.hold()
            self._held.add(vm)

    def _output_has_room(self) -> None:
        held, self._held = self._held, set()
        for vm in held:
            vm.release()

    def _output_lost(self, stream: int, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self._unread.add(stream)
        elif not self._stopped.done():
            self._say(f"sfrun: cannot write to standard {'output' if stream == STDOUT else 'error'}: {error}")
            self._stop(EXIT_OUTPUT_LOST)

    def _gone(self, vm: Vm, cause: str) -> None:
        self._vms.discard(vm)
        self._files.forget(vm)
        self._closed -= {(vm, STDOUT), (vm, STDERR)}
        output = self._outputs.pop(vm, None)
        if output:
            output.close()
        if self._regions:
            self._regions.vm_gone(vm, cause)
        if vm is self._parent:
            if not self._done.done():
                if not self._stopped.done() and not self._ending:  # else we ended it ourselves
                    tail = vm.console_tail()
                    self._say(f"sfrun: the parent VM is lost: {cause}" + (f"\n{tail}" if tail else ""))
                self._done.set_result(EXIT_PARENT_LOST)
        else:
            self._free_numbers.append(vm.number)

    def _frame(self, vm: Vm, frame: Frame) -> None:
        match frame.type:
            case FrameType.OUTPUT:
                self._print(vm, frame.channel, frame.payload)
            case FrameType.FUSE:
                self._files.request(vm, frame.channel, frame.payload)
            case FrameType.REQUEST:
                self._request(vm, frame)
            case FrameType.GONE if self._regions:
                self._regions.client_gone(vm, frame.channel)
            case FrameType.TAKEN:
                if vm is self._reader:
                    self._stdin_taken.set()
            case FrameType.MODES:
                if vm is self._reader:  # a clone's terminal is a copy of it, which nobody sees
                    self._modes.change(frame.payload)
            case kind:
                raise ProtocolError(f"unexpected frame {kind.name}")

    def _request(self, vm: Vm, frame: Frame) -> None:
        assert self._regions is not None
        # Only the copy-back of a VM that runs the program itself reaches the host's files.
        rank = self._regions.rank_of(vm)
        if (vm is self._parent or rank is not None) and frame.payload.find(b"\xa2op\xa4file", 0, 64) >= 0:
            if not self._changes_told:
                self._changes_told = True
                log.info("copying changed files to the host")
            self._files.change(vm, frame.channel, rank, frame.payload)
            return
        self._regions.request(vm, frame.channel, frame.payload)

    def _exited(self, vm: Vm, report: Exited) -> None:
        if vm is not self._parent:
            assert self._regions is not None
            self._regions.clone_exited(vm, report.status, report.oom_kills)
            return
        self._guest_told = True
        if not self._done.done():
            if os.WIFSIGNALED(report.status) and report.oom_kills:
                self._say("sfrun: the parent ran out of memory and its kernel killed the program; give it more with --memory")
            log.info("the program ended with exit code %d; forks: %d", exit_code(report.status), self._forks)
            self._done.set_result(exit_code(report.status))

    def _report(self, report: ForkReport) -> None:
        self._forks += 1
        if self._trace:
            self._trace.add(report)
        if self._options.on_report:
            self._options.on_report(report)
        elif self._options.statistics:
            self._say(statistics.describe(report))
        if log.isEnabledFor(logging.INFO):
            log.info(statistics.summary(report))

    # -- the terminal ------------------------------------------------------------------------------------------------

    def _watch_signals(self, stack: contextlib.AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        for number in signals.obeyed((signal.SIGTERM, signal.SIGHUP)):
            loop.add_signal_handler(number, self._stop, 128 + number)
            stack.callback(loop.remove_signal_handler, number)
        stack.callback(self._places.interrupts.watch(self._interrupt))
        job_control.watch(self._pause, self._go_on)
        if self._terminal:
            loop.add_signal_handler(signal.SIGWINCH, self._resized)
            stack.callback(loop.remove_signal_handler, signal.SIGWINCH)
            stack.callback(self._modes.restore)

    def _interrupt(self) -> None:
        """Ctrl-C goes to the program, which gets its KeyboardInterrupt; the second one, or another signal, ends the job."""
        running = self._parent and self._parent.woken.done() and not self._done.done()
        if self._parent and running and not self._interrupted:
            self._parent.send(FrameType.SIGNAL, int(signal.SIGINT).to_bytes(4, "little"))
            # A guest whose prints block does not read its port.
            self._output.allow_more()
            self._output_has_room()
        else:
            self._stop(128 + signal.SIGINT)
        self._interrupted = True

    async def _pause(self) -> None:
        """Ctrl-Z. The shell has the terminal next: it is to be as it was, and nothing that was printed is to come later."""
        self._paused = await pausing.pause(self._vms)
        self._modes.restore()
        await self._say_last_words()

    def _go_on(self) -> None:
        self._modes.apply()
        if self._terminal:
            self._resized()
        pausing.go_on(self._paused)

    def _world_starts(self, ranks: list[Vm]) -> None:
        """Each rank of a whole program has an input of its own; ours is that of the first."""
        for vm in ranks[1:]:
            vm.send(FrameType.CLOSE, channel=terminal.STDIN)
        self._feed_stdin(ranks[0])

    def _feed_stdin(self, reader: Vm) -> None:
        """Pass our standard input on."""
        self._reader = reader
        loop = asyncio.get_running_loop()
        source = terminal.Input()

        async def pass_on(data: bytes) -> None:
            # One piece at a time: what the program does not read would pile up in the guest's memory.
            self._stdin_taken.clear()
            reader.send(FrameType.STDIN, data)
            await self._stdin_taken.wait()
            await reader.room()  # also of a guest that says so and does not read

        def read() -> None:
            last = False
            while not last:
                data, last = source.read()
                try:
                    asyncio.run_coroutine_threadsafe(pass_on(data), loop).result()
                except (RuntimeError, concurrent.futures.CancelledError):
                    return  # the job is over, its loop closed or about to be

        threading.Thread(target=read, name="stdin", daemon=True).start()

    def _resized(self) -> None:
        """The terminal's window has another size."""
        told = terminal.described(self._terminal)
        for vm in (self._parent, *self._outputs):
            if vm and vm.woken.done():  # else it has no program yet, or learns its size with its memory
                vm.send(FrameType.TERMINAL, told)


def _use(path: Path, what: str) -> None:
    """Keep `sf clean` from removing what the job needs until it ends.

    Raises:
        EnvironmentProblem: it was removed just now.
    """
    if not locks.use(path):
        raise EnvironmentProblem(f"{what} was removed while the job was starting", hint="run the program again")


def run(options: JobOptions, places: Places, pid: int) -> int:
    """Run a job to its end, in the namespaces that `confinement.confine` made."""

    async def job() -> int:
        return await Job(options, places, pid).run()

    return job_control.run(job())
