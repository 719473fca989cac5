"""Cross-entropy of rows of logits: statistics over tiles of columns, then the gradient of each tile.

The formulas are those of ``ssd_core.reference.cross_entropy``.
"""

from __future__ import annotations

import torch

from ssd_core import groups
from ssd_core.chunked.logits import BelowMax, LogSumExp, RowPass, inside_tile, marked, run, wide_dtype


class CrossEntropyRows(RowPass):
    """A row pass over logits c, before the temperature.

    Targets: ``ids`` (R, K) with ``probs`` (R, K), or None for hard labels; or ``dense`` (R, V) class probabilities.
    ``class_weight`` (V,) is that of this rank's columns, ``label_weight`` (R,) that of each row's label. The gradient
    is that of ``(row_scale * loss).sum()``, ``row_scale`` (R,). ``factor`` multiplies all of the loss but the z-loss.
    ``vocab`` counts the columns of all ranks; this rank's begin at ``vocab_start``.
    """

    sizes = 3           # of the results: loss, nll, lse

    def __init__(
        self, ids, probs, dense, class_weight, label_weight, row_scale, *, wide, vocab, vocab_start=0, temperature=1.0,
        label_smoothing=0.0, z_loss=0.0, bucket=False, factor=1.0,
    ):
        count, device = len(ids), ids.device
        self.ids, self.probs, self.dense, self.class_weight, self.label_weight = (
            ids, probs, dense, class_weight, label_weight)
        self.row_scale, self.vocab, self.vocab_start = row_scale, vocab, vocab_start
        self.temperature, self.label_smoothing, self.z_loss = temperature, label_smoothing, z_loss
        self.bucket, self.factor = bucket, factor
        self.w = torch.ones(ids.shape, dtype=wide, device=device) if probs is None else probs.to(wide)      # (R, K)
        self.used = self.w > 0 if dense is None else torch.zeros_like(ids, dtype=torch.bool)
        self.lse = LogSumExp(count, wide, device)
        self.z_k = torch.zeros_like(self.w)
        self.seen = torch.zeros_like(self.w)                                # an id that no rank has makes the loss NaN
        self.off = LogSumExp(count, wide, device) if bucket else None       # off the support
        self.off_count = torch.zeros(count, dtype=wide, device=device)
        self.smooth = BelowMax(count, wide, device) if label_smoothing or dense is not None else None
        self.plain = BelowMax(count, wide, device) if dense is not None else None
        self.results = torch.zeros(self.sizes, count, dtype=wide, device=device)
        self.on_q = torch.zeros(count, dtype=wide, device=device)           # d loss / d z_j = on_q q_j - ...

    # -- statistics

    def update(self, c, first: int, rows: slice, step: int = 0):
        """Take in columns ``first``, ``first + 1``, ... of these rows; exp(z - max), for ``gradient``."""
        z = self._tempered(c)
        e, rise = self.lse.add(z, rows)
        inside, place = inside_tile(self.ids[rows], self.used[rows], first, z.shape[-1])
        if z.shape[-1]:
            self.z_k[rows] += torch.where(inside, z.gather(-1, place), 0)
            self.seen[rows] += inside
        if self.smooth is not None:
            below = self.lse.max[rows].unsqueeze(-1) - z
            self.smooth.add(below, self._smoothing(first, z.shape[-1], rows), rise, rows)
            if self.plain is not None:
                self.plain.add(below, self._dense(first, z.shape[-1], rows), rise, rows)
        if self.bucket:
            off = ~marked(z, inside, place)
            self.off.add(z.masked_fill(~off, -torch.inf), rows)
            self.off_count[rows] += off.sum(-1)
        return e

    def reduce(self, group, step: int = 0) -> None:
        rise = self.lse.reduce(group)
        self.z_k = groups.all_reduce(self.z_k, "sum", group)
        self.seen = groups.all_reduce(self.seen, "sum", group)
        if self.smooth is not None:
            self.smooth.reduce(rise, group)
        if self.plain is not None:
            self.plain.reduce(rise, group)
        if self.bucket:
            self.off.reduce(group)
            self.off_count = groups.all_reduce(self.off_count, "sum", group)

    def finish(self, rows: slice = slice(None)) -> None:
        """Results and the gradient's coefficients of these rows, whose columns are all in."""
        m, log_sum = self.lse.max[rows], self.lse.log_sum(rows)
        lse = m + log_sum
        if self.dense is not None:
            nll = self.plain.sum[rows] + self.plain.weight[rows] * log_sum
            loss = self.smooth.sum[rows] + self.smooth.weight[rows] * log_sum
            on_q = self.smooth.weight[rows]
        else:
            w = self.w[rows]
            mass = w.sum(-1)                                                # S
            # (m - z_y) + log sum: right under a large common offset, where lse - z_y has lost its digits
            z_k = self.z_k[rows].masked_fill(self.seen[rows] == 0, torch.nan)
            nll = torch.where(self.used[rows], w * (m.unsqueeze(-1) - z_k), 0).sum(-1) + mass * log_sum
            if self.bucket:
                p_tail = self._p_tail(rows)
                nll = nll + torch.where(p_tail > 0, p_tail * -self.off.less(self.lse, rows), 0)
                mass = mass + p_tail
            c_y = self._label_factor(rows)
            loss, on_q = c_y * nll, c_y * mass
            if self.label_smoothing:
                each = self.label_smoothing / self.vocab
                loss = loss + each * (self.smooth.sum[rows] + self.smooth.weight[rows] * log_sum)
                on_q = on_q + each * self.smooth.weight[rows]
        loss, on_q = self.factor * loss, self.factor * on_q
        if self.z_loss:
            loss, on_q = loss + self.z_loss * lse.square(), on_q + 2 * self.z_loss * lse
        self.results[:, rows] = torch.stack((loss, nll, lse))
        self.on_q[rows] = on_q

    # -- the gradient

    def probabilities(self, c, rows: slice, e=None):
        """softmax(z) of these columns; ``e`` is what the last ``update`` of the same columns returned."""
        if e is not None:
            return e.mul_((1 / self.lse.sum[rows]).unsqueeze(-1))
        return self.lse.softmax(self._tempered(c), rows)

    def gradient(self, c, first: int, rows: slice, q):
        """With respect to c; overwrites ``q``, the probabilities of these columns.

        d loss / d z_j = q_j (c_y S + eps C / V + 2 z_loss lse) - c_y w_j - eps c_j / V - tail
        """
        grad = q.mul_(self.on_q[rows].unsqueeze(-1))
        columns = c.shape[-1]
        inside, place = inside_tile(self.ids[rows], self.used[rows], first, columns)
        if self.dense is not None:
            grad.sub_(self.factor * self._smoothing(first, columns, rows))
        else:
            c_y = self.factor * self._label_factor(rows)
            c_y = c_y.unsqueeze(-1) if torch.is_tensor(c_y) else c_y
            grad.scatter_add_(-1, place, torch.where(inside, -c_y * self.w[rows], 0))
            if self.label_smoothing:
                each = self.factor * self.label_smoothing / self.vocab
                weights = self._smoothing(first, columns, rows)
                grad.sub_(each if weights is None else each * weights)
            if self.bucket:
                grad.sub_(self._tail(c, inside, place, c_y, rows))
        return grad.mul_((self.row_scale[rows] / self.temperature).unsqueeze(-1))

    def softmax_weight(self):
        """(R,) what the softmax enters the gradient with: on_q times row_scale."""
        return self.on_q * self.row_scale

    # -- pieces

    def _tempered(self, c):
        return c if self.temperature == 1 else c / self.temperature

    def _label_factor(self, rows):
        keep = 1 - self.label_smoothing
        return keep if self.label_weight is None else keep * self.label_weight[rows]

    def _own(self, tensor, first, columns):
        start = first - self.vocab_start
        return tensor[..., start : start + columns]

    def _dense(self, first, columns, rows):
        return self._own(self.dense[rows], first, columns).to(self.w.dtype)

    def _smoothing(self, first, columns, rows):
        """The weights of lse - z_j in the loss: of label smoothing up to eps / V, of class probabilities all of it."""
        weights = None if self.class_weight is None else self._own(self.class_weight, first, columns)
        if self.dense is None:
            return weights
        target = (1 - self.label_smoothing) * self._dense(first, columns, rows) + self.label_smoothing / self.vocab
        return target if weights is None else target * weights

    def _p_tail(self, rows):
        return (1 - self.w[rows].sum(-1)).clamp_min(0).masked_fill(self.off_count[rows] == 0, 0)

    def _tail(self, c, inside, place, c_y, rows):
        """The target's mass off the support, spread as the student spreads it there."""
        z = self._tempered(c)
        q_off = self.off.softmax(z, rows).masked_fill(marked(z, inside, place), 0)
        p_tail = self._p_tail(rows).unsqueeze(-1)
        return torch.where(p_tail > 0, c_y * p_tail * q_off, 0)


def cross_entropy(
    logits, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, logit_scale, softcap, **options,
):
    """``(loss, nll, lse, d_logits)`` of given logits (N, V): see ``chunked.linear_cross_entropy``."""

    def make_pass(index, part):
        return cross_entropy_rows(
            ids, probs, dense, label_weight, index, None if row_scale is None else row_scale[part],
            class_weight=class_weight, wide=wide_dtype(logits.dtype), vocab=logits.shape[1], **options)

    results, grad = run(logits, make_pass, rows, scaled=row_scale is not None, scale=logit_scale, softcap=softcap)
    return *results, grad


def cross_entropy_rows(ids, probs, dense, label_weight, index, row_scale, *, class_weight, **options):
    """The row pass of tokens ``index`` of all N."""

    def take(tensor):
        return None if tensor is None else tensor[index]

    return CrossEntropyRows(
        ids[index].long(), take(probs), take(dense), class_weight, take(label_weight), row_scale, **options)
