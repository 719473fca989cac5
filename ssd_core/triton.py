"""Backend "triton": the interfaces of ``ssd_core.chunked``, served by the Triton kernels.

A head has two routes, of which ``ssd_core.plan`` chooses (only the first, for class probabilities and the gradient
filter). *Chunked*: the library's product makes a chunk of logits in float32, kernels of rows put the gradient in their
place. *Tiled*: ``kernels.tiled`` computes logits where it looks at them, and again where it makes the gradient, which
alone is in memory. Either gradient goes through the library's products, in the loop of ``chunked.head``.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from ssd_core import groups
from ssd_core.chunked import grad_filter as filters
from ssd_core.chunked import head as heads


def missing() -> str | None:
    """Why this backend cannot be used here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU (with TRITON_INTERPRET=1 its kernels run on CPU tensors, slowly)"
    return None


def linear_bytes(demand) -> dict:
    """Rows are worked on in registers; outputs are in float32. For the gradient filter, the weight's rows are copied
    together, blocks of them are worked on in float32, and d_input is added up in parts. The tiled route holds the state
    of all spans twice while they are merged."""
    from ssd_core.kernels.grad_filter import groups_of
    from ssd_core.kernels.tiled import state_bytes

    def held(rows):
        return 2 * state_bytes(rows, demand.vocab, demand.dtype, demand.device)

    if demand.filtered:
        partial = groups_of(-(-demand.vocab // filters.TILE), demand.hidden, demand.dtype)
        return {"buffers": 3, "wide_logits": True, "cast": True, "partial": partial}
    return {"buffers": 0, "wide_logits": True, "tiled": held if demand.looks else None}


class KernelPass:
    """A row pass (see ``chunked.logits.RowPass``) of kernels that look at raw outputs. ``rows.run(u, grad, bias,
    first)`` does all of it, or what ``look`` and ``finish`` say; what has been seen is in ``rows.state``, which
    ``reduce`` adds up over the ranks of a group."""

    passes = 1

    def __init__(self, rows, reduce):
        self.rows, self._reduce = rows, reduce

    @property
    def results(self):
        return self.rows.results

    def whole(self, head, u, tile, first, scaled):
        return self._run(head, u, scaled, tile, first)

    def look(self, head, u, tile, first, step):
        self._run(head, u, False, tile, first, finish=False, step=step)

    def reduce(self, group, step):
        self._reduce(self.rows, lambda tensor, how: groups.all_reduce(tensor.clone(), how, group), step)

    def finish(self):
        self.rows.run(self.rows.state[:, :0], None, look=False, **self.given(slice(0, 0)))

    def given(self, tile) -> dict:
        """What ``rows.run`` wants to know of a tile besides."""
        return {}

    def slope(self, head, u, tile, first, scaled=True, grad_filter=None):
        asked = {} if grad_filter is None else {"masses": grad_filter.mass, "width": filters.TILE}
        return self._run(head, u, scaled, tile, first, look=False, **asked)

    def softmax_weight(self):
        return self.rows.softmax_weight()

    def _run(self, head, u, scaled, tile, first, **steps):
        late = head.bias is not None and not head.early_bias
        grad = head.in_place(u) if scaled else None
        bias = head.bias[tile] if late else None
        self.rows.run(u, grad, bias, tile.start, first, scale=head.scale, softcap=head.softcap, **self.given(tile),
                      **steps)
        return grad


class TiledPass(KernelPass):
    """A row pass of kernels that make the outputs they look at: ``look_at(rows, tiles, step)`` leaves ``rows.state``,
    and ``write_slope(rows, tiles, columns, grad)`` the gradient of some columns. A dense teacher is ``beside``."""

    def __init__(self, rows, reduce, look_at, write_slope, beside=None):
        super().__init__(rows, reduce)
        self.look_at, self.write_slope, self.beside = look_at, write_slope, beside


class Tiles(heads.Chunk):
    """The rows of one chunk, whose logits are in no buffer: the gradient is."""

    @staticmethod
    def buffer_for(head, rows, columns, scaled):
        return head.input.new_empty(rows, columns if scaled else 0, dtype=head.dtype)

    @property
    def tiles(self):
        from ssd_core.kernels.tiled import Head

        return Head(self.x, self.head.weight, self.head.bias, self.vocab_start, self.head.scale, self.head.softcap,
                    self.row_pass.beside)

    def whole(self, tile, scaled):
        self.statistics([tile], None)
        self.row_pass.finish()
        return self.gradient(tile) if scaled else None

    def statistics(self, tiles, group):
        for step in range(self.row_pass.passes):
            self.row_pass.look_at(self.row_pass.rows, self.tiles, step)
            if group is not None:
                self.row_pass.reduce(group, step)

    def gradient(self, tile, scaled=True, grad_filter=None):
        """Of the student's columns: there may be others, which only a teacher has."""
        tile = slice(tile.start, max(tile.start, min(tile.stop, len(self.head.weight))))
        grad = self.buffer[: len(self.x), : tile.stop - tile.start]
        if grad.shape[1]:
            self.row_pass.write_slope(self.row_pass.rows, self.tiles, tile, grad)
        return grad


# -- what ranks, or spans of the vocabulary, have seen: ``over(tensor, how)`` is the sum or maximum over them


def _over_spans(tensor, how):
    """Of the last axes (S, R) it leaves R."""
    return tensor.sum(-2) if how == "sum" else tensor.amax(-2)


def _reduced_sums(top, sums, over):
    """The maximum, and sums (n, R) of exponentials relative to it."""
    most, shift = _largest(top, over)
    return most, over(sums * torch.exp(top - shift), "sum")


def _reduced_below(below, weight, top, most, over):
    """sum_j a_j (max - z_j) and sum_j a_j, whose maximum rose from top to most."""
    return over(torch.stack((below + weight * _rise(top, most), weight)), "sum")


def _rise(top, most):
    """From -inf, where nothing was, by nothing."""
    return torch.where(top == -torch.inf, 0, most - top)


def _largest(top, over):
    """The maximum, and what exponents are relative to: 0 where there are none but -inf."""
    most = over(top, "max")
    return most, most.masked_fill(most == -torch.inf, 0)


def _owned(values, over):
    """Of the rank that has one; NaN where none has."""
    mine = ~values.isnan()
    total = over(values.masked_fill(~mine, 0), "sum")
    return total.masked_fill(over(mine.to(values.dtype), "sum") == 0, torch.nan)


def _head(input, weight, bias, logit_scale, softcap, dtype, chunks):
    bias = None if bias is None else bias.contiguous()          # kernels add it
    return heads.Head(input, weight, bias, logit_scale, softcap, dtype, chunks.columns, wide=True)


def _on_logits(rows, logits, scaled, tokens, logit_scale, softcap, **given):
    """d_logits (N, V) or None; the others' is 0."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    grad = None
    if scaled:
        make = torch.empty_like if tokens is None else torch.zeros_like
        grad = make(logits, memory_format=torch.contiguous_format)
    rows.run(logits, grad, scale=logit_scale, softcap=softcap, by_token=True, **given)
    return grad


def _taken(tensor, index):
    return None if tensor is None else tensor[index].contiguous()


def _place(index):
    """Of rows among all: the first of those that follow each other, or where each is."""
    return index.start if isinstance(index, slice) else index


# -- cross-entropy


def _cross_entropy_rows(ids, probs, dense, class_weight, label_weight, **options):
    """(index, row_scale) -> the rows of these tokens."""
    from ssd_core.kernels.cross_entropy import CrossEntropyRows
    from ssd_core.kernels.support import merged

    ids, weights = (ids.long(), None) if probs is None else merged(ids, probs)
    if dense is not None and dense.stride(1) != 1:
        dense = dense.contiguous()
    class_weight = None if class_weight is None else class_weight.float().contiguous()

    def of(index, row_scale):
        return CrossEntropyRows(
            _taken(ids, index), _taken(weights, index), dense, class_weight, _taken(label_weight, index), row_scale,
            _place(index), **options)

    return of


def linear_cross_entropy(
    input, linear_weight, linear_bias, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, needs, chunks,
    keep_float32, dtype, logit_scale, softcap, temperature, vocab, vocab_start, group, grad_filter, grad_filter_weight,
    one_sign, vocab_order, **options,
):
    from ssd_core.kernels.tiled_cross_entropy import slope

    head, filtered = _head(input, linear_weight, linear_bias, logit_scale, softcap, dtype, chunks), None
    if grad_filter or grad_filter_weight:
        order = filters.default_order(head, rows, temperature, chunks) if vocab_order is None else vocab_order
        order = order.contiguous()
        count = len(input) if rows is None else len(rows)
        head = head.ordered(order)
        filtered = KernelFilter(head, order, grad_filter, grad_filter_weight, count, group, vocab_start, one_sign)
        ids = filtered.places(ids.long())
    make = _cross_entropy_rows(
        ids, probs, dense, class_weight, label_weight, temperature=temperature, vocab=vocab, **options)
    tiled = chunks.route == "tiled"

    def make_pass(index, part):
        found = make(index, _taken(row_scale, part))
        if tiled:
            return TiledPass(found, _reduce_cross_entropy, _look_cross_entropy, slope)
        return KernelPass(found, _reduce_cross_entropy)

    results, *grads = heads.run(
        head, make_pass, rows, scaled=row_scale is not None and any(needs), needs=needs, chunks=chunks,
        keep_float32=keep_float32, group=group, vocab_start=vocab_start, grad_filter=filtered,
        kind=Tiles if tiled else heads.Chunk)
    return *results, None if filtered is None else filtered.certificate(), *grads


class KernelFilter(filters.GradFilter):
    """The gradient filter of kernels, on outputs that come in the vocabulary's order."""

    def places(self, ids):
        """Where ids are in the order of the rank that has them: supports, which are sorted by it, are the same on all
        ranks. Ids that nobody has stay as they are."""
        own = ids - self.vocab_start
        mine = (own >= 0) & (own < len(self.order))
        places = torch.where(mine, self.place_of[own.where(mine, 0)] + self.vocab_start, -1)
        places = groups.all_reduce(places, "max", self.group)
        return torch.where(places < 0, ids, places)

    def select(self) -> None:
        from ssd_core.kernels.grad_filter import FilteredRows

        self.filtered = [FilteredRows(self.mass, self.row_pass.rows.ids, self.vocab_start, self.order, filters.TILE,
                                      share.delta) for share in self.shares]
        for share, rows in zip(self.shares, self.filtered, strict=True):
            share.skipped = torch.cat((share.skipped, rows.skipped))
            share.count += rows.stayed.sum()

    def products(self, gradients, x, grad) -> None:
        x = x if x.stride(1) == 1 else x.contiguous()
        for share, rows in zip(self.shares, self.filtered, strict=True):
            rows.moments(grad, share.row_mass[self.part], share.column_mass)
            if share is self.for_input and gradients.input is not None:
                gradients.rows = rows.input_product(grad, self.head.weight)
            if share is self.for_weight and gradients.weight is not None:
                rows.add_weight_product(grad, x, gradients.weight)


def cross_entropy(
    logits, ids, probs, dense, rows, *, class_weight, label_weight, row_scale, logit_scale, softcap, **options,
):
    make = _cross_entropy_rows(ids, probs, dense, class_weight, label_weight, vocab=logits.shape[1], **options)
    found = make(slice(0, len(logits)) if rows is None else rows, row_scale)
    grad = _on_logits(found, logits, row_scale is not None, rows, logit_scale, softcap)
    return *found.results, grad


def _reduce_cross_entropy(rows, over, step) -> None:
    rows.state = torch.cat((_cross_entropy_sums(rows.state[:, :7], over), _owned(rows.state[:, 7:], over)), -1)


def _cross_entropy_sums(state, over):
    top, total, peak, below, weight, plain, plain_weight = state.unbind(-1)
    most, total = _reduced_sums(top, total, over)
    highest, _ = _largest(peak, over)
    sums = [*_reduced_below(below, weight, peak, highest, over),
            *_reduced_below(plain, plain_weight, peak, highest, over)]
    return torch.stack((most, total, highest, *sums), -1)


def _look_cross_entropy(rows, tiles, step) -> None:
    from ssd_core.kernels.tiled_cross_entropy import look

    state, targets = look(rows, tiles)
    rows.state = torch.cat((_cross_entropy_sums(state, _over_spans), targets), -1)


# -- log-probability


def _logprob_rows(ids, index, row_scale, temperature):
    from ssd_core.kernels.logprob import LogprobRows

    return LogprobRows(_taken(ids.long(), index), row_scale, _place(index), temperature=temperature)


def linear_logprob(
    input, linear_weight, linear_bias, ids, rows, *, row_scale, needs, chunks, keep_float32, dtype, logit_scale,
    softcap, temperature, vocab_start, group,
):
    from ssd_core.kernels.tiled_logprob import slope

    tiled = chunks.route == "tiled"

    def make_pass(index, part):
        found = _logprob_rows(ids, index, _taken(row_scale, part), temperature)
        return TiledPass(found, _reduce_logprob, _look_logprob, slope) if tiled else KernelPass(
            found, _reduce_logprob)

    results, *grads = heads.run(
        _head(input, linear_weight, linear_bias, logit_scale, softcap, dtype, chunks), make_pass, rows,
        scaled=row_scale is not None and any(needs), needs=needs, chunks=chunks, keep_float32=keep_float32,
        group=group, vocab_start=vocab_start, kind=Tiles if tiled else heads.Chunk)
    return *results, *grads


def logprob(logits, ids, rows, *, row_scale, logit_scale, softcap, temperature):
    found = _logprob_rows(ids, slice(0, len(logits)) if rows is None else rows, row_scale, temperature)
    grad = _on_logits(found, logits, row_scale is not None, rows, logit_scale, softcap)
    return *found.results, grad


def _reduce_logprob(rows, over, step) -> None:
    top, total, below, z_y, argmax = rows.state.unbind(-1)
    most = over(top, "max")
    rise = _rise(top, most)
    sums = over(torch.stack((total, below - rise * total)) * torch.exp(-rise), "sum")
    # the lowest id of those that have the maximum, or of all if there is none but NaN
    lowest = over(torch.where(top < most, -torch.inf, -argmax), "max")
    rows.state = torch.stack((most, *sums, _owned(z_y, over), -lowest), -1)


def _look_logprob(rows, tiles, step) -> None:
    from ssd_core.kernels.tiled_logprob import look

    rows.state = look(rows, tiles)
    _reduce_logprob(rows, _over_spans, 0)


# -- distillation


class TaughtPass(KernelPass):
    """With a dense teacher, whose outputs are given, or made by its head in a buffer."""

    passes = 2

    def __init__(self, rows, logits=None, head=None, index=None, scale=1.0, softcap=0.0, buffer=None):
        super().__init__(rows, _reduce_dense_distill)
        self.logits, self.head, self.buffer, self.scale, self.softcap = logits, head, buffer, scale, softcap
        self.x, self.held = None if head is None else head.input[index].to(head.dtype), None

    def given(self, tile):
        if self.head is None:
            outputs = {"t": self.logits[:, tile], "t_bias": None, "t_scale": self.scale, "t_softcap": self.softcap}
        else:
            outputs = {"t": self._outputs(tile), "t_scale": self.head.scale, "t_softcap": self.head.softcap,
                       "t_bias": self.head.bias[tile] if self.head.bias is not None and not self.head.early_bias
                       else None}
        return {"teacher": {**outputs, "t_by_token": self.head is None}}

    def _outputs(self, tile):
        u = self.buffer[: len(self.x), : max(0, min(tile.stop, len(self.head.weight)) - tile.start)]
        if self.held != tile and u.shape[1]:
            self.head.outputs(self.x, tile, u)
        self.held = tile
        return u


class TaughtTiles(TiledPass):
    """The same by tiles: of the teacher's logits (N, V'), or of a head of the same rows."""

    def __init__(self, rows, teacher):
        from ssd_core.kernels.tiled_dense_distill import slope

        super().__init__(rows, _reduce_dense_tiles, _look_dense_distill, slope, teacher)
        self.passes = rows.looks

    def finish(self):
        from ssd_core.kernels.tiled_dense_distill import finish_divergence

        finish_divergence(self.rows)
        super().finish()

    def given(self, tile):
        return {"teacher": {"t": self.rows.state[:, :0], "t_bias": None, "t_scale": 1.0, "t_softcap": 0.0,
                            "t_by_token": False}}


def _distill_rows(ids, probs, labels, class_weight, label_weight, device, **options):
    """(index, count, row_scale) -> the rows of these tokens."""
    from ssd_core.kernels.distill import DistillRows
    from ssd_core.kernels.support import merged

    ids, weights = (None, None) if ids is None else merged(ids, probs)
    class_weight = None if class_weight is None else class_weight.float().contiguous()

    def of(index, count, row_scale):
        return DistillRows(
            count, _taken(ids, index), _taken(weights, index), _taken(labels, index), class_weight,
            _taken(label_weight, index), row_scale, _place(index), device, **options)

    return of


def linear_distill(
    input, linear_weight, linear_bias, ids, probs, teacher_logits, teacher_input, teacher_weight, teacher_bias, labels,
    rows, *, class_weight, label_weight, row_scale, needs, chunks, keep_float32, dtype, logit_scale, softcap,
    teacher_logit_scale, teacher_softcap, vocab, vocab_start, group, **options,
):
    make = _distill_rows(ids, probs, labels, class_weight, label_weight, input.device, vocab=vocab, **options)
    tiled = chunks.route == "tiled"
    teacher_head = buffer = None
    extent = 0 if teacher_logits is None else teacher_logits.shape[1]
    if teacher_logits is not None and teacher_logits.stride(1) != 1:
        teacher_logits = teacher_logits.contiguous()
    if teacher_input is not None:
        teacher_head = _head(teacher_input, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap,
                             teacher_input.dtype, chunks)
        extent = len(teacher_weight)
        buffer = None if tiled else teacher_input.new_empty(
            min(chunks.rows, len(input)), min(chunks.tile, extent), dtype=teacher_head.output_dtype)

    def make_pass(index, part):
        found = make(index, part.stop - part.start, _taken(row_scale, part))
        if tiled:
            return _tiled_distill(found, teacher_logits, teacher_head, index)
        if ids is not None:
            return KernelPass(found, _reduce_sparse_distill)
        return TaughtPass(found, teacher_logits, teacher_head, index, teacher_logit_scale, teacher_softcap, buffer)

    results, *grads = heads.run(
        _head(input, linear_weight, linear_bias, logit_scale, softcap, dtype, chunks), make_pass, rows,
        scaled=row_scale is not None and any(needs), needs=needs, chunks=chunks, keep_float32=keep_float32, group=group,
        vocab_start=vocab_start, extent=extent, kind=Tiles if tiled else heads.Chunk)
    return *results, *grads


def _tiled_distill(rows, teacher_logits, teacher_head, index):
    from ssd_core.kernels import tiled, tiled_distill

    if rows.ids is not None:
        return TiledPass(rows, _reduce_sparse_distill, _look_sparse_distill, tiled_distill.slope)
    if teacher_head is None:
        return TaughtTiles(rows, tiled.Logits(teacher_logits))
    dtype = torch.float32 if teacher_head.dtype.itemsize > 4 else teacher_head.dtype        # of tiles, at most
    return TaughtTiles(rows, tiled.Head(teacher_head.input[index].to(dtype), teacher_head.weight, teacher_head.bias, 0,
                                        teacher_head.scale, teacher_head.softcap))


def distill(
    logits, ids, probs, teacher_logits, labels, rows, *, class_weight, label_weight, row_scale, logit_scale, softcap,
    **options,
):
    make = _distill_rows(
        ids, probs, labels, class_weight, label_weight, logits.device, vocab=logits.shape[1], **options)
    everything = slice(0, len(logits)) if rows is None else rows
    found = make(everything, len(logits) if rows is None else len(rows), row_scale)
    given = {}
    if teacher_logits is not None:
        if teacher_logits.stride(1) != 1:
            teacher_logits = teacher_logits.contiguous()
        given = TaughtPass(found, teacher_logits).given(slice(None))      # they are the teacher's logits as they are
    grad = _on_logits(found, logits, row_scale is not None, rows, logit_scale, softcap, **given)
    return *found.results, grad


def _look_sparse_distill(rows, tiles, step) -> None:
    from ssd_core.kernels.tiled_distill import look

    state, targets = look(rows, tiles)
    merged = state[0].clone()
    _reduce_student(merged, state, _over_spans)
    rows.state = torch.cat((merged, targets), -1)


def _look_dense_distill(rows, tiles, step) -> None:
    from ssd_core.kernels.tiled_dense_distill import look, terms

    if step == 0:
        spans = look(rows, tiles)
        rows.state = spans[0].clone()
        _reduce_both(rows.state, spans, _over_spans)
        _reduce_apart(rows, spans, _over_spans)
    else:
        rows.state[:, 9:11] = terms(rows, tiles).sum(0)


def _reduce_sparse_distill(rows, over, step) -> None:
    state = rows.state.clone()
    _reduce_student(state, rows.state, over)
    state[:, 11:] = _owned(rows.state[:, 11:], over)
    rows.state = state


def _reduce_dense_distill(rows, over, step) -> None:
    state = rows.state.clone()
    if step == 0:
        _reduce_both(state, rows.state, over)
    else:
        state[:, 9:11] = over(rows.state[:, 9:11], "sum")
    rows.state = state


def _reduce_dense_tiles(rows, over, step) -> None:
    mine = rows.state
    _reduce_dense_distill(rows, over, step)
    if step == 0:
        _reduce_apart(rows, mine, over)


def _reduce_both(state, mine, over) -> None:
    _reduce_student(state, mine, over)
    state[:, 7], state[:, 8] = _reduced_sums(mine[..., 7], mine[..., 8], over)


def _reduce_apart(rows, mine, over) -> None:
    """What tiles have summed of a KL, once the maxima are known: see ``kernels.tiled_dense_distill``."""
    if rows.looks > 1:
        return
    weighing, other = (7, 0) if rows.forward else (0, 7)
    rise, risen = (_rise(mine[..., side], rows.state[:, side]) for side in (weighing, other))
    fall = torch.exp(-rise)
    apart = (mine[..., 9] + mine[..., weighing + 1] * (risen - rise)) * fall
    rows.state[:, 9] = over(apart.masked_fill(fall == 0, 0), "sum")                 # it may be infinite


def _reduce_student(state, mine, over) -> None:
    """Of the student, and of the cross-entropy that goes with it."""
    top, total, ce_top, ce_total, label, below, weight = mine[..., :7].unbind(-1)
    state[:, 0], state[:, 1] = _reduced_sums(top, total, over)
    state[:, 2], state[:, 3] = _reduced_sums(ce_top, ce_total, over)
    state[:, 4] = _owned(label, over)
    state[:, 5], state[:, 6] = _reduced_below(below, weight, ce_top, state[:, 2], over)


# -- sampling


def sample(logits, seeds, positions, *, support_limit, **options):
    from ssd_core.kernels.sample import sample

    token, logprob, *stats, ids, probs = sample(logits, seeds, positions, support_limit=support_limit, **options)
    wrong, width = torch.stack((~logprob.isfinite(), (probs > 0).sum(-1))).amax(-1).tolist()    # the host waits once
    if wrong:
        raise ValueError("logits: expected finite values or -inf, with a finite maximum, got NaN or inf")
    return token, logprob, *stats, ids[:, :width], probs[:, :width]
