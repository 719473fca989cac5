"""The tests of backend "cpu" under AddressSanitizer and UndefinedBehaviorSanitizer, by every compiler that is here.

A sanitized extension is built in build/sanitizers/<compiler>, beside a copy of the package; nothing else sees it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest
from compiled import ROOT, run_tests
from test_packaging import FOLDERS

from ssd_core import native

pytestmark = [
    pytest.mark.all, pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are preloaded as on Linux"),
    pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))]

# vptr looks into classes of torch, whose type information is hidden.
FLAGS = "-O2 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
COMPILERS = {   # what else each needs, and the libraries that must be loaded first
    # GCC 12 crashes in that pass on instrumented vectors.
    "g++": ("-fno-tree-slp-vectorize", ("libasan.so", "libubsan.so")),
    # Clang's OpenMP has another runtime than torch's: its extension is serial.
    "clang++": ("-shared-libasan -fno-sanitize=function -fno-openmp -fopenmp-simd",
                (f"libclang_rt.asan-{platform.machine()}.so",)),
}
# Leaks of the interpreter are not ours; torch takes more memory than a sanitizer thinks sound, and checks what it got.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1",
           "PYTHONMALLOC": "malloc"}


def sanitized(compiler):
    """Builds and returns the environment of a Python that has it."""
    path = shutil.which(compiler)
    if path is None:
        pytest.skip(f"no {compiler}")
    folder = ROOT / "build/sanitizers" / compiler
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("csrc", *FOLDERS):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    more, libraries = COMPILERS[compiler]
    command = folder / "c++"        # last of all, as setup.py asks for -O3 -g0
    command.write_text(f'#!/bin/sh\nexec "{path}" "$@" {FLAGS} {more}\n')
    command.chmod(0o755)
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, env={**os.environ, "CXX": str(command)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert built.returncode == 0, built.stdout
    # Both runtimes, and C++'s own, whose exceptions they watch: Python itself was built without.
    preloaded = [subprocess.run([path, f"-print-file-name={library}"], capture_output=True, text=True,
                                check=True).stdout.strip() for library in (*libraries, "libstdc++.so.6")]
    return OPTIONS | {"LD_PRELOAD": " ".join(preloaded), "PYTHONPATH": str(folder)}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_sanitized(compiler, tmp_path):
    environment = sanitized(compiler)
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import ssd_core, torch, ssd_core._C as C, json; "
         "print(json.dumps([C.__file__, open('/proc/self/maps').read().count('asan')]))"],
        cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True)
    assert where.returncode == 0, where.stderr
    file, mapped = json.loads(where.stdout)
    assert "build/sanitizers" in file and mapped > 0
    # an error ends the process, and with it all tests that it had still to do; its report must not be captured
    run_tests("--capture=no", "--maxfail=3", **environment)
