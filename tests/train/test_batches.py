"""Which samples are trained on, in which order, in which steps."""

import pytest
import torch

from ssd_core.checks import UsageError
from ssd_core.store import Completion
from ssd_core.targets import SparseTarget
from ssd_core.train.batches import plan_steps, select
from ssd_core.train.config import TrainConfig


def completion(index, length=3, text="text", finish="stop"):
    zeros = torch.zeros(length)
    return Completion(index, 0, [1, 2], [3] * length, text, finish, zeros, zeros, zeros, zeros,
                      SparseTarget(torch.full((length, 1), 3), torch.ones(length, 1)))


def test_empty_and_truncated_completions_are_counted_and_dropped():
    given = [completion(0), completion(1, text=" \n"), completion(2, finish="length"),
             completion(3, text="", finish="length"), completion(4)]
    train, held_out, counts = select(given, TrainConfig(eval_fraction=0.0))
    assert [c.prompt_index for c in train] == [0, 2, 4] and not held_out
    assert (counts.completions, counts.empty, counts.truncated, counts.dropped, counts.trained) == (5, 2, 2, 2, 3)
    train, _, counts = select(given, TrainConfig(eval_fraction=0.0, drop_truncated=True))
    assert [c.prompt_index for c in train] == [0, 4] and counts.dropped == 3


def test_nothing_left_is_an_error_that_counts():
    with pytest.raises(UsageError, match="none left to train on, of 2: 2 empty, 1 truncated"):
        select([completion(0, text=""), completion(1, text="", finish="length")], TrainConfig())


@pytest.mark.parametrize(("prompts", "fraction", "held"), [(64, 0.125, 8), (10, 0.1, 1), (3, 0.5, 2), (1, 0.5, 0)])
def test_prompts_are_held_out_whole(prompts, fraction, held):
    given = [completion(i // 2) for i in range(2 * prompts)]
    train, held_out, _ = select(given, TrainConfig(eval_fraction=fraction))
    assert len({c.prompt_index for c in held_out}) == held
    assert not {c.prompt_index for c in held_out} & {c.prompt_index for c in train}
    assert len(train) + len(held_out) == len(given)


def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own():
    given = [completion(i, length=1 + i % 5) for i in range(21)]
    steps = plan_steps(given, TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2,
                                          num_train_epochs=3.0))
    assert len(steps) == 18 and all(len(batch) <= 2 for step in steps for batch in step)
    epochs = [[i for step in steps[n : n + 6] for batch in step for i in batch] for n in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert steps == plan_steps(given, TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2,
                                                  num_train_epochs=3.0))
    assert steps != plan_steps(given, TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2,
                                                  num_train_epochs=3.0, seed=1))


@pytest.mark.parametrize(("changes", "count"), [
    ({"max_steps": 7}, 7), ({"num_train_epochs": 0.5}, 3), ({"num_train_epochs": 1.5}, 8)])
def test_length_of_the_run(changes, count):
    given = [completion(i) for i in range(20)]
    assert len(plan_steps(given, TrainConfig(per_device_train_batch_size=4, **changes))) == count


def test_tokens_per_step_bounds_the_tokens_of_a_step():
    given = [completion(i, length=1 + 7 * i % 23) for i in range(40)]
    lengths = [2 + len(c.token_ids) for c in given]
    steps = plan_steps(given, TrainConfig(tokens_per_step=60, per_device_train_batch_size=3))
    sums = [sum(lengths[i] for batch in step for i in batch) for step in steps]
    assert max(sums) <= 60 and min(sums[:-1]) > 60 - max(lengths) and sum(sums) == sum(lengths)
    assert len(plan_steps(given, TrainConfig(tokens_per_step=1))) == 40     # one too long fills a step alone
