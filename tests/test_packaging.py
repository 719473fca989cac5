"""What pip makes of the source: wheels, source archives and editable installations, each in an environment of its own
that sees this environment's packages (torch is not installed again), used from another folder."""

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.all

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"ssd_core": "ssd_core", "kernels": "ssd_core/kernels", "bench": "ssd_core/bench"}   # source -> wheel
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."

LOSS = """
import torch, ssd_core
torch.manual_seed(0)
x, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
y = torch.tensor([1, 2, -100, 10, 0])
loss = ssd_core.linear_cross_entropy(x, w, y, backend={backend!r})
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x @ w.T, y))
loss.backward()
assert x.grad[2].eq(0).all() and x.grad[0].ne(0).all()
print(ssd_core.__file__)
"""


def run(*command, cwd, status=0, **environment):
    environment = {key: value for key, value in {**os.environ, **environment}.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=900)
    assert done.returncode == status, done.stdout
    return done.stdout


class Environment:
    """A virtual environment that sees the packages of the one the tests run in, but not its ssd_core."""

    def __init__(self, folder):
        self.folder, self.elsewhere = folder / "environment", folder / "elsewhere"
        self.elsewhere.mkdir()
        run(sys.executable, "-P", "-m", "venv", "--without-pip", self.folder, cwd=folder)
        self.python, self.script = self.folder / "bin/python", self.folder / "bin/ssd-core"
        self.site = Path(self.run("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site / "these_tests.pth").write_text("\n".join(paths) + "\n")

    def run(self, code, cwd=None, **options):
        return run(self.python, "-P", "-c", code, cwd=cwd or self.elsewhere, **options)

    def pip(self, *arguments, cwd=None, **options):
        return pip("--python", self.python, "install", *arguments, cwd=cwd or self.elsewhere, **options)

    def info(self):
        return run(self.script, "info", cwd=self.elsewhere, COLUMNS="1000")


def pip(*arguments, **options):
    scripts = sysconfig.get_path("scripts")     # ninja
    return run(sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", *arguments,
               PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}", **options)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


def copy_source(target):
    target.mkdir()
    for name in ("csrc", *FOLDERS):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source as a stranger has it, and where it is compiled: once for all tests here, thanks to ninja."""
    return copy_source(tmp_path_factory.mktemp("packaging") / "the source")


@pytest.fixture(scope="module")
def wheel(source):
    stale = source / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/ssd_core/removed_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    folder = source.parent / "wheels"
    pip("wheel", "--no-build-isolation", "--no-deps", "-w", folder, source, cwd=source.parent)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Skips where pip reaches no package index."""
    folder = tmp_path_factory.mktemp("index")
    try:
        pip("download", "--no-deps", "-d", folder, "setuptools>=77", cwd=folder)
    except AssertionError as error:
        pytest.skip(f"no package index: {str(error)[:200]}")


def python_files(source):
    return {f"{target}/{path.relative_to(source / folder)}" for folder, target in FOLDERS.items()
            for path in (source / folder).rglob("*.py") if not (folder == "bench" and path.name.startswith("test_"))}


def test_wheel_holds_everything_and_nothing_else(source, wheel):
    extension = f"ssd_core/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    expected = python_files(source) | {extension, "ssd_core/_build.json", "ssd_core/py.typed"} | {
        path.relative_to(source).as_posix() for pattern in ("**/*.jsonl", "**/*.html") for path in
        (source / "ssd_core").glob(pattern)}
    assert {"ssd_core/report/template.html", "ssd_core/data/demo_prompts.jsonl", "ssd_core/data/demo_problems.jsonl",
            "ssd_core/kernels/__init__.py", "ssd_core/bench/__init__.py"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert json.loads(archive.read("ssd_core/_build.json")) == {"torch": torch.__version__}
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert archive.read(f"{info}/entry_points.txt").decode().split() == [
            "[console_scripts]", "ssd-core", "=", "ssd_core.cli:main"]
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["ssd_core"]
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert found - expected == set() and expected - found == set()
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == project["version"] and metadata["Requires-Python"] == ">=3.11"
    requirements = metadata.get_all("Requires-Dist")
    assert f"{next(need for need in project['dependencies'] if need.startswith('torch'))}" in requirements
    assert not any(need.startswith("torch==") for need in requirements)
    triton = [need for need in requirements if need.startswith("triton")]
    assert all("extra ==" in need and need.startswith("triton;") for need in triton)     # never required, never pinned
    assert sys.implementation.cache_tag.replace("cpython-", "cp") in wheel.name and "none-any" not in wheel.name


def test_wheel_is_installed_and_used(wheel, environment):
    environment.pip("--no-deps", wheel)
    where = environment.run(LOSS.format(backend="cpu")).strip()
    assert Path(where).is_relative_to(environment.site)
    assert "torch_version" in environment.info() and "not built" not in environment.info()
    environment.run("import ssd_core.kernels, ssd_core.bench, ssd_core.report\n"
                    "from ssd_core.data import demo_prompts\nassert demo_prompts().exists()")
    assert "Usage" in run(environment.script, "--help", cwd=environment.elsewhere)


def test_another_torch_is_refused(wheel, environment):
    environment.pip("--no-deps", wheel)
    (environment.site / "ssd_core/_build.json").write_text('{"torch": "2.11.0"}')
    said = environment.info()
    assert f"compiled for torch 2.11.0, this is torch {torch.__version__}" in said and REBUILD in said
    said = environment.run(LOSS.format(backend="cpu"), status=1)
    assert "UsageError" in said and "compiled for torch 2.11.0" in said and REBUILD in said
    environment.run(LOSS.format(backend="auto"))


def test_editable(source, environment):
    environment.pip("--no-build-isolation", "--no-deps", "-e", source)
    where = environment.run(LOSS.format(backend="cpu")).strip()
    assert Path(where) == source / "ssd_core/__init__.py"
    environment.run("import ssd_core.kernels, ssd_core.bench")
    environment.run("import ssd_core.kernels, ssd_core.bench", cwd=source)
    found = environment.run("import importlib.util; print(importlib.util.find_spec('kernels'))", cwd=source)
    assert str(source) not in found


def test_editable_compiles_only_what_changed(source, environment):
    install = ("--no-build-isolation", "--no-deps", "-e", source)
    environment.pip(*install)
    objects = sorted((source / "build").rglob("*.o"))
    assert len(objects) == len(list((source / "csrc").rglob("*.cpp")))
    before = [path.stat().st_mtime_ns for path in objects]
    with (source / "csrc/cpu/isa.cpp").open("a") as file:
        file.write("// changed\n")
    environment.pip(*install)
    if not shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"):
        pytest.skip("no ninja: everything is compiled")
    changed = [path.name for path, time in zip(objects, before, strict=True) if path.stat().st_mtime_ns != time]
    assert changed == ["isa.o"]


def test_source_archive_and_isolated_build(index, environment, tmp_path):
    """The archive holds all that a build needs, also when it was made without torch. pip's isolated build compiles
    for the torch of the environment it installs into."""
    source = copy_source(tmp_path / "source")
    code = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden')\n")
    name = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(hidden)!r}); {code}", cwd=source).split()[-1]
    with tarfile.open(source / "dist" / name) as archive:
        names = {member.name.partition("/")[2] for member in archive}
    wanted = {path.relative_to(source).as_posix() for path in (source / "csrc").rglob("*") if path.is_file()}
    assert wanted and wanted <= names and {"kernels/__init__.py", "bench/__init__.py", "LICENSE"} <= names
    assert not any(path.endswith((".so", "_build.json")) for path in names)
    environment.pip("--no-deps", source / "dist" / name)
    assert Path(environment.run(LOSS.format(backend="cpu")).strip()).is_relative_to(environment.site)


@pytest.mark.parametrize("setting, reason", [
    ({"CXX": "/nonexistent/c++"}, "no working C++ compiler was found"),
    ({"SSD_CORE_NO_EXTENSION": "1"}, "SSD_CORE_NO_EXTENSION was set"),
])
def test_without_the_extension(source, environment, setting, reason):
    environment.pip("--no-build-isolation", "--no-deps", source, **setting)
    assert not list((environment.site / "ssd_core").glob("*.so"))
    said = environment.info()
    assert reason in said and REBUILD in said
    for backend in ("auto", "torch"):
        environment.run(LOSS.format(backend=backend))
    said = environment.run(LOSS.format(backend="cpu"), status=1)
    assert "UsageError" in said and reason in said


def test_code_that_does_not_compile_is_an_error(environment, tmp_path):
    """No silent fallback, and whatever was installed before stays."""
    source = copy_source(tmp_path / "source")
    for path in (source / "csrc").rglob("*.cpp"):
        path.write_text("#error on purpose\n")
    said = environment.pip("--no-build-isolation", "--no-deps", source, status=1)
    assert "on purpose" in said
    environment.run("import ssd_core", status=1)


def test_beside_hugging_face_kernels(index, source, environment):
    """With Hugging Face's `kernels` installed, transformers finds theirs, and we ours, also in our folder."""
    environment.pip("--no-deps", "kernels")
    available = "from transformers.utils import is_kernels_available\nprint('transformers:', is_kernels_available())"
    before = environment.run(available)         # True or False depends on the releases of the two
    environment.pip("--no-build-isolation", "--no-deps", "-e", source)
    probe = f"""
import kernels, ssd_core.kernels
from pathlib import Path
assert callable(kernels.get_kernel), kernels.__file__
assert Path(kernels.__file__).is_relative_to({str(environment.site)!r})
assert Path(ssd_core.kernels.__file__) == Path({str(source / "kernels/__init__.py")!r})
{available}
"""
    for folder in (environment.elsewhere, source):
        assert environment.run(probe, cwd=folder) == before
    test = environment.elsewhere / "test_probe.py"
    test.write_text(f"def test():\n    exec({probe!r}, {{}})\n")
    for folder in (environment.elsewhere, source):
        run(environment.python, "-P", "-m", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider", test,
            cwd=folder)
        assert "torch_version" in run(environment.script, "info", cwd=folder)
