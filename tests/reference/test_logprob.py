"""The definitions of log-probability, entropy and softmax, against formulas that share no code with them."""

import pytest
import torch
import torch.nn.functional as F
from scipy import special, stats

from ssd_core.reference.linear_logprob import linear_logprob
from ssd_core.reference.log_softmax import log_softmax
from ssd_core.reference.logprob import logprob
from ssd_core.reference.softmax import softmax

N, V = 6, 11
INF = float("inf")


@pytest.fixture
def u():
    torch.manual_seed(0)
    return (2 * torch.randn(N, V, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(V, (N,))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_values_equal_torch_and_scipy(u, ids):
    lp, entropy, lse, argmax = logprob(u, ids, temperature=1.3, logit_scale=0.8, softcap=3.0)
    z = 3.0 * (0.8 * u.detach() / 3.0).tanh() / 1.3
    close(lp.detach(), -F.cross_entropy(z, ids, reduction="none"))
    close(entropy.detach(), torch.from_numpy(stats.entropy(z.softmax(-1).numpy(), axis=-1)))
    close(lse.detach(), torch.from_numpy(special.logsumexp(z.numpy(), axis=-1)))
    assert torch.equal(argmax, u.argmax(-1))


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7}, {"temperature": 1.7, "logit_scale": 0.6, "softcap": 2.0},
])
def test_gradients_by_finite_differences(u, ids, options):
    assert torch.autograd.gradcheck(lambda u: logprob(u, ids, **options)[:3], u, atol=1e-8)


@pytest.mark.parametrize("fill", [-INF, -2000.0])
def test_dead_logits_contribute_nothing(u, ids, fill):
    dead = torch.arange(V) % 3 == 1
    ids = ids * 0 + 3
    z = u.detach().masked_fill(dead, fill).requires_grad_()
    alive = u.detach()[:, ~dead].requires_grad_()
    found = logprob(z, ids)[:3]
    expected = logprob(alive, ids - 1)[:3]                          # one dead id comes before id 3
    for one, two in zip(found, expected, strict=True):
        close(one, two)
        (grad,) = torch.autograd.grad(one.sum(), z, retain_graph=True)
        (grad_alive,) = torch.autograd.grad(two.sum(), alive, retain_graph=True)
        close(grad, torch.zeros_like(z).masked_scatter(~dead, grad_alive))


def test_a_dead_label_has_probability_0(u, ids):
    z = u.detach()
    z[torch.arange(N), ids] = -INF
    lp, entropy, *_ = logprob(z, ids)
    assert (lp == -INF).all() and entropy.isfinite().all()


def test_a_certain_token_and_a_vocabulary_of_one():
    z = torch.full((2, V), -INF, dtype=torch.float64)
    z[:, 4] = 2.0
    z.requires_grad_()
    lp, entropy, lse, argmax = logprob(z, torch.tensor([4, 4]))
    assert (lp == 0).all() and (entropy == 0).all() and (lse == 2).all() and (argmax == 4).all()
    (grad,) = torch.autograd.grad((lp + entropy).sum(), z)
    assert (grad == 0).all()
    lp, entropy, lse, argmax = logprob(torch.tensor([[3.0]]), torch.tensor([0]), temperature=2.0)
    assert (lp, entropy, lse, argmax) == (0, 0, 1.5, 0)


def test_of_tied_ids_the_lowest_is_the_likeliest(u, ids):
    z = torch.zeros(N, V)
    assert (logprob(z, ids)[3] == 0).all()
    z[:, 5:] = 1
    assert (logprob(z, ids)[3] == 5).all()
    z[:, 3] = torch.nan
    assert (logprob(z, ids)[3] == 3).all()                          # as torch.argmax


def test_a_common_offset_changes_the_log_sum_exp_alone(u, ids):
    lp, entropy, lse, argmax = logprob(u, ids)
    far = logprob(u + 1e3, ids)
    torch.testing.assert_close((far[0], far[1], far[2] - 1e3), (lp, entropy, lse), rtol=1e-10, atol=1e-10)
    assert torch.equal(far[3], argmax)


def test_linear_logprob_is_logprob_of_the_heads_outputs(ids):
    x, w, b = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((N, 4), (V, 4), (V,)))
    found = linear_logprob(x, w, ids, linear_bias=b, temperature=1.2, softcap=3.0)
    expected = logprob(F.linear(x, w, b), ids, temperature=1.2, softcap=3.0)
    for one, two in zip(found, expected, strict=True):
        close(one, two)
    assert torch.equal(linear_logprob(x, w, ids)[3], (x @ w.T).argmax(-1))
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_logprob(x, w, ids, linear_bias=b, temperature=1.2)[:2], (x, w, b), atol=1e-8)
    half = linear_logprob(x.bfloat16(), w.bfloat16(), ids)
    assert half[0].dtype == torch.float32


def test_softmax_and_log_softmax(u):
    close(softmax(u, temperature=0.7).detach(), torch.from_numpy(special.softmax(u.detach().numpy() / 0.7, axis=-1)))
    close(log_softmax(u, temperature=0.7).detach(),
          torch.from_numpy(special.log_softmax(u.detach().numpy() / 0.7, axis=-1)))
    for function in (softmax, log_softmax):
        close(function(u.view(2, 3, V)), function(u).view(2, 3, V))
        close(function(u), function(u, temperature=1.0))
        assert function(u.half()).dtype == torch.float32 and function(u[:, :1]).shape == (N, 1)
        assert torch.autograd.gradcheck(lambda u, function=function: function(u, temperature=1.7), u)
    dead = u.detach().masked_fill(torch.arange(V) == 2, -INF)
    assert (softmax(dead)[:, 2] == 0).all() and (log_softmax(dead)[:, 2] == -INF).all()
