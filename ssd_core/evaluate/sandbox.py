"""Run one untrusted program in a process of its own, under limits."""

import math
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ssd_core.checks import UsageError

try:
    import resource
except ImportError:  # Windows
    resource = None

CHILD = Path(__file__).with_name("_child.py")
FILE_BYTES = 1 << 24  # largest file a program may write
SPARE_PROCESSES = 256  # processes and threads a program may add to those of its user
LEAST_MEMORY = 1 << 26  # below this the interpreter itself does not start
CHANNEL_BYTES = 1 << 16
PROC = "/proc"  # macOS has none: what needs it is left out there


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    ``status`` is "passed", "failed" (it raised, exited early or crashed), "timeout", "memory" or "error" (it could
    not be run at all, which says nothing about the program). ``detail`` is empty when it passed; else its first line
    says why and the rest is the end of the program's output. ``seconds`` is wall-clock time.
    """

    status: str
    detail: str
    seconds: float


def run_program(
    source: str, *, timeout: float = 6.0, memory_bytes: int = 1 << 30, output_bytes: int = 1 << 16
) -> Outcome:
    """Run Python ``source``; it passes when execution reaches its end, nothing raised.

    Each call starts a fresh interpreter with only the standard library, in a temporary directory that is removed
    afterwards, with an empty standard input, an environment without the caller's variables and a fixed hash seed. The
    source runs as a module named ``program``, so ``if __name__ == "__main__"`` blocks do not run. That the end was
    reached is shown by a random word that only our epilogue sends: ``sys.exit(0)`` and ``os._exit(0)`` do not pass.

    Limits: ``timeout`` seconds of wall-clock time (and about as much CPU time), after which the whole process group and
    whatever left it is killed; ``memory_bytes`` of address space for each process (not enforced by macOS); files of
    16 MiB; 256 open files; 256 processes and threads more than the user has now (not for root). Of what is printed, the
    last ``output_bytes`` are kept. Network, other programs, signals to other processes and writing outside the
    temporary directory are refused at Python's level.

    **These are limits against accidents, not a security boundary.** A program runs as the calling user, can read what
    that user can read, and hostile code can get around most of the above. Grade code that you would not run yourself
    in a container or a virtual machine.

    Raises :class:`UsageError` for an argument out of range, and where the system has no ``resource`` module (Windows).
    Safe to call from several threads.
    """
    if resource is None:
        raise UsageError(
            f"run_program: expected a system with Python's resource module (Linux, macOS), got {sys.platform}: "
            "programs would run without limits"
        )
    if not (timeout > 0 and math.isfinite(timeout)):
        raise UsageError(f"timeout: expected a positive number of seconds, got {timeout}")
    if memory_bytes < LEAST_MEMORY:
        raise UsageError(f"memory_bytes: expected at least {LEAST_MEMORY}, got {memory_bytes}")
    if output_bytes < 0:
        raise UsageError(f"output_bytes: expected 0 or more, got {output_bytes}")

    with tempfile.TemporaryDirectory(prefix="ssd-core-", ignore_cleanup_errors=True) as directory:
        # A lone surrogate is no Python source: let the child's compile() say so.
        Path(directory, "program.py").write_bytes(source.encode("utf-8", "surrogatepass"))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sentinel = secrets.token_hex(16)
            settings = (sentinel, memory_bytes, math.ceil(timeout) + 1, FILE_BYTES, _process_limit())
            ours.sendall(" ".join(map(str, settings)).encode())
            begin = time.monotonic()
            try:
                process = subprocess.Popen(
                    # -I would ignore PYTHONHASHSEED too; the environment is ours anyway.
                    [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(CHILD), str(theirs.fileno())],
                    cwd=directory,
                    env=_environment(directory),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:
                return Outcome("error", f"the interpreter did not start: {error}", time.monotonic() - begin)
            theirs.close()
            with process:
                watch = _Watch(process, ours, output_bytes)
                try:
                    in_time = watch.until(begin + timeout)
                    seconds = time.monotonic() - begin
                finally:  # also when interrupted
                    _kill(process, directory)
                watch.drain()
        return _outcome(sentinel, process.returncode, in_time, timeout, seconds, watch)


def _environment(directory: str) -> dict[str, str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": directory, "TMPDIR": directory, "PYTHONHASHSEED": "0"}
    if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _process_limit() -> int:
    """RLIMIT_NPROC counts every thread of the user: those there are now plus a margin; -1 for no limit."""
    user, tasks = os.getuid(), 0
    if user == 0 or not os.path.isdir(f"{PROC}/self/task"):  # root is exempt
        return -1
    for entry in os.scandir(PROC):
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                if entry.stat().st_uid == user:
                    tasks += len(os.listdir(f"{entry.path}/task"))
    return tasks + SPARE_PROCESSES


class _Watch:
    """Reads what a process prints and reports, keeping a bounded tail of each."""

    def __init__(self, process: subprocess.Popen, channel: socket.socket, output_bytes: int):
        self.process = process
        self.kept = {process.stdout.fileno(): bytearray(), channel.fileno(): bytearray()}
        self.bounds = {process.stdout.fileno(): output_bytes, channel.fileno(): CHANNEL_BYTES}
        self.output, self.reports = self.kept.values()
        self.first = b""  # the channel's first line, which a flood of later ones must not push out
        for descriptor in self.kept:
            os.set_blocking(descriptor, False)

    def until(self, deadline: float) -> bool:
        """Read until the process ends; False when it is still running at ``deadline``."""
        with selectors.DefaultSelector() as selector:
            for descriptor in self.kept:
                selector.register(descriptor, selectors.EVENT_READ)
            while self.process.poll() is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if not selector.get_map():  # everything closed: it is about to end, or hides
                    with suppress(subprocess.TimeoutExpired):
                        self.process.wait(left)
                    continue
                # A fork that outlives the process keeps the pipes open: so look at the process now and then.
                for key, _ in selector.select(min(left, 0.05)):
                    if not self._read(key.fd):
                        selector.unregister(key.fd)
        return True

    def drain(self) -> None:
        """What is left in the pipes once nobody writes; bounded, should somebody have escaped."""
        for descriptor in self.kept:
            for _ in range(64):
                if not self._read(descriptor):
                    break

    def _read(self, descriptor: int) -> bool:
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError:  # nothing there, or reset
            return False
        kept = self.kept[descriptor]
        if kept is self.reports and b"\n" not in self.first:
            self.first += data
        kept += data
        del kept[: max(0, len(kept) - self.bounds[descriptor])]
        return bool(data)


def _kill(process: subprocess.Popen, directory: str) -> None:
    """End the process, its group, and what left the group (recognised by its environment, where /proc shows it)."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM when only zombies are left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    mark = f"HOME={directory}\0".encode()
    for _ in range(100):  # what forks while we look is seen in the next round
        found = False
        for entry in os.scandir(PROC) if os.path.isdir(f"{PROC}/self") else ():
            if entry.name.isdigit():
                with suppress(OSError):  # not ours to look at, or gone
                    if mark in Path(entry.path, "environ").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)
                        found = True
        if not found:
            return
        time.sleep(0.01)


def _outcome(sentinel: str, returncode: int, in_time: bool, timeout: float, seconds: float, watch: _Watch) -> Outcome:
    output = watch.output.decode("utf-8", "replace").strip()
    status, reason = "", ""
    for line in watch.reports.decode("utf-8", "replace").splitlines():
        word, _, rest = line.partition(" ")
        if word == sentinel:
            status, _, reason = rest.strip().partition(" ")
    signal_name = ""
    if returncode < 0:
        with suppress(ValueError):
            signal_name = signal.Signals(-returncode).name

    if not watch.first.startswith(f"{sentinel} ready".encode()):
        status, reason = "error", f"the sandbox did not start (exit code {returncode})"
    elif not in_time or signal_name == "SIGXCPU":
        status, reason = "timeout", f"still running after {timeout:g} s" if not in_time else "CPU time used up"
    elif status == "passed" and returncode == 0:
        return Outcome("passed", "", seconds)
    elif status in ("failed", "memory"):
        pass
    elif output.endswith("MemoryError") or signal_name == "SIGKILL":  # only the system's own killer is left
        status, reason = "memory", f"killed by {signal_name}" if signal_name else "MemoryError"
    elif returncode < 0:
        status, reason = "failed", f"killed by {signal_name or f'signal {-returncode}'}"
    else:
        status, reason = "failed", f"left with exit code {returncode} before the end of the test"
    return Outcome(status, f"{reason}\n{output}" if output else reason, seconds)
