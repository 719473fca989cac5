"""The tests of backend "cpu" at every instruction set but the machine's best, which all other tests run at."""

import pytest
from compiled import run_tests
from test_native import ISAS, isas  # noqa: F401  a fixture

from ssd_core import native

pytestmark = [pytest.mark.all, pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))]


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set(isa, isas):  # noqa: F811
    if isa not in isas:
        pytest.skip(f"this machine has no {isa}")
    if isa == native.cpu_isa():
        pytest.skip(f"all other tests run at {isa}")
    run_tests(SSD_CORE_CPU_ISA=isa)
