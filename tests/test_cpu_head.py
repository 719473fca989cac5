"""linear_distill, linear_logprob and class probabilities of backend "cpu" against the float64 definition, at every edge
of their panels, tiles, chunks and spans. What all backends share is in tests/ops; cross-entropy in test_cpu.py."""

import itertools

import pytest
import torch
from test_cpu import TOLERANCE, WHOLE, error

from ssd_core import native
from ssd_core.reference.cross_entropy import cross_entropy
from ssd_core.reference.distill import distill
from ssd_core.reference.logprob import logprob

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

EDGES = [(1, 1, 2), (63, 5, 255), (64, 6, 256), (65, 47, 257), (131, 48, 513), (70, 33, 1025)]
NO_TEMPERATURE = {"logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0}
COMMON = {"divergence": "forward_kl", "beta": 0.5, "tail": "bucket", "temperature_squared": False, "ce_weight": 0.0,
          "label_smoothing": 0.0, "z_loss": 0.0}
DISTILL = {
    "sparse": {},
    "sparse, two temperatures": {"temperature": 2.0, "ce_weight": 0.4, "divergence": "jsd", "label_smoothing": 0.1},
    "sparse, renormalised": {"tail": "renormalise", "softcap": 4.0},
    "sparse, support": {"tail": "support", "divergence": "reverse_kl", "ce_weight": 0.5, "z_loss": 0.01},
    "logits": {},
    "logits, jsd": {"divergence": "jsd", "beta": 0.3, "temperature": 1.5, "ce_weight": 0.3, "softcap": 5.0},
    "hidden": {"divergence": "reverse_kl", "ce_weight": 0.5, "label_smoothing": 0.1},
    "hidden, jsd": {"divergence": "jsd", "beta": 0.6},
}


def head(n, d, v, dtype, seed=0):
    """Hidden states, weight, bias, labels and the losses' weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    w = (2 * torch.randn(v, d, generator=g, dtype=torch.float64) / d**0.5).to(dtype)
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype)
    return x, w, b, torch.randint(v, (n,), generator=g), torch.rand(n, generator=g) + 0.5


def leaves(x, w, b):
    x, w, b = (t.double().requires_grad_() for t in (x, w, b))
    return torch.nn.functional.linear(x, w, b), (x, w, b)


def compare(call, results, grads, dtype):
    """In chunks of one panel and of all tokens, with all of the vocabulary and with tiles of it."""
    size = max(result.norm().item() for result in results)      # a loss is a difference of terms of this size
    for rows, columns in itertools.product((64, 1000), (WHOLE, 256, 512)):
        found = call(rows, columns)
        for got, ref in zip(found[: len(results)], results, strict=True):
            assert error(got, ref.detach(), size) <= 3e-6, (rows, columns)
        for got, ref in zip(found[-3:], grads, strict=True):
            assert error(got, ref, 0.1) <= 1.5 * TOLERANCE[dtype], (rows, columns)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7, "logit_scale": 1.3}, {"softcap": 3.0}], ids=lambda options: "-".join(options))
@pytest.mark.parametrize("on_entropy", [0.0, -0.7])
def test_logprob(on_entropy, options, dtype):
    for n, d, v in EDGES:
        x, w, b, y, weight = head(n, d, v, dtype)
        scale = torch.stack((weight, on_entropy * weight.flip(0)), -1)
        u, given = leaves(x, w, b)
        true = logprob(u, y, **{**options, "softcap": options.get("softcap")})
        grads = torch.autograd.grad((scale[:, 0] * true[0] + scale[:, 1] * true[1]).sum(), given)

        def call(rows, columns):
            return native.linear_logprob(
                x, w, b, y, None, scale, dtype, [True] * 3, False, rows, columns, **{**NO_TEMPERATURE, **options})  # noqa: B023

        assert torch.equal(call(64, WHOLE)[3].long(), true[3])
        compare(call, true[:3], grads, dtype)


def taught(kind, n, v, dtype, more=0, seed=1):
    """Arguments of a teacher for ``native.linear_distill``, and for the definition; a dense one has ``more`` ids."""
    g = torch.Generator().manual_seed(seed)
    if kind == "sparse":
        ids = torch.randint(v, (n, 5), generator=g)
        probs = torch.rand(n, 5, generator=g) / 6
        return (ids, probs, None, None, None, None), {"ids": ids, "probs": probs.double()}
    x, w, b, *_ = head(n, 7, v + more, dtype, seed)
    if kind == "logits":
        logits = torch.nn.functional.linear(x, w, b)
        return (None, None, logits, None, None, None), {"teacher_u": logits.double()}
    u = torch.nn.functional.linear(x.double(), w.double(), b.double())
    return (None, None, None, x, w, b), {"teacher_u": u}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", DISTILL)
def test_distill(name, dtype):
    kind, options = name.split(",")[0], {**COMMON, **NO_TEMPERATURE, **DISTILL[name]}
    for n, d, v in EDGES:
        x, w, b, y, weight = head(n, d, v, dtype)
        more = 0 if options["divergence"] == "forward_kl" else 3        # it would be infinite
        teacher, definition = taught(kind, n, v, dtype, more)
        u, given = leaves(x, w, b)
        plain = {**options, "softcap": options["softcap"] or None}
        labels = y if options["ce_weight"] else None
        true = distill(u, labels=labels, **definition, **plain)
        grads = torch.autograd.grad((weight * true[0]).sum(), given)

        def call(rows, columns):
            return native.linear_distill(
                x, w, b, *teacher, labels, None, None, weight, dtype, [True] * 3, False, rows, columns,  # noqa: B023
                with_ce=True, **options)

        compare(call, true, grads, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.2, "z_loss": 0.01}, {"softcap": 3.0, "temperature": 0.8}],
    ids=lambda options: "-".join(options))
@pytest.mark.parametrize("weighted", [False, True])
def test_class_probabilities(weighted, options, dtype):
    for n, d, v in EDGES:
        x, w, b, y, weight = head(n, d, v, dtype)
        g = torch.Generator().manual_seed(3)
        dense = torch.rand(n, v, generator=g).softmax(-1)
        c = torch.rand(v, generator=g) + 0.5 if weighted else None
        u, given = leaves(x, w, b)
        true = cross_entropy(
            u, dense=dense.double(), class_weight=None if c is None else c.double(),
            **{**options, "softcap": options.get("softcap")})
        grads = torch.autograd.grad((weight * true[0]).sum(), given)

        def call(rows, columns):
            return native.linear_cross_entropy(
                x, w, b, y.unsqueeze(-1), None, dense, c, None, weight, dtype, [True] * 3, False, rows, columns,  # noqa: B023
                **{**NO_TEMPERATURE, **options})

        compare(call, true, grads, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bits_depend_on_neither_chunks_nor_threads(dtype):
    x, w, b, y, weight = head(300, 40, 1500, dtype)
    teachers = [taught(kind, 300, 1500, dtype)[0] for kind in ("sparse", "hidden")]
    scale = torch.stack((weight, -weight), -1)

    def results(rows, columns=WHOLE):
        found = [native.linear_logprob(x, w, b, y, None, scale, dtype, [True] * 3, False, rows, columns)]
        for teacher in teachers:
            found.append(native.linear_distill(
                x, w, b, *teacher, y, None, None, weight, dtype, [True] * 3, False, rows, columns, divergence="jsd",
                with_ce=True, ce_weight=0.5, temperature=2.0))
        return found

    threads, expected = torch.get_num_threads(), results(300)
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for one, again, chunked in zip(expected, results(300), results(64), strict=True):
                assert all(torch.equal(a, e) for a, e in zip(again, one, strict=True))
                assert all(torch.equal(a, e) for a, e in zip(chunked[:5], one[:5], strict=True))
            for columns in (256, 1024, 1280):       # of which so many are kept, and the rest computed again
                for one, part in zip(expected, results(300, columns), strict=True):
                    assert all(torch.equal(a, e) for a, e in zip(part, one, strict=True))
    finally:
        torch.set_num_threads(threads)
