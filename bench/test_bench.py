"""``pytest bench/``: the same variants under pytest-benchmark, on small shapes unless the environment says otherwise.

    SSD_CORE_BENCH_OPS=linear_cross_entropy SSD_CORE_BENCH_CASE=smollm2 SSD_CORE_BENCH_TOKENS=1024 \
        SSD_CORE_BENCH_DTYPE=bfloat16 SSD_CORE_BENCH_DEVICE=cpu SSD_CORE_BENCH_PEERS=eager,ssd-core pytest bench/
"""

import functools
import os

import pytest
import torch
from ssd_core.bench import jobs, measure
from ssd_core.bench.ops import OPS


def setting(name, default):
    return os.environ.get(f"SSD_CORE_BENCH_{name}", default)


WANTED = setting("PEERS", "eager,top k first,HF,ssd-core").split(",")


@functools.cache
def job(op):
    return jobs.Job(op, setting("CASE", "4096x64"), int(setting("TOKENS", "128")), setting("DTYPE", "float32"),
                    setting("DEVICE", "cpu"))


@functools.cache
def problem(op):
    return job(op).problem()


def variants():
    for op in setting("OPS", ",".join(OPS)).split(","):
        for variant in job(op).variants(None):
            if any(part.lower() in variant.name.lower() for part in WANTED):
                yield pytest.param(op, variant, id=f"{op}-{variant.name}".replace(" ", "_"))


@pytest.mark.parametrize(("op", "variant"), variants())
def test_time(benchmark, op, variant):
    if variant.function is None:
        pytest.skip(variant.missing)
    benchmark.group = op
    given = problem(op)

    def call():
        measure.gradients(variant.function, given)
        if given.case.weight.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
