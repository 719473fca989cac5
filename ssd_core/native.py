"""The compiled extension: loaded at first use, never at ``import ssd_core``; says why when it cannot be.

An extension works only with the torch that it was compiled for. What the build found is in ``_build.json``, read
before loading: against another torch the extension would crash or compute nonsense rather than fail to load.
"""

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

_RECORD = Path(__file__).with_name("_build.json")
# Float64 (n,) of this rank -> (ranks, n) of all that share the vocabulary. Then the weight, and all else that has V, is
# of this rank's ids, which begin at `vocab_start`, and d_input is float32 and this rank's part.
Gather = Callable[[torch.Tensor], torch.Tensor]

_REBUILD = "rebuild it with `pip install --no-build-isolation --no-deps --force-reinstall .` or `make build`"


@functools.cache
def _load():
    """(the extension module, None) or (None, why there is none)"""
    try:
        record = json.loads(_RECORD.read_text())
    except FileNotFoundError:
        return None, f"the C++ extension was not built: {_REBUILD}"
    if "missing" in record:
        return None, f"the C++ extension was not built: {record['missing']}; {_REBUILD}"
    if record["torch"] != torch.__version__:
        return None, (
            f"the C++ extension was compiled for torch {record['torch']}, this is torch {torch.__version__}: {_REBUILD}"
        )
    try:
        return importlib.import_module(f"{__package__}._C"), None
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}): {_REBUILD}"


def missing() -> str | None:
    """None if the extension is available, else the reason in one sentence."""
    return _load()[1]


def _extension():
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(reason)
    return extension


def build_info() -> dict:
    """torch_version it was compiled for, compiler, isa (the compiled levels), openmp."""
    return _extension().build_info()


def cpu_isa() -> str:
    """The instruction set in use; ``SSD_CORE_CPU_ISA`` overrides it."""
    return _extension().cpu_isa()


def tile_shape(dtype: torch.dtype) -> tuple[int, int]:
    """Tokens of a panel and vocabulary ids of a tile: the grain of ``linear_cross_entropy``'s chunks."""
    return _extension().tile_shape(dtype)


def product_itemsize(dtype: torch.dtype) -> int:
    """Bytes of what a head's products multiply: 4 where there are no products of 16 bits, or none that pay."""
    return _extension().product_itemsize(dtype)


def kept_workspace_bytes() -> int:
    """What ``release_workspace`` would give back."""
    return _extension().kept_workspace_bytes()


def release_workspace() -> None:
    """Gives back the memory that the fused losses of a head keep for the next call on a CPU, of which it saves up to a
    third of the time: as much as the last call used, no more than its ``workspace_bytes``."""
    if missing() is None:
        _extension().release_workspace()


def linear_cross_entropy_bytes(
    rows: int, columns: int, vocab: int, hidden: int, support: int, dtype: torch.dtype, softcap: bool, smoothing: bool,
    dense: bool, cast: bool,
) -> int:
    """Bytes that ``linear_cross_entropy`` holds at most, beyond inputs and gradients, in such chunks."""
    return _extension().linear_cross_entropy_bytes(
        rows, columns, vocab, hidden, support, dtype, softcap, smoothing, dense, cast)


def grad_filter_bytes(
    tokens: int, rows: int, vocab: int, hidden: int, dtype: torch.dtype, bounds: int, wide_input: bool
) -> int:
    """The same of what the gradient filter holds on top, with one bound or two; ``wide_input``: for an input of 16
    bits."""
    return _extension().grad_filter_bytes(tokens, rows, vocab, hidden, dtype, bounds, wide_input)


def ranks_bytes(tokens: int, rows: int, vocab: int, support: int, ranks: int) -> int:
    """The same of what a call holds on top if ranks share the vocabulary, each with ``vocab`` ids at most."""
    return _extension().ranks_bytes(tokens, rows, vocab, support, ranks)


def linear_cross_entropy(
    input: torch.Tensor,  # (N, D) float32, bfloat16 or float16
    weight: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    ids: torch.Tensor,  # (N, K) int64
    probs: torch.Tensor | None,  # (N, K) float32; None: hard labels, K = 1
    dense: torch.Tensor | None,  # (N, V) class probabilities, in place of ids
    class_weight: torch.Tensor | None,  # (V,) float32, of hard labels and class probabilities
    index: torch.Tensor | None,  # (M,) int64 rows that count; None: all
    row_scale: torch.Tensor | None,  # (M,) float32; None: no gradients
    dtype: torch.dtype,  # that products are taken in
    needs: list[bool],  # gradients of input, weight, bias
    keep_float32: bool,  # those of weight and bias stay in float32
    rows: int,
    columns: int,
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,  # 0: none
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    bucket: bool = False,
    grad_filter: float = 0.0,
    grad_filter_weight: float = 0.0,
    vocab_order: torch.Tensor | None = None,  # (V,) int64; None: by mean probability
    held_bytes: int = 1 << 62,  # of what the filter leaves, before d_weight's products
    gather: Gather | None = None,  # None: this is the whole vocabulary
    vocab_start: int = 0,
) -> tuple[torch.Tensor | None, ...]:
    """``(loss, nll, lse, certificate, d_input, d_weight, d_bias)``, the first three (M,) float32; see
    csrc/cpu/linear_cross_entropy.h. Not differentiable itself."""
    return _extension().linear_cross_entropy(
        input, weight, bias, ids, probs, dense, class_weight, index, row_scale, dtype, needs, keep_float32, rows,
        columns, logit_scale, softcap, temperature, label_smoothing, z_loss, bucket, grad_filter, grad_filter_weight,
        vocab_order, held_bytes, gather, vocab_start,
    )  # fmt: skip


def linear_logprob_bytes(rows: int, columns: int, vocab: int, hidden: int, dtype: torch.dtype, cast: bool) -> int:
    """See ``linear_cross_entropy_bytes``."""
    return _extension().linear_logprob_bytes(rows, columns, vocab, hidden, dtype, cast)


def linear_logprob(
    input: torch.Tensor,  # (N, D) float32, bfloat16 or float16
    weight: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    ids: torch.Tensor,  # (N,) int64
    index: torch.Tensor | None,  # (M,) int64 rows that count; None: all
    row_scale: torch.Tensor | None,  # (M, 2) float32; None: no gradients
    dtype: torch.dtype,  # that products are taken in
    needs: list[bool],  # gradients of input, weight, bias
    keep_float32: bool,
    rows: int,
    columns: int,
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,  # 0: none
    temperature: float = 1.0,
    gather: Gather | None = None,
    vocab_start: int = 0,
) -> tuple[torch.Tensor | None, ...]:
    """``(logprob, entropy, lse, argmax, d_input, d_weight, d_bias)``, the first four (M,) float32; see
    csrc/cpu/linear_logprob.h. Not differentiable itself."""
    return _extension().linear_logprob(
        input, weight, bias, ids, index, row_scale, dtype, needs, keep_float32, rows, columns, logit_scale, softcap,
        temperature, gather, vocab_start)


def linear_distill_bytes(
    rows: int, columns: int, vocab: int, hidden: int, support: int, teacher_hidden: int, dtype: torch.dtype, cast: bool,
) -> int:
    """See ``linear_cross_entropy_bytes``."""
    return _extension().linear_distill_bytes(rows, columns, vocab, hidden, support, teacher_hidden, dtype, cast)


def linear_distill(
    input: torch.Tensor,  # (N, D) float32, bfloat16 or float16
    weight: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    ids: torch.Tensor | None,  # (N, K) int64 of a sparse teacher
    probs: torch.Tensor | None,  # (N, K) float32
    teacher_logits: torch.Tensor | None,  # (N, V')
    teacher_input: torch.Tensor | None,  # (N, D')
    teacher_weight: torch.Tensor | None,  # (V', D')
    teacher_bias: torch.Tensor | None,  # (V',)
    labels: torch.Tensor | None,  # (N,) int64
    class_weight: torch.Tensor | None,  # (V,) float32
    index: torch.Tensor | None,  # (M,) int64 rows that count; None: all
    row_scale: torch.Tensor | None,  # (M,) float32; None: no gradients
    dtype: torch.dtype,  # that products are taken in
    needs: list[bool],  # gradients of input, weight, bias
    keep_float32: bool,
    rows: int,
    columns: int,
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,  # 0: none
    temperature: float = 1.0,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float = 0.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature_squared: bool = False,
    with_ce: bool = False,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    gather: Gather | None = None,
    vocab_start: int = 0,
) -> tuple[torch.Tensor | None, ...]:
    """``(loss, divergence, nll, lse, d_input, d_weight, d_bias)``, the first four (M,) float32; see
    csrc/cpu/linear_distill.h. Not differentiable itself."""
    return _extension().linear_distill(
        input, weight, bias, ids, probs, teacher_logits, teacher_input, teacher_weight, teacher_bias, labels,
        class_weight, index, row_scale, dtype, needs, keep_float32, rows, columns, logit_scale, softcap, temperature,
        teacher_logit_scale, teacher_softcap, divergence, beta, tail, temperature_squared, with_ce, ce_weight,
        label_smoothing, z_loss, gather, vocab_start)


def softmax_rows(logits: torch.Tensor, temperature: float, log: bool) -> torch.Tensor:
    """Softmax, or its logarithm, of ``logits / temperature`` (N, V) along the last axis."""
    return _extension().softmax_rows(logits, temperature, log)


def softmax_rows_backward(grad: torch.Tensor, out: torch.Tensor, temperature: float, log: bool) -> torch.Tensor:
    """d logits (N, V) from ``grad`` with respect to ``out``, the result of ``softmax_rows``."""
    return _extension().softmax_rows_backward(grad, out, temperature, log)


def cross_entropy_rows(
    logits: torch.Tensor,  # (N, V) float32, bfloat16 or float16, any strides
    ids: torch.Tensor,  # (N, K) int32 or int64; with dense not looked at
    probs: torch.Tensor | None,  # (N, K) float32; None: hard labels, K = 1
    dense: torch.Tensor | None = None,  # (N, V) class probabilities
    class_weight: torch.Tensor | None = None,  # (V,) float32, not with probs
    index: torch.Tensor | None = None,  # (M,) int64 ascending: rows that count; None: all
    row_scale: torch.Tensor | None = None,  # (M,) float32; None: no gradient
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,  # 0: none
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    bucket: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``((loss, nll, lse) (3, M), d_logits)``; see csrc/cpu/logit_rows.h. Not differentiable itself."""
    return _extension().cross_entropy_rows(
        logits, ids, probs, dense, class_weight, index, row_scale, logit_scale, softcap, temperature, label_smoothing,
        z_loss, bucket,
    )  # fmt: skip


def logprob_rows(
    logits: torch.Tensor,  # (N, V)
    ids: torch.Tensor,  # (N,) int64
    index: torch.Tensor | None = None,  # (M,)
    row_scale: torch.Tensor | None = None,  # (M, 2) float32, of logprob and entropy
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``((logprob, entropy, lse, argmax) (4, M), d_logits)``; see csrc/cpu/logit_rows.h."""
    return _extension().logprob_rows(logits, ids, index, row_scale, logit_scale, softcap, temperature)


def distill_rows(
    logits: torch.Tensor,  # (N, V)
    ids: torch.Tensor | None,  # (N, K) of a sparse teacher
    probs: torch.Tensor | None,  # (N, K) float32
    teacher_logits: torch.Tensor | None = None,  # (N, V') in place of ids and probs, float64 too
    labels: torch.Tensor | None = None,  # (N,) int64
    class_weight: torch.Tensor | None = None,  # (V,) float32
    index: torch.Tensor | None = None,  # (M,)
    row_scale: torch.Tensor | None = None,  # (M,) float32
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature_squared: bool = False,
    ce_weight: float = 0.0,
    with_ce: bool = False,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``((loss, divergence, nll, lse) (4, M), d_logits)``; see csrc/cpu/logit_rows.h."""
    return _extension().distill_rows(
        logits, ids, probs, teacher_logits, labels, class_weight, index, row_scale, divergence, beta, tail,
        temperature_squared, ce_weight, with_ce, logit_scale, softcap, temperature, label_smoothing, z_loss,
    )  # fmt: skip


def sample(
    logits: torch.Tensor,  # (B, V) float32, bfloat16 or float16
    seeds: torch.Tensor,  # (B,) int64
    positions: torch.Tensor,  # (B,) int64
    *,
    temperature: float = 1.0,  # 0: greedy
    top_k: int = 0,  # at most V; 0: all
    top_p: float = 1.0,
    min_p: float = 0.0,
    support_limit: int,
) -> tuple[torch.Tensor, ...]:
    """``(token, logprob, sampling_logprob, kept_mass, entropy, ids, probs)``: tokens (B,) int64, statistics (B,)
    float32, the support (B, K) int32 and float32 with zeros beyond a row's end, K at most support_limit; see
    csrc/cpu/sample.h."""
    return _extension().sample(logits, seeds, positions, temperature, top_k, top_p, min_p, support_limit)
