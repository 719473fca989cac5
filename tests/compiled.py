"""Tests in processes of their own: of backend "cpu" at an instruction set or sanitized, of "triton" interpreted."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("tests/ops", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_cpu*.py")),
         "tests/test_native.py", "tests/test_logit_rows.py", "tests/test_fuzz.py")
# The cases of tests/ops have the backend's name; "auto" of the superset is served by it. What looks at threads, time,
# all instruction sets or the way the extension was built has nothing to gain.
CHOICE = " and not ".join(("(cpu or native or logit_rows or fuzz or (superset and auto))", "threads",
                           "instruction_sets", "isa", "vectorised", "openmp", "build_info"))


def run_tests(*arguments, files=FILES, choice=CHOICE, processes=None, **environment):
    """Those of ``files`` that ``choice`` picks. Fails with the output of the tests that fail."""
    processes = processes or min(4, os.cpu_count() or 1)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *files, "-m", "not all", "-k", choice, "-n", str(processes),
         "-p", "no:cacheprovider", "--tb=short", *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    passed = done.returncode == 0
    assert passed, f"{environment}\n{done.stdout}"
    print(done.stdout.splitlines()[-1])
