"""``logprob`` beyond test_every_op.py."""

import pytest
import torch
from suite import OPS, TOKENS, check_op, each_backend, each_case, gradients, hard, on_logits, pool
from tolerances import error

from ssd_core import linear_logprob, logprob

pytestmark = pytest.mark.usefixtures("poisoned")

OP = OPS["logprob"]
each_backend, each_case = each_backend(OP.name), each_case(OP.name)
UPSTREAM = torch.linspace(-2, 3, TOKENS, dtype=torch.float64)


@each_case
@pytest.mark.parametrize("upstream", [(UPSTREAM, -UPSTREAM.flip(0)), (UPSTREAM, 0.0), (0.0, UPSTREAM)],
                         ids=["both", "logprob", "entropy"])
def test_each_result_has_its_upstream_gradient(backend, dtype, upstream):
    check_op(OP, backend, dtype, upstream=upstream, seeds=pool(dtype))


@each_case
@pytest.mark.parametrize("options", [
    {"temperature": 1.7}, {"logit_scale": 0.4}, {"softcap": 2.0},
    {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7}], ids=lambda options: "-".join(options))
def test_options(backend, dtype, options):
    check_op(OP, backend, dtype, upstream=(UPSTREAM, -UPSTREAM.flip(0)), seeds=pool(dtype), **options)


@each_backend
def test_it_is_linear_logprob_of_a_head_that_does_nothing(backend):
    z, y = on_logits(hard(v=40))(0)
    options = {"temperature": 0.7, "softcap": 5.0, "backend": backend}
    found, true = logprob(z, y, **options), linear_logprob(z, torch.eye(40), y, **options | {"backend": "auto"})
    for a, e in zip((*found, *gradients(found[:2], [z])), (*true, *gradients(true[:2], [z])), strict=True):
        torch.testing.assert_close(a, e)
    assert not (found.lse.requires_grad or found.argmax.requires_grad)


@each_backend
def test_minus_infinity_of_the_target_and_of_all(backend):
    """The target's makes its logprob -inf. A token of nothing else is NaN, and no other token is."""
    z, y = on_logits(hard(v=30, ignored=0))(0)
    z.data[2, y[2]] = -torch.inf
    z.data[5] = -torch.inf
    found = logprob(z, y, backend=backend)
    assert found.logprob[2] == -torch.inf and found.entropy[2].isfinite()
    assert found.logprob[5].isnan() and found.entropy[5].isnan()
    fine = torch.ones(TOKENS, dtype=torch.bool).index_fill(0, torch.tensor([2, 5]), False)
    assert found.logprob[fine].isfinite().all() and found.entropy[fine].isfinite().all()


@each_backend
def test_entropy_of_known_distributions(backend):
    z = torch.zeros(3, 1000)
    z[1, 17:] = -torch.inf
    z[2, 5] = 300.0
    found = logprob(z, torch.full((3,), 5), backend=backend)
    assert error(found.entropy, torch.tensor([1000.0, 17.0, 1.0]).log()) < 1e-6
    assert error(found.logprob, -torch.tensor([1000.0, 17.0, 1.0]).log()) < 1e-6
    assert found.argmax.tolist() == [0, 0, 5]


@each_backend
def test_shift_predicts_the_next_token(backend):
    z, y = on_logits(hard(n=24))(0)
    z, y = z.detach().view(2, 12, -1).requires_grad_(), y.view(2, 12)
    found, by_hand = logprob(z, y, shift=True, backend=backend), logprob(z[:, :-1], y[:, 1:], backend=backend)
    assert found.logprob.shape == (2, 11)
    for a, e in zip((*found, *gradients(found[:2], [z])), (*by_hand, *gradients(by_hand[:2], [z])), strict=True):
        torch.testing.assert_close(a, e)


@each_backend
@pytest.mark.parametrize("ignore_index", [7, None, -1])
def test_any_ignore_index(backend, ignore_index):
    z, y = on_logits(hard(ignored=0))(0)
    y[::3] = -100 if ignore_index is None else ignore_index
    as_usual = y.masked_fill(y == (-100 if ignore_index is None else ignore_index), -100)
    found, true = logprob(z, y, ignore_index=ignore_index, backend=backend), logprob(z, as_usual, backend=backend)
    assert all(torch.equal(a, e) for a, e in zip(found, true, strict=True)) and (found.logprob[::3] == 0).all()


@pytest.mark.parametrize(("change", "error_type", "message"), [
    ({"target": torch.zeros(TOKENS)}, ValueError, rf"target: expected integer labels, got float32 \({TOKENS},\)"),
    ({"target": [1, 2]}, TypeError, "target: expected a tensor, got list"),
])
def test_errors_name_argument_expected_and_given(change, error_type, message):
    z, y = on_logits(hard())(0)
    with pytest.raises(error_type, match=message):
        logprob(z, **{"target": y, **change})
