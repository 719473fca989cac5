"""Clang compiles the extension, for this architecture and for another one, from headers alone: `ziglang` brings it and
what a foreign architecture needs. Nothing is linked or run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from compiled import ROOT
from torch.utils.cpp_extension import include_paths

pytestmark = [
    pytest.mark.all,
    pytest.mark.skipif(not importlib.util.find_spec("ziglang"),
                       reason="needs ziglang (0.4 GB): `make test-portability` installs it")]

SOURCES = sorted(ROOT.glob("csrc/**/*.cpp"))
# Additions and products of four float32 at a time, fused, in registers of 128 bits.
VECTORS = {"aarch64": r"\bfmla\s+v\d+\.4s", "x86_64": r"\bmulps\s.*%xmm"}


@pytest.fixture(scope="module", params=VECTORS)
def objects(request, tmp_path_factory):
    """The architecture, and {source: (object file, what clang said)}."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-P", "-m", "ziglang", "c++", "-target", f"{request.param}-linux-gnu", "-std=c++20",
               "-Wall", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fopenmp-simd",
               "-DTORCH_EXTENSION_NAME=_C", '-DSSD_CORE_TORCH_VERSION="none"']
    # Debian's Python has a configuration of each architecture, and only this machine's is there: those of 64 bits agree
    config = Path(sysconfig.get_config_h_filename())
    own = config.parents[1] / (sysconfig.get_config_var("MULTIARCH") or "") / config.parent.name / config.name
    there = folder / f"{request.param}-linux-gnu" / config.parent.name
    there.mkdir(parents=True)
    shutil.copy(own if own.exists() else config, there)
    for path in (*include_paths(), sysconfig.get_path("include"), folder):
        command += ["-isystem", str(path)]
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}
    found = {}
    for source in SOURCES:
        target = folder / f"{source.stem}.o"
        done = subprocess.run([*command, "-c", str(source), "-o", str(target)], env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        found[source.stem] = (target if done.returncode == 0 else None, done.stdout)
    return request.param, found


def test_it_compiles_without_warnings(objects):
    architecture, found = objects
    said = {name: text for name, (target, text) in found.items() if target is None or text}
    assert not said, "\n".join(f"{architecture} {name}:\n{text}" for name, text in said.items())


def test_objects_are_of_the_architecture(objects):
    architecture, found = objects
    machines = {"x86_64": 62, "aarch64": 183}                   # e_machine of an ELF header
    for target, _ in found.values():
        header = target.read_bytes()[:20]
        assert header[:4] == b"\x7fELF" and int.from_bytes(header[18:20], "little") == machines[architecture]


@pytest.mark.skipif(not shutil.which("llvm-objdump"), reason="no llvm-objdump")
def test_the_baseline_is_vectorised(objects):
    """Of the kernels: the matrix product and the exponentials are vectors in every architecture."""
    architecture, found = objects
    target, _ = found["kernels_baseline"]
    code = subprocess.run(["llvm-objdump", "-d", "--no-show-raw-insn", str(target)], capture_output=True, text=True,
                          check=True).stdout
    assert len(re.findall(VECTORS[architecture], code)) > 50
