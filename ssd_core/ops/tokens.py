"""What the losses share between their checks and their backends: tokens, autograd, mixed precision."""

from __future__ import annotations

import contextlib
import numbers

import torch

from ssd_core import checks, groups
from ssd_core.targets import SparseTarget

REDUCTIONS = ("none", "mean", "sum")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of losses and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floats(input: torch.Tensor, name: str = "input", last: str = "D") -> None:
    checks.expect_type(input, name, torch.Tensor, "a tensor")
    floats = input.is_floating_point() and input.ndim > 0 and input.shape[-1] > 0
    checks.expect(floats, name, f"floating point (..., {last}) with {last} > 0", input)


def check_head(input, linear_weight, linear_bias) -> None:
    """Hidden states (..., D), a weight (V, D) and a bias (V,)."""
    check_floats(input)
    checks.expect_type(linear_weight, "linear_weight", torch.Tensor, "a tensor")
    hidden = input.shape[-1]
    matrix = linear_weight.ndim == 2 and linear_weight.shape[1] == hidden and linear_weight.shape[0] > 0
    checks.expect(matrix, "linear_weight", f"(V, {hidden})", linear_weight)
    check_same_device(input, linear_weight=linear_weight, linear_bias=linear_bias)
    check_vectors(linear_bias=(linear_bias, linear_weight.shape[:1]))


def check_vectors(**vectors) -> None:
    """Each ``name=(tensor or None, shape)``: floating point and of that shape."""
    for name, (tensor, shape) in vectors.items():
        if tensor is not None:
            checks.expect_type(tensor, name, torch.Tensor, "a tensor")
            fits = tensor.is_floating_point() and tensor.shape == shape
            checks.expect(fits, name, lambda shape=shape: f"floating point {tuple(shape)}", tensor)


def check_constants(**tensors) -> None:
    for name, tensor in tensors.items():
        constant = tensor is None or not tensor.requires_grad
        checks.expect(constant, name, "a constant (no gradient reaches it)", "a tensor that requires grad")


def check_same_device(input, **tensors) -> None:
    for name, tensor in tensors.items():
        same = tensor is None or tensor.device == input.device
        checks.expect(same, name, f"a tensor on {input.device} like input", None if same else tensor.device)


def check_shape(target, name: str, shape) -> None:
    checks.expect(target.shape == shape, name, lambda: f"{tuple(shape)} like input without D", tuple(target.shape))


def check_labels(target: torch.Tensor, name: str, shape) -> None:
    check_shape(target, name, shape)
    integers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    checks.expect(integers, name, "integer labels", target)


def check_logit_options(temperature, logit_scale, softcap, z_loss=0.0, label_smoothing=0.0) -> None:
    checks.finite_positive(temperature, "temperature")
    checks.finite_positive(logit_scale, "logit_scale")
    checks.finite_not_negative(z_loss, "z_loss")
    checks.in_range(label_smoothing, "label_smoothing", 0, 1)
    if softcap is not None:
        checks.finite_positive(softcap, "softcap")


def check_group(process_group, vocab_start: int) -> None:
    checks.expect(vocab_start >= 0, "vocab_start", "at least 0", vocab_start)
    if process_group is None:
        checks.expect(vocab_start == 0, "vocab_start", "0 without a process group", vocab_start)
    else:
        named = hasattr(process_group, "group_name")
        checks.expect(named, "process_group", "a torch.distributed process group", type(process_group).__name__)


def product_dtype(input, linear_weight) -> torch.dtype:
    """What products are taken in: autocast's dtype, to which the backend casts tile by tile, or the tensors' own."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64 and linear_weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    checks.expect(linear_weight.dtype == input.dtype, "linear_weight", f"{input.dtype} like input", linear_weight.dtype)
    return input.dtype


def without_autocast(device: torch.device):
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


def packed(linear_weight, dtype) -> bool:
    """Whether products of ``dtype`` need the weight in another form."""
    return linear_weight.dtype != dtype or linear_weight.stride(1) != 1


def needs(*tensors) -> list[bool]:
    """Which of them want a gradient. Forward-mode derivatives would come out as 0: they are refused."""
    level = torch.autograd.forward_ad._current_level
    if not torch.compiler.is_compiling() and level >= 0:
        duals = [t for t in tensors if t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None]
        if duals:
            raise RuntimeError("forward-mode differentiation is not supported")
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


def group_name(process_group) -> str:
    return "" if process_group is None else process_group.group_name


def shifted(tensor, axis: int = -1):
    """Tokens 1 to T - 1, then zeros in the last place (which for a mask means ignored)."""
    if tensor is None:
        return None
    checks.expect(tensor.ndim >= -axis, "target", "a time axis to shift along", tuple(tensor.shape))
    if tensor.shape[axis] == 0:
        return tensor
    later, last = tensor.narrow(axis, 1, tensor.shape[axis] - 1), tensor.narrow(axis, 0, 1)
    return torch.cat((later, torch.zeros_like(last)), axis)


def counting(valid):
    """(M,) the tokens that count, which alone meet products; None for all of them. How many there are is the one thing
    that the host waits for."""
    rows = valid.nonzero().squeeze(-1)
    return None if len(rows) == len(valid) else rows


def of_rows(values, rows):
    """(N, ...) values of all tokens -> (M, ...) of those that count."""
    return values if values is None or rows is None else values[rows]


def check_target_values(ids, probs, valid, vocab: int, name: str) -> None:
    """Ids of the tokens that count, where they have weight, are in [0, V), and weights not negative (on CPU)."""
    used = valid.unsqueeze(-1) if probs is None else (probs > 0) & valid.unsqueeze(-1)
    checks.labels_in_range(ids, used, vocab, name if probs is None else f"{name}.ids")
    if probs is not None:
        checks.not_negative(probs, f"{name}.probs")


def spread(values, rows, count: int):
    """(M,) values of the tokens that count -> (N,), 0 elsewhere; memory of its own."""
    return values.clone() if rows is None else values.new_zeros(count).index_copy_(0, rows, values)


def shaped(values, shape, shift: bool):
    """(N,) values in the tokens' shape; without the last of each sequence, which predicts nothing, after a shift."""
    values = values.reshape(shape)
    return values[..., :-1] if shift else values


def labels(target, ignore_index: int | None, shift: bool):
    """(N,) int64 labels, 0 where they are ignored, and which are not."""
    valid = target != (-100 if ignore_index is None else ignore_index)
    ids = target.where(valid, 0).long()
    if shift:
        ids, valid = shifted(ids), shifted(valid)
    return ids.reshape(-1), valid.reshape(-1)


def label_weights(class_weight, ids, vocab_start: int, process_group):
    """(N,) the class weight of each label, from the rank that has it."""
    place = ids - vocab_start
    mine = (place >= 0) & (place < len(class_weight))
    found = torch.where(mine, class_weight[place.where(mine, 0)], 0)
    return groups.all_reduce(found, "sum", process_group)


def sparse_probs(target: SparseTarget, tail: str, wide: torch.dtype) -> torch.Tensor:
    """The weights, divided by their sum if ``tail`` is "renormalise"."""
    probs = target.probs.to(wide)
    if tail == "renormalise":
        probs = probs / probs.sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    return probs


def row_weights(token_weight, shape, shift: bool, wide: torch.dtype, device) -> torch.Tensor:
    """(N,) factors of the tokens' losses."""
    if token_weight is None:
        return torch.ones(shape.numel(), dtype=wide, device=device)
    token_weight = shifted(token_weight) if shift else token_weight
    return token_weight.reshape(-1).to(wide)


def mean_denominator(num_items_in_batch, weights, wide: torch.dtype) -> torch.Tensor:
    """What "mean" divides by, 0-d: the number over all micro-batches and ranks if given, else the weights' sum."""
    if num_items_in_batch is None:
        return weights.sum()
    if isinstance(num_items_in_batch, numbers.Real):        # made where it is needed, not copied there
        return torch.full((), num_items_in_batch, dtype=wide, device=weights.device)
    scalar = torch.is_tensor(num_items_in_batch) and num_items_in_batch.ndim == 0
    checks.expect(scalar, "num_items_in_batch", "a number or 0-d tensor", num_items_in_batch)
    return num_items_in_batch.to(weights.device, wide)


def reciprocal(denominator):
    """1 / denominator, and 0 for 0: nothing that counts gives loss 0, not NaN."""
    return torch.where(denominator == 0, 0, 1 / denominator)


def split_scale(scale, dtype: torch.dtype):
    """``(early, late)`` with early * late = scale. float16 gradients of a mean underflow: there the scale's power of
    two, which rounds nothing, waits for the backward, after loss scaling."""
    if dtype != torch.float16:
        return scale, None
    early, exponent = torch.frexp(scale)
    return early, torch.ldexp(torch.ones_like(scale), exponent)


def reduced(loss, reduction: str, denominator, shape, shift: bool):
    """(N,) losses, with their token weights, as ``reduction`` says."""
    if reduction == "none":
        return shaped(loss, shape, shift)
    return loss.sum() if reduction == "sum" else loss.sum() * reciprocal(denominator)
