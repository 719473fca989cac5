"""The shape of the package: imports flow one way, importing is cheap, and `kernels` stays Hugging Face's."""

import ast
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ssd_core

ROOT = Path(__file__).resolve().parents[1]

# Top to bottom. A module imports from its own folder or from lower lines; entries of one line do not know each other.
LAYERS = """
cli
dryrun bench
pipeline
report presets integrations
train sampler evaluate distributed
nn store models prompts
data ops
plan backends targets sampling_params files
triton
chunked reference cpu
native kernels groups
checks
""".split("\n")[1:-1]
HEIGHT = {name: -line for line, names in enumerate(LAYERS) for name in names.split()}


def modules():
    """{dotted name: file} of everything that the wheel holds."""
    found = {}
    for package, folder in {"ssd_core": "ssd_core", "ssd_core.kernels": "kernels", "ssd_core.bench": "bench"}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.name.startswith("test_"):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imported(name, path):
    """(line, what) of every import in a file, also those inside functions, as strings "module:attribute" for
    importlib, and as attributes of ssd_core that load a module at first use."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in MODULES or base == "ssd_core" else base
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ssd_core":
            yield node.lineno, f"ssd_core.{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"ssd_core(\.\w+)+(:\w+)?", node.value):
                yield node.lineno, node.value.partition(":")[0]


def layer(name):
    """The entry of LAYERS that a module belongs to: for the public names, that of the module they come from."""
    name = ssd_core._PUBLIC.get(name.removeprefix("ssd_core."), name)
    return name.split(".")[1] if "." in name else None


def violations(name, path):
    own = layer(name)
    for line, other in imported(name, path):
        if not other.startswith("ssd_core.") or own is None:    # ssd_core/__init__.py names what it exports
            continue
        target = layer(other)
        if target.startswith("__"):                             # ssd_core.__version__
            continue
        if target not in HEIGHT:
            yield f"{path.relative_to(ROOT)}:{line}: {other} is in no layer"
        elif target != own and HEIGHT[target] >= HEIGHT[own]:
            yield f"{path.relative_to(ROOT)}:{line}: {own} imports {other}, which is not below it"


def test_every_module_is_in_a_layer():
    assert {layer(name) for name in MODULES} - {None} <= HEIGHT.keys()
    assert layer("ssd_core.linear_cross_entropy") == "ops"


def test_imports_flow_one_way():
    assert not [text for name, path in MODULES.items() for text in violations(name, path)]


def test_a_wrong_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "wrong.py"
    for code in ("import ssd_core.train.loop", "def f():\n    from ssd_core import cli", "from ssd_core import Sampler",
                 "from ..train import loop", "import ssd_core\nssd_core.self_distill()", 'x = "ssd_core.nn:Module"',
                 "import ssd_core.unknown"):
        path.write_text(code)
        assert len(list(violations("ssd_core.ops.wrong", path))) == 1, code
    path.write_text("import torch\nfrom ssd_core import checks\nfrom .sample import sample\nfrom . import softmax\n")
    assert not list(violations("ssd_core.ops.wrong", path))


def test_kernels_import_torch_and_triton_only():
    for name, path in MODULES.items():
        if layer(name) == "kernels":
            for line, other in imported(name, path):
                allowed = other.split(".")[0] in {"torch", "triton", "__future__", *sys.stdlib_module_names}
                assert allowed or layer(other) == "kernels", f"{path}:{line}: {other}"


# -- what importing costs


def run(*command, cwd, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_import_is_cheap(tmp_path):
    code = "import time, torch\nstart = time.perf_counter()\nimport ssd_core\nprint(time.perf_counter() - start)"
    seconds = [float(run(sys.executable, "-P", "-c", code, cwd=tmp_path)) for _ in range(3)]
    assert statistics.median(seconds) < 0.3, seconds


@pytest.mark.parametrize("code", [
    "import ssd_core", "import ssd_core; ssd_core.linear_cross_entropy; ssd_core.sample; ssd_core.SparseTarget"])
def test_import_loads_no_heavy_module(tmp_path, code):
    code = f"import sys, torch\nbefore = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"
    new = set(run(sys.executable, "-P", "-c", code, cwd=tmp_path).split())
    assert "ssd_core" in new
    assert not new & {"transformers", "triton", "ssd_core._C", "matplotlib", "jinja2", "typer", "kernels"}


def test_help_is_quick_and_loads_no_transformers(tmp_path):
    code = ("import sys, time\nstart = time.perf_counter()\nfrom ssd_core import cli\nsys.argv[1:] = ['--help']\n"
            "try: cli.main()\nfinally: print(time.perf_counter() - start, 'transformers' in sys.modules)")
    seconds, loaded = run(sys.executable, "-P", "-c", code, cwd=tmp_path).split()[-2:]
    assert float(seconds) < 15 and loaded == "False", (seconds, loaded)    # torch itself takes most of it


# -- the name `kernels`

WAYS = {    # a fresh interpreter that runs the code in $PROBE
    "python -P -c": [sys.executable, "-P", "-c", "import os; exec(os.environ['PROBE'])"],
    "python -P -m": [sys.executable, "-P", "-m", "probe"],
    "script": [sys.executable, "{scripts}/probe-script"],
    "pytest": [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", "{probe}"],
}
PROBE = """
import kernels, ssd_core.kernels, ssd_core, os.path
assert kernels.MARKER == "theirs", kernels.__file__
assert not hasattr(ssd_core.kernels, "MARKER") and ssd_core.kernels is not kernels
assert ssd_core.kernels.__name__ == "ssd_core.kernels"
"""


@pytest.fixture
def theirs(tmp_path):
    """A folder as site-packages would be: a package `kernels` that is not ours, and ways of starting."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels/__init__.py").write_text("MARKER = 'theirs'\n")
    (site / "probe.py").write_text("import os\nexec(os.environ['PROBE'])\n")
    scripts = tmp_path / "scripts"          # sys.path[0] of a console script is its own folder
    scripts.mkdir()
    (scripts / "probe-script").write_text("import os\nexec(os.environ['PROBE'])\n")
    (scripts / "test_probe.py").write_text("import os\ndef test_probe():\n    exec(os.environ['PROBE'], {})\n")
    return tmp_path


@pytest.mark.parametrize("where", ["elsewhere", "root"])
@pytest.mark.parametrize("way", WAYS)
def test_both_kernels_packages_import(theirs, way, where):
    command = [part.format(scripts=theirs / "scripts", probe=theirs / "scripts/test_probe.py") for part in WAYS[way]]
    run(*command, cwd=ROOT if where == "root" else theirs, PYTHONPATH=str(theirs / "site"), PROBE=PROBE)


def test_our_tests_do_not_shadow_it(theirs):
    """pytest as `make test` starts it, in the root, on this folder's configuration."""
    script = shutil.which("pytest", path=str(Path(sys.executable).parent))
    for command in ([sys.executable, "-P", "-m", "pytest"], [script]):
        if command != [None]:
            run(*command, "-p", "no:cacheprovider", f"{__file__}::test_kernels_is_not_ours", cwd=ROOT,
                PYTHONPATH=str(theirs / "site"))


def test_kernels_is_not_ours():
    """Neither the root nor tests/, which conftest.py puts on the path, offers a `kernels`, not even a bare folder."""
    spec = importlib.util.find_spec("kernels")
    for location in spec.submodule_search_locations if spec else ():
        assert Path(location).parent not in (ROOT, ROOT / "tests"), location


def test_no_package_folder_in_tests():
    """An __init__.py there would make pytest put the root on sys.path, and `kernels` with it."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint"])
def test_make_starts_python_with_p(target):
    command = [shutil.which("make"), "--no-print-directory", "-n", target, "PYTHON=/a/python"]
    lines = run(*command, cwd=ROOT).splitlines()
    assert lines[0].startswith("sh .ci/setup")
    assert len(lines) > 1 and all(line.startswith('"/a/python" -P -m ') for line in lines[1:] if "/a/python" in line)


# -- the rest


def test_public_names():
    assert set(ssd_core.__all__) == set(ssd_core._PUBLIC) and ssd_core.__all__ == sorted(ssd_core.__all__)
    for name in ssd_core.__all__:
        assert getattr(ssd_core, name).__name__ == name
        assert name in dir(ssd_core)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ssd_core.nothing


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ssd_core.__version__


def test_third_party_imports_are_declared():
    """In pyproject.toml; else `make test` passes only where something else happened to install them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    always = {re.match(r"[\w-]+", need).group().replace("-", "_") for need in project["dependencies"]}
    always |= {"tokenizers", "markupsafe"}                  # transformers and jinja2 are made of them
    tests = always | {re.match(r"[\w-]+", need).group().replace("-", "_") for need in extras["test"]}
    optional = {re.match(r"[\w-]+", need).group().replace("-", "_") for extra in extras.values() for need in extra}
    own = {"ssd_core", "conftest", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    files = {**MODULES, **{str(path): path for path in (ROOT / "tests").rglob("*.py")}}
    for name, path in files.items():
        if path.is_relative_to(ROOT / "tests"):
            allowed = tests
        elif layer(name) in ("bench", "kernels"):
            allowed = always | optional
        else:
            allowed = always
        for line, other in imported(name, path):
            top = other.split(".")[0]
            assert top in sys.stdlib_module_names or top in own | allowed, f"{path.relative_to(ROOT)}:{line}: {other}"


def test_every_folder_of_the_package_is_a_package():
    """setup.py finds the folders that have an __init__.py; one without would be missing in the wheel only."""
    for path in MODULES.values():
        assert (path.parent / "__init__.py").exists(), f"{path.parent.relative_to(ROOT)}/__init__.py"


def test_no_path_of_a_machine_in_the_repository():
    """What is here must mean the same everywhere."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    own = re.escape(str(ROOT))
    machine = re.compile(rf"{own}(?![\w-])|(?<![\w.*}}/-])/(?:root|home|work|Users)/[\w.]|file:///[a-z]")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        path = ROOT / name
        if not path.is_file() or path.samefile(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found = machine.search(text)
        assert found is None, f"{name}: {found.group()!r}"
