"""The measuring stick is itself measured."""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from ssd_core.bench import cases, measure, ops, peers

GRADIENT_OPS = [name for name, op in ops.OPS.items() if op.define is not None]


def small(op="linear_cross_entropy", dtype=torch.float32, frozen=False, name="97x16"):
    case = cases.find(name, 50, cache=None)
    return ops.problem(ops.OPS[op], case.to(dtype, "cpu"), frozen)


def eager(op):
    return peers.PEERS[op][0].function


@pytest.mark.parametrize("op", GRADIENT_OPS)
def test_truth_is_float64_autograd(op, monkeypatch):
    """Eager PyTorch in float64 is the definition that everyone knows. In chunks of 7 tokens."""
    monkeypatch.setattr(measure, "CHUNK", 7 * 97)
    problem = small(op, torch.float64)
    expected = measure.gradients(eager(op), problem)
    found = measure.truth(problem)
    assert found.keys() == expected.keys()
    for name in found:
        # eager computes divergences in float32
        torch.testing.assert_close(found[name], expected[name].double(), rtol=1e-5, atol=1e-7)
    if op in ("linear_cross_entropy", "softmax", "log_softmax", "cross_entropy"):
        assert max(measure.errors(expected, found).values()) < 1e-13


def test_truth_of_a_softcap():
    problem = small()
    problem.given["softcap"] = 2.0
    x, w = problem.case.input.double().requires_grad_(), problem.case.weight.double().requires_grad_()
    loss = F.cross_entropy(2 * torch.tanh(x @ w.T / 2), problem.case.target)
    expected = torch.autograd.grad(loss, (x, w))
    found = measure.truth(problem)
    for a, b in zip((found["value"], found["d_input"], found["d_weight"]), (loss.detach(), *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_frozen_head_gets_no_gradient_and_two_products():
    problem = small(frozen=True)
    assert measure.truth(problem).keys() == measure.gradients(eager("linear_cross_entropy"), problem).keys() == {
        "value", "d_input"}
    assert problem.products == 2 and problem.flops == 2 * 2 * 50 * 97 * 16
    assert ops.floor_name(problem) == "two bare GEMMs"


def test_a_head_that_float64_cannot_hold_is_left_out(monkeypatch):
    monkeypatch.setattr(measure, "LARGEST", 0)
    assert measure.truth(small()).keys() == {"value", "d_input"}


def test_errors_see_a_wrong_gradient():
    problem = small()
    true = measure.truth(problem)
    found = measure.gradients(eager("linear_cross_entropy"), problem)
    assert max(measure.errors(found, true).values()) < 1e-5
    found["d_weight"][3:6] = 0
    wrong = measure.errors(found, true)
    assert wrong["d_weight"] > 1e-3 and wrong["d_weight_row_p99"] > 0.5 and wrong["d_input"] < 1e-5
    found["d_input"][0, 0] = torch.nan
    assert not measure.worst(measure.errors(found, true)) <= 1e9


def test_the_bound_is_three_times_eagers_error():
    problem = small(dtype=torch.bfloat16)
    eagers = measure.errors(measure.gradients(eager("linear_cross_entropy"), problem), measure.truth(problem))
    assert measure.bound(problem, eagers) == 3 * measure.worst(eagers) > 4e-3
    assert measure.bound(problem, {"value": 0.0}) == measure.ROUNDING[torch.bfloat16]
    assert measure.bound(problem, None) == measure.WITHOUT_EAGER[torch.bfloat16]


def test_draws_are_judged():
    problem = small("sample")
    for function in (eager("sample"), lambda t: peers._draw(t.logits)):
        right = measure.draw_errors(function, problem, draws=2000)
        assert right["outside_support"] == 0 and right["sigmas"] < 5
    greedy = measure.draw_errors(lambda t: t.logits.argmax(-1), problem)
    assert greedy["outside_support"] == 0 and greedy["sigmas"] > 5
    anything = measure.draw_errors(lambda t: torch.randint(97, (len(t.logits),)), problem)
    assert anything["outside_support"] > 0.5


def test_interleaved_takes_turns():
    calls = []
    times = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, samples=3)
    assert calls == ["a", "b"] * 4                      # the first turn warms up
    assert times["a"]["samples"] == 3 and times["a"]["p20"] <= times["a"]["median"] <= times["a"]["p80"]


def test_a_budget_ends_it_after_three_samples_at_least():
    times = measure.interleaved({"a": lambda: time.sleep(0.01)}, samples=1000, budget=0)
    assert times["a"]["samples"] == 3
    times = measure.interleaved({"a": lambda: time.sleep(0.01)}, samples=1000, budget=0.2)
    assert 3 < times["a"]["samples"] <= 20


def test_statistics_of_the_samples():
    found = measure.spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert found == {"median": 3.0, "p20": 2.0, "p80": 4.0, "samples": 5}
    assert measure.spread([1.0] * 9 + [100.0])["p80"] == 1.0


@pytest.mark.parametrize(("op", "products"), [("linear_cross_entropy", 3), ("linear_distill_hidden", 4)])
def test_floor_is_the_products(op, products, monkeypatch):
    problem = small(op)
    made = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: made.append(mm(a, b, out=out)))
    ops.floor(problem)()
    assert len(made) == products == problem.products
    x, w = problem.case.input, problem.case.weight
    torch.testing.assert_close(made[-3], x @ w.T)
    torch.testing.assert_close(made[-2], (x @ w.T) @ w)
    torch.testing.assert_close(made[-1], (x @ w.T).T @ x)


def test_floor_of_row_ops_moves_the_bytes(monkeypatch):
    for op in ("softmax", "cross_entropy", "distill", "sample"):
        problem = small(op)
        moved = []
        copy_ = torch.Tensor.copy_
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", lambda a, b, copy=copy_, m=moved: (m.append(2 * b.nbytes), copy(a, b)))
            ops.floor(problem)()
        assert sum(moved) == pytest.approx(problem.bytes, rel=1e-3), op


def test_memory_is_beyond_what_is_returned():
    tensors = {"value": torch.zeros(()), "d_input": torch.zeros(10, 4)}
    assert measure._returned(tensors) == 4 + 160


@pytest.mark.parametrize("op", ops.OPS)
def test_same_case_same_numbers(op):
    """The memory probe makes its own problem in another process."""
    for a, b in zip(*(small(op).given.values() for _ in range(2)), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_every_op_has_peers_and_ours():
    assert ops.OPS.keys() == peers.PEERS.keys() == peers.OURS.keys()
    for a, b in itertools.combinations(ops.OPS.values(), 2):
        assert a.about != b.about
