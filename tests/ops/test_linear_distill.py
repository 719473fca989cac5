"""``linear_distill`` beyond test_every_op.py: three teachers, what is compared with them, and what goes with it."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from suite import (
    OPS,
    TOKENS,
    Taught,
    check_op,
    each_backend,
    each_case,
    expected,
    flops,
    gradients,
    planned,
    pool,
    problem,
    soft,
    taught,
    upstream_of,
)
from tolerances import error

from ssd_core import LinearDistillLoss, SparseTarget, TeacherHidden, TeacherLogits, linear_distill
from ssd_core.ops.linear_distill import DistillStats

pytestmark = pytest.mark.usefixtures("poisoned")

OP = OPS["linear_distill-sparse"]
each_backend, each_case = each_backend(OP.name), each_case(OP.name)
each_teacher = pytest.mark.parametrize("kind", ["sparse", "logits", "hidden"])
BETAS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2), ("jsd", 0.9)]
TAILS = ["bucket", "renormalise", "support"]
MEASURES = [("sparse", d, beta, tail) for (d, beta), tail in itertools.product(BETAS, TAILS)
            if (d, tail) != ("reverse_kl", "renormalise")]      # infinite, and refused
MEASURES += [(kind, d, beta, "bucket") for kind, (d, beta) in itertools.product(("logits", "hidden"), BETAS)]


def loss_and_grads(draw, backend="torch", upstream=1.0, **options):
    x, w, b, (teacher, labels) = draw
    loss = linear_distill(x, w, teacher, linear_bias=b, backend=backend, **{"target": labels, **options})
    return loss.detach(), gradients(loss, (x, w, b), upstream)


def same(found, true):
    torch.testing.assert_close(found[0], true[0])
    for a, e in zip(found[1], true[1], strict=True):
        torch.testing.assert_close(a, e)


# -- measures ---------------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize(("kind", "divergence", "beta", "tail"), MEASURES)
def test_every_measure(backend, dtype, kind, divergence, beta, tail):
    """At a temperature, with its square; sparse teachers leave a fifth of their mass to the tail. Few rows of d_weight
    meet a support: their quantiles need more problems."""
    seeds = pool(dtype) * (2 if tail == "support" else 1)
    check_op(OP, backend, dtype, taught(kind, dtype), divergence=divergence, beta=beta, tail=tail, temperature=1.5,
             temperature_squared=True, reduction="none", upstream=upstream_of(OP, TOKENS, 601), seeds=seeds)


@each_backend
@each_teacher
@pytest.mark.parametrize("tail", ["bucket", "support"])
def test_the_ends_of_beta_are_the_two_kl(backend, kind, tail):
    """beta 0 is forward KL and beta 1 reverse KL, not the 0 that the mixture tends to."""
    draw = taught(kind)(0)
    for beta, divergence in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        loss, grads = loss_and_grads(draw, backend, divergence="jsd", beta=beta, tail=tail)
        true_loss, true = loss_and_grads(draw, backend, divergence=divergence, tail=tail)
        assert torch.equal(loss, true_loss) and loss > 0
        assert all(torch.equal(a, e) for a, e in zip(grads, true, strict=True))


@each_backend
@each_teacher
def test_defaults_mix_nothing_in(backend, kind):
    """A default call is the plain KL divergence at temperature 1, labels or not (TRL #5731: half was cross-entropy)."""
    x, w, b, (teacher, labels) = taught(kind, labels=True, ignored=0)(0)
    q = F.log_softmax(F.linear(x, w, b), -1)
    if kind == "sparse":
        p = torch.zeros_like(q).scatter_add(1, teacher.ids.long(), teacher.probs)
        used = (teacher.probs > 0).any(-1)
        on = p > 0
        tail = torch.log(q.exp().masked_fill(on, 0).sum(-1, keepdim=True))
        p, q = torch.cat((p, 1 - p.sum(-1, keepdim=True)), 1)[used], torch.cat((q.where(on, 0), tail), 1)[used]
        true = F.kl_div(q, p, reduction="none").sum(-1).mean()
    else:
        z = teacher.logits if kind == "logits" else F.linear(teacher.input, teacher.linear_weight, teacher.linear_bias)
        true = F.kl_div(q, F.log_softmax(z, -1), reduction="none", log_target=True).sum(-1).mean()
    for target in (None, labels):
        same(loss_and_grads((x, w, b, Taught(teacher, target)), backend), (true.detach(), gradients(
            true, (x, w, b), retain_graph=True)))


@each_backend
@each_teacher
def test_temperature_squared_scales_loss_and_gradient(backend, kind):
    """Both (axolotl #3660: only one of them), the divergence alone, and only when asked for."""
    draw = taught(kind)(0)
    plain, squared = (loss_and_grads(draw, backend, temperature=3.0, temperature_squared=on) for on in (False, True))
    same(squared, (9 * plain[0], [9 * grad for grad in plain[1]]))
    x, w, b, (teacher, _) = draw
    y = problem(ignored=0)[3]
    plain, squared = (loss_and_grads((x, w, b, Taught(teacher, y)), backend, temperature=3.0, ce_weight=1.0,
                                     temperature_squared=on) for on in (False, True))
    assert torch.equal(plain[0], squared[0])


@each_case
@each_teacher
@pytest.mark.parametrize("options", [
    {"logit_scale": 0.4}, {"softcap": 2.0}, {"z_loss": 0.01}, {"ce_weight": 0.3}, {"ce_weight": 1.0},
    {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7, "z_loss": 1e-3, "label_smoothing": 0.2, "ce_weight": 0.4,
     "divergence": "jsd", "beta": 0.3, "temperature_squared": True},
], ids=lambda options: "-".join(options))
def test_options(backend, dtype, kind, options):
    """Of the student alone: a teacher's scale and softcap are its own."""
    check_op(OP, backend, dtype, taught(kind, dtype, labels=True), seeds=4, **options)


@each_case
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_scale_and_softcap_of_the_teachers_head(backend, dtype, divergence):
    draw = taught("hidden", dtype, teacher_options={"logit_scale": 0.6, "softcap": 2.5})
    check_op(OP, backend, dtype, draw, divergence=divergence, softcap=4.0, logit_scale=1.3, temperature=1.3,
             seeds=pool(dtype))


@each_case
@each_teacher
def test_class_weights_of_the_cross_entropy(backend, dtype, kind):
    """They do not enter the denominator of the mean, which is the divergence's too."""
    weight = torch.rand(601, generator=torch.Generator().manual_seed(0)) + 0.1
    check_op(OP, backend, dtype, taught(kind, dtype, labels=True), weight=weight, ce_weight=0.6, label_smoothing=0.1,
             seeds=pool(dtype))


# -- sparse teachers --------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("tail", TAILS)
def test_repeated_ids_are_added_up(backend, tail):
    x, w, b, (teacher, _) = taught("sparse")(0)
    ids, probs = teacher.ids.clone(), teacher.probs
    ids[:, 3] = ids[:, 1]
    once = probs.clone()
    once[:, 1], once[:, 3] = probs[:, 1] + probs[:, 3], 0
    other = ids.clone()
    other[:, 3] = 10**9                                         # an unused place may have any id
    same(loss_and_grads((x, w, b, Taught(SparseTarget(ids, probs), None)), backend, tail=tail),
         loss_and_grads((x, w, b, Taught(SparseTarget(other, once), None)), backend, tail=tail))
    check_op(OP, backend, torch.float32, lambda seed: (x, w, b, Taught(SparseTarget(ids, probs), None)), tail=tail,
             seeds=1)


@each_case
@pytest.mark.parametrize(("divergence", "tail", "total"), [
    ("forward_kl", "bucket", 0.3), ("jsd", "bucket", 0.3), ("forward_kl", "support", 0.3),
    ("reverse_kl", "support", 1.0), ("jsd", "support", 1.0)])
def test_mass_of_the_support(backend, dtype, divergence, tail, total):
    draw = taught("sparse", dtype, total=total)
    check_op(OP, backend, dtype, draw, divergence=divergence, tail=tail, seeds=pool(dtype))


@pytest.mark.parametrize("backend", ["torch"])  # the compiled backend takes no float64
@pytest.mark.parametrize("total", [0.3, 0.95])
def test_reverse_kl_on_buckets_in_longer_numbers(backend, total):
    """Differences of nearly equal logarithms cost the definition two digits of its own, more than float64 tests allow
    for. Where long double is no longer than double the bound is what that leaves."""
    *head, (teacher, _) = taught("sparse", torch.float64, total=total)(0)
    z = F.linear(*head).detach()
    loss = linear_distill(z.requires_grad_(), torch.eye(601).double(), teacher, divergence="reverse_kl",
                          reduction="sum", backend=backend)
    (found,) = gradients(loss, [z])
    bound = 1e-12 if np.finfo(np.longdouble).eps < 1e-18 else 1e-11
    for i in (teacher.probs > 0).any(-1).nonzero().flatten():
        logits, ids, p = (t[i].numpy() for t in (z.detach(), teacher.ids, teacher.probs))
        q, p = np.exp(logits.astype(np.longdouble) - logits.max()), p.astype(np.longdouble)
        q /= q.sum()
        q_on, q_tail = q[ids], np.delete(q, ids).sum()
        on, off = np.log(q_on / p), np.log(q_tail / (1 - p.sum()))
        true = q * (off - (q_on @ on + q_tail * off))
        true[ids] += q_on * (on - off)
        assert error(found[i], torch.from_numpy(true.astype(np.float64))) < bound


@each_backend
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("total", [1.0, 1.7])
def test_a_support_that_has_all_mass(backend, divergence, total):
    """Nothing is left for the tail. Weights beyond 1 are taken as they are."""
    check_op(OP, backend, torch.float32, taught("sparse", total=total), divergence=divergence, tail="bucket", seeds=2)


@each_backend
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", ["bucket", "support"])
def test_a_support_of_the_whole_vocabulary(backend, divergence, tail):
    """There is no tail, whatever the probabilities lack to 1."""

    def draw(seed):
        x, w, b, _ = problem(v=5, seed=seed)
        teacher = soft(TOKENS, 5, k=5, total=0.8, seed=seed)
        return x, w, b, Taught(teacher, None)

    check_op(OP, backend, torch.float32, draw, divergence=divergence, tail=tail, seeds=2)


@each_backend
def test_a_student_tail_that_underflows(backend):
    """1e-7 of mass off the support, which 1 - sum(q) has lost in float32, keeps the gradient right."""
    z = torch.tensor([[9.0, 8.0, -9.0, -9.5]])
    teacher = SparseTarget(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]))
    x, w = torch.ones(1, 1, requires_grad=True), z.T.clone().requires_grad_()
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        loss = linear_distill(x, w, teacher, divergence=divergence, backend=backend)
        true_loss, true = expected(OP.define, (x, w, None), Taught(teacher, None), divergence=divergence)
        assert error(loss.detach(), true_loss[0]) < 1e-6
        for grad, t in zip(gradients(loss, (x, w)), true, strict=True):
            assert error(grad, t) < 1e-5


def test_the_reverse_kl_to_a_teacher_without_a_tail_is_refused():
    x, w, b, (teacher, _) = taught("sparse")(0)
    for options in ({"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 1.0}):
        with pytest.raises(ValueError, match=r"tail: expected 'bucket' or 'support' with .* got 'renorm"):
            linear_distill(x, w, teacher, linear_bias=b, tail="renormalise", **options)


# -- dense teachers ---------------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize(("more", "divergence"), [
    (70, "jsd"), (-70, "jsd"), (70, "reverse_kl"), (-70, "forward_kl")])
def test_vocabularies_of_different_size(backend, dtype, kind, more, divergence, monkeypatch):
    """Whoever has fewer ids has probability 0 on the others, in one piece and in tiles that end anywhere."""
    draw = taught(kind, dtype, more=more)
    check_op(OP, backend, dtype, draw, divergence=divergence, seeds=pool(dtype))
    with planned(monkeypatch, OP.name, 17, 50, 97):
        once = torch.finfo(dtype).eps / 2 / 3**0.5 if dtype.itemsize == 2 else 0.0
        check_op(OP, backend, dtype, draw, divergence=divergence, seeds=2, extra=once)


@each_backend
@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize(("more", "divergence"), [(70, "forward_kl"), (-70, "reverse_kl")])
def test_mass_where_the_other_has_none_is_infinite(backend, kind, more, divergence):
    """Not the small number that padding with logits of 0 gives."""
    x, w, b, (teacher, _) = taught(kind, more=more)(0)
    loss = linear_distill(x, w, teacher, linear_bias=b, divergence=divergence, reduction="none", backend=backend)
    assert (loss == torch.inf).all()


@each_backend
@pytest.mark.parametrize("kind", [TeacherLogits, TeacherHidden])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_offsets_of_either_side_cost_no_digits(backend, kind, divergence):
    """Logits are multiples of 1/8, exact in float32 with an offset added. The sides are near each other: a divergence
    of 0.02 is known to the digits of its terms."""
    g = torch.Generator().manual_seed(0)
    t = torch.randint(-40, 40, (700,), generator=g) / 8
    z = t + torch.randint(-2, 3, (700,), generator=g) / 8
    ones, offset = torch.ones(3, 1), 1024.0

    def taught(logits):
        if kind is TeacherHidden:
            return TeacherHidden(ones.to(logits), logits.unsqueeze(-1))
        return TeacherLogits(logits.expand(3, -1))

    found, true = (
        loss_and_grads((ones.to(student).requires_grad_(), student.unsqueeze(-1).requires_grad_(), None,
                        Taught(taught(teacher), None)), name, divergence=divergence)
        for student, teacher, name in ((z + offset, t - offset, backend), (z.double(), t.double(), "torch")))
    assert abs(found[0] - true[0]) < 1e-6 and error(found[1][1], true[1][1]) < 1e-5


@each_backend
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_an_id_that_is_all_but_excluded_makes_no_nan(backend, divergence):
    """One side's probability of some ids is e^-200, the other has none: infinite, or nothing where it underflows, also
    where a sum begins with it."""
    certain, other = torch.zeros(600), torch.zeros(600)
    certain[150], other[::70] = 200, -torch.inf
    teacher, student = (certain, other) if divergence == "forward_kl" else (other, certain)
    loss = linear_distill(torch.ones(3, 1), student.unsqueeze(-1), TeacherLogits(teacher.expand(3, -1)),
                          divergence=divergence, reduction="none", backend=backend)
    assert (loss == torch.inf).all() or error(loss, F.cross_entropy(other, torch.tensor(150)).expand(3)) < 1e-6


@each_backend
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(backend, divergence):
    x, w, b, _ = problem()
    for teacher in (TeacherHidden(x.detach(), w, b), TeacherLogits(F.linear(x, w, b).detach())):
        loss, grads = loss_and_grads((x, w, b, Taught(teacher, None)), backend, divergence=divergence, temperature=0.5)
        assert loss.abs() < 1e-6 and all(grad.abs().max() < 1e-6 for grad in grads)


@each_backend
def test_no_gradient_reaches_a_teacher(backend):
    """Hidden states and a head that require grad are cut off; a tied head gets the student's share alone."""
    x, w, b, _ = problem()
    other, weight, bias, _ = problem(seed=1)
    loss = linear_distill(x, w, TeacherHidden(other, weight, bias), linear_bias=b, backend=backend)
    loss.backward()
    assert other.grad is None and weight.grad is None and bias.grad is None and x.grad.any()
    tied = loss_and_grads((x, w, b, Taught(TeacherHidden(other, w, b), None)), backend)
    copied = TeacherHidden(other, w.detach().clone(), b.detach().clone())
    free = loss_and_grads((x, w, b, Taught(copied, None)), backend)
    assert torch.equal(tied[0], free[0]) and all(torch.equal(a, e) for a, e in zip(tied[1], free[1], strict=True))
    for wrong, name in ((lambda: TeacherLogits(torch.zeros(2, 3, requires_grad=True)), "logits"),
                        (lambda: SparseTarget(torch.zeros(2, 3).int(), torch.ones(2, 3, requires_grad=True)), "probs")):
        with pytest.raises(ValueError, match=f"{name}: expected a constant .*, got a tensor that requires grad"):
            wrong()


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype(backend, dtype):
    """Teachers are read in their own dtype: no copy in the student's is asked for."""
    x, w, b, _ = problem()
    other, weight, bias, _ = (t.detach() for t in problem(seed=1, dtype=dtype))
    logits = TeacherLogits(F.linear(other, weight, bias))
    true = loss_and_grads((x, w, b, Taught(TeacherLogits(logits.logits.float()), None)), backend)
    same(loss_and_grads((x, w, b, Taught(logits, None)), backend), true)
    loss, _ = loss_and_grads((x, w, b, Taught(TeacherHidden(other, weight, bias), None)), backend)
    assert error(loss, true[0]) < 1e-2


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_large_vocabularies_in_tiles(kind, monkeypatch):
    """A teacher of 262,144 ids and a student of fewer."""
    draw = taught(kind, n=3, d=8, v=262144 - 300, more=300, ignored=0)
    with planned(monkeypatch, OP.name, 2, 4096, 50_000):
        check_op(OP, "torch", torch.float32, draw, divergence="jsd", seeds=1)


# -- what counts, statistics, cost ------------------------------------------------------------------------------------


@each_backend
@each_teacher
@pytest.mark.parametrize("ignore_index", [7, None, -1])
def test_any_ignore_index(backend, kind, ignore_index):
    x, w, b, (teacher, y) = taught(kind, labels=True, ignored=0)(0)
    y[::3] = -100 if ignore_index is None else ignore_index
    as_usual = y.masked_fill(y == (-100 if ignore_index is None else ignore_index), -100)
    same(loss_and_grads((x, w, b, Taught(teacher, y)), backend, ce_weight=0.5, ignore_index=ignore_index),
         loss_and_grads((x, w, b, Taught(teacher, as_usual)), backend, ce_weight=0.5))


@each_backend
@each_teacher
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_predicts_the_next_token(backend, kind, reduction):
    """Labels and a sparse teacher belong to the next token; a dense one has seen what the student has seen."""
    x, w, b, (teacher, y) = taught(kind, n=24, labels=True)(0)
    y, token_weight = y.view(2, 12), torch.rand(2, 12)
    x3 = x.detach().view(2, 12, -1).requires_grad_()
    if kind == "sparse":
        cube = SparseTarget(teacher.ids.view(2, 12, -1), teacher.probs.view(2, 12, -1))
        by_hand = cube[:, 1:]
    elif kind == "logits":
        cube = TeacherLogits(teacher.logits.view(2, 12, -1))
        by_hand = TeacherLogits(cube.logits[:, :-1])
    else:
        cube = TeacherHidden(teacher.input.view(2, 12, -1), teacher.linear_weight, teacher.linear_bias)
        by_hand = TeacherHidden(cube.input[:, :-1], teacher.linear_weight, teacher.linear_bias)
    options = {"linear_bias": b, "ce_weight": 0.5, "reduction": reduction, "backend": backend, "return_stats": True}
    loss, stats = linear_distill(x3, w, cube, target=y, token_weight=token_weight, shift=True, **options)
    true, true_stats = linear_distill(
        x3[:, :-1], w, by_hand, target=y[:, 1:], token_weight=token_weight[:, 1:], **options)
    assert loss.shape == true.shape == ((2, 11) if reduction == "none" else ())
    for a, e in zip((loss, *stats, *gradients(loss, (x3, w, b))),
                    (true, *true_stats, *gradients(true, (x3, w, b))), strict=True):
        torch.testing.assert_close(a, e)


@each_backend
@each_teacher
@pytest.mark.parametrize("labels", [True, False])
def test_stats(backend, kind, labels):
    x, w, b, (teacher, y) = taught(kind, labels=labels)(0)
    token_weight = torch.rand(TOKENS)
    loss, stats = linear_distill(
        x, w, teacher, target=y, linear_bias=b, temperature=2.0, temperature_squared=True, token_weight=token_weight,
        ce_weight=0.3 * labels, reduction="none", return_stats=True, backend=backend)
    assert isinstance(stats, DistillStats) and not any(t.requires_grad for t in stats)
    z = F.linear(x, w, b).detach()
    valid = torch.ones(TOKENS, dtype=torch.bool) if y is None else y != -100
    if kind == "sparse":
        valid = valid & (teacher.probs > 0).any(-1)
    torch.testing.assert_close(stats.lse, torch.where(valid, z.logsumexp(-1), 0))
    nll = F.cross_entropy(z, y, reduction="none") if labels else torch.zeros(TOKENS)
    torch.testing.assert_close(stats.nll, torch.where(valid, nll, 0))
    alone = linear_distill(x, w, teacher, target=y, linear_bias=b, temperature=2.0, temperature_squared=True,
                           reduction="none", backend=backend)
    torch.testing.assert_close(stats.divergence, alone.detach())
    mixed = (1 - 0.3 * labels) * stats.divergence + 0.3 * labels * stats.nll
    torch.testing.assert_close(loss.detach(), mixed * token_weight)
    torch.testing.assert_close(stats.denominator, token_weight[valid].sum())


@pytest.mark.parametrize("backend", ["torch"])  # whose products a profiler sees
@pytest.mark.parametrize("kind", ["sparse", "logits"])
def test_labels_and_mixing_cost_no_product(backend, kind):
    """A sparse teacher costs no forward pass, and cross-entropy shares the student's logits: 3 GEMMs in all, 2 with a
    frozen head, 1 without gradients."""
    for labels, ce_weight in ((False, 0.0), (True, 0.5)):
        x, w, b, (teacher, y) = taught(kind, labels=labels, ignored=0)(0)
        count = (teacher.probs > 0).any(-1).sum().item() if kind == "sparse" else len(x)
        product = 2 * count * x.shape[1] * len(w)
        for frozen, products in (((), 3), ((1, 2), 2), ((0,), 2), ((0, 1, 2), 1)):
            some = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate((x, w, b))]
            assert flops(functools.partial(_step, some, teacher, y, ce_weight, backend)) == products * product


@pytest.mark.parametrize("backend", ["torch"])  # whose products a profiler sees
def test_hidden_teacher_costs_one_product_more(backend):
    x, w, b, (teacher, y) = taught("hidden", labels=True, ignored=0)(0)
    product, teachers = 2 * x.shape[0] * x.shape[1] * len(w), 2 * x.shape[0] * teacher.input.shape[1] * len(w)
    for frozen, products in (((), 3), ((1, 2), 2), ((0, 1, 2), 1)):
        some = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate((x, w, b))]
        assert flops(functools.partial(_step, some, teacher, y, 0.5, backend)) == products * product + teachers
    with torch.no_grad():
        assert flops(functools.partial(_step, (x, w, b), teacher, y, 0.5, backend)) == product + teachers


def _step(head, teacher, labels, ce_weight, backend):
    loss = linear_distill(head[0], head[1], teacher, target=labels, ce_weight=ce_weight, linear_bias=head[2],
                          backend=backend)
    if loss.requires_grad:
        loss.backward()


def test_module_holds_options():
    x, w, b, (teacher, y) = taught("hidden", labels=True)(0)
    loss = LinearDistillLoss(divergence="reverse_kl", ce_weight=0.2)
    true = linear_distill(x, w, teacher, target=y, linear_bias=b, divergence="reverse_kl", ce_weight=0.2)
    assert torch.equal(loss(x, w, teacher, y, b), true)
    assert "divergence='reverse_kl'" in repr(loss)
    with pytest.raises(TypeError, match=r"options: expected some of .*, got .*'divergance'"):
        LinearDistillLoss(divergance="jsd")


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "error_type", "message"), [
    ({"teacher": torch.zeros(TOKENS, 601)}, TypeError,
     "teacher: expected a SparseTarget, TeacherLogits or TeacherHidden, got Tensor"),
    ({"divergence": "kl"}, ValueError, "divergence: expected 'forward_kl', 'reverse_kl' or 'jsd', got 'kl'"),
    ({"beta": 1.5}, ValueError, r"beta: expected a number in \[0, 1\], got 1.5"),
    ({"beta": float("nan")}, ValueError, r"beta: expected a number in \[0, 1\], got nan"),
    ({"ce_weight": -0.1}, ValueError, r"ce_weight: expected a number in \[0, 1\], got -0.1"),
    ({"ce_weight": 0.5}, ValueError, r"target: expected labels for the cross-entropy \(ce_weight > 0\), got None"),
    ({"tail": "none"}, ValueError, "tail: expected 'bucket', 'renormalise' or 'support', got 'none'"),
    ({"temperature_squared": 2.0}, TypeError, "temperature_squared: expected True or False, got float"),
    ({"target": torch.zeros(TOKENS - 1).long()}, ValueError,
     rf"target: expected \({TOKENS},\) like input without D, got \({TOKENS - 1},\)"),
    ({"target": torch.zeros(TOKENS)}, ValueError, rf"target: expected integer labels, got float32 \({TOKENS},\)"),
    ({"target": [1, 2]}, TypeError, "target: expected a tensor of labels, got list"),
    ({"teacher": SparseTarget(torch.zeros(TOKENS, 2).int(), torch.tensor([[1.0, -0.5]]).repeat(TOKENS, 1))}, ValueError,
     "teacher.probs: expected weights of at least 0, got a negative one"),
])
def test_errors_name_argument_expected_and_given(change, error_type, message):
    x, w, b, (teacher, _) = taught("sparse")(0)
    arguments = {"linear_bias": b, **change}
    with pytest.raises(error_type, match=message):
        linear_distill(x, w, arguments.pop("teacher", teacher), **arguments)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TeacherLogits(torch.zeros(2, 3).long()),
     r"logits: expected floating point \(..., V\), got int64 \(2, 3\)"),
    (lambda: TeacherHidden(torch.zeros(2, 3), torch.zeros(5, 4)),
     r"linear_weight: expected \(V, 3\), got float32 \(5, 4\)"),
    (lambda: TeacherHidden(torch.zeros(2, 3), torch.zeros(5, 3).double()),
     "linear_weight: expected torch.float32 like input, got torch.float64"),
    (lambda: TeacherHidden(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(4)),
     r"linear_bias: expected floating point \(5,\), got float32 \(4,\)"),
    (lambda: TeacherHidden(torch.zeros(2, 3), torch.zeros(5, 3), softcap=0.0),
     "softcap: expected a finite number above 0, got 0.0"),
    (lambda: TeacherHidden(torch.zeros(2, 3), torch.zeros(5, 3), logit_scale=-1.0),
     "logit_scale: expected a finite number above 0, got -1.0"),
])
def test_teachers_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()
