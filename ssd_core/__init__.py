"""ssd-core: fused large-vocabulary losses, a sampler and a lean loop for simple self-distillation.

Names are imported at first use, so that ``import ssd_core`` costs little beyond torch.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Completion": "ssd_core.store",
    "DistillStats": "ssd_core.ops.linear_distill",
    "LinearCrossEntropyLoss": "ssd_core.nn",
    "LinearDistillLoss": "ssd_core.nn",
    "Logprob": "ssd_core.ops.linear_logprob",
    "LossStats": "ssd_core.ops.linear_cross_entropy",
    "Sample": "ssd_core.ops.sample",
    "Sampler": "ssd_core.sampler",
    "SamplingParams": "ssd_core.sampling_params",
    "SparseTarget": "ssd_core.targets",
    "TeacherHidden": "ssd_core.targets",
    "TeacherLogits": "ssd_core.targets",
    "TrainConfig": "ssd_core.train",
    "cross_entropy": "ssd_core.ops.cross_entropy",
    "distill": "ssd_core.ops.distill",
    "linear_cross_entropy": "ssd_core.ops.linear_cross_entropy",
    "linear_distill": "ssd_core.ops.linear_distill",
    "linear_logprob": "ssd_core.ops.linear_logprob",
    "log_softmax": "ssd_core.ops.log_softmax",
    "logprob": "ssd_core.ops.logprob",
    "release_workspace": "ssd_core.native",
    "sample": "ssd_core.ops.sample",
    "self_distill": "ssd_core.pipeline",
    "softmax": "ssd_core.ops.softmax",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ssd_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_PUBLIC])
