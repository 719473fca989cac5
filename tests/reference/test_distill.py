"""The definition of distillation, against formulas that share no code with it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr

from ssd_core.reference.distill import dense_divergence, distill, sparse_divergence
from ssd_core.reference.linear_distill import linear_distill

N, V, K = 6, 11, 3
INF = float("inf")
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2), ("jsd", 0.9), ("jsd", 0.0), ("jsd", 1.0)]
each_kind = pytest.mark.parametrize(("divergence", "beta"), KINDS)
PLAIN = {"divergence": "forward_kl", "beta": 0.5, "temperature": 1.0, "temperature_squared": False, "tail": "bucket"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def student(scale=1.0, vocab=V):
    return (scale * torch.randn(N, vocab, dtype=torch.float64)).requires_grad_()


def teacher(total=0.8, vocab=V, k=K):
    ids = torch.stack([torch.randperm(vocab)[:k] for _ in range(N)])
    probs = torch.rand(N, k, dtype=torch.float64) + 0.1
    return ids, total * probs / probs.sum(-1, keepdim=True)


def between(p, q, divergence, beta):
    """The same of probabilities (N, B) by scipy."""
    p, q = p.detach().double().numpy(), q.detach().double().numpy()
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
        value = rel_entr(p, q).sum(-1)
    elif divergence == "reverse_kl" or (divergence == "jsd" and beta == 1):
        value = rel_entr(q, p).sum(-1)
    else:
        m = beta * p + (1 - beta) * q
        value = beta * rel_entr(p, m).sum(-1) + (1 - beta) * rel_entr(q, m).sum(-1)
    return torch.from_numpy(value)


def buckets(z, ids, probs, tail):
    """Probabilities of teacher and student, row by row: the support's ids, then everything else."""
    q_all = z.detach().softmax(-1)
    ps, qs = [], []
    for q, row_ids, row_probs in zip(q_all, ids.tolist(), probs.tolist(), strict=True):
        merged = {}
        for i, prob in zip(row_ids, row_probs, strict=True):
            if prob > 0:
                merged[i] = merged.get(i, 0.0) + prob
        p = torch.tensor(list(merged.values()), dtype=torch.float64)
        on = q[list(merged)]
        rest = [j for j in range(len(q)) if j not in merged]
        p_tail, q_tail = max(0.0, 1 - p.sum().item()) if rest else 0.0, q[rest].sum().item()
        if tail != "bucket":
            p, p_tail = p / p.sum(), 0.0
        if tail == "support":
            on, q_tail = on / on.sum(), 0.0
        pad = torch.zeros(len(row_ids) - len(merged), dtype=torch.float64)
        ps.append(torch.cat((p, pad, torch.tensor([p_tail], dtype=torch.float64))))
        qs.append(torch.cat((on, pad, torch.tensor([q_tail], dtype=torch.float64))))
    return torch.stack(ps), torch.stack(qs)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def grad_of(value, leaf):
    return torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]


# -- sparse teachers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "support"])
@pytest.mark.parametrize("kind", ["plain", "unused", "repeated", "heavy", "all"])
@each_kind
def test_sparse_equals_scipy_on_the_buckets(tail, kind, divergence, beta):
    z = student(scale=2)
    ids, probs = teacher(total=1.7 if kind == "heavy" else 0.8, k=V if kind == "all" else K)
    if kind == "unused":
        probs[::2, 1] = 0
        ids[::2, 1] = -5
    if kind == "repeated":
        ids[:, 2] = ids[:, 0]
    value = sparse_divergence(z, ids, probs, divergence=divergence, beta=beta, tail=tail)
    assert value.shape == (N,)
    close(value.detach(), between(*buckets(z, ids, probs, tail), divergence, beta))


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "support"])
@pytest.mark.parametrize("repeated", [False, True])
@each_kind
def test_sparse_gradients_by_finite_differences(tail, repeated, divergence, beta):
    z = student()
    ids, probs = teacher()
    if repeated:
        ids[:, 2] = ids[:, 0]
    if tail == "renormalise" and (divergence == "reverse_kl" or beta == 1):
        value = sparse_divergence(z, ids, probs, divergence=divergence, beta=beta, tail=tail)
        assert (value == INF).all()                     # the student has mass where the teacher has none
        return
    assert torch.autograd.gradcheck(
        lambda z: sparse_divergence(z, ids, probs, divergence=divergence, beta=beta, tail=tail), z, atol=1e-8)


def test_forward_kl_has_the_gradient_of_the_design():
    """``q_j - p_j`` on the support and ``q_j (1 - p_tail / q_tail)`` off it."""
    z = student()
    ids, probs = teacher()
    value = sparse_divergence(z, ids, probs, divergence="forward_kl", beta=0.5, tail="bucket")
    q = z.detach().softmax(-1)
    off = torch.ones_like(q).scatter(1, ids, 0)
    q_tail = (q * off).sum(-1, keepdim=True)
    expected = (q * (1 - 0.2 / q_tail)).scatter(1, ids, q.gather(1, ids) - probs)
    close(grad_of(value, z), expected)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "support"])
@each_kind
def test_a_support_of_the_whole_vocabulary_equals_a_dense_teacher(tail, divergence, beta):
    z, t = student(), student(scale=2).detach()
    dense = dense_divergence(z, t, divergence=divergence, beta=beta)
    everything = torch.arange(V).expand(N, V)
    value = sparse_divergence(z, everything, t.softmax(-1), divergence=divergence, beta=beta, tail=tail)
    close(value, dense)
    close(grad_of(value, z), grad_of(dense, z))


@each_kind
def test_support_does_not_see_logits_off_the_support(divergence, beta):
    z = student()
    ids, probs = teacher()
    options = {"divergence": divergence, "beta": beta, "tail": "support"}
    value = sparse_divergence(z, ids, probs, **options)
    off = torch.ones(N, V).scatter(1, ids, 0).bool()
    other = torch.where(off, 100 * torch.randn(N, V).double(), z)
    assert torch.equal(sparse_divergence(other, ids, probs, **options), value)
    assert (grad_of(value, z)[off] == 0).all()
    ids_k = torch.arange(K).expand(N, K)
    close(sparse_divergence(z.gather(1, ids), ids_k, probs, **options), value)


@each_kind
def test_repeated_ids_equal_their_sum(divergence, beta):
    z = student()
    ids, probs = teacher()
    halves = torch.cat((0.25 * probs, 0.75 * probs), -1)
    options = {"divergence": divergence, "beta": beta, "tail": "bucket"}
    whole = sparse_divergence(z, ids, probs, **options)
    close(sparse_divergence(z, torch.cat((ids, ids), -1), halves, **options), whole)


@pytest.mark.parametrize(("divergence", "beta"), [("forward_kl", 0.5), ("jsd", 0.5)])
def test_an_empty_teacher_tail_has_a_finite_gradient(divergence, beta):
    z = student()
    ids, _ = teacher()
    probs = torch.tensor([0.5, 0.25, 0.25]).double().expand(N, K)           # the sum is 1 exactly
    value = sparse_divergence(z, ids, probs, divergence=divergence, beta=beta, tail="bucket")
    close(value.detach(), between(*buckets(z, ids, probs, "bucket"), divergence, beta))
    assert torch.autograd.gradcheck(
        lambda z: sparse_divergence(z, ids, probs, divergence=divergence, beta=beta, tail="bucket"), z, atol=1e-8)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "support"])
@each_kind
def test_tokens_without_a_teacher_count_for_nothing(tail, divergence, beta):
    z = student()
    ids, probs = teacher()
    options = {"divergence": divergence, "beta": beta, "tail": tail}
    expected = sparse_divergence(z, ids, probs, **options).detach()
    probs[2] = 0
    ids[2] = -100
    value = sparse_divergence(z, ids, probs, **options)
    expected[2] = 0
    assert torch.equal(value, expected) and (grad_of(value, z)[2] == 0).all()


def test_a_tail_below_float32_rounding_is_seen():
    """q_tail is about 1e-9; 1 - sum(q) is 0 in float32."""
    z = torch.full((1, V), -20.0)
    z[0, 3] = 3.0
    ids, probs = torch.tensor([[3]]), torch.tensor([[0.5]])
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        value = sparse_divergence(z, ids, probs, divergence=divergence, beta=0.5, tail="bucket")
        exact = sparse_divergence(z.double(), ids, probs, divergence=divergence, beta=0.5, tail="bucket")
        assert value.dtype == torch.float32 and exact > 0.05
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)


# -- where probabilities are 0 -----------------------------------------------------------------------------------------


def reduced(z, dead, function):
    """Value and gradient of ``function`` on the logits that are alive; the others have gradient 0."""
    alive = z.detach()[:, ~dead].requires_grad_()
    value = function(alive)
    grad = torch.zeros_like(z)
    grad[:, ~dead] = grad_of(value, alive)
    return value, grad


@each_kind
@pytest.mark.parametrize("fill", [-INF, -2000.0])       # no logit, and one whose probability underflows
def test_dead_logits_of_both_sides_contribute_nothing(fill, divergence, beta):
    dead = torch.arange(V) % 4 == 1
    t = student(scale=2).detach().masked_fill(dead, fill)
    z = student().detach().masked_fill(dead, fill).requires_grad_()
    value = dense_divergence(z, t, divergence=divergence, beta=beta)
    expected, grad = reduced(z, dead, lambda z: dense_divergence(z, t[:, ~dead], divergence=divergence, beta=beta))
    close(value, expected)
    close(grad_of(value, z), grad)


@pytest.mark.parametrize("fill", [-INF, -2000.0])
def test_dead_student_logits(fill):
    """q = 0 where p > 0: reverse KL and JSD are finite, forward KL is not, or is the logit's distance."""
    z = student().detach()
    z[:, 4] = fill
    z.requires_grad_()
    t = student(scale=2).detach()
    p, q = t.softmax(-1), z.detach().softmax(-1)
    for divergence in ("reverse_kl", "jsd"):
        value = dense_divergence(z, t, divergence=divergence, beta=0.3)
        close(value.detach(), between(p, q, divergence, 0.3))
        grad = grad_of(value, z)
        assert grad.isfinite().all() and (grad[:, 4] == 0).all()
    forward = dense_divergence(z, t, divergence="forward_kl", beta=0.3)
    assert (forward == INF).all() if fill == -INF else (forward > 1000 * p[:, 4]).all()
    close(grad_of(forward, z), q - p)


def test_dead_teacher_logits():
    """p = 0 where q > 0: forward KL and JSD are finite, reverse KL is infinite."""
    z = student()
    t = student(scale=2).detach()
    t[:, 4] = -INF
    p, q = t.softmax(-1), z.detach().softmax(-1)
    for divergence in ("forward_kl", "jsd"):
        value = dense_divergence(z, t, divergence=divergence, beta=0.3)
        close(value.detach(), between(p, q, divergence, 0.3))
        assert torch.autograd.gradcheck(lambda z, d=divergence: dense_divergence(z, t, divergence=d, beta=0.3), z)
    assert (dense_divergence(z, t, divergence="reverse_kl", beta=0.3) == INF).all()


@pytest.mark.parametrize("tail", ["bucket", "support"])
@each_kind
def test_dead_student_logits_off_the_support_of_a_sparse_teacher(tail, divergence, beta):
    ids, probs = teacher()
    dead = torch.ones(N, V).scatter(1, ids, 0).bool() & (torch.rand(N, V) < 0.5)
    z = student().detach().masked_fill(dead, -INF).requires_grad_()
    value = sparse_divergence(z, ids, probs, divergence=divergence, beta=beta, tail=tail)
    close(value.detach(), between(*buckets(z, ids, probs, tail), divergence, beta))
    grad = grad_of(value, z)
    assert grad.isfinite().all() and (grad[dead] == 0).all()
    close(grad.sum(-1), torch.zeros(N).double())


def test_a_dead_student_tail():
    """Everything off the support is -inf."""
    ids, probs = teacher()
    off = torch.ones(N, V).scatter(1, ids, 0).bool()
    z = student().detach().masked_fill(off, -INF).requires_grad_()
    for divergence in ("reverse_kl", "jsd"):
        value = sparse_divergence(z, ids, probs, divergence=divergence, beta=0.5, tail="bucket")
        close(value.detach(), between(*buckets(z, ids, probs, "bucket"), divergence, 0.5))
        assert grad_of(value, z).isfinite().all()
    assert (sparse_divergence(z, ids, probs, divergence="forward_kl", beta=0.5, tail="bucket") == INF).all()
    empty = sparse_divergence(z, ids, probs, divergence="forward_kl", beta=0.5, tail="renormalise")
    assert empty.isfinite().all() and grad_of(empty, z).isfinite().all()


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "support"])
@each_kind
def test_a_vocabulary_of_one(tail, divergence, beta):
    z = student(vocab=1)
    value = sparse_divergence(
        z, torch.zeros(N, 1, dtype=torch.long), torch.ones(N, 1), divergence=divergence, beta=beta, tail=tail)
    assert (value == 0).all() and (grad_of(value, z) == 0).all()
    value = dense_divergence(z, z, divergence=divergence, beta=beta)
    assert (value == 0).all() and (grad_of(value, z) == 0).all()


# -- dense teachers ----------------------------------------------------------------------------------------------------


def test_forward_and_reverse_kl_equal_pytorch():
    z, t = student(), student(scale=2).detach()
    forward = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)
    close(dense_divergence(z, t, divergence="forward_kl", beta=0.5), forward)
    reverse = F.kl_div(t.log_softmax(-1), z.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    close(dense_divergence(z, t, divergence="reverse_kl", beta=0.5), reverse)


@each_kind
def test_dense_equals_scipy_and_finite_differences(divergence, beta):
    z, t = student(), student(scale=2).detach()
    value = dense_divergence(z, t, divergence=divergence, beta=beta)
    close(value.detach(), between(t.softmax(-1), z.softmax(-1), divergence, beta))
    assert torch.autograd.gradcheck(lambda z: dense_divergence(z, t, divergence=divergence, beta=beta), z, atol=1e-8)


def test_dense_gradients_equal_their_formulas():
    """DESIGN section 3 at temperature 1."""
    z, t = student(), student(scale=2).detach()
    p, q = t.softmax(-1), z.detach().softmax(-1)
    m = 0.3 * p + 0.7 * q
    kl = {name: (q * (q / other).log()).sum(-1, keepdim=True) for name, other in (("p", p), ("m", m))}
    expected = {"forward_kl": q - p, "reverse_kl": q * ((q / p).log() - kl["p"]),
                "jsd": 0.7 * q * ((q / m).log() - kl["m"])}
    for divergence, grad in expected.items():
        close(grad_of(dense_divergence(z, t, divergence=divergence, beta=0.3), z), grad)


def test_jsd_is_symmetric_bounded_and_tends_to_the_kl_divergences():
    z, t = student(3).detach(), student(3).detach()
    half = dense_divergence(z, t, divergence="jsd", beta=0.5)
    close(half, dense_divergence(t, z, divergence="jsd", beta=0.5))
    assert (half > 0).all() and (half < np.log(2)).all()
    close(dense_divergence(z, t, divergence="jsd", beta=0.2), dense_divergence(t, z, divergence="jsd", beta=0.8))
    for beta, kl in ((1e-9, "forward_kl"), (1 - 1e-9, "reverse_kl")):
        near = dense_divergence(z, t, divergence="jsd", beta=beta) / min(beta, 1 - beta)
        torch.testing.assert_close(near, dense_divergence(z, t, divergence=kl, beta=0.5), rtol=1e-5, atol=1e-5)


@each_kind
def test_the_narrower_side_is_padded_with_minus_infinity(divergence, beta):
    z, t = student(), student(scale=2).detach()
    for wide, narrow in ((V, V - 3), (V - 3, V)):
        a, b = z[:, :wide], t[:, :narrow]
        p, q = torch.zeros(N, V).double(), torch.zeros(N, V).double()
        p[:, :narrow], q[:, :wide] = b.softmax(-1), a.detach().softmax(-1)
        value = dense_divergence(a, b, divergence=divergence, beta=beta)
        close(value.detach(), between(p, q, divergence, beta))
        if value.isfinite().all():
            assert torch.autograd.gradcheck(lambda a, b=b: dense_divergence(a, b, divergence=divergence, beta=beta),
                                            a.detach().requires_grad_(), atol=1e-8)


def test_the_teacher_gets_no_gradient():
    z, t = student(), student()
    dense_divergence(z, t, divergence="jsd", beta=0.5).sum().backward()
    assert t.grad is None and z.grad.abs().sum() > 0


@each_kind
def test_a_student_equal_to_its_teacher_is_a_fixed_point(divergence, beta):
    z = student()
    value = dense_divergence(z, z.detach(), divergence=divergence, beta=beta)
    assert value.abs().max() < 1e-14 and grad_of(value, z).abs().max() < 1e-14


# -- the whole loss ----------------------------------------------------------------------------------------------------


def test_distill_written_out():
    u, t = student(scale=3), student(scale=3, vocab=V - 2).detach()
    labels = torch.randint(V, (N,))
    weight = torch.rand(V, dtype=torch.float64)
    loss, divergence, nll, lse = distill(
        u, teacher_u=t, divergence="forward_kl", beta=0.5, temperature=1.7, temperature_squared=True, tail="bucket",
        labels=labels, ce_weight=0.3, class_weight=weight, label_smoothing=0.2, logit_scale=0.8, softcap=4.0,
        z_loss=0.01, teacher_logit_scale=1.2, teacher_softcap=3.0)
    c = 4.0 * (0.8 * u / 4.0).tanh()
    p = torch.zeros(N, V, dtype=torch.float64)              # not softcapped: the teacher does not know the last two
    p[:, :-2] = (3.0 * (1.2 * t / 3.0).tanh() / 1.7).softmax(-1)
    kl = F.kl_div((c / 1.7).log_softmax(-1), p, reduction="none").sum(-1) * 1.7**2
    ce = F.cross_entropy(c, labels, weight, reduction="none", label_smoothing=0.2)
    expected = 0.7 * kl + 0.3 * ce + 0.01 * c.logsumexp(-1) ** 2
    close(divergence, kl)
    close(loss, expected)
    close(nll, F.cross_entropy(c, labels, reduction="none"))
    close(lse, c.logsumexp(-1))
    close(grad_of(loss, u), grad_of(expected, u))


def test_sparse_probabilities_are_given_at_the_temperature():
    u = student(scale=2)
    ids, probs = teacher()
    loss, divergence, nll, lse = distill(u, ids=ids, probs=probs, **{**PLAIN, "temperature": 2.5})
    expected = sparse_divergence(u / 2.5, ids, probs, divergence="forward_kl", beta=0.5, tail="bucket")
    close(divergence, expected)
    assert torch.equal(loss, divergence) and (nll == 0).all()
    close(lse, u.logsumexp(-1))


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@each_kind
def test_gradients_of_the_whole_loss_by_finite_differences(kind, divergence, beta):
    u = student(scale=2)
    ids, probs = teacher()
    side = {"ids": ids, "probs": probs} if kind == "sparse" else {"teacher_u": student(vocab=V).detach()}
    labels = torch.randint(V, (N,))

    def function(u):
        return distill(u, **side, divergence=divergence, beta=beta, temperature=1.4, temperature_squared=True,
                       tail="bucket", labels=labels, ce_weight=0.4, label_smoothing=0.1, logit_scale=0.7, softcap=3.0,
                       z_loss=0.02)

    assert torch.autograd.gradcheck(function, u, atol=1e-8)


def test_temperature_squared_multiplies_the_divergence_alone():
    u = student()
    ids, probs = teacher()
    labels = torch.randint(V, (N,))
    options = {"ids": ids, "probs": probs, "labels": labels, "ce_weight": 0.25, "z_loss": 0.1}
    plain = distill(u, **options, **{**PLAIN, "temperature": 3.0})
    squared = distill(u, **options, **{**PLAIN, "temperature": 3.0, "temperature_squared": True})
    close(squared[1], 9 * plain[1])
    close(squared[0] - plain[0], 0.75 * 8 * plain[1])
    assert torch.equal(squared[2], plain[2]) and torch.equal(squared[3], plain[3])


# -- through a linear head ---------------------------------------------------------------------------------------------


def test_linear_distill_is_distill_of_the_heads_outputs():
    x, w, b = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((N, 4), (V, 4), (V,)))
    tx, tw, tb = (torch.randn(*shape, dtype=torch.float64) for shape in ((N, 7), (V - 2, 7), (V - 2,)))
    ids, probs = teacher()
    options = {**PLAIN, "divergence": "jsd", "temperature": 1.3, "z_loss": 0.1, "logit_scale": 0.9}
    hidden = linear_distill(x, w, linear_bias=b, teacher_input=tx, teacher_weight=tw, teacher_bias=tb,
                            teacher_softcap=5.0, teacher_logit_scale=0.6, **options)
    logits = linear_distill(x, w, linear_bias=b, teacher_logits=F.linear(tx, tw, tb), teacher_softcap=5.0,
                            teacher_logit_scale=0.6, **options)
    u = F.linear(x, w, b)
    expected = distill(u, teacher_u=F.linear(tx, tw, tb), teacher_softcap=5.0, teacher_logit_scale=0.6, **options)
    for one, two, three in zip(hidden, logits, expected, strict=True):
        close(one, two)
        close(one, three)
    sparse = linear_distill(x, w, linear_bias=b, ids=ids, probs=probs, **options)
    expected = distill(u, ids=ids, probs=probs, **options)
    close(sparse[0], expected[0])
    close(torch.autograd.grad(sparse[0].sum(), (x, w, b)), torch.autograd.grad(expected[0].sum(), (x, w, b)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_students_dtype_decides_float64_or_float32(dtype, teacher_dtype):
    x, w, z = (torch.randn(*shape).to(dtype) for shape in ((N, 4), (V, 4), (N, V)))
    t, tx, tw = (torch.randn(*shape).to(teacher_dtype) for shape in ((N, V), (N, 3), (V, 3)))
    ids, probs = teacher()
    probs = probs.to(teacher_dtype)
    options = {**PLAIN, "divergence": "jsd"}
    pairs = [
        (linear_distill(x, w, **side, **options),
         linear_distill(x.double(), w.double(), **{name: v.double() for name, v in side.items()}, **options))
        for side in ({"teacher_logits": t}, {"teacher_input": tx, "teacher_weight": tw})
    ]
    pairs.append((linear_distill(x, w, ids=ids, probs=probs, **options),
                  linear_distill(x.double(), w.double(), ids=ids, probs=probs, **options)))
    kind = {"divergence": "jsd", "beta": 0.5}
    pairs.append(([sparse_divergence(z, ids, probs, tail="bucket", **kind), dense_divergence(z, t, **kind)],
                  [sparse_divergence(z.double(), ids, probs, tail="bucket", **kind),
                   dense_divergence(z.double(), t.double(), **kind)]))
    for found, exact in pairs:
        for out, ref in zip(found, exact, strict=True):
            assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            tolerance = 1e-12 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(out.double(), ref, rtol=tolerance, atol=tolerance)
