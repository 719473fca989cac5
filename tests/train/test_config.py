"""Settings: values that make no sense are named; the schedule."""

import pytest

from ssd_core.train.config import TrainConfig


@pytest.mark.parametrize(("changes", "message"), [
    ({"learning_rate": 0.0}, "learning_rate: expected a finite number above 0"),
    ({"learning_rate": float("nan")}, "learning_rate"),
    ({"save_steps": 0}, "save_steps: expected at least 1, got 0"),
    ({"eval_fraction": 1.0}, "eval_fraction"),
    ({"targets": "both"}, "targets: expected 'soft' or 'hard', got 'both'"),
    ({"lr_scheduler_type": "step"}, "lr_scheduler_type: expected one of"),
    ({"loss_temperature": 0.8}, r"loss_temperature: expected 1 with soft targets .* got 0.8"),
    ({"grad_filter": 1.0}, r"grad_filter: expected a number in \[0, 1\)"),
    ({"adam_beta1": 1.5}, "adam_beta1"),
    ({"learning_rate": 1e-6, "min_lr": 1e-5}, "min_lr: expected at most the learning rate, 1e-06, got 1e-05"),
    ({"max_steps": 1.5}, "max_steps: expected a whole number, got float"),
    ({"learning_rate": "1e-5"}, "learning_rate: expected a number, got str"),
    ({"bf16": "no"}, "bf16: expected True or False, got str"),
])
def test_wrong_values_are_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**changes)


def test_loss_temperature_goes_with_hard_targets():
    assert TrainConfig(targets="hard", loss_temperature=0.8).loss_temperature == 0.8


def test_schedules():
    cosine = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4)
    rates = [cosine.learning_rate_at(step, 15) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.6) and rates[14] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    linear = TrainConfig(learning_rate=1.0, lr_scheduler_type="linear")
    assert [linear.learning_rate_at(step, 5) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    constant = TrainConfig(learning_rate=1.0, lr_scheduler_type="constant", warmup_steps=1)
    assert [constant.learning_rate_at(step, 3) for step in range(3)] == [1, 1, 1]
    assert cosine.learning_rate_at(0, 1) == 0.25 and TrainConfig().learning_rate_at(0, 1) == 5e-6
