"""The definition itself, against formulas that share no code with it."""

import pytest
import torch
import torch.nn.functional as F

from ssd_core.reference.linear_cross_entropy import linear_cross_entropy

N, D, V, K = 6, 5, 11, 3


@pytest.fixture
def head():
    torch.manual_seed(0)
    x = torch.randn(N, D, dtype=torch.float64)
    w = torch.randn(V, D, dtype=torch.float64)
    b = torch.randn(V, dtype=torch.float64)
    return x, w, b


def sparse(total=1.0):
    ids = torch.stack([torch.randperm(V)[:K] for _ in range(N)])
    probs = torch.rand(N, K, dtype=torch.float64)
    return ids, total * probs / probs.sum(-1, keepdim=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_hard_labels_equal_pytorch(head, smoothing, weighted):
    x, w, b = head
    y = torch.randint(V, (N, 1))
    class_weight = torch.rand(V, dtype=torch.float64) if weighted else None
    loss, nll, lse = linear_cross_entropy(
        x, w, y, linear_bias=b, class_weight=class_weight, label_smoothing=smoothing)
    z = F.linear(x, w, b)
    expected = F.cross_entropy(z, y[:, 0], class_weight, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nll, F.cross_entropy(z, y[:, 0], reduction="none"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, z.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_sparse_targets_equal_pytorch_on_probabilities(head):
    x, w, b = head
    ids, probs = sparse()
    loss, *_ = linear_cross_entropy(x, w, ids, probs, linear_bias=b)
    dense = torch.zeros(N, V, dtype=torch.float64).scatter_add(1, ids, probs)
    expected = F.cross_entropy(F.linear(x, w, b), dense, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_scale_softcap_temperature_z_loss_written_out(head):
    x, w, b = head
    y = torch.randint(V, (N, 1))
    loss, *_ = linear_cross_entropy(
        x, w, y, linear_bias=b, logit_scale=0.7, softcap=3.0, temperature=1.3, z_loss=0.01)
    z = 3.0 * ((x @ w.T + b) * 0.7 / 3.0).tanh() / 1.3
    lse = z.exp().sum(-1).log()
    expected = lse - z[torch.arange(N), y[:, 0]] + 0.01 * lse**2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_bucket_is_cross_entropy_on_k_plus_one_buckets(head):
    x, w, b = head
    ids, probs = sparse(total=0.8)
    loss, *_ = linear_cross_entropy(x, w, ids, probs, linear_bias=b, bucket=True)
    q = F.linear(x, w, b).softmax(-1)
    on = q.gather(1, ids)
    expected = -(probs * on.log()).sum(-1) - 0.2 * (1 - on.sum(-1)).log()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_bucket_with_the_whole_vocabulary_has_no_tail(head):
    x, w, b = head
    ids = torch.arange(V).expand(N, V)
    probs = torch.full((N, V), 0.9 / V, dtype=torch.float64)
    loss, *_ = linear_cross_entropy(x, w, ids, probs, linear_bias=b, bucket=True)
    plain, *_ = linear_cross_entropy(x, w, ids, probs, linear_bias=b)
    assert torch.equal(loss, plain) and loss.isfinite().all()


@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.2}, {"softcap": 2.0, "logit_scale": 0.5}, {"temperature": 1.7, "z_loss": 0.1},
    {"bucket": True}, {"bucket": True, "softcap": 2.0, "temperature": 0.8},
])
@pytest.mark.parametrize("kind", ["hard", "sparse", "repeated"])
def test_gradients_by_finite_differences(head, options, kind):
    ids, probs = sparse(total=0.7)
    if kind == "hard":
        ids, probs = ids[:, :1], None
    if kind == "repeated":
        ids[:, 1] = ids[:, 0]
    leaves = [t.requires_grad_() for t in head]

    def function(x, w, b):
        return linear_cross_entropy(x, w, ids, probs, linear_bias=b, **options)[0]

    assert torch.autograd.gradcheck(function, leaves, rtol=1e-6, atol=1e-8)


def test_unused_places_may_hold_any_id(head):
    x, w, _ = head
    ids, probs = sparse()
    probs[:, 2] = 0
    expected, *_ = linear_cross_entropy(x, w, ids, probs)
    ids[:, 2] = -7
    loss, *_ = linear_cross_entropy(x, w, ids, probs)
    assert torch.equal(loss, expected)


# -- the identities of the paper (arXiv 2604.01193): p the student, q the tempered and truncated teacher --------------


@pytest.fixture
def paper():
    """Logits as a head with the identity as hidden states; S the three likeliest tokens."""
    torch.manual_seed(1)
    T = 1.6
    z = torch.randn(N, V, dtype=torch.float64) * 2
    w = z.T.contiguous()                                    # (V, N): logits of row i are z[i]
    x = torch.eye(N, dtype=torch.float64).requires_grad_()
    p0 = torch.randn(N, V, dtype=torch.float64).softmax(-1)
    ids = p0.topk(K, dim=-1).indices
    q = p0.gather(1, ids) ** (1 / T)
    return T, z, x, w, ids, q / q.sum(-1, keepdim=True)


def test_equation_15_decomposes_the_cross_entropy(paper):
    T, z, x, w, ids, q = paper
    loss, *_ = linear_cross_entropy(x, w, ids, q)
    p_support = z.softmax(-1).gather(1, ids)
    kept = p_support.sum(-1)                                # K, the kept mass
    p_support = p_support / kept.unsqueeze(-1)
    powers = p_support ** (1 / T)
    tempered = powers / powers.sum(-1, keepdim=True)
    renyi = -T * powers.sum(-1).log()                       # (1 - T) H_{1/T}(p_S)
    kl = (q * (q / tempered).log()).sum(-1)
    entropy = -(q * q.log()).sum(-1)
    torch.testing.assert_close(loss, -kept.log() + renyi + T * kl + T * entropy, rtol=1e-12, atol=1e-12)


def test_equation_17_gives_the_logit_gradient(paper):
    _, z, x, w, ids, q = paper
    w.requires_grad_()
    loss, *_ = linear_cross_entropy(x, w, ids, q)
    (grad,) = torch.autograd.grad(loss.sum(), w)            # d loss_i / d z_i is column i
    p = z.softmax(-1)
    on = p.gather(1, ids)
    kept = on.sum(-1, keepdim=True)
    expected = p.scatter(1, ids, -(1 - kept) * on / kept + (on / kept - q))
    torch.testing.assert_close(grad.T, expected, rtol=1e-12, atol=1e-12)


def test_the_models_own_distribution_is_a_fixed_point(paper):
    _, z, x, w, *_ = paper
    w.requires_grad_()
    p = z.softmax(-1)
    loss, *_ = linear_cross_entropy(x, w, torch.arange(V).expand(N, V), p)
    (grad,) = torch.autograd.grad(loss.sum(), w)
    assert grad.abs().max() < 1e-12


def test_float32_is_used_for_16_bit_inputs(head):
    x, w, _ = (t.to(torch.bfloat16) for t in head)
    y = torch.randint(V, (N, 1))
    loss, *_ = linear_cross_entropy(x, w, y)
    exact, *_ = linear_cross_entropy(x.double(), w.double(), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
