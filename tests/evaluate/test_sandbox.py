import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ssd_core.checks import UsageError
from ssd_core.evaluate import run_program, sandbox

pytest.importorskip("resource", reason="the sandbox needs the resource module")
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def running(word: str) -> list[int]:
    """Processes whose environment or command line holds ``word``."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                text = Path(entry.path, "environ").read_bytes() + Path(entry.path, "cmdline").read_bytes()
            except OSError:
                continue
            if word.encode() in text:
                found.append(int(entry.name))
    return found


def test_passes():
    outcome = run_program("def f(x):\n    return x + 1\nassert f(1) == 2\nprint('noise')")
    assert (outcome.status, outcome.detail) == ("passed", "") and 0 < outcome.seconds < 6


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("assert 1 == 2", "AssertionError (line 1: assert 1 == 2)"),
        ("def f():\n    return 1 / 0\nf()", "ZeroDivisionError: division by zero (line 2: return 1 / 0)"),
        ("def f(:", "SyntaxError: invalid syntax (line 1: def f(:)"),
        ("x = '\0'", ""),  # SyntaxError or ValueError, by version
        ("\ud800", "SyntaxError"),
        ("input()", "EOFError"),
        ("import sys; assert sys.stdin.read() == ''; raise KeyError", "KeyError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit"),
        ("import os; os._exit(0)", "left with exit code 0 before the end"),
        ("class E(Exception):\n    __str__ = None\nraise E", "E: (no message)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import sys; sys.stdout.close(); sys.stdout = None; assert 0", "AssertionError"),
    ],
)
def test_fails(source, detail):
    outcome = run_program(source)
    assert outcome.status == "failed" and outcome.detail.startswith(detail), outcome


def test_detail_ends_with_the_output():
    reason, *output = run_program("print('seen', flush=True)\nraise ValueError('a\\nb')").detail.split("\n")
    assert reason == "ValueError: a b (line 2: raise ValueError('a\\nb'))" and output == ["seen"]


CLOSE = "import os\nfor fd in range(20):\n    try: os.close(fd)\n    except OSError: pass\n"


@pytest.mark.parametrize(
    "source",
    ["while True: pass", "import time; time.sleep(60)", CLOSE + "while True: pass"],
    ids=["loop", "sleep", "close"],
)
def test_timeout(source):
    begin = time.monotonic()
    outcome = run_program(source, timeout=2)        # in which the sandbox starts on a busy machine, too
    assert outcome.status == "timeout" and outcome.detail == "still running after 2 s"
    assert time.monotonic() - begin < 5


FORK = """
import os, time
if os.fork() == 0:
    {leave}
    time.sleep(60)
{parent}
"""


@linux
@pytest.mark.parametrize("leave", ["pass", "os.setsid()", "os.setsid()\n    os.fork()"])
@pytest.mark.parametrize(("parent", "status"), [("pass", "passed"), ("time.sleep(60)", "timeout")])
def test_grandchildren_are_killed(monkeypatch, tmp_path, leave, parent, status):
    word = f"ssd-{uuid.uuid4().hex}"
    (tmp_path / word).mkdir()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path / word))  # so that we find them by their HOME
    seen = []
    threading.Timer(0.4, lambda: seen.extend(running(word))).start()
    begin = time.monotonic()
    # "passed" ends at once: give the fork a moment to leave
    pause = "time.sleep(0.8)\n" if status == "passed" else ""
    outcome = run_program(FORK.format(leave=leave, parent=pause + parent), timeout=1.5)
    assert outcome.status == status and time.monotonic() - begin < 8
    assert len(seen) >= 2  # they were there
    assert running(word) == []


@linux
def test_the_group_is_killed_without_proc_too(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sandbox, "PROC", "/nowhere")
    outcome = run_program(FORK.format(leave="pass", parent="time.sleep(60)"), timeout=1)
    assert outcome.status == "timeout"
    deadline = time.monotonic() + 5
    while running(str(tmp_path)) and time.monotonic() < deadline:  # a killed process takes a moment to go
        time.sleep(0.05)
    assert running(str(tmp_path)) == []


def test_standard_input_is_empty():
    code = "from ssd_core.evaluate import run_program\nprint(run_program('print(input())').detail)"
    done = subprocess.run([sys.executable, "-c", code], input="secret\n", capture_output=True, text=True, check=True)
    assert done.stdout.startswith("EOFError")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not enforce RLIMIT_AS")
@pytest.mark.parametrize(
    "source",
    ["x = bytearray(1 << 40)", "x = []\nwhile True: x.append(bytearray(1 << 20))", "x = []\nwhile True: x.append([x])"],
)
def test_memory(source):
    outcome = run_program(source, memory_bytes=1 << 27, timeout=20)
    assert outcome.status == "memory", outcome


def test_endless_printing_is_bounded():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = run_program("while True: print('spam' * 1000)\n", timeout=1.5, output_bytes=1000)
    assert outcome.status == "timeout"
    assert 0 < len(outcome.detail.split("\n", 1)[1]) <= 1000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (32 << 20 if sys.platform == "darwin" else 32 << 10)


def test_a_lot_of_output_is_no_failure():
    assert run_program("print('x' * (1 << 22))").status == "passed"
    assert run_program("print('x' * (1 << 22))", output_bytes=0).status == "passed"


def test_huge_file():
    outcome = run_program("open('f', 'wb').write(bytes(1 << 25))")
    assert outcome.status == "failed" and "File too large" in outcome.detail
    assert run_program("open('f', 'wb').write(bytes(1 << 20))").status == "passed"


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() == 0, reason="root has no limit on processes")
def test_fork_bomb():
    outcome = run_program("import os\nwhile True: os.fork()", timeout=2)
    assert outcome.status in ("failed", "timeout")


def test_files_are_gone(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    assert run_program("open('left', 'w').write('x'); import os; os.mkdir('d')").status == "passed"
    assert list(tmp_path.iterdir()) == []


def test_environment_is_scrubbed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONSTARTUP", "x")
    names = "{'PATH', 'HOME', 'TMPDIR', 'PYTHONHASHSEED', 'LD_LIBRARY_PATH', 'LC_CTYPE', '__CF_USER_TEXT_ENCODING'}"
    outcome = run_program(f"import os\nassert not set(os.environ) - {names}, set(os.environ)")
    assert outcome.status == "passed", outcome


def test_same_hash_seed():
    source = "print(hash('a'), flush=True)\nassert 0"
    assert run_program(source).detail == run_program(source).detail


def test_no_packages_and_not_main():
    source = "import sys\nassert 'site' not in sys.modules and __name__ == 'program'\nimport pytest"
    assert run_program(source).detail.startswith("ModuleNotFoundError: No module named 'pytest'")


@pytest.mark.parametrize(
    "action",
    [
        "open({outside!r}, 'w')",
        "import os; os.chdir('/'); os.open('.' + {outside!r}, os.O_WRONLY | os.O_CREAT)",
        "import os; os.symlink({folder!r}, 'link'); open('link/new', 'w')",
        "import os; os.remove({inside!r})",
        "import shutil; shutil.rmtree({folder!r})",
        "import pathlib; pathlib.Path({inside!r}).rename('mine')",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.killpg(os.getpgid(os.getppid()), 9)",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
    ],
)
def test_accidents_are_refused(tmp_path, action):
    inside = tmp_path / "inside"
    inside.write_text("kept")
    names = {"outside": str(tmp_path / "outside"), "inside": str(inside), "folder": str(tmp_path)}
    outcome = run_program(action.format(**names))
    assert outcome.status == "failed" and "PermissionError" in outcome.detail
    assert os.listdir(tmp_path) == ["inside"] and inside.read_text() == "kept"


def test_ordinary_work_is_allowed():
    source = """
import dataclasses, os, shutil, tempfile, threading
with tempfile.TemporaryDirectory() as directory:
    with open(os.path.join(directory, "x"), "w") as file:
        file.write("x")
os.makedirs("a/b"); os.rename("a/b", "a/c"); shutil.rmtree("a")
open(os.devnull, "w").write("x"); open(os.__file__).read()
thread = threading.Thread(target=print); thread.start(); thread.join()
@dataclasses.dataclass
class Point:
    x: "int" = 0
child = os.fork()
if child == 0:
    os._exit(3)
os.kill(child, 0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
"""
    outcome = run_program(source)
    assert outcome.status == "passed", outcome


def test_a_fork_cannot_pass_for_its_parent():
    outcome = run_program("import os\nif os.fork():\n    os.wait()\n    os._exit(0)")
    assert outcome.status == "failed"


def test_reports_need_the_word():
    source = "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'0 ready\\n0 passed\\n' * 9000)\n"
    assert run_program(source + "    except OSError: pass\nos._exit(0)", timeout=1).status != "passed"


def test_what_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/nowhere/python")
    assert run_program("").status == "error"
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    assert run_program("").status == "error"


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": float("nan")}, {"memory_bytes": 1000}, {"output_bytes": -1}]
)
def test_arguments(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        run_program("", **options)


def test_without_resource(monkeypatch):
    monkeypatch.setattr(sandbox, "resource", None)
    with pytest.raises(UsageError, match="resource module"):
        run_program("")


def test_threads():
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(run_program, [f"assert {i} % 2" for i in range(20)]))
    assert [o.status for o in outcomes] == ["failed", "passed"] * 10


def test_import_is_light():
    code = "import sys, ssd_core.evaluate, ssd_core.report as r\nprint(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "matplotlib", "jinja2"} & set(modules)
