"""How backend "triton" launches its kernels: on which device, with which configuration, and what the host waits for."""

import contextlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from compiled import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

from ssd_core import backends


def interpreted(*command, **environment):
    return subprocess.run(
        [sys.executable, "-P", *command], env={**os.environ, "TRITON_INTERPRET": "1", **environment}, cwd=ROOT,
        text=True, capture_output=True)


# -- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted({record.op for record in backends.BACKENDS if record.name == "triton"}))
def test_kernels_are_launched_on_the_device_of_their_tensors(op, monkeypatch):
    """Triton takes the current device, whatever the tensors'."""
    current = [0]

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(backends, "_load", lambda location: lambda tensor, **options: (current[-1], options))
    record = next(record for record in backends.BACKENDS if (record.op, record.name) == (op, "triton"))
    tensor = SimpleNamespace(device=torch.device("cuda", 1))
    assert record.load()(tensor, temperature=2.0) == (1, {"temperature": 2.0}) and current == [0]
    assert record.load()(torch.zeros(1)) == (0, {})                                         # the interpreter's


# -- what the host waits for ------------------------------------------------------------------------------------------

WAITS = """
import sys, traceback
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import ssd_core
from ssd_core import SparseTarget, TeacherLogits
from ssd_core.ops import cross_entropy, distill, linear_cross_entropy, linear_distill, linear_logprob, logprob

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.lift_fresh.default, aten.equal.default}
OPS = {getattr(torch.ops.ssd_core, name).default: getattr(sys.modules[f"ssd_core.ops.{name}"], f"_{name}")._init_fn
       for name in ("cross_entropy", "distill", "linear_cross_entropy", "linear_distill", "linear_logprob", "logprob")}

def ours(frame):
    "The interpreter's, of a check on a CPU, and of the look at an upstream gradient of 1 there."
    return "interpreter" in frame.filename or frame.filename.endswith("checks.py") or 'type == "cpu"' in frame.line

class Waits(TorchDispatchMode):
    "Numbers that go from tensors to the host, and lists that become tensors."
    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in OPS:
            with self:
                return OPS[function](*args, **(kwargs or {}))
        if function in WAITS and not any(ours(frame) for frame in traceback.extract_stack()):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))

n, d, v = 9, 8, 300
g = torch.Generator().manual_seed(0)
x, w, z = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((n, d), (v, d), (n, v)))
b = torch.randn(v, generator=g)
y = torch.randint(v, (n,), generator=g)
y[2] = -100
sparse = SparseTarget(torch.randint(v, (n, 3), generator=g), torch.rand(n, 3, generator=g))
teacher = TeacherLogits(torch.randn(n, v, generator=g))
weight = torch.rand(v, generator=g)
few = {"backend": "triton", "workspace_bytes": WORKSPACE}
CALLS = {
    "hard": lambda: ssd_core.linear_cross_entropy(
        x, w, y, linear_bias=b, weight=weight, softcap=3.0, label_smoothing=0.1, z_loss=0.1, num_items_in_batch=7,
        **few),
    "sparse": lambda: ssd_core.linear_cross_entropy(x, w, sparse, tail="bucket", **few),
    "filtered": lambda: ssd_core.linear_cross_entropy(x, w, y, grad_filter=0.1, backend="triton"),
    "distill, sparse": lambda: ssd_core.linear_distill(x, w, sparse, tail="bucket", target=y, ce_weight=0.5, **few),
    "distill, dense": lambda: ssd_core.linear_distill(x, w, teacher, target=y, divergence="jsd", **few),
    "logprob": lambda: sum(ssd_core.linear_logprob(x, w, y, **few)[:2]).sum(),
    "on logits": lambda: ssd_core.cross_entropy(z, y, backend="triton"),
    "distill on logits": lambda: ssd_core.distill(z, teacher, backend="triton"),
    "logprob on logits": lambda: sum(ssd_core.logprob(z, y, backend="triton")[:2]).sum(),
}
for name, call in CALLS.items():
    with Waits() as waits:
        call().backward()
    print(f"{name}: {waits.found}")
"""


@pytest.mark.parametrize("route", ["chunked", "tiled"])
def test_the_host_waits_for_the_number_of_tokens_alone(route):
    """Also where a vocabulary comes in tiles, whose rows carry a state."""
    done = interpreted("-c", WAITS.replace("WORKSPACE", "20_000"), SSD_CORE_ROUTE=route)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ") for line in done.stdout.splitlines())
    assert len(lines) == 9 and all(found == "['aten.nonzero.default']" for found in lines.values()), lines


COMPILED = """
import torch
from ssd_core import cross_entropy, linear_cross_entropy, linear_logprob

g = torch.Generator().manual_seed(0)
x, w = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((9, 8), (300, 8)))
y = torch.randint(300, (9,), generator=g)
y[2] = -100

def step(x, w, y):
    loss = linear_cross_entropy(x, w, y, backend="triton") + cross_entropy(x @ w.T, y, backend="triton")
    return loss + linear_logprob(x, w, y, backend="triton").logprob.sum()

def found(step):
    loss = step(x, w, y)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))

assert all(map(torch.equal, found(torch.compile(step, fullgraph=True, backend="aot_eager")), found(step)))
print("equal")
"""


def test_what_torch_compile_makes_of_it_is_the_same():
    done = interpreted("-c", COMPILED)
    assert done.stdout == "equal\n", done.stderr


# -- configurations ---------------------------------------------------------------------------------------------------

SHOW = """
from ssd_core.kernels import launch
import torch
print(launch.rows("softmax", 4000), launch.rows("distill", 4000), launch.products("moments"),
      launch.tiles(100, torch.float32, torch.device("cpu"), True))
"""


def test_what_was_tuned_is_launched(tmp_path):
    path = tmp_path / "launch.json"
    plain = interpreted("-c", SHOW, SSD_CORE_LAUNCH=str(path)).stdout
    assert plain.startswith("Rows(block=16384, warps=1) Rows(block=16384")
    found = {"softmax": {"block": 512}, "moments": {"rows": 16}, "tiles32": {"columns": 32}}
    path.write_text(json.dumps({"another": {"distill": {"block": 128}}, "interpreter": found}))
    expected = plain
    for before, after in (("Rows(block=16384", "Rows(block=512"), ("warps=8, rows=32", "warps=8, rows=16"),
                          ("Tiles(rows=16, columns=64", "Tiles(rows=16, columns=32")):
        assert before in expected
        expected = expected.replace(before, after, 1)
    assert interpreted("-c", SHOW, SSD_CORE_LAUNCH=str(path)).stdout == expected


@pytest.mark.parametrize("text", [
    "{", "[]", '{"gpu": {"no such op": {"block": 1}}}', '{"gpu": {"softmax": {"size": 1}}}',
    '{"gpu": {"softmax": {"block": "wide"}}}'])
def test_a_file_of_something_else_is_named(tmp_path, text):
    path = tmp_path / "launch.json"
    path.write_text(text)
    done = interpreted("-c", SHOW, SSD_CORE_LAUNCH=str(path))
    assert done.returncode == 1
    assert f"RuntimeError: {path}: expected a file of `ssd-core bench tune`, tune anew or remove it" in done.stderr


def test_descent_finds_the_fastest_and_gives_up_in_time():
    from ssd_core.bench.tune import descend

    def seconds(fields):
        return 1 + abs(fields["block"] - 2048) / 4096 + abs(fields["warps"] - 2) / 10

    def ratio(these, other):
        return float("inf") if other["warps"] == 1 else seconds(other) / seconds(these)

    start = {"block": 8192, "warps": 8, "hidden": 0}
    fields, total = descend(start, ratio, float("inf"))
    assert fields == {"block": 2048, "warps": 2, "hidden": 0}
    assert total == pytest.approx(seconds(fields) / seconds(start))
    assert descend(start, ratio, 0) == (start, 1.0)


def test_tuning_keeps_what_it_finds(tmp_path):
    path = tmp_path / "deep" / "launch.json"
    command = ("-m", "ssd_core.bench.run", "tune", "--ops", "softmax,cross_entropy", "--case", "512x16", "--tokens",
               "8", "--dtype", "float32", "--device", "cpu", "--samples", "1")
    done = interpreted(*command, SSD_CORE_LAUNCH=str(path))
    assert done.returncode == 0, done.stderr
    assert "cross_entropy, cross_entropy: " in done.stdout and "softmax, softmax: " in done.stdout
    assert done.stdout.endswith(f"{path}\n") and set(json.loads(path.read_text())) == {"interpreter"}
    assert interpreted(*command, SSD_CORE_LAUNCH=str(path)).returncode == 0         # on top of what is there
    refused = interpreted(*command, TRITON_INTERPRET="0")
    assert refused.returncode == 2 and "device: expected one that backend 'triton' serves, got cpu" in refused.stderr
