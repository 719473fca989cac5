"""The ops' tests share suite.py, whose assertions are explained as those of tests are."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
pytest.register_assert_rewrite("suite")
