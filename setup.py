"""Builds ssd_core, with its C++ extension where torch and a compiler are at hand. Metadata: pyproject.toml.

Without them the package still installs and runs on its PyTorch backend; ssd_core/_build.json records why. Code that
does not compile is an error, never a silent fallback. SSD_CORE_NO_EXTENSION=1 leaves the extension out.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
# torch compiles with this command. setuptools would link with the compiler that Python itself was built with, which
# need not be on this machine.
os.environ.setdefault("CXX", "c++")


def import_torch():
    """torch, or None. pip builds in an isolated environment that hides the installed torch; an extension works only
    with the torch that it was compiled for, so the one that the running interpreter finds otherwise (-E: without the
    PYTHONPATH that isolates) is exactly the right one. Its folders go last, behind what the build environment holds."""
    for command in (None, [sys.executable, "-E", "-P", "-c", "import sys; print(*sys.path, sep='\\n')"]):
        if command is not None:
            sys.path += subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        try:
            import torch
            import torch.utils.cpp_extension

            return torch
        except ImportError:
            continue
    return None


def compiler_error():
    """None if a C++20 program that includes Python.h compiles, else what went wrong."""
    command = shlex.split(os.environ["CXX"])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <vector>\nint main() { return 0; }\n")
        command += ["-std=c++20", "-I" + sysconfig.get_path("include"), "-c", str(source), "-o", f"{source}.o"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
    if done.returncode != 0:
        return next((line for line in done.stderr.splitlines() if "error" in line), f"{command[0]} fails")
    return None


def missing_reason():
    """Why the extension cannot be built here, or None."""
    if os.environ.get("SSD_CORE_NO_EXTENSION", "0") not in ("", "0"):
        return "SSD_CORE_NO_EXTENSION was set when the package was built"
    if sys.platform == "win32":
        return "the extension is not built on Windows"
    if TORCH is None:
        return "torch was not installed when the package was built"
    error = compiler_error()
    return f"no working C++ compiler was found when the package was built ({error})" if error else None


def extension():
    # OpenMP. at::parallel_for is an inline template: compiled without -fopenmp it runs on one thread, silently. The
    # runtime must be the one that torch uses, or torch.set_num_threads does not reach it and two thread pools compete.
    # Linking with -fopenmp would name the compiler's libgomp.so.1, which is torch's only if torch's copy has kept
    # that name (some wheels bundle it as libgomp-<hash>.so). So -fopenmp is given to the compiler alone: the extension
    # names no runtime, and its OpenMP symbols resolve through libtorch_cpu to whatever torch itself loaded.
    # Apple's clang has no OpenMP; there the extension runs on one thread and build_info() says so.
    openmp = sys.platform != "darwin" and TORCH.backends.openmp.is_available()
    flags = ["-O3", "-g0", "-Wall", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    flags.append("-fopenmp" if openmp else "-fopenmp-simd")
    return TORCH.utils.cpp_extension.CppExtension(
        "ssd_core._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        extra_compile_args={"cxx": flags},
        # In the command line, so that another torch means other commands: ninja compiles everything anew.
        define_macros=[("SSD_CORE_TORCH_VERSION", f'"{TORCH.__version__}"')],
    )


TORCH = import_torch()
MISSING = missing_reason()
RECORD = {"missing": MISSING} if MISSING else {"torch": TORCH.__version__}


def write_record(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(RECORD) + "\n")


class BuildPy(build_py):
    def find_package_modules(self, package, package_dir):  # bench/test_*.py stay in the repository
        return [found for found in super().find_package_modules(package, package_dir) if found[1][:5] != "test_"]

    def run(self):
        if not self.editable_mode:  # what lies there is packed, also a module that was removed since the last build
            shutil.rmtree(Path(self.build_lib, "ssd_core"), ignore_errors=True)
        super().run()
        if MISSING:  # without extensions, a build does not run BuildExt
            write_record(ROOT / "ssd_core" if self.editable_mode else Path(self.build_lib, "ssd_core"))


class BuildExt(build_ext if MISSING else TORCH.utils.cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # An editable installation would compile in a temporary folder: everything, every time.
        self.build_temp = str(ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")

    def run(self):
        folder = ROOT / "ssd_core" if self.inplace else Path(self.build_lib, "ssd_core")
        record = folder / "_build.json"
        # setuptools compares times only: an extension built for another torch would pass as up to date.
        self.force = self.force or not record.exists() or json.loads(record.read_text()) != RECORD
        super().run()
        write_record(folder)


class SDist(sdist):
    def make_distribution(self):
        # also where torch is missing and no extension is declared: the wheel is built elsewhere
        self.filelist.extend(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file())
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()


if MISSING:
    print(f"ssd-core: building without the C++ extension: {MISSING}", file=sys.stderr)

setup(
    packages=[*find_packages(include=["ssd_core*"]), "ssd_core.kernels", "ssd_core.bench"],
    # An editable installation warns of a folder with the package's name in the root: it is the package, and the finder
    # that setuptools installs resolves the two mapped names also when ssd_core is imported from there.
    package_dir={"ssd_core": "ssd_core", "ssd_core.kernels": "kernels", "ssd_core.bench": "bench"},
    package_data={"ssd_core": ["py.typed", "**/*.json", "**/*.jsonl", "**/*.html"]},
    exclude_package_data={"ssd_core": ["_build.json"]},  # each build writes its own
    ext_modules=[] if MISSING else [extension()],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "sdist": SDist},
)
