"""Divergences from a teacher of rows of logits. The formulas are those of ``ssd_core.reference.distill``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ssd_core import groups
from ssd_core.chunked.cross_entropy import CrossEntropyRows
from ssd_core.chunked.logits import LogSumExp, RowPass, capped, inside_tile, marked, run, wide_dtype

FORWARD, REVERSE, JSD = "forward_kl", "reverse_kl", "jsd"


class Measure(NamedTuple):
    """Which divergence, at which temperature, and its share of the loss."""

    divergence: str
    beta: float
    temperature: float
    factor: float           # 1 - ce_weight, times temperature^2 if so asked

    @property
    def kind(self) -> str:
        """JSD with beta 0 is forward KL and with beta 1 reverse KL."""
        if self.divergence == JSD and self.beta in (0, 1):
            return REVERSE if self.beta else FORWARD
        return self.divergence

    def terms(self, log_p, log_q):
        """``(value, own)``, summed over the last axis, of log-probabilities (r, B): the divergence, and for its slope
        ``sum_b q_b g_b`` with g_b = d value / d q_b up to a constant."""
        if self.kind == FORWARD:
            value = _expected(log_p, log_p, log_q).sum(-1)
            return value, -log_p.exp().sum(-1)
        if self.kind == REVERSE:
            value = _expected(log_q, log_q, log_p).sum(-1)
            return value, value
        log_m = self._mixture(log_p, log_q)
        own = _expected(log_q, log_q, log_m).sum(-1)
        return self.beta * _expected(log_p, log_p, log_m).sum(-1) + (1 - self.beta) * own, (1 - self.beta) * own

    def pull(self, log_p, log_q):
        """q_b g_b (r, B)."""
        if self.kind == FORWARD:
            return -log_p.exp()
        if self.kind == REVERSE:
            return _expected(log_q, log_q, log_p)
        return (1 - self.beta) * _expected(log_q, log_q, self._mixture(log_p, log_q))

    def _mixture(self, log_p, log_q):
        return torch.logaddexp(math.log(self.beta) + log_p, math.log1p(-self.beta) + log_q)


def _expected(log_a, log_b, log_c):
    """a (log b - log c) with 0 log 0 = 0."""
    a = log_a.exp()
    return torch.where(a == 0, 0, a * (log_b - log_c))


class _DistillRows(RowPass):
    """A row pass: the divergence's share of the loss, and the cross-entropy that goes with it.

    ``ce`` is a CrossEntropyRows at temperature 1, or None. Subclasses set ``self.value`` in ``finish``.
    """

    sizes = 4           # of the results: loss, divergence, nll, lse

    def __init__(self, ce: CrossEntropyRows | None, row_scale, measure: Measure, count: int, *, wide, device):
        self.ce, self.row_scale, self.measure = ce, row_scale, measure
        self.lse = LogSumExp(count, wide, device)       # of the student at the divergence's temperature
        self.value = torch.zeros(count, dtype=wide, device=device)
        self.results = torch.zeros(self.sizes, count, dtype=wide, device=device)

    def _finish(self, rows: slice, scale: float) -> None:
        """``scale`` makes the divergence that is reported of the value."""
        self.results[0, rows] = self.measure.factor * self.value[rows]
        self.results[1, rows] = scale * self.value[rows]
        if self.ce is not None:
            self.ce.finish(rows)
            self.results[0, rows] += self.ce.results[0, rows]
            self.results[2:, rows] = self.ce.results[1:, rows]

    def probabilities(self, c, rows: slice, e=None):
        return self.lse.softmax(self._tempered(c), rows)

    def gradient(self, c, first: int, rows: slice, q):
        """With respect to c; overwrites ``q``."""
        scale = self.row_scale[rows] * (self.measure.factor / self.measure.temperature)
        grad = self._gradient(c, first, rows, q).mul_(scale.unsqueeze(-1))
        if self.ce is not None:
            grad.add_(self.ce.gradient(c, first, rows, self.ce.probabilities(c, rows)))
        return grad

    def _tempered(self, c):
        return c if self.measure.temperature == 1 else c / self.measure.temperature


class SparseDistillRows(_DistillRows):
    """From a teacher's probabilities on a few ids, on K + 1 buckets: the ids, and everything else.

    With r_b = q_b g_b, the slope is ``r_k - q_k sum(r)`` on the ids and ``q_j / q_tail r_tail - q_j sum(r)`` off them.
    """

    def __init__(self, ids, probs, ce, row_scale, measure, *, tail: str, reported: float, wide):
        super().__init__(ce, row_scale, measure, len(ids), wide=wide, device=ids.device)
        self.ids, self.w = merged(ids, probs.to(wide))
        self.used, self.tail, self.reported = self.w > 0, tail, reported
        self.z_k = torch.full_like(self.w, -torch.inf)
        self.seen = torch.zeros_like(self.w)
        self.off = LogSumExp(len(ids), wide, ids.device)
        self.off_count = torch.zeros_like(self.value)
        self.pulls = self.w.new_zeros(len(ids), self.w.shape[1] + 1)    # r
        self.own = torch.zeros_like(self.value)                         # sum(r)
        self.q_k = torch.zeros_like(self.w)

    def update(self, c, first: int, rows: slice, step: int = 0):
        z = self._tempered(c)
        inside, place = inside_tile(self.ids[rows], self.used[rows], first, z.shape[-1])
        self.z_k[rows] = torch.where(inside, z.gather(-1, place), self.z_k[rows])
        self.seen[rows] += inside
        if self.ce is not None:
            self.ce.update(c, first, rows)
        if self.tail != "support":
            self.lse.add(z, rows)
            on = marked(z, inside, place)
            self.off.add(z.masked_fill(on, -torch.inf), rows)
            self.off_count[rows] += (~on).sum(-1)

    def reduce(self, group, step: int = 0) -> None:
        self.z_k = groups.all_reduce(self.z_k, "max", group)
        self.seen = groups.all_reduce(self.seen, "sum", group)
        self.lse.reduce(group)
        self.off.reduce(group)
        self.off_count = groups.all_reduce(self.off_count, "sum", group)
        if self.ce is not None:
            self.ce.reduce(group)

    def finish(self, rows: slice = slice(None)) -> None:
        w, used = self.w[rows], self.used[rows]
        mass = w.sum(-1, keepdim=True)
        p = w if self.tail == "bucket" else w / mass.clamp_min(torch.finfo(w.dtype).tiny)
        z_k = self.z_k[rows].masked_fill(used & (self.seen[rows] == 0), torch.nan)      # an id that no rank has
        if self.tail == "support":
            log_q = z_k.masked_fill(~used, -torch.inf)
            log_q = log_q - log_q.logsumexp(-1, keepdim=True).masked_fill(mass == 0, 0)
            p_tail = torch.zeros_like(mass)
            log_q_tail = torch.full_like(mass, -torch.inf)
        else:
            log_q = (z_k - self.lse.max[rows].unsqueeze(-1)) - self.lse.log_sum(rows).unsqueeze(-1)
            log_q = log_q.masked_fill(~used, -torch.inf)
            empty = self.off_count[rows].unsqueeze(-1) == 0
            p_tail = (1 - mass).clamp_min(0).masked_fill(empty | (self.tail == "renormalise"), 0)
            log_q_tail = self.off.less(self.lse, rows).unsqueeze(-1).masked_fill(empty, -torch.inf)
        log_p = torch.cat((p, p_tail), -1).log()
        log_q = torch.cat((log_q, log_q_tail), -1)
        ignored = mass.squeeze(-1) == 0
        value, own = self.measure.terms(log_p, log_q)
        self.value[rows], self.own[rows] = value.masked_fill(ignored, 0), own.masked_fill(ignored, 0)
        self.pulls[rows] = self.measure.pull(log_p, log_q).masked_fill(ignored.unsqueeze(-1), 0)
        self.q_k[rows] = log_q[:, :-1].exp()
        self._finish(rows, self.reported)

    def probabilities(self, c, rows: slice, e=None):
        return torch.zeros_like(c) if self.tail == "support" else super().probabilities(c, rows)

    def _gradient(self, c, first, rows, q):
        inside, place = inside_tile(self.ids[rows], self.used[rows], first, c.shape[-1])
        own = self.own[rows].unsqueeze(-1)
        on_ids = self.pulls[rows, :-1]
        if self.tail == "support":
            return q.scatter_add_(-1, place, torch.where(inside, on_ids - self.q_k[rows] * own, 0))
        grad = q.mul_(-own)
        z, r_tail = self._tempered(c), self.pulls[rows, -1:]
        off = self.off.softmax(z, rows).mul_(r_tail).masked_fill_(marked(z, inside, place) | (r_tail == 0), 0)
        return grad.add_(off).scatter_add_(-1, place, torch.where(inside, on_ids, 0))


class DenseDistillRows(_DistillRows):
    """From a teacher's logits over its whole vocabulary; whoever has fewer ids has probability 0 on the others.

    ``teacher``: see ``TeacherTiles``. Normalisers in the first look at the columns, the divergence in the second.
    """

    passes = 2

    def __init__(self, teacher, ce, row_scale, measure, *, count: int, reported: float, wide, device):
        super().__init__(ce, row_scale, measure, count, wide=wide, device=device)
        self.teacher, self.reported = teacher, reported
        self.teacher_lse = LogSumExp(count, wide, device)
        self.own = torch.zeros_like(self.value)

    def open(self, tile: slice, step: int) -> None:
        self.teacher.open(tile)

    def update(self, c, first: int, rows: slice, step: int = 0):
        z, teacher_z = self._both(c, rows)
        if step == 0:
            self.lse.add(z, rows)
            self.teacher_lse.add(teacher_z, rows)
            if self.ce is not None:
                self.ce.update(c, first, rows)
            return
        value, own = self.measure.terms(self._log(self.teacher_lse, teacher_z, rows), self._log(self.lse, z, rows))
        self.value[rows] += value
        self.own[rows] += own

    def reduce(self, group, step: int = 0) -> None:
        if step == 0:
            self.lse.reduce(group)
            self.teacher_lse.reduce(group)
            if self.ce is not None:
                self.ce.reduce(group)
        else:
            self.value = groups.all_reduce(self.value, "sum", group)
            self.own = groups.all_reduce(self.own, "sum", group)

    def finish(self, rows: slice = slice(None)) -> None:
        self._finish(rows, self.reported)

    def _gradient(self, c, first, rows, q):
        z, teacher_z = self._both(c, rows)
        pull = self.measure.pull(self._log(self.teacher_lse, teacher_z, rows), self._log(self.lse, z, rows))
        return q.mul_(-self.own[rows].unsqueeze(-1)).add_(pull[:, : c.shape[1]])

    def _both(self, c, rows):
        z, teacher_z = self._tempered(c), self._tempered(self.teacher.logits(rows))
        width = max(z.shape[1], teacher_z.shape[1])
        return [t if t.shape[1] == width else F.pad(t, (0, width - t.shape[1]), value=-torch.inf)
                for t in (z, teacher_z)]

    @staticmethod
    def _log(lse, z, rows):
        return z - lse.max[rows].unsqueeze(-1) - lse.log_sum(rows).unsqueeze(-1)


class TeacherTiles:
    """A teacher's logits for the rows of a chunk, a tile of columns at a time: given, or made from hidden states."""

    def __init__(self, index, outputs=None, head=None, scale: float = 1.0, softcap: float = 0.0, buffer=None):
        self.index, self.given, self.head, self.buffer = index, outputs, head, buffer
        self.scale, self.softcap, self.held = scale, softcap, None
        self.x = None if head is None else head.input[index].to(head.dtype)

    def open(self, tile: slice) -> None:
        if self.head is not None and self.held != tile:
            width = max(0, min(tile.stop, len(self.head.weight)) - tile.start)
            self.u = self.buffer[: len(self.x), :width]
            if width:
                self.head.outputs(self.x, tile, self.u)
        self.held = tile

    def logits(self, rows: slice):
        """(r, C) of the open tile, before the temperature."""
        if self.head is not None:
            return self.head.logits(self.u[rows], self.held)
        index = self.index
        if isinstance(index, slice):
            found = self.given[index.start + rows.start : index.start + rows.stop, self.held]
        else:
            found = self.given[:, self.held][index[rows]]
        return capped(found, None, self.scale, self.softcap)


def merged(ids, w):
    """Each id once, with the sum of its weights: ``(ids, weights)`` (R, K), the unused places of weight 0."""
    key, order = ids.masked_fill(w <= 0, torch.iinfo(ids.dtype).max).sort(-1)
    w = w.clamp_min(0).gather(-1, order)
    place = F.pad((key[:, 1:] != key[:, :-1]).long().cumsum(-1), (1, 0)) if ids.shape[1] else key
    weights = torch.zeros_like(w).scatter_add_(-1, place, w)
    ids = torch.zeros_like(ids).scatter_(-1, place, key)
    return ids.masked_fill(weights <= 0, 0), weights


def distill_rows(
    ids, probs, teacher, labels, index, part, row_scale, *, wide, device, vocab, divergence, beta, temperature,
    temperature_squared, tail, ce_weight, with_ce, class_weight, label_weight, label_smoothing, z_loss, vocab_start=0,
):
    """The row pass of tokens ``index``, which are ``part`` of those that count: of a sparse teacher if there are
    ``ids``, else of ``teacher``. Without ``labels`` the cross-entropy is 0, and its statistics are there."""
    count = part.stop - part.start
    reported = temperature**2 if temperature_squared else 1.0
    measure = Measure(divergence, beta, temperature, (1 - ce_weight) * reported)
    ce = None
    if with_ce:
        nothing = torch.zeros(count, 1, dtype=torch.int64, device=device) if labels is None else None
        ce = CrossEntropyRows(
            labels[index].unsqueeze(-1) if nothing is None else nothing, nothing, None, class_weight,
            None if label_weight is None else label_weight[index], row_scale, wide=wide, vocab=vocab,
            vocab_start=vocab_start, label_smoothing=label_smoothing, z_loss=z_loss, factor=ce_weight)
    if ids is not None:
        return SparseDistillRows(
            ids[index].long(), probs[index], ce, row_scale, measure, tail=tail, reported=reported, wide=wide)
    return DenseDistillRows(
        teacher, ce, row_scale, measure, count=count, reported=reported, wide=wide, device=device)


def distill(logits, ids, probs, teacher_logits, labels, rows, *, row_scale, logit_scale, softcap, **options):
    """``(loss, divergence, nll, lse, d_logits)`` of given logits (N, V): see ``chunked.linear_distill``."""

    def make_pass(index, part):
        return distill_rows(
            ids, probs, TeacherTiles(index, teacher_logits), labels, index, part,
            None if row_scale is None else row_scale[part], wide=wide_dtype(logits.dtype), device=logits.device,
            vocab=logits.shape[1], **options)

    extent = 0 if teacher_logits is None else teacher_logits.shape[1]
    results, grad = run(
        logits, make_pass, rows, scaled=row_scale is not None, scale=logit_scale, softcap=softcap, extent=extent)
    return *results, grad
