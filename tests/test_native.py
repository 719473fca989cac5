"""The compiled extension: cross_entropy_rows against a float64 definition, its instruction sets, threads, loading."""

import gc
import importlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssd_core import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def definition(logits, ids, probs, class_weight, *, logit_scale=1.0, softcap=0.0, temperature=1.0,
               label_smoothing=0.0, z_loss=0.0, bucket=False):  # fmt: skip
    """(loss, nll, lse) of (R, V) logits in plain PyTorch, as the op's documentation defines them."""
    V = logits.shape[1]
    z = logit_scale * logits
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    lse = torch.logsumexp(z, 1)
    w = torch.ones(ids.shape, dtype=z.dtype) if probs is None else probs.to(z.dtype)
    used = w != 0
    picked = z.gather(1, ids.where(used, 0))
    nll = w.sum(1) * lse - (w * picked).where(used, 0.0).sum(1)
    if bucket:
        support = torch.zeros(z.shape, dtype=torch.bool)
        for row, (row_ids, row_used) in enumerate(zip(ids, used, strict=True)):
            support[row, row_ids[row_used]] = True
        whole = support.all(1)
        tail = (1 - w.sum(1)).clamp(min=0).where(~whole, 0.0)
        off = z.masked_fill(support & ~whole[:, None], float("-inf")).logsumexp(1)
        nll = nll + (tail * (lse - off)).where(tail > 0, 0.0)
    c = torch.ones(V, dtype=z.dtype) if class_weight is None else class_weight.to(z.dtype)
    c_y = 1.0 if class_weight is None else c[ids[:, 0]]
    loss = c_y * (1 - label_smoothing) * nll
    if label_smoothing:
        loss = loss + label_smoothing / V * (c * (lse[:, None] - z)).sum(1)
    return loss + z_loss * lse**2, nll, lse


def expected(case, row_scale, options):
    """(loss, nll, lse, gradient) in float64."""
    logits = case["logits"].double().requires_grad_()
    loss, nll, lse = definition(logits, case["ids"], case["probs"], case["class_weight"], **options)
    (gradient,) = torch.autograd.grad((row_scale.double() * loss).sum(), logits)
    return loss.detach(), nll.detach(), lse.detach(), gradient


def make_case(R, V, dtype, seed=0, *, K=None, class_weight=False, mass=0.9, spread=3.0, offset=0.0):
    """K None: hard labels. Sparse targets repeat an id and hold an entry of probability 0 with an impossible id."""
    g = torch.Generator().manual_seed(seed)
    case = {"probs": None, "class_weight": None}
    case["logits"] = (torch.randn(R, V, generator=g) * spread + offset).to(dtype)
    if class_weight:
        case["class_weight"] = torch.rand(V, generator=g) + 0.1
    case["ids"] = torch.randint(V, (R, K or 1), generator=g)
    if K is not None:
        probs = torch.rand(R, K, generator=g) + 0.1
        if K > 2:
            case["ids"][:, 1] = case["ids"][:, 0]
            case["ids"][:, 2] = V + 12345
            probs[:, 2] = 0
        case["probs"] = probs / probs.sum(1, keepdim=True) * mass
    return case


def call(case, row_scale=None, **options):
    """(loss, nll, lse, gradient)"""
    results, gradient = native.cross_entropy_rows(
        case["logits"], case["ids"], case["probs"], None, case["class_weight"], None, row_scale, **options)
    return *results, gradient


def error(got, ref, floor=0.0):
    """Largest error of a row of (R, V), relative to the row's norm, or to floor (R,) where that is larger."""
    return ((got.double() - ref).norm(dim=1) / ref.norm(dim=1).clamp(min=floor)).max().item()


def tolerance(dtype):
    """Of a gradient: some float32 roundings, or one rounding to 16 bits."""
    return {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


def check(case, **options):
    """The op against the definition, reading and training, with row scales of both signs."""
    R = case["logits"].shape[0]
    row_scale = torch.linspace(-1.5, 2.0, R) if R > 1 else torch.tensor([-0.7])
    loss, nll, lse, gradient = expected(case, row_scale, options)
    magnitude = 1 + lse.abs().max().item()  # a loss is a difference of terms of this size
    before = case["logits"].clone()
    forward, trained = call(case, **options), call(case, row_scale, **options)
    assert torch.equal(case["logits"], before) and forward[3] is None
    for name, got, again, ref in zip(("loss", "nll", "lse"), forward, trained, (loss, nll, lse), strict=False):
        assert got.dtype == torch.float32 and got.shape == (R,)
        assert torch.equal(got, again), f"{name} depends on row_scale"
        atol = 1e-6 * magnitude
        torch.testing.assert_close(got.double(), ref, rtol=2e-6, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert trained[3].dtype == case["logits"].dtype
    # q - w loses digits where the student is nearly sure: below a tenth of w's own gradient the error is absolute.
    floor = 0.1 * row_scale.double().abs() * options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
    assert error(trained[3], gradient, floor) <= tolerance(case["logits"].dtype), "gradient"


OPTIONS = {
    "plain": {},
    "scale, temperature": {"logit_scale": 0.7, "temperature": 1.6},
    "softcap": {"softcap": 5.0, "logit_scale": 1.3, "temperature": 0.8},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.03, "logit_scale": 0.5},
    "all": {"softcap": 8.0, "logit_scale": 1.3, "temperature": 0.8, "label_smoothing": 0.2, "z_loss": 0.01},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype):
    """1000 is no multiple of a vector; 7 is shorter than one; a vocabulary of 1 has gradient 0 but for z_loss."""
    for V, class_weight in itertools.product((1, 7, 1000, 2047, 2048, 2049, 5000), (True, False)):
        check(make_case(5, V, dtype, class_weight=class_weight), **options)
    for V, bucket in itertools.product((7, 1000, 5000), (True, False)):
        for K in (1, 2, 3, 7):
            check(make_case(5, V, dtype, seed=K, K=K), bucket=bucket, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V, R", [(50257, 5), (262144, 2)])
def test_large_vocabulary(V, R, dtype):
    check(make_case(R, V, dtype, class_weight=True), label_smoothing=0.3)
    check(make_case(R, V, dtype, K=7), bucket=True, softcap=20.0, label_smoothing=0.3, z_loss=1e-3)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["smoothing"], {"bucket": True, "label_smoothing": 0.1}])
def test_common_offset(options):
    """nll is a difference to the maximum: an offset of 1e3 costs it nothing. Subtracting from lse would lose 1e-4."""
    K = 7 if "bucket" in options else None
    case = make_case(5, 1000, torch.float32, K=K, offset=1e3)
    row_scale = torch.linspace(-1.5, 2.0, 5)
    loss, nll, _, gradient = expected(case, row_scale, options)
    got = call(case, row_scale, **options)
    torch.testing.assert_close(got[0].double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), nll, rtol=1e-6, atol=1e-6)
    assert error(got[3], gradient) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [0.0, 30.0, 100.0, 300.0])
def test_bucket_far_below(gap, dtype):
    """Off-support logits far below the maximum: exp(-100) is 0 in float32, but the bucket's shares must be exact."""
    case = make_case(5, 1000, dtype, K=7)
    case["logits"].scatter_add_(1, case["ids"].clamp(max=999), torch.full((5, 7), gap, dtype=dtype))
    check(case, bucket=True)


def test_bucket_whole_vocabulary():
    """The support holds every id: there is no tail, though the probabilities sum to 0.9."""
    for dtype, softcap in itertools.product(DTYPES, (0.0, 5.0)):
        case = make_case(4, 7, dtype, K=8)
        case["ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 3]]).repeat(4, 1)
        case["probs"] = torch.rand(4, 8) * 0.1 + 0.01
        check(case, bucket=True, softcap=softcap)
        case["logits"][:, 2] = float("-inf")
        assert all(x.isfinite().all() for x in call(case | {"probs": case["probs"] * (case["ids"] != 2)})[:3])


def test_no_support():
    """All probabilities 0: nothing to learn, loss and gradient are 0, with the bucket too."""
    case = make_case(3, 1000, torch.float32, K=4, mass=0.0)
    for bucket in (False, True):
        loss, nll, lse, gradient = call(case, torch.ones(3), bucket=bucket)
        assert loss.eq(0).all() and nll.eq(0).all() and lse.isfinite().all() and gradient.abs().max() < 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_stride(dtype):
    """Rows of a wider tensor, of a transposed one (which are copied, a few at a time), and one row many times."""
    wide = make_case(5, 1300, dtype)["logits"]
    case, row_scale = make_case(5, 1000, dtype, K=5), torch.linspace(-1, 1, 5)
    for logits in (wide[:, 100:1100], wide[:, :1000].T.contiguous().T, wide[2, :1000].expand(5, 1000), wide[:, ::1]):
        logits = logits[:, :1000]
        for got, ref in zip(call(case | {"logits": logits}, row_scale, bucket=True),
                            call(case | {"logits": logits.contiguous()}, row_scale, bucket=True), strict=True):
            assert torch.equal(got, ref)


def test_strided_arguments():
    """Everything but the logits may be strided."""
    case = make_case(4, 1000, torch.float32, K=6)
    strided = {}
    for name, x in case.items():
        if name != "logits" and x is not None:
            strided[name] = torch.empty(*x.shape, 2, dtype=x.dtype)[..., 0].copy_(x)
    row_scale = torch.linspace(-1, 1, 8)[::2]
    for got, ref in zip(call(case | strided, row_scale), call(case, row_scale.contiguous()), strict=True):
        assert torch.equal(got, ref)


def test_offsets_past_2_31():
    """Two bfloat16 rows 2^31 + 9 elements apart; the pages between them are never touched."""
    try:
        buffer = torch.empty(2**31 + 5009, dtype=torch.bfloat16)
    except RuntimeError as reason:
        pytest.skip(f"4 GB of address space: {reason}")
    logits = buffer.as_strided((2, 5000), (2**31 + 9, 1))
    case = make_case(2, 5000, torch.bfloat16)
    logits.copy_(case["logits"])
    row_scale = torch.tensor([0.5, -2.0])
    got, ref = call(case | {"logits": logits}, row_scale), call(case, row_scale)
    assert all(torch.equal(x, y) for x, y in zip(got, ref, strict=True))
    del buffer, logits
    gc.collect()


# -- special values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"label_smoothing": 0.1}, {"bucket": True}], ids=str)
def test_nan(options, dtype):
    """A NaN anywhere, whatever its bits, makes its row NaN, loss and gradient, and no other row."""
    integers, quiet, all_ones, signalling = (
        (torch.int32, 0x7FC00000, 0x7FFFFFFF, 0x7F800001) if dtype == torch.float32
        else (torch.int16, 0x7FC0, 0x7FFF, 0x7F81) if dtype == torch.bfloat16 else (torch.int16, 0x7E00, 0x7FFF, 0x7C01)
    )  # fmt: skip
    for bits, place in itertools.product((quiet, all_ones, signalling, -1), (0, 500, 999)):
        case = make_case(3, 1000, dtype, K=5 if "bucket" in options else None)
        case["logits"].view(integers)[1, place] = bits
        assert case["logits"][1, place].isnan()
        for x in call(case, torch.ones(3), **options):
            assert x[1].isnan().all() and x[::2].isfinite().all()
    case["logits"].fill_(float("nan"))
    assert all(x.isnan().all() for x in call(case, torch.ones(3), **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite(dtype):
    case = make_case(3, 1000, dtype)
    case["ids"].fill_(3)
    case["logits"][1, 10] = float("inf")
    loss, nll, lse, gradient = call(case, torch.ones(3))
    for x in (loss, nll, lse, gradient):  # as log_softmax does
        assert x[1].isnan().all() and x[::2].isfinite().all()
    for value in (float("inf"), float("-inf")):  # bounded by the cap, where it is flat
        case["logits"][1, 10] = value
        check_finite(case, 1, 10, softcap=5.0)
    check_finite(case, 1, 10)  # -inf: probability 0
    case["logits"][2] = float("-inf")
    assert call(case)[0][2].isnan()
    case["logits"][2, 3] = 1.0  # the label is the only possible token
    loss, _, _, gradient = call(case, torch.ones(3))
    assert loss[2] == 0 and gradient[2].eq(0).all()


def check_finite(case, row, column, **options):
    """As the definition with a huge finite logit in place of the infinite one, which gets gradient 0."""
    finite = case | {"logits": case["logits"].clamp(-1e4, 1e4)}
    got, ref = call(case, torch.ones(3), **options), expected(finite, torch.ones(3), options)
    torch.testing.assert_close(got[0].double(), ref[0], rtol=2e-6, atol=2e-5)
    assert error(got[3], ref[3]) <= tolerance(case["logits"].dtype)
    assert got[3][row, column] == 0


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradient_is_rounded_to_nearest(dtype):
    """One rounding of the float32 gradient, to nearest even: subnormal float16, and past the largest, too."""
    case = make_case(4, 1000, dtype, K=5)
    for factor in (1.0, 1e-3, 1e6):
        row_scale = factor * torch.linspace(-1, 1, 4)
        exact = call(case | {"logits": case["logits"].float()}, row_scale, bucket=True)[3]
        assert torch.equal(call(case, row_scale, bucket=True)[3], exact.to(dtype))
    ids = torch.zeros(3, 1, dtype=torch.int64)  # two equal logits: gradient +-row_scale / 2, here half-way cases
    row_scale = 2 + torch.tensor([1.0, 3.0, 5.0]) * 2**-7
    case = {"logits": torch.zeros(3, 2).bfloat16(), "ids": ids, "probs": None, "class_weight": None}
    half = (row_scale / 2).bfloat16()
    assert torch.equal(call(case, row_scale)[3], torch.stack([-half, half], 1))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_number_is_read_as_it_is(dtype):
    """The log-sum-exp of a single logit is that logit."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).unsqueeze(1)
    lse = native.logprob_rows(x, torch.zeros(2**16, dtype=torch.int64))[0][2]
    number = ~x[:, 0].isnan() & (x[:, 0] != torch.inf)
    assert torch.equal(lse[number], x[number, 0].float()) and lse[~number].isnan().all()


# -- wrong arguments --------------------------------------------------------------------------------------------------


def test_bad_id_names_id_row_and_vocabulary():
    for bad in (-1, -100, 1000, 2**40):
        case = make_case(5, 1000, torch.float32)
        case["ids"][3] = bad
        with pytest.raises(IndexError, match=rf"ids: expected 0 <= id < V = 1000, got {bad} in row 3, column 0"):
            call(case, torch.ones(5))


WRONG = {
    "logits: expected Float, BFloat16 or Half, got Double": {"logits": torch.zeros(3, 8).double()},
    r"logits: expected shape \(N, V\) with at least one column, got \[8\]": {"logits": torch.zeros(8)},
    r"logits: expected shape \(N, V\) with at least one column, got \[3, 0\]": {"logits": torch.zeros(3, 0)},
    "ids: expected Int or Long, got Short": {"ids": torch.zeros(3, 1, dtype=torch.int16)},
    r"ids: expected shape \(3, K\), got \[4, 1\]": {"ids": torch.zeros(4, 1, dtype=torch.int64)},
    "ids: expected one id per row without probs, got K = 2": {"ids": torch.zeros(3, 2, dtype=torch.int64)},
    r"probs: expected shape \[3, 1\], got \[3, 2\]": {"probs": torch.zeros(3, 2)},
    "class_weight: expected hard labels": {"class_weight": torch.ones(8), "probs": torch.ones(3, 1)},
    r"class_weight: expected shape \[8\], got \[9\]": {"class_weight": torch.zeros(9)},
    "class_weight: expected Float, got Double": {"class_weight": torch.zeros(8).double()},
    r"dense: expected shape \[3, 8\], got \[3, 9\]": {"dense": torch.zeros(3, 9)},
    r"index: expected ascending rows below N = 3, got 1 in place 1": {"index": torch.tensor([1, 1])},
    r"row_scale: expected shape \[3\], got \[1\]": {"row_scale": torch.ones(1)},
    "logit_scale: expected a positive number, got 0": {"logit_scale": 0.0},
    "temperature: expected a positive number, got -1": {"temperature": -1.0},
    "softcap: expected a positive number, or 0 for none, got inf": {"softcap": float("inf")},
    "label_smoothing: expected 0 to 1, got 1.5": {"label_smoothing": 1.5},
    "z_loss: expected a finite number, got nan": {"z_loss": float("nan")},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    arguments = {"logits": torch.zeros(3, 8), "ids": torch.zeros(3, 1, dtype=torch.int64), "probs": None}
    with pytest.raises((RuntimeError, IndexError), match=message):
        native.cross_entropy_rows(**arguments | WRONG[message])


def test_no_rows():
    case = make_case(0, 8, torch.float32)
    assert [tuple(x.shape) for x in call(case, torch.ones(0))] == [(0,), (0,), (0,), (0, 8)]


# -- functions of a float ----------------------------------------------------------------------------------------------


def ulps(got, ref):
    _, exponent = torch.frexp(ref.abs())
    return ((got.double() - ref).abs() / torch.exp2(exponent.double() - 24)).max().item()


def floats(first, last, count=1_000_003):
    """Positive float32, evenly spread over their bit patterns: every binade gets its share."""
    low, high = torch.tensor([first, last]).view(torch.int32).tolist()
    return torch.linspace(low, high, count, dtype=torch.float64).to(torch.int32).view(torch.float32)


def test_exp():
    C = importlib.import_module("ssd_core._C")
    x = -floats(1e-9, 86.98)
    assert ulps(C.exp_nonpositive(x), x.double().exp()) <= 1.1
    special = torch.tensor([0.0, -0.0, -87.34, -1e30, float("-inf"), float("nan"), -float("nan")])
    torch.testing.assert_close(
        C.exp_nonpositive(special), torch.tensor([1.0, 1, 0, 0, 0, float("nan"), float("nan")]),
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip


def test_expm1():
    C = importlib.import_module("ssd_core._C")
    x = -floats(1e-30, 40.0)
    assert ulps(C.expm1_nonpositive(x), x.double().expm1()) <= 1
    special = torch.tensor([0.0, -1e30, float("-inf"), float("nan")])
    expected = torch.tensor([0.0, -1, -1, float("nan")])
    torch.testing.assert_close(C.expm1_nonpositive(special), expected, rtol=0, atol=0, equal_nan=True)


def test_log1p():
    """Of small and of all but the last few numbers above -1, where the sum with 1 decides."""
    C = importlib.import_module("ssd_core._C")
    x = -torch.cat((floats(1e-30, 1 - 2**-24), 1 - torch.arange(1, 1 << 20) * 2.0**-24))
    assert ulps(C.log1p_nonpositive(x), x.double().log1p()) <= 1
    special = torch.tensor([0.0, -1.0, float("nan")])
    expected = torch.tensor([0.0, float("-inf"), float("nan")])
    torch.testing.assert_close(C.log1p_nonpositive(special), expected, rtol=0, atol=0, equal_nan=True)


def test_tanh():
    C = importlib.import_module("ssd_core._C")
    x = floats(1.2e-38, 30.0)
    got, ref = C.tanh(x), x.double().tanh()
    assert ulps(got, ref) <= 2.6 and (got.double() - ref).abs().max() <= 1.5e-7
    assert torch.equal(C.tanh(-x), -got)
    special = torch.tensor([0.0, 1e-45, 1e30, float("inf"), float("-inf"), float("nan")])
    expected = torch.tensor([0.0, 1e-45, 1, 1, -1, float("nan")])
    torch.testing.assert_close(C.tanh(special), expected, rtol=0, atol=0, equal_nan=True)
    assert C.tanh(torch.tensor([-0.0])).signbit().item()


# -- instruction sets, threads, loading -------------------------------------------------------------------------------


def python(code, tmp_path, **environment):
    """Standard output of a fresh interpreter, in a folder of its own."""
    code = f"import torch\nfrom ssd_core import native\nassert native.missing() is None, native.missing()\n{code}"
    environment = os.environ | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def isas(tmp_path_factory):
    """The levels that this machine runs, from the extension's own refusal."""
    folder = tmp_path_factory.mktemp("isa")
    code = "try: print(native.cpu_isa())\nexcept RuntimeError as error: print(str(error).splitlines()[0])"
    message = python(code, folder, SSD_CORE_CPU_ISA="mmx")
    assert message.startswith("SSD_CORE_CPU_ISA: expected one of {baseline"), message
    assert message.endswith("got 'mmx'\n"), message
    supported = message[message.index("{") + 1 : message.index("}")].split(", ")
    assert supported == [isa for isa in ISAS if isa in supported] and set(supported) <= set(native.build_info()["isa"])
    return supported


def saved_by_each(isas, code, tmp_path):
    """What ``code``, run on each instruction set, saves as ``<instruction set>.pt``."""
    for isa in isas:
        python(code, tmp_path, SSD_CORE_CPU_ISA=isa)
    return [torch.load(tmp_path / f"{isa}.pt") for isa in isas]


def fastest(isas):
    """Intel multiplies pairs of bfloat16 at half the rate of float32."""
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    return [isa for isa in isas if not (intel and isa == "avx512bf16")][-1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_isa_default_and_override(isas, tmp_path):
    if "SSD_CORE_CPU_ISA" not in os.environ:
        assert native.cpu_isa() == fastest(isas)
    for isa in isas:
        assert python("print(native.cpu_isa())", tmp_path, SSD_CORE_CPU_ISA=isa) == f"{isa}\n"


def test_op_refuses_unknown_isa(tmp_path):
    code = "native.cross_entropy_rows(torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64), None)"
    with pytest.raises(AssertionError, match="SSD_CORE_CPU_ISA: expected one of"):
        python(code, tmp_path, SSD_CORE_CPU_ISA="sse9")


def test_isas_agree(isas, tmp_path):
    """Every level gives the same numbers, up to the order of additions and fused multiply-adds."""
    cases = [make_case(5, V, dtype, K=K) for V in (7, 1000, 50257) for dtype in DTYPES for K in (1, 6)]
    torch.save((cases, list(OPTIONS.values())), tmp_path / "cases.pt")
    code = """
cases, all_options = torch.load("cases.pt")
results = []
for case in cases:
    for options in all_options:
        got, gradient = native.cross_entropy_rows(case["logits"], case["ids"], case["probs"],
                                                  row_scale=torch.linspace(-1, 2, 5), bucket=True, **options)
        results.append([*got, gradient])
torch.save(results, native.cpu_isa() + ".pt")
"""
    results = saved_by_each(isas, code, tmp_path)
    for level in results[1:]:
        for row, ref_row in zip(level, results[0], strict=True):
            for got, ref in zip(row[:3], ref_row[:3], strict=True):
                torch.testing.assert_close(got, ref, rtol=1e-6, atol=1e-5)
            assert error(row[3], ref_row[3].double()) <= tolerance(row[3].dtype)
    # and they are different code: fused multiply-adds round differently somewhere
    flat = [torch.cat([row[3].flatten().float() for row in level]) for level in results]
    assert all(not torch.equal(x, flat[0]) for x in flat[1:])


def test_isas_are_vectorised(isas, tmp_path):
    """Wider vectors are faster: a unit that the compiler left scalar would not be. Best of many, retried."""
    code = """
import time
torch.set_num_threads(1)
logits, ids = torch.randn(8, 32768), torch.zeros(8, 1, dtype=torch.int64)
times = []
for _ in range(300):
    start = time.perf_counter()
    native.cross_entropy_rows(logits, ids, None)
    times.append(time.perf_counter() - start)
print(min(times))
"""
    isas = [isa for isa in isas if isa != "avx512bf16"]         # which has products of its own, no vectors
    for _ in range(5):
        best = [float(python(code, tmp_path, SSD_CORE_CPU_ISA=isa)) for isa in isas]
        if all(wide < 0.75 * narrow for narrow, wide in itertools.pairwise(best)):
            return
    raise AssertionError(f"seconds of {isas}: {best}")


@pytest.mark.skipif(sys.platform == "darwin", reason="built without OpenMP")
def test_one_openmp_runtime(tmp_path):
    """The extension shares torch's OpenMP runtime: a second one would not follow torch.set_num_threads."""
    maps = "/proc/self/maps"
    if not os.path.exists(maps):
        pytest.skip("no /proc")
    code = """
import re
before = set(re.findall(r"\\S*lib[gi]?omp\\S*", open("/proc/self/maps").read()))
native.cross_entropy_rows(torch.zeros(64, 32768), torch.zeros(64, 1, dtype=torch.int64), None)
after = set(re.findall(r"\\S*lib[gi]?omp\\S*", open("/proc/self/maps").read()))
print(sorted(before), sorted(after), sep="\\n")
"""
    # The runtimes that torch alone loads are the standard: native.missing() in python() has loaded the extension.
    alone = subprocess.run(
        [sys.executable, "-c", "import re, torch\nprint(sorted(set(re.findall("
         "r'\\S*lib[gi]?omp\\S*', open('/proc/self/maps').read()))))"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert python(code, tmp_path).split("\n")[:2] == [alone, alone] and "omp" in alone


def test_results_do_not_depend_on_threads():
    case, row_scale = make_case(33, 5000, torch.float32, K=5), torch.linspace(-1, 1, 33)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(case, row_scale, bucket=True, label_smoothing=0.1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def busy(function, seconds=0.3):
    """Processor time over wall time, which is the number of threads at work."""
    cpu, wall = time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        function()
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


def speed_ups(functions, rounds=12):
    """One thread's time over two threads', the best of many runs, taken in turns so that all see the same noise."""
    best = {}
    for _ in range(rounds):
        for threads, function in itertools.product((1, 2), functions):
            torch.set_num_threads(threads)
            for _ in range(4):
                start = time.perf_counter()
                function()
                seconds = time.perf_counter() - start
                best[threads, function] = min(seconds, best.get((threads, function), seconds))
    return [best[1, function] / best[2, function] for function in functions]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
@pytest.mark.skipif(sys.platform == "darwin", reason="built without OpenMP")
def test_threads():
    """set_num_threads(1) is honoured; two threads beat one. Other programs make noise: several tries, each beside a
    torch op of the same kind, which tells whether there was a second processor to be had at all."""
    logits, ids = torch.randn(128, 32768), torch.zeros(128, 1, dtype=torch.int64)

    def op():
        native.cross_entropy_rows(logits, ids, None, softcap=30.0)

    def torch_op():
        torch.tanh(logits)

    threads = torch.get_num_threads()
    tries = []
    try:
        torch.set_num_threads(1)
        op()
        time.sleep(0.2)  # workers of an earlier parallel region spin for a while
        assert busy(op) < 1.2
        for _ in range(8):
            tries.append(speed_ups((op, torch_op)))
            if tries[-1][0] >= 1.5:
                return
        if max(torch_ratio for _, torch_ratio in tries) < 1.5:
            pytest.skip(f"no second processor was free: (op, torch.tanh) speed-ups {tries}")
        raise AssertionError(f"two threads over one, (op, torch.tanh): {tries}")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.all
@pytest.mark.parametrize("isa", ISAS)
def test_unit_exports_only_its_kernels(isa, tmp_path):
    """A standard inline function compiled for AVX-512 in a unit could be the copy that the whole extension gets."""
    source = Path(__file__).parents[1] / "csrc" / "cpu" / f"kernels_{isa}.cpp"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or shutil.which("nm") is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler, nm and x86-64")
    for level in ("-O0", "-O3"):
        command = [compiler, "-std=c++20", level, "-fopenmp-simd", "-fPIC", "-c", str(source), "-o", "unit.o"]
        subprocess.run(command, cwd=tmp_path, check=True)
        symbols = subprocess.run(["nm", "-C", "unit.o"], cwd=tmp_path, check=True, capture_output=True, text=True)
        shared = {line[19:] for line in symbols.stdout.splitlines() if line[17].isupper() or line[17] in "uvw"}
        kernels = (("bfloat16_tiles", "bfloat16_wide_tiles") if isa == "avx512bf16"
                   else ("row_kernels", "float32_tiles", "sample_kernels"))
        expected = {f"ssd_core::cpu::{isa}::{name}" for name in kernels}
        # GCC 12 without optimisation names what unwinds exceptions even where there are none
        runtime = {"memcpy", "memset", "_GLOBAL_OFFSET_TABLE_", "__gxx_personality_v0", "DW.ref.__gxx_personality_v0"}
        assert shared - runtime == expected


def test_build_info():
    info = native.build_info()
    assert info["torch_version"] == torch.__version__
    assert info["isa"][0] == "baseline" and info["compiler"]
    # without -fopenmp at::parallel_for compiles and works, on one thread
    assert info["openmp"] == (torch.backends.openmp.is_available() and sys.platform != "darwin")


@pytest.fixture
def record(monkeypatch, tmp_path):
    """native reading a record of the test's own."""
    monkeypatch.setattr(native, "_RECORD", tmp_path / "_build.json")
    native._load.cache_clear()
    yield tmp_path / "_build.json"
    native._load.cache_clear()


def test_other_torch_is_refused(record):
    record.write_text(json.dumps({"torch": "1.0.0"}))
    reason = native.missing()
    assert "compiled for torch 1.0.0" in reason and torch.__version__ in reason
    assert "pip install --no-build-isolation --no-deps --force-reinstall ." in reason and "make build" in reason
    for function in (native.build_info, native.cpu_isa, lambda: call(make_case(1, 8, torch.float32))):
        with pytest.raises(RuntimeError, match=r"compiled for torch 1\.0\.0"):
            function()


def test_reason_of_a_missing_extension(record):
    assert "was not built" in native.missing()
    native._load.cache_clear()
    record.write_text(json.dumps({"missing": "no compiler"}))
    assert "no compiler" in native.missing()


def test_import_does_not_load_the_extension(tmp_path):
    code = "import sys, ssd_core, ssd_core.native\nprint('ssd_core._C' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
