"""Backend "triton" without a GPU: its kernels in the interpreter, in processes of their own; compiled ahead of time."""

import os
import subprocess
import sys

import pytest
import torch
from compiled import ROOT, run_tests

triton = pytest.importorskip("triton", reason="Triton is not installed")

from ssd_core import backends  # noqa: E402
from ssd_core.triton import missing  # noqa: E402

OPS = sorted({record.op for record in backends.BACKENDS if record.name == "triton"})


def interpreted(code):
    """What a script prints in the interpreter."""
    done = subprocess.run([sys.executable, "-P", "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- the shared suite -------------------------------------------------------------------------------------------------


def test_every_op_in_the_interpreter():
    """One test of test_every_op.py for each op: options, ignored tokens and all dtypes are in the whole suite."""
    run_tests("--maxfail=1", files=["tests/ops/test_every_op.py"],
              choice="triton and float32 and results_and_gradients", TRITON_INTERPRET="1")


@pytest.mark.all
@pytest.mark.parametrize("choice", [
    "triton and not float16",           # nor bfloat16
    "triton and float16 and (results_and_gradients or autocast or sparse_targets or every_measure)"])
def test_the_shared_suite_in_the_interpreter(choice):
    """All of it in float32, and in 16 bits what rounds: it is a thousand times slower than a GPU."""
    run_tests(files=["tests/ops", "tests/test_known_bugs.py"], choice=choice, TRITON_INTERPRET="1")


# -- who is served ----------------------------------------------------------------------------------------------------


def test_cpu_tensors_are_refused_without_the_interpreter():
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve this call: it serves cuda tensors, not cpu"):
        backends.choose("softmax", torch.device("cpu"), torch.float32, "triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_why_it_is_missing(monkeypatch):
    assert missing().startswith("there is no GPU (with TRITON_INTERPRET=1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing() == "Triton is not installed"


@pytest.mark.parametrize("option", backends.FILTER)
def test_an_option_that_it_lacks_is_refused_by_name(option):
    record = next(r for r in backends.BACKENDS if (r.op, r.name) == ("linear_cross_entropy", "triton"))
    assert record.refuses("cuda", torch.float32, [option]) == f"{option}: not in this backend yet"


# -- what the interpreter does wrong: the kernels go around it; if it is mended, so can they be ------------------------


def test_the_interpreter_cuts_bfloat16_off_instead_of_rounding():
    found = interpreted("""
import torch, triton, triton.language as tl
source = '''
import triton
import triton.language as tl
@triton.jit
def copy(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr).to(tl.bfloat16))
'''
import importlib.util, tempfile, pathlib
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "copy_kernel.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("copy_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, y = torch.tensor([1 + 255 / 2**15]), torch.empty(1, dtype=torch.bfloat16)
    module.copy[(1,)](x, y)
    print(y.item(), x.to(torch.bfloat16).item())
""")
    ours, right = map(float, found.split())
    assert right == 1.0078125 and ours == 1.0, "it rounds now: kernels.logits.TRUNCATES can go"


# -- compiled ahead of time -------------------------------------------------------------------------------------------

REGISTERS = 128         # of a thread: two programs of 8 warps share a multiprocessor
WIDE_WARPS = 168        # the same on CDNA, of whose 512 a lane three warps then fit
SHARED = 16 << 10       # bytes of a program
OF_A_DRAW = 255         # it sorts 64-bit keys, in float64; one program a row
ARITHMETIC = ("sample, threshold", "sample, score", "draw")     # more of it than of memory: narrower blocks


def check_resources(found):
    assert found
    for one in found:
        assert one.spills == 0, one
        limit = OF_A_DRAW if one.variant.startswith("draw") else WIDE_WARPS if "gfx" in one.target else REGISTERS
        assert one.registers <= limit, one
        assert one.shared <= SHARED, one
        assert one.load_bits >= (64 if one.variant.startswith(ARITHMETIC) else 128), one


def test_a_kernel_compiles_for_hopper():
    from ssd_core.bench.resources import VARIANTS, compiled

    check_resources([compiled(VARIANTS[0], "sm_90")])


@pytest.mark.all
def test_all_kernels_compile_for_all_targets():
    from ssd_core.bench.resources import TARGETS, VARIANTS, everything

    found = list(everything())
    assert len(found) == len(TARGETS) * len(VARIANTS)
    check_resources(found)


def test_every_kernel_has_a_variant():
    """A kernel that is added is compiled, too."""
    import importlib
    import pkgutil

    from ssd_core.bench.resources import VARIANTS

    from ssd_core import kernels

    there = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        found = importlib.import_module(f"ssd_core.kernels.{module.name}")
        there |= {(module.name, name) for name, value in vars(found).items()
                  if isinstance(value, triton.JITFunction) and value.fn.__module__ == found.__name__
                  and any(p.name.endswith("_stride") for p in value.params)}
    assert there == {(variant.module, variant.function) for variant in VARIANTS}
