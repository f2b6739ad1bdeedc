"""Servers as plain processes that ``fl scale`` starts: for development, and for hosts without systemd units.

Unlike the children of ``fedctl.processes.Family``, these servers outlive the command, its terminal and its end.

Rules kept here:

* A lock says who runs, never a pid: server I holds serverd-I.lock exclusively from before its first instruction
  to its end, however it ends. The pid in that file means nothing once the lock is free.
* To look at a lock is to share it for an instant, so those who look do not take each other for a server.
* Only who holds scale.lock starts and stops servers.
* A server is signalled through a pidfd that was opened before its lock was seen held. So it cannot be
  another process that has got the same pid.

Source: flock(2): the lock belongs to the open file, which the child inherits; pidfd_open(2).
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedcore.config import Address
from fedctl.processes import Child, program, wait_until
from fedctl.scale.addresses import NO_ANSWER, PROBE_S, Addresses, addresses_of, readiness

MOST = 100  # fl-serverd knows instances 0..99
DRAIN_S = 30.0  # a server waits up to 10 s for the requests in flight
KILL_S = 10.0  # the end after a SIGKILL is a matter of the kernel
SIGN_S = 2.0  # a server signs its lock right after its birth
_LOOK_S = 0.05
_FILE_MODE = 0o640
_DIRECTORY_MODE = 0o750

Say = Callable[[str], None]


# ---- who runs


@dataclass(frozen=True, slots=True)
class Running:
    """A server that runs.

    Attributes:
        instance: 0..99.
        pid: of its process.
    """

    instance: int
    pid: int

    @property
    def name(self) -> str:
        """For messages and files."""
        return _name(self.instance)


def _name(instance: int) -> str:
    return f"serverd-{instance}"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Locks and logs of the servers that ``fl scale`` has started.

    Attributes:
        path: the directory; absolute.
    """

    path: Path

    def lock(self, instance: int) -> Path:
        """File whose lock a server holds as long as it lives."""
        return self.path / f"{_name(instance)}.lock"

    def log(self, instance: int) -> Path:
        """File of a server's standard output and error."""
        return self.path / f"{_name(instance)}.log"

    @contextmanager
    def alone(self, say: Say) -> Iterator[None]:
        """Make the directory, and keep other ``fl scale`` from changing anything in it.

        Raises:
            ClickException: it cannot be made or written to.
        """
        try:
            self.path.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
            descriptor = os.open(self.path / "scale.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        except OSError as error:
            raise click.ClickException(
                f"the run directory {self.path} cannot be used: {error.strerror}; choose another: --run-dir"
            ) from error
        try:
            if not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                say(f"another fl scale is at work in {self.path}: waiting for its end")
                _lock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def running(self) -> list[Running]:
        """Return the servers that run, the lowest instance first."""
        holders = ((instance, _holder(self.lock(instance))) for instance in range(MOST))
        return [Running(instance, pid) for instance, pid in holders if pid is not None]


def _lock(descriptor: int, how: int) -> bool:
    """Take a lock; False if LOCK_NB is in ``how`` and somebody else has it."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True


def _held(descriptor: int) -> bool:
    if not _lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB):
        return True
    _lock(descriptor, fcntl.LOCK_UN)
    return False


def _holder(lock: Path) -> int | None:
    """Return the pid of the server that holds a lock, None if the lock is free.

    Raises:
        ClickException: who holds it has not signed it.
    """
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise click.ClickException(f"{lock} cannot be read: {error.strerror}") from error
    try:
        found: list[bytes] = []

        def settled() -> bool:
            found[:] = [os.pread(descriptor, 32, 0)]
            return not _held(descriptor) or found[0].endswith(b"\n")

        wait_until(settled, "a pid", SIGN_S)
        return int(found[0]) if _held(descriptor) else None
    except (TimeoutError, ValueError):
        raise click.ClickException(
            f"{lock} is locked, but holds no pid; end who has locked it: fuser -v {lock}"
        ) from None
    finally:
        os.close(descriptor)


def _command_line(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return []


def _check_kin(servers: Sequence[Running], yaml_config: Path) -> None:
    """Make sure that running servers and this command mean the same files.

    Raises:
        ClickException: they were started with another configuration or from another directory.
    """
    for server in servers:
        words = _command_line(server.pid)
        theirs = words[words.index("--yaml-config") + 1] if "--yaml-config" in words else str(yaml_config)
        if theirs != str(yaml_config):
            raise click.ClickException(
                f"{server.name} runs with {theirs}: give that one, or choose another --run-dir"
            )
        with suppress(OSError):  # a process of another user
            place = os.readlink(f"/proc/{server.pid}/cwd")
            if place != os.getcwd():
                raise click.ClickException(
                    f"{server.name} runs in {place}, where its relative paths begin: call fl scale there"
                )


# ---- starting


def start_servers(
    directory: RunDirectory,
    wanted: Mapping[int, Addresses],
    arguments: Sequence[str],
    patience: float,
    say: Say,
) -> None:
    """Start servers and wait until they are ready.

    Args:
        directory: locked by this process.
        wanted: instances that do not run, and where they will listen.
        arguments: for each fl-serverd, without ``--instance``.
        patience: seconds until all shall be ready.
        say: told each step.

    Raises:
        ClickException: an admin address is taken, and nothing was started; or a server cannot be started, has
            ended or is not ready, and the others go on.
    """
    for instance, addresses in wanted.items():
        _check_free(instance, addresses.admin)
    children: dict[int, Child] = {}
    for instance in wanted:
        try:
            command = [*program("fl-serverd"), "--instance", str(instance), *arguments]
            child = children[instance] = _start(directory, instance, command)
        except OSError as error:
            raise click.ClickException(f"{_name(instance)} cannot be started: {error}") from error
        say(f"{child.name}: started, pid {child.pid}, log {child.log}")
    failures = _await_ready(children, wanted, patience, say)
    if failures:
        raise click.ClickException("\n".join(failures))


def _check_free(instance: int, admin: Address) -> None:
    """Make sure that who will answer at a server's admin address is that server."""
    with suppress(OSError), socket.create_connection((admin.host, admin.port), PROBE_S):
        raise click.ClickException(
            f"{admin}, the admin address of instance {instance}, is taken; end what uses it (a server that "
            "fl scale has not started?) or change fedcore.server.admin_address"
        )


def _start(directory: RunDirectory, instance: int, command: Sequence[str]) -> Child:
    """Start a server that holds its lock and has nothing else in common with this process."""
    log = directory.log(instance)
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    with ExitStack() as files:
        lock = os.open(directory.lock(instance), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        files.callback(os.close, lock)
        _lock(lock, fcntl.LOCK_EX)  # it was free; only a passing look can have it now
        os.ftruncate(lock, 0)
        output = files.enter_context(log.open("ab"))
        begins = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
            pass_fds=[lock],
            # The child signs the lock itself: were this process killed here, nobody else would know the pid.
            # That this process has no threads is what makes it safe.
            preexec_fn=partial(_sign, lock),  # noqa: PLW1509
        )
        return Child(_name(instance), log, process, begins)


def _sign(lock: int) -> None:
    os.pwrite(lock, b"%d\n" % os.getpid(), 0)


def _await_ready(
    children: Mapping[int, Child], addresses: Mapping[int, Addresses], patience: float, say: Say
) -> list[str]:
    """Wait for new servers, telling why they are not ready yet.

    Returns:
        What went wrong, an entry for each that ended or is not ready in time.
    """
    began = time.monotonic()
    told = dict.fromkeys(children, NO_ANSWER)
    failures: list[str] = []
    while told:
        late = time.monotonic() - began > patience
        for instance in list(told):
            child = children[instance]
            ready, words = readiness(addresses[instance].admin)
            if not child.running:
                failures.append(str(child.failure(child.end())))
            elif ready:
                say(f"{child.name}: ready after {time.monotonic() - began:.1f} s")
            elif late:
                failures.append(f"{child.name} goes on, but is not ready within {patience:g} s: {words}")
            else:
                if words != told[instance]:
                    say(f"{child.name}: {words}")
                told[instance] = words
                continue
            del told[instance]
        if told:
            time.sleep(_LOOK_S)  # there is no notice of readiness to wait for
    return failures


# ---- stopping


def stop_servers(
    directory: RunDirectory, servers: Sequence[Running], patience: float, kill: bool, say: Say
) -> None:
    """Ask servers to end, the highest instance first, and wait for that.

    Args:
        directory: locked by this process.
        servers: those that run.
        patience: seconds until all shall have ended.
        kill: whether to kill those that have not.
        say: told each step.

    Raises:
        ClickException: some go on.
    """
    with ExitStack() as handles:
        left: dict[int, Running] = {}
        for server in sorted(servers, key=lambda server: -server.instance):
            handle = _pidfd(directory.lock(server.instance), server.pid)
            if handle is not None:
                handles.callback(os.close, handle)
                left[handle] = server
                _signal(handle, server, signal.SIGTERM)
                say(f"{server.name}: asked to end, pid {server.pid}")
        left = _await_ends(left, patience, say)
        if left and kill:
            for handle, server in left.items():
                _signal(handle, server, signal.SIGKILL)
                say(f"{server.name}: killed, it went on after {patience:g} s")
            left = _await_ends(left, KILL_S, say)
    if left:
        names = ", ".join(f"{server.name} (pid {server.pid})" for server in left.values())
        raise click.ClickException(
            f"not ended within {patience:g} s: {names}; look into the log, repeat the command, or add --kill"
        )


def _pidfd(lock: Path, pid: int) -> int | None:
    """Return a handle of the process that holds a lock, None if it has ended meanwhile."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if _holder(lock) == pid:
        return handle
    os.close(handle)
    return None


def _signal(handle: int, server: Running, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        pass  # it has just ended; its handle says so too
    except PermissionError:
        raise click.ClickException(f"{server.name} (pid {server.pid}) belongs to another user") from None


def _await_ends(left: Mapping[int, Running], patience: float, say: Say) -> dict[int, Running]:
    """Wait for the end of processes, given by their handles, and return those that go on."""
    left = dict(left)
    deadline = time.monotonic() + patience
    poll = select.poll()
    for handle in left:
        poll.register(handle, select.POLLIN)
    while left:
        ended = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ended:
            break
        for handle, _ in ended:
            poll.unregister(handle)
            say(f"{left.pop(handle).name}: ended")
    return left


# ---- all of it


def show(servers: Sequence[Running], addresses: Mapping[int, Addresses], directory: RunDirectory) -> None:
    """Print what runs: a table on a terminal, a line per server elsewhere."""
    if not servers:
        click.echo(f"no server runs here (run directory {directory.path})")
        return
    table = Table("instance", "pid", "devices", "nodes", "admin", "ready")
    lines = []
    for server in servers:
        own = addresses[server.instance]
        words = readiness(own.admin)[1]
        table.add_row(
            *map(str, (server.instance, server.pid, own.devices, own.node_port, own.admin)), Text(words)
        )
        lines.append(
            f"{server.name}  pid {server.pid}  devices {own.devices}  nodes {own.node_port}  "
            f"admin {own.admin}  {words}"
        )
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
    else:
        click.echo("\n".join(lines))


def scale_here(
    n: int | None,
    options: Sequence[str],
    yaml_config: Path,
    run_dir: Path | None,
    *,
    ready_timeout: float,
    drain_timeout: float,
    kill: bool,
) -> None:
    """Make N servers run as processes, or show those that do; the arguments are the command's.

    Raises:
        ClickException: something stands against it.
    """
    yaml_config = yaml_config.absolute()
    directory = RunDirectory((run_dir or Path(f"{yaml_config.stem}-run")).absolute())
    if n is None:
        running = directory.running()
        show(running, addresses_of(yaml_config, [server.instance for server in running]), directory)
        return
    say = partial(Console(highlight=False).print, markup=False, soft_wrap=True)
    with directory.alone(say):
        running = directory.running()
        _check_kin(running, yaml_config)
        missing = sorted(set(range(n)) - {server.instance for server in running})
        if missing:
            arguments = ["--yaml-config", str(yaml_config), *options]
            start_servers(directory, addresses_of(yaml_config, missing), arguments, ready_timeout, say)
        stop_servers(
            directory, [server for server in running if server.instance >= n], drain_timeout, kill, say
        )
        now = directory.running()
    say(f"servers on this host: {len(now)}")
