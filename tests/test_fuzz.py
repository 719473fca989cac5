"""Backend "cpu" against the float64 reference over calls that nobody thought of: sizes, strides, options, values.

A call is a dictionary of numbers and words, so that what hypothesis finds can be kept as it is: in FOUND. Every op with
a record of backend "cpu" takes part. ``make fuzz FUZZ_SECONDS=600`` goes on for that long, with calls that are new each
time; ``make test`` makes the same few every time, ``make test-all`` the same many, as far as its three minutes go.
"""

import dataclasses
import math
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import ssd_core
from ssd_core import SparseTarget, TeacherHidden, TeacherLogits, native
from ssd_core.backends import BACKENDS
from ssd_core.sampling_params import SamplingParams

pytestmark = [pytest.mark.usefixtures("poisoned"),
              pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))]

SECONDS = float(os.environ.get("FUZZ_SECONDS", 180))
RECORDS = {record.op: record for record in BACKENDS if record.name == "cpu"}
OPS = [op for op in RECORDS if not op.endswith("_backward")]
LEAVES = ("input", "linear_weight", "linear_bias", "logits")

# Calls that were wrong once: (op, call).
FOUND = [
    # what fills up a panel of tokens met an infinite weight, and had exponents above 0
    ("linear_cross_entropy", {"seed": 0, "dtype": "bfloat16", "n": 3, "v": 7, "spread": 1.0, "d": 8,
                              "extremes": ("linear_weight", "-inf"), "shift": True, "reduction": "mean"}),
    ("linear_cross_entropy", {"seed": 3, "dtype": "float32", "n": 3, "v": 64, "spread": 0.0, "d": 8, "bias": "float32",
                              "temperature": 0.1, "softcap": 10.0, "logit_scale": 12.5, "reduction": "mean"}),
    # a bucket that the student has no mass for: the loss is infinite, lse is not
    ("cross_entropy", {"seed": 0, "dtype": "float32", "n": 3, "v": 3, "spread": 1.0, "extremes": "-inf", "k": 5,
                       "reduction": "mean", "tail": "bucket"}),
    # a student's mass that float32 does not hold, where the teacher has none: infinite
    ("distill", {"seed": 0, "dtype": "float32", "n": 3, "v": 7, "spread": 5.0, "temperature": 0.1, "reduction": "mean",
                 "teacher": "logits", "divergence": "reverse_kl", "more": -1}),
]

# Edges: nothing, one, primes, a panel of 64 tokens, a tile of 256 ids (the filter's, too) and two.
TOKENS = (0, 1, 2, 3, 5, 31, 63, 64, 65, 97, 130)
HIDDEN = (1, 2, 3, 7, 8, 16, 33, 47, 48, 64, 65)
VOCABULARY = (1, 2, 3, 7, 63, 64, 65, 251, 255, 256, 257, 511, 512, 513, 601, 1009)
LAYOUTS = ("contiguous", "transposed", "strided", "sliced", "expanded")
VALUES = ("nan", "inf", "-inf", "1e30", "-1e30", "1e-40", "0")


# -- calls ------------------------------------------------------------------------------------------------------------


def one_of(*choices):
    """The first is what hypothesis falls back to."""
    return st.sampled_from(choices)


@st.composite
def calls(draw, op):
    linear = op.startswith("linear")
    dtypes = RECORDS[op].dtypes
    call = {"seed": draw(st.integers(0, 999)), "dtype": draw(st.sampled_from(dtypes)), "n": draw(one_of(3, *TOKENS)),
            "v": draw(one_of(7, *VOCABULARY)), "spread": draw(one_of(1.0, 0.0, 1e-3, 5.0))}

    def maybe(name, *choices, one_in=3):
        if draw(st.integers(1, one_in)) == one_in:
            call[name] = draw(one_of(*choices))

    if linear:
        call["d"] = draw(one_of(8, *HIDDEN))
        maybe("bias", *FLOATS, one_in=2)
        maybe("layouts", *((x, w) for x in LAYOUTS for w in LAYOUTS))
        maybe("workspace_bytes", 1 << 10, 200_000, 1_500_000, 1 << 30)
        if call["dtype"] == "float32" and "bfloat16" in dtypes:
            maybe("autocast", True)
        maybe("constant", "input", "linear_weight", "linear_bias", one_in=6)
        # an infinite weight has no defined gradient: its products with gradients of 0 are NaN
        maybe("extremes", *((place, value) for place in ("input", "linear_weight", "linear_bias") for value in VALUES
                            if (place, "inf") != ("linear_weight", value[-3:])))
    else:
        maybe("layouts", *LAYOUTS)
        maybe("extremes", *VALUES, "row of -inf", "offset of 1e3", "offset of -1e3", "ties")
    if "workspace_bytes" not in call:       # of which each thread takes its share: chunks then have other sizes
        maybe("threads", 2, 3)
    maybe("nothing", "v", *["d"] * linear, one_in=40)
    call |= {call.pop("nothing"): 0} if "nothing" in call else {}
    if op == "sample":
        maybe("temperature", 0.0, 0.3, 1.7, 100.0)
        maybe("top_k", 1, 2, 20, 64, 65, 5000)
        maybe("top_p", 1e-9, 0.3, 0.95)
        maybe("min_p", 0.02, 1.0)
        return call
    maybe("temperature", 0.1, 0.7, 3.0)
    if "softmax" in op:
        return call
    maybe("logit_scale", 0.05, 2.5)
    maybe("softcap", 0.5, 10.0)
    maybe("shift", True)
    maybe("bad_id", -1, "V", 10**12, one_in=30)
    maybe("ignore_index", 0, -1)
    maybe("ignored", 0.4, 1.0)
    if "logprob" in op:
        return call
    call["reduction"] = draw(one_of("mean", "sum", "none"))
    maybe("token_weight", True)
    maybe("num_items_in_batch", 1, 1000.5)
    maybe("z_loss", 1e-3, 0.1)
    maybe("label_smoothing", 0.1, 1.0)
    maybe("weight", True)
    maybe("k", 0, 1, 2, 5, 70)
    maybe("total", 0.9, 0.3, 1.7)
    maybe("probs_dtype", "bfloat16", "float64")
    if "distill" in op:
        call["teacher"] = draw(one_of("sparse", "logits", *["hidden"] * linear))
        call["divergence"] = draw(one_of("forward_kl", "reverse_kl", "jsd"))
        maybe("beta", 0.0, 0.1, 1.0)
        maybe("temperature_squared", True)
        maybe("tail", "renormalise", "support")
        maybe("ce_weight", 0.3, 1.0)
        maybe("more", 5, -1)
        if "tail" in call:                      # the definition may then not look at all logits
            call.pop("extremes", None)
        if "more" not in call:                  # mass that underflows where the other has none is 0, not infinite
            maybe("teacher_scale", 0.5, 20.0)
    else:
        maybe("tail", "renormalise", "bucket")
        if "grad_filter" not in RECORDS[op].lacks and linear:
            maybe("grad_filter", 1e-3, 0.05)
            maybe("grad_filter_weight", 0.0, 0.01)
        if {"grad_filter", "grad_filter_weight"} & call.keys():     # weights of one sign are wanted
            call["reduction"] = "mean"
    return call


FLOATS = ("float32", "bfloat16", "float16")


def laid_out(tensor, layout):
    """The same values, or with "expanded" those of the first row, in memory of other strides amid NaN."""
    if layout == "transposed":
        return tensor.t().contiguous().t() if tensor.ndim == 2 else laid_out(tensor, "strided")
    if layout == "strided":
        wide = torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype)
        wide[..., 1] = tensor
        return wide[..., 1]
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), torch.nan, dtype=tensor.dtype)
        wide[..., 2:-3] = tensor
        return wide[..., 2:-3]
    if layout == "expanded" and len(tensor):
        return tensor[:1].clone().expand_as(tensor)
    return tensor


def put(tensor, value, g):
    """One extreme value somewhere, or as many as are named."""
    if tensor is None or tensor.numel() == 0:
        return
    row = int(torch.randint(len(tensor), (), generator=g))
    if value == "row of -inf":
        tensor[row] = -torch.inf
    elif value.startswith("offset"):
        tensor += float(value.split()[-1])
    elif value == "ties":
        tensor.copy_(tensor.round())
    else:
        tensor.view(-1)[int(torch.randint(tensor.numel(), (), generator=g))] = float(value)


def arguments(op, call):
    """Keyword arguments of the public function, but for the backend; leaves without ``requires_grad``."""
    g = torch.Generator().manual_seed(call["seed"])
    n, v, dtype = call["n"], call["v"], getattr(torch, call["dtype"])

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    given = {}
    if op.startswith("linear"):
        x, w = normal(n, call["d"]), (call["spread"] * 3 * normal(v, call["d"]) / max(1, call["d"]) ** 0.5).to(dtype)
        given = {"input": x, "linear_weight": w, "linear_bias": None}
        if "bias" in call:
            given["linear_bias"] = normal(v, dtype=getattr(torch, call["bias"]))
        if "extremes" in call:
            put(given[call["extremes"][0]], call["extremes"][1], g)
        for name, layout in zip(("input", "linear_weight"), call.get("layouts", ()), strict=False):
            given[name] = laid_out(given[name], layout)
    else:
        z = call["spread"] * 3 * normal(n, v)
        put(z, call.get("extremes", "0"), g)
        given = {"logits": laid_out(z, call.get("layouts", "contiguous"))}
    if op == "sample":
        names = ("temperature", "top_k", "top_p", "min_p")
        given["params"] = SamplingParams(**{name: call[name] for name in names if name in call})
        given["seeds"] = torch.randint(-(2**63), 2**63 - 1, (n,), generator=g)
        given["positions"] = torch.randint(0, 2**40, (n,), generator=g)
        return given

    names = ("temperature", "logit_scale", "softcap", "shift", "ignore_index", "reduction", "num_items_in_batch",
             "z_loss", "label_smoothing", "workspace_bytes", "grad_filter", "grad_filter_weight")
    given |= {name: call[name] for name in names if name in call}
    if "softmax" in op:
        return given
    ids = torch.randint(max(v, 1), (n,), generator=g)
    if "bad_id" in call and n:
        ids[n // 2] = v if call["bad_id"] == "V" else call["bad_id"]
    ids[torch.rand(n, generator=g) < call.get("ignored", 0.0)] = call.get("ignore_index", -100)
    if "token_weight" in call:
        given["token_weight"] = 2 * torch.rand(n, generator=g)
    teacher = None
    if call.get("teacher") == "sparse" or ("k" in call and op.endswith("cross_entropy")):
        teacher = sparse(call, g)
        if "bad_id" in call and teacher.ids.numel():
            teacher.ids[n // 2, 0] = v if call["bad_id"] == "V" else call["bad_id"]
        ids = teacher if op.endswith("cross_entropy") else ids
    if "weight" in call and not isinstance(ids, SparseTarget):
        given["weight"] = torch.rand(v, generator=g) + 0.2
    if op.endswith("cross_entropy"):
        given["target"] = ids
        if isinstance(ids, SparseTarget):
            given["tail"] = call.get("tail", "none")
            given.pop("ignore_index", None)
        if {"grad_filter", "grad_filter_weight"} & given.keys():        # what the certificate does not cover is refused
            given = {name: value for name, value in given.items() if name not in ("label_smoothing", "z_loss")}
            given["tail"] = "none"
    elif "logprob" in op:
        given["target"] = ids
    else:
        vocab = max(1, v + call.get("more", 0))
        scale = call.get("teacher_scale", 2.0)
        if call["teacher"] == "logits":
            teacher = TeacherLogits((scale * normal(n, vocab)).to(dtype))
        elif call["teacher"] == "hidden":
            teacher = TeacherHidden(normal(n, 5), (scale * normal(vocab, 5)).to(dtype), normal(vocab), 0.7, 9.0)
        given |= {"teacher": teacher, "divergence": call["divergence"], "beta": call.get("beta", 0.5),
                  "temperature_squared": "temperature_squared" in call}
        if call["teacher"] == "sparse":
            reverse = call["divergence"] == "reverse_kl" or (call["divergence"] == "jsd" and call.get("beta") == 1)
            tail = call.get("tail", "bucket")
            given["tail"] = "support" if reverse and tail == "renormalise" else tail
        if "ignored" in call or "ce_weight" in call:
            given |= {"target": ids, "ce_weight": call.get("ce_weight", 0.0)}
    return in_sequences(given, n) if "shift" in call else given


def sparse(call, g):
    """Ids that may repeat, some tokens without any probability."""
    n, v, k = call["n"], call["v"], call.get("k", 5)
    probs = torch.rand(n, k, generator=g) + 0.05
    probs = call.get("total", 0.9) * probs / probs.sum(-1, keepdim=True)
    probs[torch.rand(n, k, generator=g) < 0.2] = 0
    probs[2::5] = 0
    return SparseTarget(torch.randint(max(v, 1), (n, k), generator=g), probs.to(getattr(torch, call.get(
        "probs_dtype", "float32"))))


def in_sequences(given, n):
    """(n, ...) tokens as (1, n, ...): a time axis to shift along."""
    each_token = ("input", "logits", "token_weight", "target")

    def batched(value):
        return value.unsqueeze(0)

    given = {name: changed(value, batched) if name in each_token else value for name, value in given.items()}
    if "teacher" in given:
        given["teacher"] = changed(given["teacher"], batched)
    return given


def changed(value, change):
    """``change`` made to a tensor, or to those of a target that have an entry for each token."""
    if isinstance(value, SparseTarget):
        return SparseTarget(change(value.ids), change(value.probs))
    if isinstance(value, TeacherLogits):
        return TeacherLogits(change(value.logits))
    if isinstance(value, TeacherHidden):
        return dataclasses.replace(value, input=change(value.input))
    return change(value)


def widened(value):
    """The same in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, SparseTarget | TeacherLogits | TeacherHidden):
        return type(value)(**{name: widened(part) for name, part in vars(value).items()})
    return value


def truth(given, call):
    """What the reference is given: the same values in float64, without options that must change nothing."""
    given = {name: value for name, value in given.items()
             if name not in ("workspace_bytes", "grad_filter", "grad_filter_weight")}
    if "autocast" in call:
        given |= {name: given[name].bfloat16() for name in ("input", "linear_weight")}
    return {name: widened(value) for name, value in given.items()}


# -- what they give ---------------------------------------------------------------------------------------------------


def run(op, call, given, backend):
    """Results and gradients of the leaves that want one, by name."""
    leaves = {name: given[name].detach().requires_grad_(name != call.get("constant"))
              for name in LEAVES if given.get(name) is not None}
    stats = {"return_stats": True} if "reduction" in call else {}
    found = getattr(ssd_core, op)(**given | leaves | stats, backend=backend)
    if stats:
        results = {"loss": found[0], **found[1]._asdict()}
    else:
        results = {"out": found} if isinstance(found, torch.Tensor) else found._asdict()
    if op == "sample":
        return results, {}
    if "lse" in results:        # of a token without a distribution it may be infinite or NaN
        results["lse"] = results["lse"].masked_fill(results["lse"].isinf(), torch.nan)
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    outputs = [result for result in results.values() if result.requires_grad]
    grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted], [upstream(o) for o in outputs])
    return ({name: result.detach() for name, result in results.items()},
            {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)})


def upstream(result):
    """Of every sign and size, the same in every dtype."""
    return ((torch.linspace(-2, 3, result.numel()) * 32).round() / 32).to(result.dtype).view(result.shape)


def on_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def check(op, call):
    given = arguments(op, call)

    def ours():
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in call):
            return run(op, call, given, "cpu")

    try:
        results, grads = on_threads(1, ours)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if "workspace_bytes" in call and str(error).startswith("workspace_bytes: expected at least"):
            return
        with pytest.raises(type(error)):
            run(op, call, truth(given, call), "reference")
        return
    true_results, true_grads = run(op, call, truth(given, call), "reference")
    if op == "sample":
        check_sample(results, true_results, given["logits"])
        return
    allowed = bounds(op, call, given, true_results)
    if any(result.isinf().any() for result in true_results.values()):
        true_grads = {}                 # an infinite loss has no gradient
    for name, true in (true_results | true_grads).items():
        if name in allowed:
            close(name, (results | grads)[name], true, allowed[name])
    assert all(grad.dtype == given[name.split()[-1]].dtype for name, grad in grads.items())
    if "threads" in call:
        again = on_threads(call["threads"], ours)
        found, other = results | grads, again[0] | again[1]
        differ = [name for name in found if not torch.equal(found[name].nan_to_num(), other[name].nan_to_num())]
        assert not differ, f"{differ} depend on the number of threads"


def close(what, found, true, bound):
    """NaN and infinities where the truth has them, and all else within the bound, where that fits the dtype."""
    assert found.shape == true.shape, what
    bound = bound + 2 * HALF[found.dtype] * known(true).abs() + SMALLEST[found.dtype]      # its own rounding
    found, limit = found.double(), torch.finfo(found.dtype).max / 4
    fits = true.isfinite() & (true.abs() < limit) & (bound < limit)
    assert found[true.isnan()].isnan().all() and found[fits].isfinite().all(), f"{what}: NaN in other places"
    assert (found == true)[true.isinf()].all(), f"{what}: infinite in other places"
    excess = ((found - true).abs() - bound).where(fits, -torch.inf)
    if excess.numel() and excess.max() > 0:
        place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(f"{what}{list(place)}: expected {true[place].item()!r} up to {bound[place].item():.3g}, "
                             f"got {found[place].item()!r}")


# -- how near they must be --------------------------------------------------------------------------------------------

ROUNDING = 2e-6         # of a float32 sum over the vocabulary, relative, as in tolerances.py
HALF = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}   # one rounding
SMALLEST = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 1e-7}                        # one step at 0


def bounds(op, call, given, true):
    """Of the results, and of the gradients by leaf.

    A float32 logit u, and so lse and every log-probability, is off by ROUNDING times the size s_i of its token's terms
    ``sum_k |x_ik w_jk| + |b_j|``. Losses are sums of a few of those, weighted; those that hold products of a
    probability and a logarithm are off by s_i times as much. The gradient of a token's logits is, in L1, off by as much
    as it weighs, times the same error; products of 16 bits round it once more. What remains are its products with rows
    of the other operand.
    """
    leaf = given.get("logits", given.get("input"))
    flat = leaf.detach().reshape(-1, leaf.shape[-1]).double()
    scale, temperature = call.get("logit_scale", 1.0), call.get("temperature", 1.0)
    steep = scale * max(1.0, 1 / temperature)
    half = HALF[torch.bfloat16 if "autocast" in call else leaf.dtype]
    if "linear_weight" in given:
        w, b = given["linear_weight"].detach().double(), given["linear_bias"]
        terms = known(flat).abs() @ known(w).abs().T + (0 if b is None else known(b.double()).abs())
        rounds = half
    else:
        terms, rounds = known(flat).abs(), 0.0
    size = 1 + math.log(flat.shape[0] + 2) + steep * terms.amax(-1) + math.log(terms.shape[-1] + 1)     # (N,)
    if isinstance(given.get("teacher"), TeacherLogits | TeacherHidden):
        size = size + 2 + largest_logit(given["teacher"]) / min(1.0, temperature)
    off = ROUNDING * size
    if "softmax" in op:
        return of_softmax(op, given, true, off)

    weight = given["token_weight"].max().item() if "token_weight" in given and leaf.numel() else 1.0
    total = max(1.0, call.get("total", 1.0)) + 1
    if "weight" in given:
        total *= given["weight"].max().item() if len(given["weight"]) else 1.0
    squared = temperature**2 if "temperature_squared" in call else 1.0
    products = torch.ones_like(size) if "cross_entropy" in op else size     # of probabilities and logarithms
    value = 4 * (total + products * squared + call.get("z_loss", 0) * size) * off
    rows = steep * (total + products * squared + 2 * call.get("z_loss", 0) * size) * weight * 3    # upstream
    if "logprob" in op:
        allowed = {"logprob": shaped(value, given, call), "entropy": shaped(value, given, call)}
    else:
        loss = value * weight
        if call["reduction"] == "mean":
            denominator = true["denominator"].item() or 1.0
            loss, rows = loss / denominator, rows / denominator
        allowed = {"loss": shaped(loss, given, call) if call["reduction"] == "none" else loss.sum(),
                   "nll": shaped(value, given, call), "divergence": shaped(value, given, call),
                   "denominator": ROUNDING * true["denominator"].abs()}
    if "distill" in op and "target" not in given:
        del allowed["nll"]              # of nothing
    allowed["lse"] = shaped(4 * off, given, call)

    filtered = 2 * max(call.get("grad_filter", 0.0), call.get("grad_filter_weight", 0.0))
    l1 = rows * ((4 * off + 4 * rounds).clamp(max=2) + filtered)                        # (N,) of the logits' gradient
    if "logits" in given:
        return allowed | {"gradient of logits": l1.unsqueeze(-1).expand_as(flat).view(leaf.shape)}
    largest = known(w).abs().max() if w.numel() else 0.0
    return allowed | {"gradient of input": (largest * l1).unsqueeze(-1).expand_as(flat).view(leaf.shape),
                      "gradient of linear_weight": (l1 @ known(flat).abs()).expand_as(w),
                      "gradient of linear_bias": l1.sum().expand(len(w))}


def of_softmax(op, given, true, off):
    """The gradient is made of the result, which 16 bits have rounded."""
    out, half = true["out"], HALF[given["logits"].dtype]
    g, off = upstream(out), off.unsqueeze(-1)
    smallest = SMALLEST[given["logits"].dtype] * g.abs().sum(-1, keepdim=True)
    wrong = 4 * (off + half)
    if op == "softmax":
        result = 4 * off * (known(out) + off).clamp(max=1)
        grad = wrong * (known(out) + off) * (g.abs() + (known(out) * g.abs()).sum(-1, keepdim=True)) + smallest
    else:
        p = known(out.exp())
        result = 4 * off.expand_as(out)
        grad = wrong * (g.abs() + p * (1 + known(out).abs()) * g.abs().sum(-1, keepdim=True)) + smallest
    temperature = given.get("temperature", 1.0)
    return {"out": result, "gradient of logits": grad / temperature}


def known(tensor):
    """NaN and infinities, which are compared as such, have no size."""
    return tensor.detach().nan_to_num(0, 0, 0)


def largest_logit(teacher):
    """(N,) in absolute value."""
    if isinstance(teacher, TeacherLogits):
        terms = known(teacher.logits.double()).abs().flatten(0, -2)
    else:
        terms = teacher.input.double().abs().flatten(0, -2) @ teacher.linear_weight.double().abs().T
    return terms.amax(-1)


def shaped(values, given, call):
    """(N,) values in the tokens' shape."""
    values = values.view(given.get("logits", given.get("input")).shape[:-1])
    return values[..., :-1] if "shift" in call else values


def check_sample(found, true, logits):
    """The very token; its statistics in float32."""
    assert torch.equal(found["token"], true["token"])
    for name in ("logprob", "sampling_logprob", "kept_mass", "entropy"):
        torch.testing.assert_close(found[name], true[name], rtol=2e-5, atol=2e-5)
    dense = [torch.zeros(logits.shape).scatter_add(1, support.ids.long(), support.probs)
             for support in (found["support"], true["support"])]
    torch.testing.assert_close(*dense, rtol=1e-5, atol=1e-9)


# -- tests ------------------------------------------------------------------------------------------------------------


def fuzz(op, examples, number=None):
    """``number`` None: the same calls every time."""
    quiet = settings(max_examples=examples, deadline=None, derandomize=number is None, database=None,
                     suppress_health_check=list(HealthCheck), print_blob=False)

    @quiet
    @given(calls(op))
    def one(call):
        check(op, call)

    (one if number is None else seed(number)(one))()


@pytest.mark.parametrize(("op", "call"), FOUND)
def test_what_was_found_before(op, call):
    check(op, call)


@pytest.mark.parametrize("op", OPS)
def test_a_few_calls(op):
    fuzz(op, 120)


@pytest.mark.all
@pytest.mark.parametrize("op", OPS)
def test_many_calls(op):
    """In rounds, each op its share of the seconds: of new calls if FUZZ_SECONDS asks for them, else of the same."""
    end = time.monotonic() + SECONDS / len(OPS)
    number = time.time_ns() if "FUZZ_SECONDS" in os.environ else 0
    while time.monotonic() < end:
        fuzz(op, 50, number)
        number += 1
