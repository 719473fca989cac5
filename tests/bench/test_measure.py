"""The measuring stick is itself measured."""

import torch
import torch.nn.functional as F
from ssd_core.bench import cases, measure, peers, run
from typer.testing import CliRunner


def small():
    return cases.random(tokens=50, vocab=97, hidden=16)


def test_truth_is_float64_autograd():
    case = small()
    x, w = case.input.double().requires_grad_(), case.weight.double().requires_grad_()
    loss = F.cross_entropy(F.linear(x, w), case.target)
    expected = (loss, *torch.autograd.grad(loss, (x, w)))
    for a, e in zip(measure.truth(case, rows=7), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


def test_errors_see_a_wrong_gradient():
    case = small()
    true = measure.truth(case)
    right = measure.errors(measure.gradients(peers.eager, case), true)
    assert max(right.values()) < 1e-5
    loss, dx, dw = measure.gradients(peers.eager, case)
    dw[3:6] = 0
    wrong = measure.errors((loss, dx, dw), true)
    assert wrong["d_weight"] > 1e-3 and wrong["d_weight_row_p99"] > 0.5 and wrong["d_input"] < 1e-5


def test_every_variant_that_is_here_is_right():
    case = small()
    true = measure.truth(case)
    ran = []
    for variant in peers.variants():
        if variant.loss is None:
            assert variant.missing
            continue
        if "torch_compile" in variant.name:     # minutes of compilation; measured, not tested
            continue
        ran.append(variant.name)
        assert max(measure.errors(measure.gradients(variant.loss, case), true).values()) < 1e-5
    assert {"PyTorch eager", "ssd-core torch, 64 MiB", "ssd-core cpu, 16 MiB"} <= set(ran)


def test_interleaved_takes_turns():
    calls = []
    times = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, samples=3)
    assert calls == ["a", "b"] * 4                      # the first turn warms up
    assert times["a"]["samples"] == 3 and times["a"]["p20"] <= times["a"]["median"] <= times["a"]["p80"]


def test_floor_is_the_three_products():
    case = small()
    floor = measure.gemm_floor(case)
    floor()
    z, dx, dw = _outputs(floor)
    torch.testing.assert_close(z, case.input @ case.weight.T)
    torch.testing.assert_close(dx, z @ case.weight)
    torch.testing.assert_close(dw, z.T @ case.input)


def _outputs(floor):
    cells = dict(zip(floor.__code__.co_freevars, floor.__closure__, strict=True))
    return [cells[name].cell_contents for name in ("z", "dx", "dw")]


def test_table_shows_what_is_missing():
    result = {"cpu": "some", "threads": 2, "torch": "2", "commit": "abc", "tokens": 8, "hidden": 4, "vocab": 1000,
              "inputs": "random", "rows": [
                  {"variant": "floor", "dtype": "float32", "over_floor": 1.0, "gflops": 170.0},
                  {"variant": "peer", "dtype": "float32", "missing": "not installed"}]}
    text = run.table(result)
    assert "| floor | float32 | 1.00 (170 GFLOP/s) |" in text and "| peer | float32 | (not installed) |" in text


def test_command_line_lists_its_commands():
    out = CliRunner().invoke(run.app, ["--help"]).output
    assert "losses" in out and "table" in out and "memory-probe" not in out
