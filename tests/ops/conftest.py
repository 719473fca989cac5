"""The ops' tests share suite.py, whose assertions are explained as those of tests are."""

import os
import sys

import pytest

sys.path.append(os.path.dirname(__file__))
pytest.register_assert_rewrite("suite")

from elsewhere import DEVICE, move_ops  # noqa: E402

if DEVICE != "cpu":
    move_ops(DEVICE)
