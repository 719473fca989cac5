"""What users of other fused losses hit, each as a test of ours: one name for one report.

These cannot apply here, or not yet:

- TRL #3368, #5891, #6372 and lmms-engine #29 (under ZeRO-3 the head's weight has no elements): nothing here gathers
  partitioned weights; an empty weight is refused, see ``test_liger_767``.
- Automodel #3414, torchtune #2800 and #2900, TRL #6065 (FSDP2, DTensor): no op takes DTensors; a vocabulary is sharded
  by plain tensors and a process group.
- Liger #916 and torchtune #2507 (crashes with some Triton versions), Liger #231 (AMD), Fast-LLM #497 (registers of a
  Triton block of 32k columns): there are no Triton kernels and none for AMD here.
- pytorch #124480 (four times slower than compiled chunks) is a matter of the bench; its cause is in
  ``test_pytorch_124480``.
"""

import contextlib
import inspect
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssd_core import (
    SparseTarget,
    TeacherHidden,
    TeacherLogits,
    cross_entropy,
    groups,
    linear_cross_entropy,
    linear_distill,
    linear_logprob,
    models,
    softmax,
)
from ssd_core.checks import UsageError
from ssd_core.chunked.linear_cross_entropy import linear_cross_entropy as chunked
from ssd_core.plan import MIB, ChunkPlan, Demand, plan_chunks

pytestmark = pytest.mark.usefixtures("poisoned")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["torch", "cpu", *["triton"] * INTERPRETED]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def problem(n=40, d=16, v=301, dtype=torch.float32, seed=0, ignored=0.2):
    """Leaves x, w, b, and labels, of which some are ignored."""
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in ((n, d), (v, d), (v,)))
    y = torch.randint(v, (n,), generator=g)
    return x, w, b, y.masked_fill(torch.rand(n, generator=g) < ignored, -100)


def plain(x, w, b, y, **options):
    return F.cross_entropy(F.linear(x, w, b).float(), y, **options)


def assert_close(found, true, rtol=1e-5, atol=1e-6):
    for ours, expected in zip(found, true, strict=True):
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


def error(found, true):
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


def in_chunks(monkeypatch, rows, tile=10**9, op="cross_entropy"):
    monkeypatch.setattr(f"ssd_core.ops.linear_{op}.plan_chunks",
                        lambda demand, _: ChunkPlan(rows, demand.vocab, min(tile, demand.vocab)))


class Made(TorchDispatchMode):
    """Sizes of what is made, and what products are taken of."""

    def __init__(self):
        super().__init__()
        self.bytes, self.products = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:     # no view
            self.bytes.append(out.numel() * out.element_size())
        if function in (torch.ops.aten.mm.out, torch.ops.aten.mm.default, torch.ops.aten.addmm.out):
            self.products += [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]
        return out


def watched(x, w, b, y, *, needs=(True, True, True), chunks):
    """What one call of the portable backend makes, forward and gradients."""
    with Made() as made:
        chunked(x.detach(), w.detach(), b.detach(), y.unsqueeze(-1), None, None, None, class_weight=None,
                label_weight=None, row_scale=torch.ones(len(y)), needs=list(needs), chunks=chunks, keep_float32=False,
                dtype=x.dtype, logit_scale=1.0, softcap=0.0, temperature=1.0, vocab=len(w), label_smoothing=0.0,
                z_loss=0.0, bucket=False)
    return made


# -- correctness ------------------------------------------------------------------------------------------------------


@each_backend
def test_liger_1298_none_scaled_by_the_first_upstream_gradient(backend):
    """reduction="none" multiplied every token's gradient by ``grad_output[0]`` (also #968, #678)."""
    x, w, b, y = problem()
    upstream = torch.linspace(-2, 3, len(y))
    found = torch.autograd.grad(
        linear_cross_entropy(x, w, y, linear_bias=b, reduction="none", backend=backend), (x, w, b), upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    true = torch.autograd.grad(plain(*wide, y, reduction="none"), wide, upstream.double())
    assert max(error(a, e) for a, e in zip(found, true, strict=True)) < 1e-6


@each_backend
def test_liger_512_weight_gradients_summed_in_16_bits(backend, monkeypatch):
    """bfloat16 sums of d_weight over chunks lost the small contributions; models got worse (also #827, #830)."""
    x, w, b, y = problem(n=512, dtype=torch.bfloat16, v=97, ignored=0)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    _, true, true_bias = torch.autograd.grad(F.cross_entropy(F.linear(*wide), y), wide)
    in_chunks(monkeypatch, 4)
    _, d_weight, d_bias = torch.autograd.grad(
        linear_cross_entropy(x, w, y, linear_bias=b, backend=backend), (x, w, b))
    assert error(d_weight, true) < 6e-3 and error(d_bias, true_bias) < 6e-3      # 128 roundings in a row: 3e-2


@each_backend
def test_axolotl_1601_training_diverged(backend, monkeypatch):
    """A fused loss trained worse than the plain one: the same steps must give the same weights."""
    in_chunks(monkeypatch, 7)
    trained = []
    for fused in (False, True):
        x, w, b, y = problem()
        optimizer = torch.optim.AdamW([w, b], lr=0.05)
        for _ in range(25):
            loss = linear_cross_entropy(x, w, y, linear_bias=b, backend=backend) if fused else plain(x, w, b, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained.append((loss.detach(), w.detach(), b.detach()))
    assert trained[0][0] < 1
    assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-4)


@each_backend
def test_megatron_2206_numerics_past_250k_ids(backend):
    """Wrong only beyond V = 250,000, where nobody tested."""
    x, w, b, y = problem(n=3, d=4, v=262_144, ignored=0)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    true = torch.autograd.grad(F.cross_entropy(F.linear(*wide), y), wide)
    found = torch.autograd.grad(linear_cross_entropy(x, w, y, linear_bias=b, backend=backend), (x, w, b))
    assert all(error(a, e) < 1e-5 for a, e in zip(found, true, strict=True))


@each_backend
def test_megatron_2739_input_gradient_summed_in_16_bits(backend, monkeypatch):
    """d_hidden was added up over vocabulary splits in bfloat16."""
    x, w, b, y = problem(n=16 if INTERPRETED else 64, v=4096, dtype=torch.bfloat16, ignored=0)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    true, *_ = torch.autograd.grad(F.cross_entropy(F.linear(*wide), y), wide)
    in_chunks(monkeypatch, 64, tile=32)
    (found,) = torch.autograd.grad(linear_cross_entropy(x, w, y, linear_bias=b, backend=backend), (x,))
    assert error(found, true) < 5e-3      # 128 splits added up in bfloat16: 1e-2


def test_megatron_2739_the_head_of_an_untied_model():
    """The embedding's weight was used although the head had one of its own."""
    from conftest import make_model

    model = make_model(tie_word_embeddings=False)
    assert models.head(model).weight is model.lm_head.weight
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_liger_1472_results_that_depend_on_the_chunk_size(backend, dtype, monkeypatch):
    """Models converged with one chunk constant and not with another."""
    x, w, b, y = problem(dtype=dtype)
    results = []
    for rows, tile in ((40, 10**9), (1, 10**9), (7, 10**9), (13, 100)):
        in_chunks(monkeypatch, rows, tile)
        loss = linear_cross_entropy(x, w, y, linear_bias=b, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w, b))))
    for other in results[1:]:
        assert all(error(a, e) <= 4 * torch.finfo(a.dtype).eps for a, e in zip(other, results[0], strict=True))


@each_backend
def test_cut_cross_entropy_14_gradients_filtered_by_default(backend):
    """Blocks of small probability were left out of the gradient unless one asked for exactness (#18): here the filter
    is what one asks for. 4096 ids of probability 1e-7 have their rows."""
    x = torch.ones(4, 1)
    w = torch.full((4097, 1), -16.0)
    w[0] = 0
    w.requires_grad_()
    loss = linear_cross_entropy(x, w, torch.zeros(4, dtype=torch.int64), backend=backend)
    (found,) = torch.autograd.grad(loss, (w,))
    (true,) = torch.autograd.grad(F.cross_entropy(F.linear(x, w), torch.zeros(4, dtype=torch.int64)), (w,))
    assert (found[1:] > 0).all()
    torch.testing.assert_close(found[1:], true[1:], rtol=1e-5, atol=0)
    options = inspect.signature(linear_cross_entropy).parameters
    assert options["grad_filter"].default == 0.0 and options["grad_filter_weight"].default is None


@each_backend
def test_cut_cross_entropy_52_bias(backend):
    """The bias path was wrong and every test had a bias of zero."""
    x, w, b, y = problem()
    with torch.no_grad():
        b += torch.linspace(-5, 5, len(b))
    assert_close(torch.autograd.grad(linear_cross_entropy(x, w, y, linear_bias=b, backend=backend), (x, w, b)),
                 torch.autograd.grad(plain(x, w, b, y), (x, w, b)))


class Ranks:
    """A process group whose ranks are threads."""

    group_name = "threads"

    def __init__(self, count):
        self.count, self.barrier, self.given = count, threading.Barrier(count, timeout=30), []

    def size(self):
        return self.count

    def all_reduce(self, tensor, how, group):
        if group is None:
            return tensor
        stacked = self.all_gather(tensor, group)
        return tensor.copy_(stacked.sum(0) if how == "sum" else stacked.amax(0))

    def all_gather(self, tensor, group):
        if self.barrier.wait() == 0:
            self.given = []
        self.barrier.wait()
        self.given.append(tensor.clone())
        self.barrier.wait()
        stacked = torch.stack(self.given)
        self.barrier.wait()
        return stacked


@each_backend
def test_cut_cross_entropy_42_vocabulary_over_ranks(backend, monkeypatch):
    """d_hidden of a sharded vocabulary was wrong until curves were compared with one rank. (Processes: see
    ops/test_process_group.py.)"""
    if backend == "triton":
        pytest.skip("Triton's interpreter serves one thread at a time")
    x, w, b, y = problem()
    loss = linear_cross_entropy(x, w, y, linear_bias=b)
    true = loss.detach(), *torch.autograd.grad(loss, (x, w, b))
    group, found, shards = Ranks(2), {}, (slice(0, 117), slice(117, 301))
    monkeypatch.setattr(groups, "all_reduce", group.all_reduce)
    monkeypatch.setattr(groups, "all_gather", group.all_gather)
    monkeypatch.setattr(groups, "find", lambda name: group if name else None)

    def rank(own):
        leaves = [t.detach()[part].requires_grad_() for t, part in ((x, slice(None)), (w, own), (b, own))]
        loss = linear_cross_entropy(
            leaves[0], leaves[1], y, linear_bias=leaves[2], process_group=group, vocab_start=own.start,
            backend=backend)
        found[own.start] = loss.detach(), *torch.autograd.grad(loss, leaves)

    threads = [threading.Thread(target=rank, args=(own,)) for own in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in shards:
        assert_close(found[own.start], (true[0], true[1], true[2][own], true[3][own]))


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_unsloth_1417_no_valid_label(backend, reduction):
    """Division by zero where every label was masked, which is normal in a packed batch."""
    x, w, b, y = problem(ignored=1.0)
    loss = linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, backend=backend)
    assert (loss == 0).all()
    assert not any(g.any() or g.isnan().any() for g in torch.autograd.grad(loss.sum(), (x, w, b)))


@each_backend
def test_unsloth_10892_a_masked_micro_batch_ends_the_run(backend):
    """One micro-batch without labels made the accumulated gradient NaN."""
    x, w, b, y = problem()
    y[10:20] = -100
    for part in (slice(0, 10), slice(10, 20), slice(20, 40)):
        linear_cross_entropy(x[part], w, y[part], linear_bias=b, num_items_in_batch=(y != -100).sum(),
                             backend=backend).backward()
    found, leaves = [t.grad for t in (x, w, b)], [t.detach().requires_grad_() for t in (x, w, b)]
    assert_close(found, torch.autograd.grad(plain(*leaves, y), leaves))


@each_backend
def test_unsloth_zoo_434_upstream_scale_ignored(backend):
    """Gradients computed in the forward missed the scale that data-parallel training applied."""
    x, w, b, y = problem()
    once = torch.autograd.grad(linear_cross_entropy(x, w, y, linear_bias=b, backend=backend), (x, w, b))
    scaled = torch.autograd.grad(linear_cross_entropy(x, w, y, linear_bias=b, backend=backend) * -2.5 / 4, (x, w, b))
    assert_close(scaled, [-2.5 / 4 * grad for grad in once])


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_unsloth_5230_zero_gradients_under_a_healthy_loss(backend, reduction):
    """The loss looked right and nothing was trained: gradients reach layers below and the head."""
    x, w, b, y = problem(ignored=0)
    below = torch.eye(16, requires_grad=True)
    loss = linear_cross_entropy(x.detach() @ below, w, y, linear_bias=b, reduction=reduction, backend=backend).mean()
    found = torch.autograd.grad(loss, (below, w, b))
    assert all((g != 0).any() for g in found)
    assert_close(found, torch.autograd.grad(plain(x.detach() @ below, w, b, y), (below, w, b)))


@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_unsloth_11277_logit_scale_dropped(family):
    """The scale that Cohere and Granite put on their logits was left out of the fused loss."""
    import transformers

    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None, "bos_token_id": None,
             "eos_token_id": 0}
    torch.manual_seed(0)
    if family == "cohere":
        model = transformers.CohereForCausalLM(transformers.CohereConfig(**shape, logit_scale=0.25))
    else:
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**shape, logits_scaling=4.0))
    model.eval()
    ids = torch.arange(24).view(2, 12)
    head = models.head(model)
    assert head.logit_scale == 0.25
    hidden = models.body(model)(ids).last_hidden_state
    ours, unscaled = (linear_cross_entropy(hidden, head.weight, ids, logit_scale=scale, shift=True)
                      for scale in (head.logit_scale, 1.0))
    torch.testing.assert_close(ours, model(ids, labels=ids).loss)
    assert (ours - unscaled).abs() > 1e-4


def test_trl_6629_scale_and_softcap_ignored_by_the_fused_jsd():
    """Models with a logit scale or a softcap were distilled without; of teacher and student both count."""
    x, w, b, _ = problem(ignored=0)
    states, weight, bias, _ = (t.detach() for t in problem(seed=1))
    found = linear_distill(
        x, w, TeacherHidden(states, weight, bias, logit_scale=0.6, softcap=7.0), linear_bias=b, divergence="jsd",
        logit_scale=1.3, softcap=4.0)
    q = (4 * torch.tanh(1.3 * F.linear(x, w, b) / 4)).log_softmax(-1)
    p = (7 * torch.tanh(0.6 * F.linear(states, weight, bias) / 7)).log_softmax(-1)
    m = torch.logaddexp(q, p) - torch.tensor(2.0).log()
    true = sum(F.kl_div(m, side, reduction="batchmean", log_target=True) for side in (p, q)) / 2
    torch.testing.assert_close(found, true)
    assert_close(torch.autograd.grad(found, (x, w, b)), torch.autograd.grad(true, (x, w, b)))


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_trl_5731_a_cross_entropy_that_nobody_asked_for(kind):
    """Half of the fused distillation loss was cross-entropy, at another temperature: defaults mix in nothing."""
    x, w, b, y = problem(ignored=0)
    states, weight, bias, _ = (t.detach() for t in problem(seed=1))
    z = F.linear(states, weight, bias)
    teacher = TeacherLogits(z) if kind == "logits" else TeacherHidden(states, weight, bias)
    true = F.kl_div(F.linear(x, w, b).log_softmax(-1), z.log_softmax(-1), reduction="batchmean", log_target=True)
    for target in (None, y):
        found = linear_distill(x, w, teacher, linear_bias=b, target=target)
        torch.testing.assert_close(found, true)
        assert_close(torch.autograd.grad(found, (x, w, b)), torch.autograd.grad(true, (x, w, b), retain_graph=True))
    with pytest.raises(ValueError, match="target: expected labels for the cross-entropy"):
        linear_distill(x, w, teacher, ce_weight=0.5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_axolotl_3660_cross_entropy_dropped_from_the_backward(reduction):
    """The mixed loss was reported, the gradient was the divergence's alone."""
    x, w, b, y = problem(ignored=0)
    teacher = TeacherLogits(torch.randn(len(y), len(w)))
    mixed = linear_distill(
        x, w, teacher, linear_bias=b, target=y, ce_weight=0.7, temperature=2.0, reduction=reduction).mean()
    q = (F.linear(x, w, b) / 2).log_softmax(-1)
    divergence = F.kl_div(q, (teacher.logits / 2).log_softmax(-1), reduction="batchmean", log_target=True)
    true = 0.3 * divergence + 0.7 * plain(x, w, b, y)
    torch.testing.assert_close(mixed, true)
    assert_close(torch.autograd.grad(mixed, (x, w, b)), torch.autograd.grad(true, (x, w, b)))


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_liger_1338_compiled_with_ignored_rows(backend, reduction):
    """Compiled, outputs of ignored rows were never written. (torch.empty is filled with NaN here.)"""
    torch._dynamo.reset()
    x, w, b, y = problem(ignored=0.5)

    def step(x, w, b, y):
        return linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, backend=backend)

    found, true = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w, b, y), step(x, w, b, y)
    assert torch.equal(found, true)
    pairs = zip(*(torch.autograd.grad(loss.sum(), (x, w, b)) for loss in (found, true)), strict=True)
    assert all(torch.equal(a, e) for a, e in pairs)


@each_backend
@pytest.mark.parametrize("offset", [3e3, -3e3])
def test_pytorch_195829_common_offset_of_the_logits(backend, offset):
    """lse - z_y loses all digits that a large common offset takes."""
    *_, labels = problem(n=8, ignored=0)
    z = (torch.randint(-64, 64, (8, 301)) / 16).float()         # exact with the offset
    ours = linear_cross_entropy(torch.eye(8), (z + offset).T.contiguous(), labels, reduction="none", backend=backend)
    true = F.cross_entropy(z.double(), labels, reduction="none")
    assert error(ours, true) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_transformer_engine_3193_gradients_in_the_logits_buffer(dtype):
    """Written over the logits in their dtype on the way, gradients were rounded twice, and the logits were gone."""
    x, w, b, y = problem(ignored=0)
    logits = (2 * F.linear(x, w, b)).detach().to(dtype).requires_grad_()
    before = logits.detach().clone()
    upstream = torch.linspace(-1.3, 2.7, len(y))
    (found,) = torch.autograd.grad(cross_entropy(logits, y, reduction="none"), (logits,), upstream)
    wide = before.double().requires_grad_()
    (true,) = torch.autograd.grad(F.cross_entropy(wide, y, reduction="none"), (wide,), upstream.double())
    assert torch.equal(logits, before)
    once = (true.to(dtype).double() - true).norm()
    assert (found.double() - true).norm() <= 1.01 * once       # no more than rounding the truth once


@each_backend
def test_liger_802_loss_multiplied_by_the_accumulation_steps(backend):
    """With a denominator over all micro-batches each loss is its share: they add up to the mean, not to 4 of it."""
    x, w, b, y = problem()
    shares = [linear_cross_entropy(x[part], w, y[part], linear_bias=b, num_items_in_batch=(y != -100).sum().item(),
                                   backend=backend) for part in torch.arange(40).split(10)]
    torch.testing.assert_close(sum(shares), plain(x, w, b, y))


@each_backend
def test_fla_539_means_of_unequal_micro_batches(backend):
    """The mean of means is not the mean where micro-batches have different numbers of labels."""
    x, w, b, y = problem()
    y[2:10] = -100
    count = (y != -100).sum()
    for part in (slice(0, 10), slice(10, 40)):
        linear_cross_entropy(x[part], w, y[part], linear_bias=b, num_items_in_batch=count, backend=backend).backward()
    found, leaves = [t.grad for t in (x, w, b)], [t.detach().requires_grad_() for t in (x, w, b)]
    assert_close(found, torch.autograd.grad(plain(*leaves, y), leaves))
    means = sum(plain(leaves[0][part], leaves[1], leaves[2], y[part]) for part in (slice(0, 10), slice(10, 40))) / 2
    assert error(torch.autograd.grad(means, leaves[1])[0], found[1]) > 0.1


# -- distributed, adapters --------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("shape", [(0,), (0, 16)])
def test_liger_767_a_weight_without_elements(backend, shape):
    """ZeRO-3 leaves the head empty; that came up as a ZeroDivisionError (#1353)."""
    x, _, _, y = problem()
    with pytest.raises(ValueError, match=r"linear_weight: expected \(V, 16\), got float32 \(0,"):
        linear_cross_entropy(x, torch.zeros(shape), y, backend=backend)


class Adapter(torch.nn.Module):
    """A linear layer with a low-rank update that is 0 at first, and DoRA's magnitudes."""

    def __init__(self, base, magnitude=False):
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(2, base.weight.shape[1]))
        self.b = torch.nn.Parameter(torch.zeros(base.weight.shape[0], 2))
        self.magnitude = torch.nn.Parameter(base.weight.norm(dim=1)) if magnitude else None

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def test_trl_4612_an_adapter_on_the_head_that_is_not_trained():
    """The fused loss took the base weight: the adapter got no gradient (unsloth #9331). A fresh one changes no logits,
    and is refused all the same."""
    from conftest import make_model

    model = make_model()
    model.lm_head = Adapter(model.lm_head)
    with pytest.raises(UsageError, match=r"model: expected a head of a weight and a bias, got one with a, b"):
        models.head(model)


def test_axolotl_2847_dora_on_the_head():
    """An assertion inside of a kernel; here it is named."""
    from conftest import make_model

    model = make_model()
    model.lm_head = Adapter(model.lm_head, magnitude=True)
    with pytest.raises(UsageError, match="magnitude"):
        models.head(model)


# -- crashes, performance, features -----------------------------------------------------------------------------------


def test_trl_7266_offsets_past_2_to_the_31():
    """Row offsets in 32 bits wrapped, silently (fla #1080; Liger's softmax). Of 4 GiB only the pages that are used
    are there."""
    columns, stride = 1000, 1 << 30
    with contextlib.ExitStack() as stack:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)               # poisoning would touch all of it
        stack.callback(torch.use_deterministic_algorithms, before)
        logits = torch.empty(3 * stride, dtype=torch.bfloat16).as_strided((3, columns), (stride, 1))
        logits.copy_(torch.randn(3, columns))
        y = torch.tensor([1, 2, 3])
        dense = logits.clone()
        assert torch.equal(cross_entropy(logits, y), cross_entropy(dense, y))
        assert torch.equal(softmax(logits), softmax(dense))
        weight = logits.as_strided((3, 16), (stride, 1))
        x = torch.randn(5, 16).bfloat16()
        for backend in BACKENDS:
            far, near = (linear_cross_entropy(x, w, torch.tensor([0, 1, 2, 2, 0]), backend=backend)
                         for w in (weight, weight.clone()))
            assert torch.equal(far, near)


def test_liger_softmax_past_65536_columns():
    """It raised above 65,536 columns."""
    z = torch.randn(2, 70_001)
    torch.testing.assert_close(softmax(z), z.softmax(-1))


@pytest.mark.parametrize("mebibytes", [8, 16])
def test_liger_1439_a_chunk_that_does_not_fit(mebibytes):
    """A fixed number of chunks made slabs of logits that ran out of memory: no buffer is larger than the budget."""
    x, w, b, y = problem(n=600, v=40_000, d=8, ignored=0)
    plan = plan_chunks(Demand(600, 8, 40_000, 1, torch.float32, torch.device("cpu")), mebibytes * MIB)
    gradients = 40_000 * 8 * 4
    made = watched(x, w, b, y, chunks=plan)
    assert gradients < max(made.bytes) <= mebibytes * MIB < 600 * 40_000 * 4


def test_unsloth_3827_a_budget_of_nothing(monkeypatch):
    """Sized from free memory, the chunk was 0: ours does not look at it, and a budget of 0 is refused by name."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    x, w, b, y = problem()
    torch.testing.assert_close(linear_cross_entropy(x, w, y, linear_bias=b), plain(x, w, b, y))
    assert plan_chunks(Demand(2048, 576, 49152, 1, torch.bfloat16, torch.device("cuda")), None).rows > 1
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least \d+ for \d+ logits, got 0"):
        linear_cross_entropy(x, w, y, linear_bias=b, workspace_bytes=0)


@pytest.mark.parametrize("tile", [301, 100])
def test_nmoe_10_operands_in_float32(tile):
    """Products of 16-bit numbers were taken in float32, 13 times slower (TRL #6863): all of ours stay as they are."""
    x, w, b, y = problem(dtype=torch.bfloat16, ignored=0)
    made = watched(x, w, b, y, chunks=ChunkPlan(7, 64, tile))
    assert len(made.products) >= 3 * 40 // 7 and set(made.products) == {torch.bfloat16}


def test_pytorch_124480_chunks_by_the_ratio_of_sizes():
    """Rows a chunk were N D / V, too few for a fast product: ours follow from bytes alone, whatever D is."""
    narrow, wide = (plan_chunks(Demand(8192, hidden, 49152, 1, torch.float32, torch.device("cpu")), None).rows
                    for hidden in (256, 4096))
    assert narrow > wide > 0.8 * narrow and wide > 256


def test_liger_1323_parity_with_pytorch():
    """PyTorch has this op since 2.13: changing the import must be enough."""
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is None:
        pytest.skip("this PyTorch has none")
    ours = inspect.signature(linear_cross_entropy).parameters
    for name, parameter in inspect.signature(theirs).parameters.items():
        assert name in ours, name
        equal = ours[name].default == parameter.default or (name, ours[name].default) == ("ignore_index", -100)
        assert equal, name
    x, w, b, y = problem()
    torch.testing.assert_close(linear_cross_entropy(x, w, y, linear_bias=b), theirs(x, w, y, linear_bias=b))


def test_fla_1248_a_frozen_head_that_pays_for_its_gradient():
    """d_weight was made, 2.3 GiB, although nobody had asked for it."""
    x, w, b, y = problem(n=8, v=4000, d=64, ignored=0)
    size = w.numel() * w.element_size()
    chunks = ChunkPlan(8, 4000, 4000)
    assert max(watched(x, w, b, y, chunks=chunks).bytes) == size
    assert max(watched(x, w, b, y, needs=(True, False, False), chunks=chunks).bytes) < size / 2
    frozen = [w.detach(), b.detach()]
    loss = linear_cross_entropy(x, frozen[0], y, linear_bias=frozen[1])
    assert_close(torch.autograd.grad(loss, (x,)), torch.autograd.grad(plain(x, *frozen, y), (x,)))


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_quack_209_second_backward(backend, reduction):
    """retain_graph=True, then a second backward: it failed, elsewhere it scaled saved gradients twice."""
    x, w, b, y = problem()
    loss = linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, backend=backend).sum()
    first = [g.clone() for g in torch.autograd.grad(loss, (x, w, b), torch.tensor(2.0), retain_graph=True)]
    assert_close(torch.autograd.grad(loss, (x, w, b), torch.tensor(-3.0)), [-1.5 * g for g in first],
                 atol=1e-5)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_liger_only_the_weight_requires_grad(backend, reduction):
    """With frozen hidden states there was no d_weight at all."""
    x, w, b, y = problem()
    loss = linear_cross_entropy(
        x.detach(), w, y, linear_bias=b.detach(), reduction=reduction, backend=backend).sum()
    expected = plain(x.detach(), w, b.detach(), y, reduction=reduction).sum()
    assert_close(torch.autograd.grad(loss, (w,)), torch.autograd.grad(expected, (w,)))


@each_backend
def test_liger_328_accuracy_and_log_probabilities(backend):
    """What people compute the logits again for (#873): statistics come with the loss, in one product."""
    x, w, b, y = problem()
    log_q = F.linear(x, w, b).log_softmax(-1).detach()
    valid = y != -100
    _, stats = linear_cross_entropy(x, w, y, linear_bias=b, return_stats=True, backend=backend)
    torch.testing.assert_close(-stats.nll[valid], log_q[valid].gather(1, y[valid, None])[:, 0])
    found = linear_logprob(x, w, y, linear_bias=b)
    torch.testing.assert_close(found.logprob[valid], -stats.nll[valid])
    assert torch.equal((found.argmax == y)[valid], (log_q.argmax(-1) == y)[valid])
    torch.testing.assert_close(found.entropy[valid], -(log_q.exp() * log_q).sum(-1)[valid])


def test_liger_441_a_teacher_that_was_stored():
    """Teachers ran in every step: logits from a file, or their largest, are targets here."""
    x, w, b, _ = problem()
    z = torch.randn(40, 301)
    q, p = F.linear(x, w, b).log_softmax(-1), z.log_softmax(-1)
    torch.testing.assert_close(linear_distill(x, w, TeacherLogits(z), linear_bias=b),
                               F.kl_div(q, p, reduction="batchmean", log_target=True))
    probs, ids = p.exp().topk(300)
    stored = SparseTarget(ids.int(), probs)         # one id is missing: the tail is that id
    torch.testing.assert_close(linear_distill(x, w, stored, linear_bias=b),
                               F.kl_div(q, p, reduction="batchmean", log_target=True))
