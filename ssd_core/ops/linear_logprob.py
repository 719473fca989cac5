"""``linear_logprob``: log-probability and entropy of given tokens, without (N, V) logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssd_core import backends, checks, groups
from ssd_core.ops import autograd, tokens
from ssd_core.plan import Demand, plan_chunks


class Logprob(NamedTuple):
    """Of each token, at the temperature of the call; in nats, 0 where a token is ignored."""

    logprob: Tensor     # of the target; differentiable
    entropy: Tensor     # of the distribution; differentiable
    lse: Tensor         # log-sum-exp of the logits
    argmax: Tensor      # int64: the likeliest id, of tied ones the lowest


@torch.library.custom_op("ssd_core::linear_logprob", mutates_args=())
def _linear_logprob(
    input: Tensor,                      # (N, D)
    linear_weight: Tensor,              # (V, D)
    linear_bias: Tensor | None,         # (V,)
    ids: Tensor,                        # (N,) int64
    valid: Tensor,                      # (N,) bool
    row_scale: Tensor | None,           # (N, 2); None: no gradients
    needs: list[bool],
    dtype: torch.dtype,
    logit_scale: float,
    softcap: float,                     # 0: none
    temperature: float,
    workspace_bytes: int | None,
    process_group: str,
    vocab_start: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(total, logprob, entropy, lse, argmax, d_input, d_weight, d_bias)``: see ``_linear_cross_entropy``."""
    group = groups.find(process_group)
    vocab = groups.total(len(linear_weight), input.device, group)
    checks.labels_in_range(ids, valid, vocab, "target")
    rows = tokens.counting(valid)
    serving = backends.choose(
        "linear_logprob", input.device, dtype, backend, ["process_group"] if process_group else [])
    demand = Demand(
        len(input) if rows is None else len(rows), input.shape[1],
        groups.largest(len(linear_weight), input.device, group), 1, dtype, input.device, gathered=rows is not None,
        cast=tokens.packed(linear_weight, dtype), buffers=6 + (temperature != 1) + (softcap > 0),
        ranks=groups.size(group), summed=len(input) if process_group else 0, d_weight=needs[1],
        wide_input=input.dtype.itemsize == 2 and bool(process_group))
    demand = serving.counted(demand)
    with tokens.without_autocast(input.device):
        *results, d_input, d_weight, d_bias = serving.load()(
            input, linear_weight, linear_bias, ids, rows,
            row_scale=tokens.of_rows(row_scale, rows), needs=needs,
            chunks=plan_chunks(demand, workspace_bytes), keep_float32=False, dtype=dtype, group=group,
            vocab_start=vocab_start, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    logprob, entropy, lse, argmax = (tokens.spread(values, rows, len(input)) for values in results)
    return (lse.new_zeros(()), logprob, entropy, lse, argmax.long(),
            *autograd.present(input, d_input, d_weight, d_bias))


@_linear_logprob.register_fake
def _(input, linear_weight, linear_bias, ids, valid, row_scale, needs, dtype, *_):
    wide = tokens.wide_dtype(dtype)
    each = [input.new_empty(input.shape[0], dtype=kind) for kind in (wide, wide, wide, torch.int64)]
    grads = autograd.empty_head_gradients(input, linear_weight, linear_bias, needs, row_scale is not None, wide=False)
    return input.new_empty((), dtype=wide), *each, *grads


autograd.register(_linear_logprob, tensors=6, gradients=3, differentiable=2)


def linear_logprob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shift: bool = False,
    workspace_bytes: int | None = None,
    process_group=None,
    vocab_start: int = 0,
    backend: str = "auto",
) -> Logprob:
    """Log-probability of given tokens and entropy of a linear head, its (N, V) logits never kept. It equals::

        log_q = F.log_softmax(F.linear(input, linear_weight, linear_bias).float() / temperature, -1)
        logprob = log_q.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_q.exp() * log_q).sum(-1)

    Both are differentiable, each with its own upstream gradient per token (policy gradients, entropy bonuses); the
    backward computes the logits again.

    Args:
        input, linear_weight, linear_bias, logit_scale, softcap: as in ``linear_cross_entropy``.
        target: (...) integer labels in [0, V) or ``ignore_index``.
        temperature: of all that is returned.
        shift: token t of ``input`` predicts token t + 1 of ``target``; results are (..., T - 1).
        workspace_bytes, process_group, vocab_start, backend: as in ``linear_cross_entropy``.

    Returns:
        Logprob, each (...), in float32 (float64 for float64 input), argmax int64; 0 for ignored tokens.

    Raises:
        ValueError, TypeError: an argument does not fit. IndexError: a label outside [0, V), on CPU; elsewhere its
        logprob is NaN. RuntimeError: ``create_graph=True``, which is not supported.
    """
    tokens.check_head(input, linear_weight, linear_bias)
    checks.expect_type(target, "target", Tensor, "a tensor")
    tokens.check_same_device(input, target=target)
    tokens.check_logit_options(temperature, logit_scale, softcap)
    tokens.check_group(process_group, vocab_start)
    shape = input.shape[:-1]
    tokens.check_labels(target, "target", shape)
    dtype = tokens.product_dtype(input, linear_weight)
    ids, valid = tokens.labels(target, ignore_index, shift)
    head = (input.reshape(-1, input.shape[-1]), linear_weight, linear_bias)
    _, *results = _linear_logprob(
        *head, ids, valid, None, tokens.needs(*head), dtype, float(logit_scale), float(softcap or 0),
        float(temperature), workspace_bytes, tokens.group_name(process_group), vocab_start, backend)
    return Logprob(*(tokens.shaped(values, shape, shift) for values in results[:4]))
