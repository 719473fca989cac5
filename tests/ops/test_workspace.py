"""``workspace_bytes`` is a promise about resident memory, measured from outside, library scratch included."""

import sys

import pytest
from ssd_core.bench import jobs, measure

from ssd_core import native

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")

MIB = 1 << 20
TOKENS, VOCAB, HIDDEN = 2048, 49152, 576


def check(backend, mebibytes, dtype):
    job = jobs.Job("linear_cross_entropy", f"{VOCAB}x{HIDDEN}", TOKENS, dtype)
    extra = measure.peak_extra(job, f"ssd-core {backend}, {mebibytes} MiB")
    narrow = backend == "torch" or native.cpu_isa() == "avx512bf16"     # kept logits; elsewhere they are in float32
    chunks = TOKENS * VOCAB * (2 if narrow else 4) > mebibytes * MIB
    accumulator = VOCAB * HIDDEN * 4 if dtype == "bfloat16" and chunks else 0
    assert extra <= mebibytes * MIB + accumulator
    assert extra >= mebibytes * MIB / 3         # the probe sees the workspace at all


def test_one_budget():
    check("cpu", 16, "float32")


@pytest.mark.all
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("backend", "mebibytes"), [("cpu", 16), ("cpu", 64), ("cpu", 256), ("torch", 64)])
def test_every_budget(backend, mebibytes, dtype):
    check(backend, mebibytes, dtype)
