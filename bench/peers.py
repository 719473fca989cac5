"""Who is measured: others' ways to compute the ops, each as its own documentation recommends, and ours.

A function takes the inputs of ``ops.Problem.leaves`` and returns the value. Packages are imported at first use.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from ssd_core.bench.ops import OPS, SAMPLING, capped

import ssd_core
from ssd_core import backends

MIB = 1 << 20
WORKSPACES = {"cpu": (16, 64, 256), "cuda": (512, 1024, 2048)}      # MiB
USUAL = {"cpu": 64, "cuda": 512}
DELTA = 0.01                # of the filtered variants
# have that route in backend "triton", gradients with the loss
TILED = ("linear_cross_entropy", "linear_distill", "linear_distill_hidden")
FILTERED_BOUND = 5e-2       # gradient error that filtered variants claim, in norm


@dataclasses.dataclass(frozen=True)
class Variant:
    """One line of a table."""

    name: str
    function: Callable | None
    missing: str = ""                       # why it cannot run here
    workspace: int | None = None            # bytes that it promises to keep to
    bound: float | None = None              # gradient error that it claims; None: exact
    certificate: Callable | None = None     # inputs -> facts, "holds" among them
    ours: bool = False


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    function: Callable
    needs: tuple[str, ...] = ()             # packages
    device: str = ""                        # where alone it runs
    softcap: bool = True                    # whether it has one
    bound: float | None = None


def variants(op: str, device: str, dtype: torch.dtype, softcap=None, workspaces=()) -> list[Variant]:
    """Of an op, those that cannot run here included, with the reason."""
    found = [_variant(peer, device, softcap) for peer in PEERS[op]]
    return found + _ours(op, device, dtype, workspaces or WORKSPACES.get(device, ()))


def _variant(peer: Peer, device: str, softcap) -> Variant:
    absent = [name for name in peer.needs if importlib.util.find_spec(name) is None]
    reason = ""
    if peer.device and device != peer.device:
        reason = f"runs on {peer.device} only"
    elif absent:
        reason = f"{' and '.join(absent)} not installed"
    elif softcap is not None and not peer.softcap:
        reason = "has no softcap"
    return Variant(peer.name, None if reason else peer.function, reason, bound=peer.bound)


def _get(location: str):
    module, name = location.split(":")
    return getattr(importlib.import_module(module), name)


# -- PyTorch as it comes


def _logits(input, weight, softcap):
    return capped(F.linear(input, weight), softcap)


def _cross_entropy(input, weight, target, softcap):
    return F.cross_entropy(_logits(input, weight, softcap), target)


def _sparse_kl(input, weight, ids, probs, softcap):
    log_q = _logits(input, weight, softcap).float().log_softmax(-1).gather(1, ids.long())
    return (torch.xlogy(probs, probs) - probs * log_q).sum(-1).mean()


def _jsd(input, weight, teacher_input, teacher_weight, softcap):
    log_q = _logits(input, weight, softcap).float().log_softmax(-1)
    with torch.no_grad():
        log_p = _logits(teacher_input, teacher_weight, softcap).float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    both = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
    both = both + F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    return both / 2 / len(input)


def _policy_gradient(input, weight, target, advantage, softcap):
    log_q = _logits(input, weight, softcap).float().log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return (advantage * log_q.gather(1, target.unsqueeze(1)).squeeze(1) + 0.1 * entropy).mean()


def _softmax(logits):
    return logits.softmax(-1)


def _log_softmax(logits):
    return logits.log_softmax(-1)


def _row_cross_entropy(logits, target):
    return F.cross_entropy(logits, target)


def _row_kl(logits, teacher):
    log_q, log_p = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _draw(logits):
    """Top k first, all else on k values."""
    values, ids = logits.float().topk(SAMPLING["top_k"], dim=-1)
    p = (values / SAMPLING["temperature"]).softmax(-1)
    p = p.where(p.cumsum(-1) - p < SAMPLING["top_p"], 0)
    return ids.gather(-1, torch.multinomial(p, 1)).squeeze(-1)


def _call(function: Callable, names: tuple[str, ...]) -> Callable:
    return lambda t: function(*(getattr(t, name) for name in names))


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _eager(function: Callable, *names: str) -> tuple[Peer, Peer]:
    return (Peer("PyTorch eager", _call(function, names)),
            Peer("PyTorch compiled", _call(lambda *tensors: _compiled(function)(*tensors), names)))


# -- other packages: fused cross-entropy


def _pytorch_chunked(t):
    return F.linear_cross_entropy(t.input, t.weight, t.target, options=torch.nn.LinearCrossEntropyOptions())


def _cce(impl: str, **options):
    def run(t):
        function = _get("cut_cross_entropy:linear_cross_entropy")
        return function(t.input, t.weight, t.target, softcap=t.softcap, impl=impl, **options)

    return run


def _liger_cross_entropy(**options):
    def run(t):
        function = _get("liger_kernel.transformers.functional:liger_fused_linear_cross_entropy")
        return function(t.input, t.weight, t.target, softcap=t.softcap, **options)

    return run


def _quack(t):
    return _get("quack.linear_cross_entropy:chunked_linear_cross_entropy")(t.input, t.weight, t.target)


def _trl_logprob(t, outputs):
    function, chunk = _get("trl.kernels:ChunkedLogProbFunction"), _get("trl.trainer.utils:_CHUNKED_LOGPROB_CHUNK_SIZE")
    return function.apply(t.input, t.weight, None, t.target, 1.0, chunk, t.softcap, 1.0, outputs)


def _trl_cross_entropy(t):
    return -_trl_logprob(t, ("log_probs",))[0].mean()


def _trl_policy_gradient(t):
    logprob, entropy, *_ = _trl_logprob(t, ("log_probs", "entropy"))
    return (t.advantage * logprob + 0.1 * entropy).mean()


# -- other packages: distillation


class _ChunkedTopK(torch.autograd.Function):
    """The method of axolotl's fused top-k loss, written anew: chunks of tokens in plain PyTorch, each differentiated on
    the way (compiled), their gradients kept for the backward."""

    CHUNKS = 8

    @staticmethod
    def forward(ctx, input, weight, ids, probs, softcap):
        step = _compiled(torch.func.grad_and_value(_sparse_kl, argnums=(0, 1)))
        d_weight, d_input, total = torch.zeros_like(weight), [], 0.0
        for x, i, p in zip(*(t.chunk(_ChunkedTopK.CHUNKS) for t in (input, ids, probs)), strict=True):
            (dx, dw), loss = step(x, weight, i, p, softcap)
            share = len(x) / len(input)
            d_weight += dw * share
            d_input.append(dx * share)
            total = total + loss * share
        ctx.save_for_backward(torch.cat(d_input), d_weight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        d_input, d_weight = ctx.saved_tensors
        return d_input * upstream, d_weight * upstream, None, None, None


def _axolotl_style(t):
    return _ChunkedTopK.apply(t.input, t.weight, t.ids, t.probs, t.softcap)


def _liger_kl_div(t):
    dense = torch.zeros(len(t.input), len(t.weight), device=t.input.device).scatter_(1, t.ids.long(), t.probs)
    return _get("liger_kernel.transformers.fused_linear_kl_div:LigerFusedLinearKLDivLoss")()(t.input, t.weight, dense)


def _liger_jsd(t):
    loss = _get("liger_kernel.transformers.fused_linear_jsd:LigerFusedLinearJSD")(jsd_beta=t.beta)
    return loss(t.input, t.weight, t.teacher_input, t.teacher_weight, None)


def _liger_chunked_jsd(t):
    loss = _get("liger_kernel.chunked_loss:LigerFusedLinearJSDLoss")(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=t.beta)
    target = torch.zeros(len(t.input), dtype=torch.int64, device=t.input.device)
    return loss(t.input, t.weight, t.teacher_input, t.teacher_weight, target)


def _trl_divergence(t):
    function = _get("trl.kernels.chunked_divergence:ChunkedDivergenceFunction")
    value, _ = function.apply(t.input, t.weight, None, t.teacher_input, t.teacher_weight, None, t.beta, 1.0,
                              1.0, t.softcap, 1.0, t.softcap)
    return value.mean()


# -- other packages: logits


def _liger_softmax(t):
    return _get("liger_kernel.transformers.functional:liger_softmax")(t.logits)


def _liger_row_cross_entropy(t):
    return _get("liger_kernel.transformers.functional:liger_cross_entropy")(t.logits.clone(), t.target)


def _liger_row_kl(t):
    function = _get("liger_kernel.transformers.functional:liger_kl_div")
    return function(t.logits.log_softmax(-1), t.teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def _quack_softmax(t):
    return _get("quack.softmax:softmax")(t.logits)


def _quack_row_cross_entropy(t):
    return _get("quack.cross_entropy:cross_entropy")(t.logits, t.target)


def _hf_draw(t):
    warpers = "transformers.generation.logits_process"
    scores = t.logits.float()
    for name, value in (("TemperatureLogitsWarper", SAMPLING["temperature"]), ("TopKLogitsWarper", SAMPLING["top_k"]),
                        ("TopPLogitsWarper", SAMPLING["top_p"])):
        scores = _get(f"{warpers}:{name}")(value)(None, scores)
    return torch.multinomial(scores.softmax(-1), 1).squeeze(-1)


def _vllm_draw(t):
    module = "vllm.v1.sample.ops.topk_topp_sampler"
    rows, device = len(t.logits), t.logits.device
    k = torch.full((rows,), SAMPLING["top_k"], device=device)
    p = torch.full((rows,), SAMPLING["top_p"], device=device)
    scores = _get(f"{module}:apply_top_k_top_p")(t.logits.float() / SAMPLING["temperature"], k, p)
    return _get(f"{module}:random_sample")(scores.softmax(-1), {})


def _cuda(name, function, *needs, **options) -> Peer:
    return Peer(name, function, needs=(*needs, "triton"), device="cuda", **options)


PEERS = {
    "linear_cross_entropy": (
        *_eager(_cross_entropy, "input", "weight", "target", "softcap"),
        Peer("PyTorch linear_cross_entropy(options)", _pytorch_chunked, softcap=False),
        Peer("cut-cross-entropy torch_compile", _cce("torch_compile"), needs=("cut_cross_entropy", "triton")),
        _cuda("cut-cross-entropy cce", _cce("cce"), "cut_cross_entropy", bound=FILTERED_BOUND),
        _cuda("cut-cross-entropy cce, no filter", _cce("cce", filter_eps=None), "cut_cross_entropy"),
        _cuda("Liger FLCE", _liger_cross_entropy(), "liger_kernel"),
        _cuda("Liger FLCE, float32 sums, 16 x chunks",
              _liger_cross_entropy(accum_dtype=torch.float32, chunk_mem_const=16), "liger_kernel"),
        _cuda("quack", _quack, "quack", softcap=False),
        Peer("TRL chunked", _trl_cross_entropy, needs=("trl",)),
    ),
    "linear_distill": (
        *_eager(_sparse_kl, "input", "weight", "ids", "probs", "softcap"),
        Peer("axolotl-style chunked top-k", _axolotl_style),
        _cuda("Liger FusedLinearKLDiv, dense target", _liger_kl_div, "liger_kernel", softcap=False),
    ),
    "linear_distill_hidden": (
        *_eager(_jsd, "input", "weight", "teacher_input", "teacher_weight", "softcap"),
        _cuda("Liger FusedLinearJSD", _liger_jsd, "liger_kernel", softcap=False),
        Peer("Liger chunked JSD", _liger_chunked_jsd, needs=("liger_kernel",), softcap=False),
        Peer("TRL chunked divergence", _trl_divergence, needs=("trl",)),
    ),
    "linear_logprob": (
        *_eager(_policy_gradient, "input", "weight", "target", "advantage", "softcap"),
        Peer("TRL chunked", _trl_policy_gradient, needs=("trl",)),
    ),
    "softmax": (
        *_eager(_softmax, "logits"), _cuda("Liger", _liger_softmax, "liger_kernel"),
        _cuda("quack", _quack_softmax, "quack"),
    ),
    "log_softmax": _eager(_log_softmax, "logits"),
    "cross_entropy": (
        *_eager(_row_cross_entropy, "logits", "target"),
        _cuda("Liger, on a copy (it overwrites its input)", _liger_row_cross_entropy, "liger_kernel"),
        _cuda("quack", _quack_row_cross_entropy, "quack"),
    ),
    "distill": (*_eager(_row_kl, "logits", "teacher"), _cuda("Liger KLDiv", _liger_row_kl, "liger_kernel")),
    "sample": (
        Peer("HF warpers + multinomial", _hf_draw), Peer("PyTorch, top k first", _call(_draw, ("logits",))),
        Peer("vLLM", _vllm_draw, needs=("vllm",)),
    ),
}


# -- ours: every backend of the registry


def _ours(op: str, device: str, dtype: torch.dtype, workspaces) -> list[Variant]:
    public = OPS[op].public
    if public not in ssd_core.__all__:
        return [Variant("ssd-core", None, f"ssd_core has no {public} yet", ours=True)]
    found = []
    for record in backends.BACKENDS:
        if record.op != public or not record.automatic:
            continue
        reason = record.refuses(device, dtype, ())
        if not OPS[op].linear or reason:
            found.append(_own(op, f"ssd-core {record.name}", record.name, reason))
            continue
        sizes = workspaces if record.name != "torch" else [m for m in workspaces if m == USUAL.get(device)]
        for mebibytes in sizes or workspaces:
            found.append(_own(op, f"ssd-core {record.name}, {mebibytes} MiB", record.name, None, mebibytes))
        if record.name == "triton" and op in TILED:
            found.append(_by_tiles(found[-1]))
        if op == "linear_cross_entropy":
            found.append(_filtered(op, record, device, dtype, workspaces))
    return found


def _by_tiles(variant: Variant) -> Variant:
    """By the route that ``plan.py`` may not have chosen."""
    def call(*arguments, **options):
        before = os.environ.get("SSD_CORE_ROUTE", "")       # which says nothing
        os.environ["SSD_CORE_ROUTE"] = "tiled"
        try:
            return variant.function(*arguments, **options)
        finally:
            os.environ["SSD_CORE_ROUTE"] = before

    return dataclasses.replace(variant, name=f"{variant.name}, tiled", function=call)


def _filtered(op, record, device, dtype, workspaces) -> Variant:
    mebibytes = USUAL[device] if USUAL.get(device) in workspaces else workspaces[0]
    name = f"ssd-core {record.name}, {mebibytes} MiB, grad_filter={DELTA}"
    reason = record.refuses(device, dtype, ("grad_filter",))

    def certificate(t):
        _, stats = ssd_core.linear_cross_entropy(
            t.input, t.weight, t.target, softcap=t.softcap, backend=record.name, workspace_bytes=mebibytes * MIB,
            grad_filter=DELTA, return_stats=True)
        facts = {fact: float(getattr(stats, fact)) for fact in ("skipped_max", "skipped_mean", "active")}
        return {**facts, "holds": facts["skipped_max"] <= DELTA}

    own = _own(op, name, record.name, reason, mebibytes, grad_filter=DELTA)
    return dataclasses.replace(own, bound=FILTERED_BOUND, certificate=None if reason else certificate)


def _own(op, name, backend, reason, mebibytes=None, **options) -> Variant:
    if mebibytes is not None:
        options["workspace_bytes"] = mebibytes * MIB
    function = functools.partial(OURS[op], backend=backend, **options)
    return Variant(name, None if reason else function, reason or "", options.get("workspace_bytes"), ours=True)


def _our_logprob(t, **options):
    found = ssd_core.linear_logprob(t.input, t.weight, t.target, softcap=t.softcap, **options)
    return (t.advantage * found.logprob + 0.1 * found.entropy).mean()


def _our_hidden_distill(t, **options):
    teacher = ssd_core.TeacherHidden(t.teacher_input, t.teacher_weight, softcap=t.softcap)
    return ssd_core.linear_distill(
        t.input, t.weight, teacher, divergence="jsd", beta=t.beta, softcap=t.softcap, **options)


OURS = {
    "linear_cross_entropy": lambda t, **options: ssd_core.linear_cross_entropy(
        t.input, t.weight, t.target, softcap=t.softcap, **options),
    "linear_distill": lambda t, **options: ssd_core.linear_distill(
        t.input, t.weight, ssd_core.SparseTarget(t.ids, t.probs), softcap=t.softcap, **options),
    "linear_distill_hidden": _our_hidden_distill,
    "linear_logprob": _our_logprob,
    "softmax": lambda t, **options: ssd_core.softmax(t.logits, **options),
    "log_softmax": lambda t, **options: ssd_core.log_softmax(t.logits, **options),
    "cross_entropy": lambda t, **options: ssd_core.cross_entropy(t.logits, t.target, **options),
    "distill": lambda t, **options: ssd_core.distill(
        t.logits, ssd_core.TeacherLogits(t.teacher), divergence="forward_kl", **options),
    "sample": lambda t, **options: ssd_core.sample(t.logits, t.params, t.seeds, t.positions, **options).token,
}
