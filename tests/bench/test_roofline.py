"""Predictions of a GPU's time."""

import dataclasses
import inspect
from pathlib import Path

import pytest
from ssd_core.bench.cases import Head
from ssd_core.bench.roofline import CHIPS, WORK, Chip, beside_targets, main, predict, product
from ssd_core.bench.verdict import TARGETS

from ssd_core.plan import TILED

CHIP = Chip("chip", flops=1e12, bandwidth=1e9, source="")


def test_a_product_takes_the_longer_of_arithmetic_and_memory():
    assert product(Chip("", 1e12, 1e15, ""), 100, 200, 300, 4) == 2 * 100 * 200 * 300 / 1e12
    assert product(Chip("", 1e15, 1e9, ""), 100, 200, 300, 4) == (2 * (100 * 300 + 300 * 200) + 4 * 100 * 200) / 1e9


def test_rows_are_looked_at_twice_where_the_cache_does_not_hold_them():
    small = dataclasses.replace(CHIP, multiprocessors=10, cache=2 * 10 * 2 * 1000)
    for vocab, over_floor in ((1000, 1), (1001, 1.5)):
        found = predict("softmax", "", Head(vocab, 10), small, 100, 1)
        assert found.floor == 4 * 100 * vocab / 1e9 and found.over_floor == pytest.approx(over_floor)


def test_a_larger_workspace_costs_less():
    """More chunks add up d_weight more often."""
    head = Head(128256, 256)
    small, large = (predict("linear_cross_entropy", "", head, CHIPS[0], 8192, mib << 20) for mib in (64, 8192))
    assert small.floor == large.floor == 6 * 8192 * 128256 * 256 / CHIPS[0].flops
    assert 1 < large.over_floor < small.over_floor


def test_the_tiled_route_computes_logits_twice_and_moves_none():
    """At a large workspace three products' floor becomes two of the library's and two of ours; a small workspace costs
    it next to nothing, where chunks cost a pass over d_weight each."""
    head = Head(128256, 4096)
    small, large = (predict("linear_cross_entropy", "", head, CHIPS[0], 8192, mib << 20) for mib in (64, 8192))
    assert large.tiled / large.floor == pytest.approx((2 + 2 * TILED[2]) / 3, rel=0.01)
    assert small.tiled < 1.05 * large.tiled and small.seconds > 1.5 * large.seconds
    assert predict("softmax", "", head, CHIPS[0], 8192, 1 << 30).tiled is None
    jsd = predict("linear_distill_hidden", "", head, CHIPS[0], 8192, 8 << 30)       # three looks at both sides
    assert jsd.tiled / jsd.floor == pytest.approx((2 + 2 * 3 * TILED[2]) / 4, rel=0.01)


def test_targets_are_beside_what_is_predicted():
    lines = beside_targets(CHIPS[0]).splitlines()[2:]
    assert len(lines) == sum(target.device == "cuda" and not target.seconds for target in TARGETS)
    assert any(line.startswith("| linear_cross_entropy, gemma-3-1b") and "2048 MiB" in line for line in lines)


def test_programs_side_by_side():
    def programs(registers, shared):
        return CHIPS[0].programs(warps=8, registers=registers, shared=shared << 10)

    assert [programs(128, 0), programs(32, 0), programs(129, 0)] == [2, 8, 1]
    assert [programs(32, 56), programs(32, 57), programs(32, 128)] == [4, 3, 1]


@pytest.mark.parametrize("op", sorted({target.op for target in TARGETS if target.device == "cuda"}))
def test_what_has_a_target_on_a_gpu_has_a_prediction(op):
    assert op in WORK


def test_the_page_says_what_is_predicted_now(tmp_path):
    written = tmp_path / "ROOFLINE.md"
    usual = {name: parameter.default for name, parameter in inspect.signature(main).parameters.items()}
    main(**usual | {"out": written})
    assert written.read_text() == (Path(__file__).resolve().parents[2] / "bench/ROOFLINE.md").read_text()
