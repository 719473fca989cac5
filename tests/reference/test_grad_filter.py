"""What the certified filter promises."""

import pytest
import torch

from ssd_core.reference.cross_entropy import cross_entropy
from ssd_core.reference.grad_filter import default_order, grad_filter

N, V, TILE = 17, 61, 8
DELTAS = [0.0, 0.001, 0.01, 0.1, 0.5, 1.0]


def problem(seed=0, n=N, v=V, k=1, temperature=1.0, softcap=None, z_loss=0.0, sign=1.0, scale=3.0):
    """Gradient, probabilities, target ids as a mask, and r (N,): the weight of the softmax mass in the gradient."""
    torch.manual_seed(seed)
    u = (scale * torch.randn(n, v, dtype=torch.float64)).requires_grad_()
    ids = torch.stack([torch.randperm(v)[:k] for _ in range(n)])
    probs = torch.rand(n, k, dtype=torch.float64)
    weight = sign * (torch.rand(n, dtype=torch.float64) + 0.1)
    loss, _, lse = cross_entropy(u, ids, probs, temperature=temperature, softcap=softcap, z_loss=z_loss)
    (grad,) = torch.autograd.grad((weight * loss).sum(), u)
    with torch.no_grad():
        z = u if softcap is None else softcap * (u / softcap).tanh()
        q = (z / temperature).softmax(-1)
        protected = torch.zeros(n, v, dtype=torch.bool).scatter(1, ids, True)
        r = weight * (probs.sum(-1) + 2 * z_loss * lse) / temperature
    return grad, q, protected, r


def by_tile(matrix, order, tile):
    return [matrix[:, ids] for ids in order.split(tile)]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("options", [
    {}, {"k": 3}, {"temperature": 1.6, "z_loss": 0.01}, {"softcap": 4.0}, {"sign": -1.0}, {"scale": 0.1},
    {"scale": 30.0}, {"n": 1}, {"v": TILE}, {"v": 5}, {"v": 1},
])
def test_the_promises_hold(delta, options):
    for seed in range(5):
        grad, q, protected, r = problem(seed, **options)
        order = default_order(q)
        filtered, skipped, active = grad_filter(grad, q, protected, delta=delta, tile=TILE, order=order)

        close(filtered.sum(-1), grad.sum(-1))
        close(filtered.sum(0), grad.sum(0))
        assert torch.equal(filtered[protected], grad[protected])
        assert (skipped <= delta).all()
        mass = torch.stack([part.sum(-1) for part in by_tile(q, order, TILE)], -1)
        close(skipped, (mass * ~active).sum(-1))
        target = torch.stack([part.any(-1) for part in by_tile(protected, order, TILE)], -1)
        assert active.shape == target.shape and active[target].all()
        assert ((filtered - grad).abs().sum(-1) <= 2 * skipped * r.abs() + 1e-15).all()
        for t, ids in enumerate(order.split(TILE)):
            assert torch.equal(filtered[:, ids][active[:, t]], grad[:, ids][active[:, t]])


def test_some_are_skipped_and_some_are_not():
    grad, q, protected, _ = problem()
    filtered, skipped, active = grad_filter(grad, q, protected, delta=0.1, tile=TILE, order=default_order(q))
    assert 0.1 < active.double().mean() < 0.9 and (skipped > 0).any()
    assert not torch.allclose(filtered, grad)


@pytest.mark.parametrize("delta", DELTAS)
def test_skipping_is_greedy_and_matching_is_rank_1(delta):
    """Row by row and tile by tile, in plain Python."""
    grad, q, protected, _ = problem(3, k=2)
    order = torch.randperm(V)
    filtered, skipped, active = grad_filter(grad, q, protected, delta=delta, tile=TILE, order=order)
    tiles = [ids.tolist() for ids in order.split(TILE)]
    light = []
    for i in range(N):
        masses = sorted((sum(q[i, j].item() for j in ids), t) for t, ids in enumerate(tiles)
                        if not any(protected[i, j] for j in ids))
        total, skip = 0.0, set()
        for mass, t in masses:
            if total + mass > delta:
                break
            total += mass
            skip.add(t)
        light.append(skip)
        assert {t for t in range(len(tiles)) if not active[i, t]} == skip
        assert skipped[i].item() == pytest.approx(total, rel=1e-12, abs=1e-15)
    expected = grad.clone()
    for t, ids in enumerate(tiles):
        rows = [i for i in range(N) if t in light[i]]
        if rows:
            block = grad[rows][:, ids]
            matched = torch.outer(block.sum(1), block.sum(0)) / block.sum()
            expected[torch.tensor(rows)[:, None], torch.tensor(ids)] = matched
    close(filtered, expected)


def test_of_equal_tiles_the_first_is_skipped():
    q = torch.full((1, 8), 0.125, dtype=torch.float64)
    protected = torch.zeros(1, 8, dtype=torch.bool)
    protected[0, 0] = True
    _, skipped, active = grad_filter(q.clone(), q, protected, delta=0.5, tile=2, order=torch.arange(8))
    assert active.tolist() == [[True, False, False, True]] and skipped.tolist() == [0.5]


def test_one_token_keeps_its_gradient_exactly():
    """The match of a single row is the row."""
    grad, q, protected, _ = problem(n=1)
    filtered, skipped, active = grad_filter(grad, q, protected, delta=0.9, tile=TILE, order=default_order(q))
    assert not active.all() and skipped > 0
    close(filtered, grad)


def test_skipped_mass_that_is_zero_leaves_zeros():
    q = torch.zeros(3, 8, dtype=torch.float64)
    q[:, :4] = 0.25
    protected = torch.zeros(3, 8, dtype=torch.bool)
    protected[:, 0] = True
    grad = q.masked_fill(protected, -0.75)
    filtered, skipped, active = grad_filter(grad, q, protected, delta=0.0, tile=4, order=torch.arange(8))
    assert torch.equal(filtered, grad) and (skipped == 0).all() and active.tolist() == [[True, False]] * 3


def test_tokens_of_weight_0_change_nothing():
    grad, q, protected, _ = problem(k=2)
    grad[::3] = 0
    order = default_order(q)
    filtered, *_ = grad_filter(grad, q, protected, delta=0.2, tile=TILE, order=order)
    used = torch.arange(N) % 3 != 0
    alone, *_ = grad_filter(grad[used], q[used], protected[used], delta=0.2, tile=TILE, order=order)
    close(filtered[used], alone)
    assert (filtered[~used] == 0).all()


def test_no_tokens():
    empty = torch.empty(0, V, dtype=torch.float64)
    filtered, skipped, active = grad_filter(
        empty, empty, empty.bool(), delta=0.1, tile=TILE, order=default_order(empty))
    assert (filtered.shape, skipped.shape, active.shape) == ((0, V), (0,), (0, 8))
    assert default_order(empty).tolist() == list(range(V))


def test_the_default_order():
    q = torch.tensor([[2, 4, 2, 0], [3, 1, 3, 1]], dtype=torch.float64) / 8
    assert default_order(q).tolist() == [0, 1, 2, 3]                # means 5/16, 5/16, 5/16, 1/16
    assert default_order(q[:1]).tolist() == [1, 0, 2, 3]
    assert default_order(torch.full((3, 500), 0.002)).tolist() == list(range(500))
    many = q[:1].repeat(128, 1)
    later = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).double().repeat(5000, 1)
    assert default_order(torch.cat((many, later))).tolist() == [1, 0, 2, 3]
