"""The row pass of cross-entropy: logits in, losses out, the gradient in the logits' place."""

from __future__ import annotations

import torch

ACCELERATOR_BLOCK = 1 << 24


def block_elements(device: torch.device) -> int:
    """Logits worked on at a time: a few float32 buffers of this size stay in a CPU's cache, and fill an accelerator."""
    return 1 << 17 if device.type == "cpu" else ACCELERATOR_BLOCK


def cross_entropy_rows_(
    logits, bias, ids, probs, class_weight, row_scale, *, logit_scale, softcap, temperature, label_smoothing, z_loss,
    bucket,
):
    """Loss, nll and log-sum-exp (R,) of raw logits u (R, V); the same as ``torch.ops.ssd_core.cross_entropy_rows_``.

    With ``row_scale`` (R,) the logits are overwritten by the gradient of ``(row_scale * loss).sum()`` with respect to
    u; without, they are left alone. The formulas are those of ``ssd_core.reference.linear_cross_entropy``; a
    ``softcap`` of 0 is none.
    """
    count, vocab = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    results = torch.empty(3, count, dtype=wide, device=logits.device)
    block = max(1, block_elements(logits.device) // vocab)
    for start in range(0, count, block):
        part = slice(start, min(start + block, count))
        results[:, part] = _block(
            logits[part], bias, ids[part], None if probs is None else probs[part], class_weight,
            None if row_scale is None else row_scale[part], logit_scale, softcap, temperature, label_smoothing, z_loss,
            bucket, wide)
    return tuple(results)


def _block(logits, bias, ids, probs, class_weight, row_scale, logit_scale, softcap, temperature, label_smoothing,
           z_loss, bucket, wide):
    vocab = logits.shape[-1]
    z = logits.to(wide)
    z = logit_scale * (z if bias is None else z + bias)
    if softcap:
        tanh = torch.tanh(z / softcap)
        z = softcap * tanh
    z = z / temperature

    m = z.amax(-1, keepdim=True)
    e = torch.exp(z - m)
    total = e.sum(-1, keepdim=True)
    log_total = total.log().squeeze(-1)
    lse = m.squeeze(-1) + log_total

    w = torch.ones_like(ids, dtype=wide) if probs is None else probs.to(wide)
    used = w > 0
    safe_ids = ids.where(used, 0)
    mass = w.sum(-1)                                                        # S
    # (m - z_y) + log sum: right under a large common offset, where lse - z_y has lost its digits
    nll = torch.where(used, w * (m - z.gather(-1, safe_ids)), 0).sum(-1) + mass * log_total
    if bucket:
        on_support = torch.zeros_like(z).scatter_add_(-1, safe_ids, used.to(wide)) > 0
        p_tail = (1 - mass).clamp_min(0).masked_fill(on_support.all(-1), 0)
        z_off = z.masked_fill(on_support, -torch.inf)
        lse_off = z_off.logsumexp(-1)
        nll = nll + torch.where(p_tail > 0, p_tail * (lse - lse_off), 0)
        mass = mass + p_tail

    keep = 1 - label_smoothing
    c_y = keep if class_weight is None else keep * class_weight[ids[:, 0]]
    loss = c_y * nll
    if label_smoothing:
        each = label_smoothing / vocab
        below = m - z                                                       # lse - z_j = below_j + log_total
        if class_weight is None:
            loss = loss + each * (below.sum(-1) + vocab * log_total)
            class_sum = vocab
        else:
            class_sum = class_weight.sum()
            loss = loss + each * ((class_weight * below).sum(-1) + class_sum * log_total)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if row_scale is None:
        return torch.stack((loss, nll, lse))

    # d loss / d z_j = q_j * (c_y S + eps C / V + 2 z_loss lse) - c_y w_j - eps c_j / V - tail
    on_q = c_y * mass
    if label_smoothing:
        on_q = on_q + each * class_sum
    if z_loss:
        on_q = on_q + 2 * z_loss * lse
    grad = e.mul_((on_q / total.squeeze(-1)).unsqueeze(-1))
    grad.scatter_add_(-1, safe_ids, -(c_y if class_weight is None else c_y.unsqueeze(-1)) * w)
    if label_smoothing:
        grad.sub_(each if class_weight is None else each * class_weight)
    if bucket:
        tail = torch.where(p_tail > 0, c_y * p_tail, 0).unsqueeze(-1)
        grad.sub_(torch.where(tail > 0, tail * torch.exp(z_off - lse_off.unsqueeze(-1)), 0))
    if softcap:
        grad.mul_(1 - tanh.square_())
    logits.copy_(grad.mul_((row_scale * (logit_scale / temperature)).unsqueeze(-1)))
    return torch.stack((loss, nll, lse))
