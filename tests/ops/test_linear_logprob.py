"""``linear_logprob`` beyond test_every_op.py: two results, each with an upstream gradient of its own, and constants."""

import pytest
import torch
import torch.nn.functional as F
from suite import OPS, TOKENS, check_op, each_backend, each_case, flops, gradients, hard, planned, pool, problem
from tolerances import error

from ssd_core import linear_logprob

pytestmark = pytest.mark.usefixtures("poisoned")

OP = OPS["linear_logprob"]
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
@pytest.mark.parametrize("place", [0, 1])
def test_a_result_that_nobody_uses_asks_for_nothing(backend, place):
    x, w, b, y = problem()
    found = linear_logprob(x, w, y, linear_bias=b, backend=backend)
    grads = torch.autograd.grad(found[place].sum(), (x, w, b))
    true = OP.define(x, w, b, y)[place].sum()
    for a, e in zip(grads, torch.autograd.grad(true, (x, w, b)), strict=True):
        torch.testing.assert_close(a, e)


@each_backend
def test_lse_and_argmax(backend):
    """Constants, at the temperature of the call, 0 where a token is ignored."""
    x, w, b, y = problem()
    found = linear_logprob(x, w, y, linear_bias=b, temperature=0.7, backend=backend)
    z = F.linear(x, w, b).detach() / 0.7
    torch.testing.assert_close(found.lse, torch.where(y != -100, z.logsumexp(-1), 0))
    assert torch.equal(found.argmax, torch.where(y != -100, z.argmax(-1), 0)) and found.argmax.dtype == torch.int64
    assert not (found.lse.requires_grad or found.argmax.requires_grad)


@each_backend
@pytest.mark.parametrize("tile", [60, 7, 1])
def test_the_lowest_of_tied_ids_is_the_likeliest(backend, tile, monkeypatch):
    """Within a tile of the vocabulary and across tiles."""
    bias = torch.zeros(60)
    bias[[13, 14, 20, 59]] = 3.0
    with planned(monkeypatch, OP.name, 2, 60, tile):
        head = (torch.zeros(5, 4), torch.zeros(60, 4), torch.arange(5))
        assert (linear_logprob(*head, linear_bias=bias, backend=backend).argmax == 13).all()
        flat = linear_logprob(*head, backend=backend)
        assert (flat.argmax == 0).all()
        assert error(flat.entropy, torch.full((5,), 60.0).log()) < 1e-6


@each_backend
@pytest.mark.parametrize("tile", [9, 2])
def test_infinite_and_nan_logits(backend, tile, monkeypatch):
    """-inf is probability 0, and 0 log 0 = 0 in the entropy; NaN and +inf make the token NaN, as in PyTorch."""
    def call(bias, label):
        head = (torch.zeros(1, 2), torch.zeros(9, 2), torch.tensor([label]))
        bias = bias.clone().requires_grad_()
        found = linear_logprob(*head, linear_bias=bias, backend=backend)
        return found, torch.autograd.grad(found.logprob.sum() + found.entropy.sum(), bias)[0]

    with planned(monkeypatch, OP.name, 1, 9, tile):
        for place in range(9):
            excluded = torch.linspace(-1, 2, 9).index_fill(0, torch.tensor(place), -torch.inf)
            found, grad = call(excluded, (place + 1) % 9)
            q = excluded.softmax(-1)
            torch.testing.assert_close(found.logprob[0], excluded.log_softmax(-1)[(place + 1) % 9])
            torch.testing.assert_close(found.entropy[0], torch.special.entr(q).sum())
            assert grad.isfinite().all() and grad[place] == 0
            assert call(excluded, place)[0].logprob == -torch.inf
            for bad in (torch.nan, torch.inf):
                found, _ = call(torch.zeros(9).index_fill(0, torch.tensor(place), bad), (place + 1) % 9)
                assert found.logprob.isnan().all() and found.entropy.isnan().all()


@each_backend
def test_a_distribution_that_is_certain_has_no_entropy(backend):
    bias = torch.zeros(50).index_fill(0, torch.tensor(7), 200.0)
    found = linear_logprob(torch.zeros(1, 2), torch.zeros(50, 2), torch.tensor([7]), linear_bias=bias, backend=backend)
    assert found.entropy == 0 and found.logprob == 0
    alone = linear_logprob(torch.ones(3, 2), torch.ones(1, 2), torch.zeros(3).long(), backend=backend)
    assert (alone.entropy == 0).all() and (alone.logprob == 0).all()


@each_backend
def test_a_common_offset_costs_no_digits(backend):
    z = (torch.randint(-32, 32, (4, 64), generator=torch.Generator().manual_seed(0)) / 8).float()
    y = torch.tensor([1, 30, 63, 0])
    for offset in (1e3, -1e3):
        found = linear_logprob(torch.eye(4), (z + offset).T.contiguous(), y, backend=backend)
        log_q = z.double().log_softmax(-1)
        assert error(found.logprob, log_q.gather(1, y.unsqueeze(1)).squeeze(1)) < 1e-6
        assert error(found.entropy, -(log_q.exp() * log_q).sum(-1)) < 1e-6


@each_backend
def test_shift_predicts_the_next_token(backend):
    x, w, b, y = problem(n=24)
    x, y = x.detach().view(2, 12, -1).requires_grad_(), y.view(2, 12)
    found = linear_logprob(x, w, y, linear_bias=b, shift=True, backend=backend)
    by_hand = linear_logprob(x[:, :-1], w, y[:, 1:], linear_bias=b, backend=backend)
    assert found.logprob.shape == (2, 11)
    for a, e in zip(found, by_hand, strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(gradients(found[:2], (x, w)), gradients(by_hand[:2], (x, w)), strict=True):
        torch.testing.assert_close(a, e)


@each_backend
@pytest.mark.parametrize("ignore_index", [7, None, -1])
def test_any_ignore_index(backend, ignore_index):
    x, w, b, y = problem(ignored=0)
    y[::3] = -100 if ignore_index is None else ignore_index
    as_usual = y.masked_fill(y == (-100 if ignore_index is None else ignore_index), -100)
    found = linear_logprob(x, w, y, linear_bias=b, ignore_index=ignore_index, backend=backend)
    true = linear_logprob(x, w, as_usual, linear_bias=b, backend=backend)
    assert all(torch.equal(a, e) for a, e in zip(found, true, strict=True)) and (found.logprob[::3] == 0).all()


@each_backend
def test_a_policy_gradient_with_an_entropy_bonus(backend):
    """What an RL trainer makes of it: clipped ratios times advantages, of either sign."""
    x, w, b, y = problem(ignored=0)
    advantage, before = torch.linspace(-1, 1, TOKENS), torch.linspace(-9, -1, TOKENS)

    def loss(logprob, entropy):
        ratio = (logprob - before).clamp(-4, 4).exp()
        return -(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.01 * entropy).mean()

    found = loss(*linear_logprob(x, w, y, linear_bias=b, backend=backend)[:2])
    log_q = F.log_softmax(F.linear(x, w, b), -1)
    true = loss(log_q.gather(1, y.unsqueeze(1)).squeeze(1), -(log_q.exp() * log_q).sum(-1))
    torch.testing.assert_close(found, true)
    for a, e in zip(gradients(found, (x, w, b)), gradients(true, (x, w, b)), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ["torch"])  # whose products a profiler sees
def test_products_counted(backend):
    """One without gradients; with them the logits once more, and one for each of input and weight."""
    tensors = [*problem(ignored=0)]
    for frozen, products in (((), 4), ((1, 2), 3), ((0,), 3), ((0, 1, 2), 1)):
        x, w, b = (t.detach().requires_grad_(i not in frozen) for i, t in enumerate(tensors[:3]))

        def step(x=x, w=w, b=b):
            found = linear_logprob(x, w, tensors[3], linear_bias=b, backend=backend)
            if found.logprob.requires_grad:
                (found.logprob - found.entropy).sum().backward()

        assert flops(step) == products * 2 * x.shape[0] * x.shape[1] * w.shape[0]


def test_the_result_is_named():
    found = linear_logprob(*[t for t in hard()(0) if t.ndim > 1][:2], torch.zeros(TOKENS).long())
    assert found._fields == ("logprob", "entropy", "lse", "argmax")


@pytest.mark.parametrize(("change", "error_type", "message"), [
    ({"target": torch.zeros(TOKENS)}, ValueError, rf"target: expected integer labels, got float32 \({TOKENS},\)"),
    ({"target": [1, 2]}, TypeError, "target: expected a tensor, got list"),
    ({"target": torch.zeros(TOKENS, 1).long()}, ValueError, rf"target: expected \({TOKENS},\) like input without D"),
])
def test_errors_name_argument_expected_and_given(change, error_type, message):
    x, w, b, y = problem()
    with pytest.raises(error_type, match=message):
        linear_logprob(x, w, linear_bias=b, **{"target": y, **change})
