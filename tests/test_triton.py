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


PRECISE = "triton and not float16"      # nor bfloat16
WHAT_ROUNDS = "triton and float16 and (results_and_gradients or autocast or sparse_targets or every_measure)"


@pytest.mark.all
@pytest.mark.interpreted
@pytest.mark.parametrize("choice", [PRECISE, WHAT_ROUNDS])
def test_the_shared_suite_in_the_interpreter(choice):
    """All of it in float32, and in 16 bits what rounds: it is a thousand times slower than a GPU."""
    run_tests(files=["tests/ops", "tests/test_known_bugs.py"], choice=choice, TRITON_INTERPRET="1")


HEADS = "(linear_cross_entropy or linear_logprob or linear_distill)"


def test_the_tiled_route_in_the_interpreter():
    run_tests("--maxfail=1", files=["tests/ops/test_every_op.py"],
              choice=f"triton and float32 and results_and_gradients and {HEADS} and not hard", TRITON_INTERPRET="1",
              SSD_CORE_ROUTE="tiled")


@pytest.mark.all
@pytest.mark.interpreted
@pytest.mark.parametrize(("files", "choice"), [
    ([f"tests/ops/test_{name}.py" for name in ("linear_cross_entropy", "linear_distill", "linear_logprob", "every_op",
                                               "process_group")], f"{PRECISE} and ({HEADS} or process_group)"),
    (["tests/ops"], f"triton and float16 and {HEADS} and (results_and_gradients or autocast or any_chunks)")])
def test_the_shared_suite_by_the_tiled_route(files, choice):
    run_tests(files=files, choice=choice, TRITON_INTERPRET="1", SSD_CORE_ROUTE="tiled")


TILED = """
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssd_core import SparseTarget, linear_cross_entropy, linear_distill, linear_logprob, plan, triton
from ssd_core.kernels import tiled

def problem(n, d, v, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, d, generator=g).to(dtype) for size in (n, v))
    ids = torch.randint(v, (n, 3), generator=g)
    return x, w, SparseTarget(ids, torch.rand(n, 3, generator=g))

def gradients(x, w, target):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = linear_cross_entropy(x, w, target, tail="bucket", backend="triton", softcap=3.0)
    loss = loss + linear_distill(x, w, SparseTarget(target.ids, target.probs / 4), divergence="reverse_kl",
                                 target=target.ids[:, 1], ce_weight=0.5, temperature=2.0, backend="triton")
    found = linear_logprob(x, w, target.ids[:, 0], backend="triton")
    return [loss.detach(), *found, *torch.autograd.grad(loss + (found.logprob - found.entropy).sum(), (x, w))]
"""


def by_tiles(code):
    return interpreted(f'import os\nos.environ["SSD_CORE_ROUTE"] = "tiled"\n{TILED}\n{code}')


def test_tiles_by_descriptors_and_by_pointers_are_the_same():
    """And the same bits on every call. What is not aligned has no descriptor."""
    assert by_tiles("""
made = []
make = tiled.TensorDescriptor.from_tensor
tiled.TensorDescriptor.from_tensor = lambda *given: made.append(given) or make(*given)
x, w, target = problem(17, 20, 70)
true = gradients(x, w, target)
assert len(made) == 14, len(made)           # three looks and a look again, three slopes: of each, x and weight
assert all(map(torch.equal, gradients(x, w, target), true))
apart = torch.zeros(17, 21)[:, :20].copy_(x)
made.clear()
assert all(map(torch.allclose, gradients(apart, w, target), true)) and not made
tiled.has_tensor_memory_accelerator = lambda device: False
assert all(map(torch.equal, gradients(x, w, target), true)) and not made
print("right")
""") == "right"


def test_no_logits_are_in_memory_and_the_workspace_is_kept():
    """All that a call makes, freed or not, is within the budget beyond what it returns; logits alone would not be."""
    assert by_tiles("""
class Made(TorchDispatchMode):
    sizes = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.sizes += (out.numel() * out.element_size(),)
        return out

n, d, v = 48, 16, 1000
x, w, target = problem(n, d, v)
t_x, t_w, _ = problem(n, 24, v - 7)
plan.SPAN, budget = 128, 90_000
for scaled in (False, True):
  for op in ("cross_entropy", "sparse", "hidden"):
    dense = {"logits": 2, "dense": True, "looks": 2} if op == "hidden" else {}
    demand = plan.Demand(n, d, v, {"cross_entropy": 3, "sparse": 6, "hidden": 0}[op], x.dtype, x.device, **dense)
    demand = plan.dataclasses.replace(demand, **triton.linear_bytes(demand))
    chunks = plan.plan_chunks(demand, budget)
    assert chunks.route == "tiled" and chunks.rows == n and chunks.tile < v, chunks
    common = dict(
        class_weight=None, label_weight=None, row_scale=torch.ones(n) if scaled else None,
        needs=[scaled, scaled, False], chunks=chunks, keep_float32=False, dtype=x.dtype, logit_scale=1.0, softcap=0.0,
        temperature=1.0, vocab=v, vocab_start=0, group=None, label_smoothing=0.0, z_loss=0.0)
    with Made() as made:
        if op == "cross_entropy":
            triton.linear_cross_entropy(
                x, w, None, target.ids, target.probs, None, None, grad_filter=0.0, grad_filter_weight=0.0,
                one_sign=True, vocab_order=None, bucket=False, **common)
        else:
            taught = (target.ids, target.probs / 4, None, None, None, None)
            taught = (None, None, None, t_x, t_w, None) if op == "hidden" else taught
            triton.linear_distill(
                x, w, None, *taught, target.ids[:, 0], None, teacher_logit_scale=1.0, teacher_softcap=0.0,
                divergence="jsd", beta=0.5, tail="bucket", temperature_squared=False, ce_weight=0.5, with_ce=True,
                **common)
    assert max(made.sizes) < n * v * 4 / 2, made.sizes
    spans = -(-v // chunks.tile)
    returned = (n + v) * d * 4 if scaled else 0
    assert sum(made.sizes) - returned - (2 * spans - 2) * n * d * 4 * scaled <= budget, (made.sizes, budget)
print("right")
""") == "right"


def test_a_row_that_fits_is_read_once():
    """The interpreter's blocks have 256 columns."""
    assert interpreted("""
import torch
from triton.runtime.interpreter import InterpreterBuilder

from ssd_core import cross_entropy, distill, logprob, softmax, SparseTarget, TeacherLogits

read, load = [], InterpreterBuilder.create_masked_load
InterpreterBuilder.create_masked_load = lambda self, at, *given, **named: (
    read.append(at.data.shape) or load(self, at, *given, **named))

def loads(function, v):
    # of blocks, forward and backward
    z = torch.randn(1, v, requires_grad=True)
    read.clear()
    function(z).sum().backward()
    return sum(shape == (256,) for shape in read)

y, ids = torch.tensor([3]), torch.tensor([[1, 4]])
for name, function, held, not_held in (     # a loss is computed again in the backward
        ("cross_entropy", lambda z: cross_entropy(z, y, reduction="none", backend="triton"), 2, 6),
        ("logprob", lambda z: sum(logprob(z, y, backend="triton")[:2]), 2, 6),
        ("sparse", lambda z: distill(z, SparseTarget(ids, torch.full((1, 2), 0.4)), reduction="none",
                                     backend="triton"), 2, 6),
        ("dense", lambda z: distill(z, TeacherLogits(z.detach()), divergence="jsd", reduction="none",
                                    backend="triton"), 4, 20),
        ("softmax", lambda z: softmax(z, backend="triton") * z.detach(), 3, 12)):
    found = loads(function, 256), loads(function, 257)
    assert found == (held, not_held), (name, found)
print("right")
""") == "right"


# -- who is served ----------------------------------------------------------------------------------------------------


def test_cpu_tensors_are_refused_without_the_interpreter():
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve this call: it serves cuda tensors, not cpu"):
        backends.choose("softmax", torch.device("cpu"), torch.float32, "triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_why_it_is_missing(monkeypatch):
    assert missing().startswith("there is no GPU (with TRITON_INTERPRET=1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing() == "Triton is not installed"


# -- what the interpreter does wrong: the kernels go around it; if it is mended, so can they be ------------------------


def floats_of_a_kernel(body, code):
    """What ``code`` prints, which calls a kernel of x_ptr, y_ptr and this body in the interpreter."""
    return [float(word) for word in interpreted(f"""
import importlib.util, pathlib, tempfile, torch
source = '''
import triton
import triton.language as tl
@triton.jit
def kernel(x_ptr, y_ptr):
    {body}
'''
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "a_kernel.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("a_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    {code}
""").split()]


def test_the_interpreter_cuts_bfloat16_off_instead_of_rounding():
    ours, right = floats_of_a_kernel(
        "tl.store(y_ptr, tl.load(x_ptr).to(tl.bfloat16))",
        "x, y = torch.tensor([1 + 255 / 2**15]), torch.empty(1, dtype=torch.bfloat16); module.kernel[(1,)](x, y); "
        "print(y.item(), x.to(torch.bfloat16).item())")
    assert right == 1.0078125 and ours == 1.0, "it rounds now: kernels.logits.TRUNCATES can go"


def test_the_interpreter_multiplies_the_bits_of_bfloat16():
    """tl.dot of bfloat16 is silently wrong there: in the interpreter the kernels multiply in float32."""
    ours, right = floats_of_a_kernel(
        "i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]; x = tl.load(x_ptr + i); "
        "tl.store(y_ptr + i, tl.dot(x, x))",
        "x, y = torch.eye(16, dtype=torch.bfloat16), torch.empty(16, 16); module.kernel[(1,)](x, y); "
        "print(y[0, 0].item(), (x @ x)[0, 0].item())")
    assert right == 1 and ours != 1, "it multiplies now: kernels.tiled and kernels.grad_filter need not widen"


# -- compiled ahead of time -------------------------------------------------------------------------------------------

REGISTERS = 128         # of a thread: two programs of 8 warps share a multiprocessor
WIDE_WARPS = 168        # the same on CDNA, of whose 512 a lane three warps then fit
SHARED = 16 << 10       # bytes of a program
OF_A_DRAW = 255         # it sorts 64-bit keys, in float64; one program a row
ARITHMETIC = ("sample, threshold", "sample, score", "draw")     # more of it than of memory: narrower blocks
OF_A_PRODUCT, WIDE_PRODUCT = 224, 512      # half of which are sums; on CDNA one warp has all of them
SHARED_OF_A_PRODUCT, SHARED_OF_A_ROW = 72 << 10, 32 << 10
# of tiles: bytes of shared memory that a program may have, and what copies by descriptors
CHIP_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def check_tiles(one):
    """They fill a chip's registers and its shared memory, and nothing more."""
    assert one.spills == 0 and one.registers <= 255, one
    assert one.shared <= CHIP_SHARED[one.target], one
    of_rows = one.variant.endswith(("targets", "end of rows"))
    no_matrices = of_rows or ("ieee" in one.variant and one.target != "gfx942")
    assert (one.products == 0) if no_matrices else (one.own_products > 0), one
    assert (one.copies > 0) == ("descriptors" in one.variant), one
    assert one.ahead > 0 or of_rows or one.target == "gfx942", one      # CDNA copies through registers


def most_registers(one):
    wide = "gfx" in one.target
    if one.variant.startswith("filter, d_"):
        return WIDE_PRODUCT if wide else OF_A_PRODUCT
    if one.variant.startswith("draw") or (wide and one.variant.startswith(ARITHMETIC)):
        return OF_A_DRAW
    return WIDE_WARPS if wide else REGISTERS


def check_resources(found):
    assert found
    for one in found:
        if one.variant.startswith("tiled"):
            check_tiles(one)
            continue
        product = one.variant.startswith("filter, d_")
        assert one.spills == 0 and one.registers <= most_registers(one), one
        held = one.variant.endswith("held")
        assert one.shared <= (SHARED_OF_A_PRODUCT if product else SHARED_OF_A_ROW if held else SHARED), one
        narrow = one.variant.startswith(ARITHMETIC) or one.variant.endswith("on the support")    # which reads ids alone
        assert one.load_bits >= (64 if narrow else 128), one
        if product:         # of few rows; exact ones of float32 only CDNA's matrix units have
            assert (one.products > 0) == ("float32" not in one.variant or "gfx" in one.target), one


def test_a_kernel_compiles_for_hopper():
    from ssd_core.bench.resources import VARIANTS, compiled

    tiles = next(variant for variant in VARIANTS if "descriptors" in variant.name)
    check_resources([compiled(variant, "sm_90") for variant in (VARIANTS[0], tiles)])


@pytest.mark.all
def test_all_kernels_compile_for_all_targets():
    from ssd_core.bench.resources import TARGETS, VARIANTS, everything, table

    found = list(everything())
    page = (ROOT / "bench/RESOURCES.md").read_text()
    if f"Triton {triton.__version__}," in page:
        assert table(found) in page, "the page is of other kernels"
    assert len(found) == sum(target in variant.targets for variant in VARIANTS for target in TARGETS)
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


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD's have one precision")
def test_products_of_float32_are_as_precise_as_pytorch_s():
    """pytorch #166387: after the new setting, the older one raises when it is read."""
    from ssd_core.kernels.launch import float32_products

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert float32_products() == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
