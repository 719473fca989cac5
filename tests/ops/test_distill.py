"""``distill`` beyond test_every_op.py: divergences of logits that are there."""

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
    gradients,
    on_logits,
    pool,
    taught,
    upstream_of,
)
from test_linear_distill import BETAS, MEASURES, TAILS

from ssd_core import SparseTarget, TeacherHidden, TeacherLogits, distill, linear_distill
from ssd_core.ops.linear_distill import DistillStats

pytestmark = pytest.mark.usefixtures("poisoned")

OP = OPS["distill-sparse"]
each_backend, each_case = each_backend(OP.name), each_case(OP.name)
each_teacher = pytest.mark.parametrize("kind", ["sparse", "logits"])


def drawn(kind, dtype=torch.float32, **options):
    return on_logits(taught(kind, dtype, **options))


def loss_and_grad(z, teacher, **options):
    loss = distill(z, teacher, **options)
    return loss.detach(), *gradients(loss, [z])


@each_case
@pytest.mark.parametrize(("kind", "divergence", "beta", "tail"), [m for m in MEASURES if m[0] != "hidden"])
def test_every_measure(backend, dtype, kind, divergence, beta, tail):
    check_op(OP, backend, dtype, drawn(kind, dtype), divergence=divergence, beta=beta, tail=tail, temperature=1.5,
             temperature_squared=True, reduction="none", upstream=upstream_of(OP, TOKENS, 601), seeds=pool(dtype))


@each_backend
@each_teacher
def test_the_ends_of_beta_are_the_two_kl(backend, kind):
    z, (teacher, _) = drawn(kind)(0)
    for beta, divergence in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        found = loss_and_grad(z, teacher, backend=backend, divergence="jsd", beta=beta)
        true = loss_and_grad(z, teacher, backend=backend, divergence=divergence)
        assert found[0] > 0 and all(torch.equal(a, e) for a, e in zip(found, true, strict=True))


@each_backend
def test_defaults_are_plain_forward_kl(backend):
    z, (teacher, labels) = drawn("logits", labels=True, ignored=0)(0)
    true = F.kl_div(F.log_softmax(z, -1), F.log_softmax(teacher.logits, -1), reduction="batchmean", log_target=True)
    for target in (None, labels):
        loss, grad = loss_and_grad(z, teacher, target=target, backend=backend)
        torch.testing.assert_close(loss, true.detach())
        torch.testing.assert_close(grad, *gradients(true, [z], retain_graph=True))


@each_backend
@each_teacher
def test_temperature_squared_scales_loss_and_gradient(backend, kind):
    z, (teacher, _) = drawn(kind)(0)
    plain, squared = (loss_and_grad(z, teacher, temperature=3.0, temperature_squared=on, backend=backend)
                      for on in (False, True))
    for a, e in zip(squared, plain, strict=True):
        torch.testing.assert_close(a, 9 * e)


@each_case
@each_teacher
@pytest.mark.parametrize("options", [
    {"logit_scale": 0.4}, {"softcap": 2.0}, {"z_loss": 0.01}, {"ce_weight": 0.3},
    {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7, "z_loss": 1e-3, "label_smoothing": 0.2, "ce_weight": 0.4,
     "divergence": "jsd", "beta": 0.3, "temperature_squared": True},
], ids=lambda options: "-".join(options))
def test_options(backend, dtype, kind, options):
    check_op(OP, backend, dtype, drawn(kind, dtype, labels=True), seeds=pool(dtype), **options)


@each_case
@each_teacher
def test_class_weights_of_the_cross_entropy(backend, dtype, kind):
    weight = torch.rand(601, generator=torch.Generator().manual_seed(0)) + 0.1
    check_op(OP, backend, dtype, drawn(kind, dtype, labels=True), weight=weight, ce_weight=0.6, label_smoothing=0.1,
             seeds=pool(dtype))


@each_backend
@pytest.mark.parametrize("tail", TAILS)
def test_repeated_ids_are_added_up(backend, tail):
    z, (teacher, _) = drawn("sparse")(0)
    teacher.ids[:, 3] = teacher.ids[:, 1]
    check_op(OP, backend, torch.float32, lambda seed: (z, Taught(teacher, None)), tail=tail, seeds=1)


@each_case
@pytest.mark.parametrize(("more", "divergence"), [
    (70, "jsd"), (-70, "jsd"), (70, "reverse_kl"), (-70, "forward_kl")])
def test_vocabularies_of_different_size(backend, dtype, more, divergence, monkeypatch):
    """In blocks of a few rows, too."""
    check_op(OP, backend, dtype, drawn("logits", dtype, more=more), divergence=divergence, seeds=pool(dtype))
    monkeypatch.setattr("ssd_core.chunked.logits.block_elements", lambda device: 601 * 17)
    check_op(OP, backend, dtype, drawn("logits", dtype, more=more), divergence=divergence, seeds=2)


@each_backend
@pytest.mark.parametrize(("more", "divergence"), [(70, "forward_kl"), (-70, "reverse_kl")])
def test_mass_where_the_other_has_none_is_infinite(backend, more, divergence):
    z, (teacher, _) = drawn("logits", more=more)(0)
    assert (distill(z, teacher, divergence=divergence, reduction="none", backend=backend) == torch.inf).all()


@each_backend
@pytest.mark.parametrize(("divergence", "beta"), BETAS)
def test_one_excluded_logit_of_either_side(backend, divergence, beta):
    """-inf where only the other side has mass: infinite where the definition is, finite where it is not, for that
    token alone; and never NaN."""
    z, (teacher, _) = drawn("logits")(0)
    theirs = teacher.logits.clone()
    z.data[3, 5], theirs[8, 7] = -torch.inf, -torch.inf
    loss = distill(z, TeacherLogits(theirs), divergence=divergence, beta=beta, reduction="none", backend=backend)
    true = OP.define(z.double(), Taught(TeacherLogits(theirs.double()), None), divergence=divergence, beta=beta,
                     reduction="none")
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-6)
    infinite = {"forward_kl": [3], "reverse_kl": [8], "jsd": []}[divergence]
    assert loss.isinf().nonzero().flatten().tolist() == infinite and not loss.isnan().any()


@each_backend
@each_teacher
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_predicts_the_next_token(backend, kind, reduction):
    """Labels and a sparse teacher belong to the next token; a dense one has seen what the student has seen."""
    z, (teacher, y) = drawn(kind, n=24, labels=True)(0)
    z, y, token_weight = z.detach().view(2, 12, -1).requires_grad_(), y.view(2, 12), torch.rand(2, 12)
    if kind == "sparse":
        cube = SparseTarget(teacher.ids.view(2, 12, -1), teacher.probs.view(2, 12, -1))
        by_hand = cube[:, 1:]
    else:
        cube = TeacherLogits(teacher.logits.view(2, 12, -1))
        by_hand = TeacherLogits(cube.logits[:, :-1])
    options = {"ce_weight": 0.5, "reduction": reduction, "backend": backend, "return_stats": True}
    loss, stats = distill(z, cube, target=y, token_weight=token_weight, shift=True, **options)
    true, true_stats = distill(z[:, :-1], by_hand, target=y[:, 1:], token_weight=token_weight[:, 1:], **options)
    assert loss.shape == true.shape == ((2, 11) if reduction == "none" else ())
    for a, e in zip((loss, *stats, *gradients(loss, [z])), (true, *true_stats, *gradients(true, [z])), strict=True):
        torch.testing.assert_close(a, e)


@each_backend
@each_teacher
def test_it_is_linear_distill_of_a_head_that_does_nothing(backend, kind):
    z, (teacher, y) = drawn(kind, v=40, labels=True)(0)
    options = {"target": y, "ce_weight": 0.3, "temperature": 2.0, "softcap": 5.0, "backend": backend,
               "return_stats": True}
    loss, stats = distill(z, teacher, **options)
    true, true_stats = linear_distill(z, torch.eye(40), teacher, **options | {"backend": "auto"})
    assert isinstance(stats, DistillStats) and not any(t.requires_grad for t in stats)
    for a, e in zip((loss, *stats, *gradients(loss, [z])), (true, *true_stats, *gradients(true, [z])), strict=True):
        torch.testing.assert_close(a, e)


@each_backend
@pytest.mark.parametrize("ignore_index", [7, None, -1])
def test_any_ignore_index(backend, ignore_index):
    z, (teacher, y) = drawn("logits", labels=True, ignored=0)(0)
    y[::3] = -100 if ignore_index is None else ignore_index
    as_usual = y.masked_fill(y == (-100 if ignore_index is None else ignore_index), -100)
    found = loss_and_grad(z, teacher, target=y, ce_weight=0.5, ignore_index=ignore_index, backend=backend)
    true = loss_and_grad(z, teacher, target=as_usual, ce_weight=0.5, backend=backend)
    assert all(torch.equal(a, e) for a, e in zip(found, true, strict=True))


@pytest.mark.parametrize(("change", "error_type", "message"), [
    ({"teacher": TeacherHidden(torch.zeros(TOKENS, 3), torch.zeros(601, 3))}, TypeError,
     "teacher: expected a SparseTarget or TeacherLogits, got TeacherHidden"),
    ({"divergence": "kl"}, ValueError, "divergence: expected 'forward_kl', 'reverse_kl' or 'jsd', got 'kl'"),
    ({"beta": -0.5}, ValueError, r"beta: expected a number in \[0, 1\], got -0.5"),
    ({"ce_weight": 0.5}, ValueError, r"target: expected labels for the cross-entropy \(ce_weight > 0\), got None"),
    ({"tail": "none"}, ValueError, "tail: expected 'bucket', 'renormalise' or 'support', got 'none'"),
    ({"tail": "renormalise", "divergence": "reverse_kl"}, ValueError, "tail: expected 'bucket' or 'support'"),
    ({"temperature_squared": 1}, TypeError, "temperature_squared: expected True or False, got int"),
    ({"target": torch.zeros(TOKENS)}, ValueError, rf"target: expected integer labels, got float32 \({TOKENS},\)"),
])
def test_errors_name_argument_expected_and_given(change, error_type, message):
    z, (teacher, _) = drawn("sparse")(0)
    arguments = {"teacher": teacher, **change}
    with pytest.raises(error_type, match=message):
        distill(z, **arguments)
