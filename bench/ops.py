"""The ops: their inputs, what they are in float64, and the least that any exact method must do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from ssd_core.bench.cases import Case

PER_TOKEN = ("input", "teacher_input", "target", "ids", "probs", "advantage", "logits", "teacher", "upstream")
SAMPLING = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}


@dataclasses.dataclass(frozen=True)
class Op:
    """Of hidden states and a head (``products`` of the size of the logits' at least) or of logits (``passes`` over them
    at least: reads and writes of (N, V) elements). ``define(z, t)`` is its value from float64 logits of some tokens:
    their share of a scalar, or a row for each."""

    name: str
    public: str                                     # the function of ssd_core
    about: str
    tensors: Callable[[Case, Callable], dict]       # (case, logits of some states) -> what it takes besides
    define: Callable | None = None
    products: int = 0
    passes: int = 0

    @property
    def linear(self) -> bool:
        return self.products > 0


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """An op on a case: what every variant is given."""

    op: Op
    case: Case
    given: dict             # tensors and options by name
    wrt: tuple[str, ...]    # gradients are taken of these

    @property
    def products(self) -> int:
        return self.op.products - (self.op.linear and "weight" not in self.wrt)

    @property
    def flops(self) -> int:
        return 2 * self.products * self.case.tokens * self.case.weight.numel()

    @property
    def bytes(self) -> int:
        return self.op.passes * self.case.tokens * self.case.weight.shape[0] * self.case.weight.element_size()

    @property
    def dtype(self) -> torch.dtype:
        return self.case.weight.dtype

    def leaves(self) -> SimpleNamespace:
        """The inputs, those in ``wrt`` as leaves without a gradient."""
        fresh = {name: self.given[name].detach().requires_grad_() for name in self.wrt}
        return SimpleNamespace(**{**self.given, **fresh})


def problem(op: Op, case: Case, frozen: bool = False) -> Problem:
    """``frozen``: the head gets no gradient."""
    def logits(hidden):
        return capped(F.linear(hidden, case.weight), case.softcap)

    options = {"count": case.tokens, "softcap": case.softcap if op.linear else None}
    if op.linear:
        wrt = ("input",) if frozen else ("input", "weight")
        given = {"input": case.input, "weight": case.weight}
    else:
        wrt = () if op.define is None else ("logits",)
        given = {"logits": logits(case.input)}
    return Problem(op, case, {**given, **options, **op.tensors(case, logits)}, wrt)


def capped(logits, softcap):
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


# -- definitions, of float64 logits


def _cross_entropy(z, t):
    return F.cross_entropy(z, t.target, reduction="sum") / t.count


def _sparse_kl(z, t):
    log_q = z.log_softmax(-1).gather(1, t.ids.long())
    probs = t.probs.double()
    return (torch.xlogy(probs, probs) - probs * log_q).sum() / t.count


def _divergence(z, t):
    log_q, log_p = z.log_softmax(-1), t.teacher.double().log_softmax(-1)
    if t.beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum() / t.count
    m = t.beta * log_p.exp() + (1 - t.beta) * log_q.exp()
    sides = ((t.beta, log_p), (1 - t.beta, log_q))
    return sum(share * (log.exp() * (log - m.log())).sum() for share, log in sides) / t.count


def _policy_gradient(z, t):
    log_q = z.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return (t.advantage.double() * log_q.gather(1, t.target.unsqueeze(1)).squeeze(1) + 0.1 * entropy).sum() / t.count


# -- inputs besides


def _target(case, logits):
    return {"target": case.target}


def _support(case, logits):
    return {"ids": case.ids, "probs": case.probs}


def _teacher_states(case, logits):
    return {"teacher_input": case.teacher_input, "teacher_weight": case.weight, "beta": 0.5}


def _teacher_logits(case, logits):
    return {"teacher": logits(case.teacher_input), "beta": 0}


def _advantage(case, logits):
    return {"target": case.target, "advantage": _noise((case.tokens,), torch.float32, case)}


def _upstream(case, logits):
    return {"upstream": _noise((case.tokens, len(case.weight)), case.weight.dtype, case)}


def _seeds(case, logits):
    from ssd_core import SamplingParams

    seeds = torch.arange(case.tokens, device=case.weight.device)
    return {"params": SamplingParams(**SAMPLING), "seeds": seeds, "positions": torch.zeros_like(seeds)}


def _noise(shape, dtype, case):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(case.weight.device, dtype)


OPS = {op.name: op for op in (
    Op("linear_cross_entropy", "linear_cross_entropy", "mean cross-entropy with hard labels, forward and backward",
       _target, _cross_entropy, products=3),
    Op("linear_distill", "linear_distill", "forward KL from a sparse teacher (20 ids, mass 1), forward and backward",
       _support, _sparse_kl, products=3),
    Op("linear_distill_hidden", "linear_distill",
       "JSD (beta 0.5) from a teacher's hidden states and the same head, forward and backward",
       _teacher_states, _divergence, products=4),
    Op("linear_logprob", "linear_logprob",
       "log-probability and entropy of given tokens, as a policy gradient uses them, forward and backward",
       _advantage, _policy_gradient, products=3),
    Op("softmax", "softmax", "softmax of logits, forward and backward", _upstream, lambda z, t: z.softmax(-1),
       passes=5),     # reads logits, writes y; reads y and its gradient, writes the logits'
    Op("log_softmax", "log_softmax", "log-softmax of logits, forward and backward", _upstream,
       lambda z, t: z.log_softmax(-1), passes=5),
    Op("cross_entropy", "cross_entropy", "mean cross-entropy of logits, forward and backward", _target,
       _cross_entropy, passes=2),
    Op("distill", "distill", "forward KL between dense logits, forward and backward", _teacher_logits, _divergence,
       passes=3),
    Op("sample", "sample", "one draw per row of logits: T=0.8, top-k 20, top-p 0.95", _seeds, passes=1),
)}


# -- floors


def floor(problem: Problem) -> Callable[[], None]:
    """The least that an exact method does, bare, into outputs that are there already."""
    return _products(problem) if problem.op.linear else _copies(problem)


def floor_name(problem: Problem) -> str:
    if problem.op.linear:
        return f"{['', 'one', 'two', 'three', 'four'][problem.products]} bare GEMMs"
    return f"a copy that moves {problem.op.passes} N V elements"


def _products(problem):
    x, w = problem.case.input, problem.case.weight
    teacher = problem.given.get("teacher_input")
    logits = x.new_empty(len(x), len(w))
    d_input = torch.empty_like(x)
    d_weight = torch.empty_like(w) if "weight" in problem.wrt else None

    def run():
        if teacher is not None:
            torch.mm(teacher, w.t(), out=logits)
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=d_input)
        if d_weight is not None:
            torch.mm(logits.t(), x, out=d_weight)

    return run


def _copies(problem):
    source = problem.given["logits"].flatten()
    copy = torch.empty_like(source)
    whole, half = divmod(problem.op.passes, 2)      # a copy reads and writes

    def run():
        for _ in range(whole):
            copy.copy_(source)
        if half:
            copy[: len(copy) // 2].copy_(source[: len(copy) // 2])

    return run
