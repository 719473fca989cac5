"""The sandbox's side of sandbox.run_program: limit this process, run program.py, report.

Started as a script (never imported) in a fresh directory that holds program.py, with the number of the report
channel's descriptor as its argument. Standard library only.
"""

import os
import resource
import sys
import types

PROGRAM = "program.py"

# Audit events (docs.python.org/3/library/audit_events.html) that a solution has no need of ...
REFUSED = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
}  # fmt: skip
# ... and those that may only touch the working directory.
CHANGES = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.link", "os.symlink",
    "os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move",
}  # fmt: skip


def limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def guard(root: str):
    """An audit hook that refuses network, other programs, signals to others, and writing outside ``root``."""
    realpath, fsdecode, getpgid, group = os.path.realpath, os.fsdecode, os.getpgid, os.getpgrp()
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def outside(path) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False  # an open descriptor, or an option
        path = realpath(fsdecode(path))
        return path != "/dev/null" and path != root and not path.startswith(root + os.sep)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            refused = args[2] & writing and outside(args[0])
        elif event in CHANGES:
            refused = any(outside(arg) for arg in args)
        elif event == "os.kill":
            refused = args[0] < 0 or (args[0] > 0 and getpgid(args[0]) != group)
        elif event == "os.killpg":
            refused = args[0] not in (0, group)
        else:
            refused = event in REFUSED
        if refused:
            raise PermissionError(f"{event}{args!r:.200} is refused while a program is graded")

    return hook


def describe(error: BaseException, lines: list[str]) -> str:
    """``ZeroDivisionError: division by zero (line 3: return 1 / 0)``, on one line."""
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except BaseException:  # the program's own __str__
        message = "(no message)"
    place = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == PROGRAM:
            place = step.tb_lineno
        step = step.tb_next
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    text = text[:500]
    if isinstance(place, int) and 0 < place <= len(lines):
        text += f" (line {place}: {lines[place - 1].strip()[:200]})"
    return " ".join(text.split())


def main() -> None:
    channel = int(sys.argv[1])
    sentinel, *numbers = os.read(channel, 4096).decode("ascii").split()
    memory_bytes, cpu_seconds, file_bytes, processes = map(int, numbers)
    os.set_inheritable(channel, False)
    write, leave, getpid, pid, stdout = os.write, os._exit, os.getpid, os.getpid(), sys.stdout
    out_of_memory = f"{sentinel} memory MemoryError\n".encode()  # made now: later there is no room

    def report(line: bytes) -> None:
        if getpid() == pid:  # not a fork of the program that ran on to here
            write(channel, line)

    def end(line: bytes, code: int) -> None:
        report(line)
        try:
            stdout.flush()
        except BaseException:  # closed by the program, or no memory
            pass
        leave(code)  # without waiting for threads, without the program's exit handlers

    with open(PROGRAM, "rb") as file:
        source = file.read()
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, file_bytes)
    limit(resource.RLIMIT_NOFILE, 256)
    if processes >= 0:
        limit(resource.RLIMIT_NPROC, processes)
    if sys.platform != "darwin":  # which refuses or ignores it
        limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_CPU, cpu_seconds)
    # Not "__main__": demonstrations under `if __name__ == "__main__"` do not run, as in HumanEval's own grader.
    module = types.ModuleType("program")
    module.__file__ = PROGRAM
    sys.modules["program"] = module
    sys.argv = [PROGRAM]
    sys.addaudithook(guard(os.path.realpath(os.getcwd())))
    report(f"{sentinel} ready\n".encode())
    try:
        exec(compile(source, PROGRAM, "exec"), module.__dict__)
    except MemoryError:
        end(out_of_memory, 1)
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        text = describe(error, source.decode("utf-8", "replace").split("\n"))
        end(f"{sentinel} failed {text}\n".encode("utf-8", "replace"), 1)
    end(f"{sentinel} passed\n".encode(), 0)


main()
