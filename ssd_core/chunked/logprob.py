"""Log-probability and entropy of rows of logits. The formulas are those of ``ssd_core.reference.logprob``."""

from __future__ import annotations

import torch

from ssd_core import groups
from ssd_core.chunked.logits import LogSumExp, RowPass, inside_tile, run, wide_dtype


class LogprobRows(RowPass):
    """A row pass over logits c, before the temperature.

    ``ids`` (R,) int64; ``row_scale`` (R, 2) or None: gradients are those of ``(row_scale * [logprob, entropy]).sum()``.
    """

    sizes = 4       # of the results: logprob, entropy, lse, argmax

    def __init__(self, ids, row_scale, *, wide, temperature=1.0):
        count, device = len(ids), ids.device
        self.ids, self.row_scale, self.temperature = ids.unsqueeze(-1), row_scale, temperature
        self.used = torch.ones_like(self.ids, dtype=torch.bool)
        self.lse = LogSumExp(count, wide, device)
        self.below = torch.zeros(count, dtype=wide, device=device)      # sum_j exp(z_j - max) (z_j - max)
        self.z_y = torch.full((count, 1), torch.nan, dtype=wide, device=device)
        self.argmax = torch.zeros(count, dtype=torch.int64, device=device)
        self.results = torch.zeros(self.sizes, count, dtype=wide, device=device)

    def update(self, c, first: int, rows: slice, step: int = 0):
        z = self._tempered(c)
        before, total = self.lse.max[rows].clone(), self.lse.sum[rows].clone()
        e, rise = self.lse.add(z, rows)
        # the sum so far, now relative to a larger maximum
        carried = (self.below[rows] - rise * total) * torch.exp(-rise)
        below = z - self.lse.max[rows].unsqueeze(-1)
        self.below[rows] = carried + torch.where(e > 0, e * below, 0).sum(-1)
        inside, place = inside_tile(self.ids[rows], self.used[rows], first, z.shape[-1])
        self.z_y[rows] = torch.where(inside, z.gather(-1, place), self.z_y[rows])
        top, where = z.max(-1)
        self.argmax[rows] = torch.where(top > before, first + where, self.argmax[rows])
        return e

    def reduce(self, group, step: int = 0) -> None:
        mine, total = self.lse.max.clone(), self.lse.sum
        rise = self.lse.reduce(group)
        self.below = groups.all_reduce((self.below - rise * total) * torch.exp(-rise), "sum", group)
        owned = ~self.z_y.isnan()
        z_y = groups.all_reduce(self.z_y.masked_fill(~owned, 0), "sum", group)
        self.z_y = z_y.masked_fill(groups.all_reduce(owned.to(z_y.dtype), "sum", group) == 0, torch.nan)
        # the lowest id of the ranks that have the maximum
        lowest = torch.where(mine == self.lse.max, -self.argmax, torch.iinfo(torch.int64).min)
        self.argmax = -groups.all_reduce(lowest, "max", group)

    def finish(self, rows: slice = slice(None)) -> None:
        log_sum, lse = self.lse.log_sum(rows), self.lse.value(rows)
        logprob = self.z_y[rows, 0] - self.lse.max[rows] - log_sum
        entropy = log_sum - self.below[rows] / self.lse.sum[rows]
        self.results[:, rows] = torch.stack((logprob, entropy, lse, self.argmax[rows].to(lse.dtype)))

    def probabilities(self, c, rows: slice, e=None):
        if e is not None:
            return e.mul_((1 / self.lse.sum[rows]).unsqueeze(-1))
        return self.lse.softmax(self._tempered(c), rows)

    def gradient(self, c, first: int, rows: slice, q):
        """With respect to c; overwrites ``q``: d logprob / d z_j = [j = y] - q_j, d H / d z_j = -q_j (log q_j + H)."""
        z = self._tempered(c)
        on_logprob, on_entropy = (scale.unsqueeze(-1) for scale in self.row_scale[rows].unbind(-1))
        entropy = self.results[1, rows].unsqueeze(-1)
        log_q = z - self.lse.max[rows].unsqueeze(-1) - self.lse.log_sum(rows).unsqueeze(-1)
        weight = torch.where(q > 0, on_entropy * (log_q + entropy), 0).add_(on_logprob)
        grad = q.mul_(weight).neg_()
        inside, place = inside_tile(self.ids[rows], self.used[rows], first, z.shape[-1])
        grad.scatter_add_(-1, place, torch.where(inside, on_logprob, 0))
        return grad.mul_(1 / self.temperature)

    def _tempered(self, c):
        return c if self.temperature == 1 else c / self.temperature


def logprob(logits, ids, rows, *, row_scale, logit_scale, softcap, temperature):
    """``(logprob, entropy, lse, argmax, d_logits)`` of given logits (N, V): see ``chunked.linear_logprob``."""

    def make_pass(index, part):
        return LogprobRows(ids[index], None if row_scale is None else row_scale[part], wide=wide_dtype(logits.dtype),
                           temperature=temperature)

    results, grad = run(logits, make_pass, rows, scaled=row_scale is not None, scale=logit_scale, softcap=softcap)
    return *results, grad
