"""The definition of cross-entropy of logits: dense class probabilities. Other targets: test_linear_cross_entropy.py."""

import pytest
import torch
import torch.nn.functional as F

from ssd_core.reference.cross_entropy import cross_entropy

N, V = 6, 11


@pytest.fixture
def u():
    torch.manual_seed(0)
    return torch.randn(N, V, dtype=torch.float64).requires_grad_()


def dense():
    p = torch.randn(N, V, dtype=torch.float64).softmax(-1)
    p[:, ::3] = 0
    return p


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_dense_targets_equal_pytorch(u, smoothing, weighted):
    p = dense()
    weight = torch.rand(V, dtype=torch.float64) if weighted else None
    loss, nll, lse = cross_entropy(
        u, dense=p, class_weight=weight, label_smoothing=smoothing, temperature=1.4, logit_scale=0.8, softcap=3.0,
        z_loss=0.1)
    z = 3.0 * (0.8 * u / 3.0).tanh() / 1.4
    expected = F.cross_entropy(z, p, weight, reduction="none", label_smoothing=smoothing) + 0.1 * z.logsumexp(-1) ** 2
    close(loss, expected)
    close(nll, F.cross_entropy(z, p, reduction="none"))
    close(lse, z.logsumexp(-1))
    close(torch.autograd.grad(loss.sum(), u), torch.autograd.grad(expected.sum(), u))


def test_a_one_hot_target_is_its_label(u):
    y = torch.randint(V, (N,))
    hot = F.one_hot(y, V).double()
    found = cross_entropy(u, dense=hot)
    for one, two in zip(found, cross_entropy(u, y.unsqueeze(-1)), strict=True):
        close(one, two)


def test_a_dead_logit_without_a_target_contributes_nothing(u):
    p = dense()
    z = u.detach().masked_fill(torch.arange(V) % 3 == 0, -torch.inf).requires_grad_()
    loss, nll, _ = cross_entropy(z, dense=p)
    close(loss, -(p[:, p[0] > 0] * z[:, p[0] > 0].log_softmax(-1)).sum(-1))
    assert torch.equal(loss, nll) and torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize("everything", [False, True])
def test_the_gradient_of_an_empty_bucket_is_that_without_one(u, everything):
    """Nothing is off the support, or what is there has no probability: log q_tail is -inf, p_tail is 0."""
    z = u.detach()
    if not everything:
        z[:, 5:] = -torch.inf
    z.requires_grad_()
    support = V if everything else 5
    ids = torch.arange(support).expand(N, support)
    probs = torch.full((N, support), 1.0 / support if everything else 0.25, dtype=torch.float64)
    found = cross_entropy(z, ids, probs, bucket=True)[0]
    expected = cross_entropy(z, ids, probs)[0]
    assert torch.equal(found, expected)
    close(torch.autograd.grad(found.sum(), z), torch.autograd.grad(expected.sum(), z))


def test_float32_is_used_for_16_bit_outputs(u):
    y = torch.randint(V, (N, 1))
    loss, nll, lse = cross_entropy(u.bfloat16(), y)
    exact = cross_entropy(u.bfloat16().double(), y)
    assert loss.dtype == nll.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-5)
