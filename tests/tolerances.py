"""The one table of tolerances, the same in continuous integration.

A backend passes when its error against the float64 reference is no larger than that of the unfused PyTorch op at the
same dtype, plus float32 rounding. Errors are ``norm(out - ref) / norm(ref)``, pooled over several problems: a single
small one may favour either side by a fifth.
"""

import torch

FACTOR = 1.05    # what chance leaves after pooling
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
LOSS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error in norm; absolute where the reference is 0."""
    reference = reference.double()
    difference = (out.double() - reference).norm()
    scale = reference.norm()
    return (difference / scale if scale > 0 else difference).item()


def row_errors(out: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The relative error of each row whose reference is not 0."""
    reference = reference.double().flatten(1)
    scale = reference.norm(dim=1)
    used = scale > 0
    return (out.double().flatten(1) - reference).norm(dim=1)[used] / scale[used]
