"""Kernels compiled ahead of time, without a GPU: registers, spills, shared memory, instructions.

    python -P -m ssd_core.bench.resources --targets sm_90,gfx942
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import importlib.metadata
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from ssd_core.checks import UsageError

HEADING = """# What the compiler makes of the kernels

Triton {triton}, without a GPU: registers of a thread / KiB of shared memory of a program; "descriptors" are those of
the tensor memory accelerator. A block has columns of a row, or rows, columns and coordinates of a product. `python -P
-m ssd_core.bench.resources --out bench/RESOURCES.md` writes this table; tests/test_triton.py holds it to limits."""
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PRODUCTS = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma",
            "gfx942": r"v_mfma"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel as a call makes it: module and function, what is not the usual type or value, and its launch."""

    name: str
    module: str
    function: str
    launch: str                                 # of kernels.launch.ROWS or FILTER, or "[narrow ][pairs of ]tiles";
                                                # " held N": of a whole row, of which N numbers a column are kept
    types: tuple[tuple[str, str], ...] = ()
    flags: tuple[tuple[str, object], ...] = ()
    targets: tuple[str, ...] = TARGETS


def _variant(name, module, function, launch, types=None, targets=TARGETS, **flags):
    return Variant(name, module, function, launch, tuple((types or {}).items()), tuple(flags.items()), targets)


def _tiled(name, op, kernel, targets=TARGETS, dtype="bf16", teacher=None, launch="tiles", **flags):
    """With the operands' dtype, or that of a descriptor of them; a teacher's may be another."""
    types = {"x_ptr": dtype, "w_ptr": dtype, "ids_ptr": "*i64"}
    if flags.get("T_HEAD"):
        types |= {"t_ptr": teacher or dtype, "v_ptr": teacher or dtype}
    return _variant(name, f"tiled_{op}", f"_{kernel}", launch, types, targets, **{"PRECISION": "ieee", **flags})


def _tiled_variants():
    """A look, the end of rows whose spans are added up, slopes, and slopes at the targets."""
    hopper = ("sm_90", "sm_100")
    options = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HAS_CLASS_WEIGHT": True, "SMOOTH": True}
    everything, labels = {**options, "BUCKET": True}, {**options, "WITH_CE": True, "HAS_LABELS": True}
    for through, targets, flags in ((", descriptors", hopper, {"TMA": True}), ("", TARGETS, {})):
        yield _tiled(f"tiled cross-entropy, look{through}", "cross_entropy", "look", targets, **flags)
        yield _tiled(f"tiled cross-entropy, look, 64 ids, all options{through}", "cross_entropy", "look", targets, K=64,
                     BLOCK_K=64, **everything, **flags)
        yield _tiled(f"tiled cross-entropy, slope{through}", "cross_entropy", "slope", targets, **flags)
        yield _tiled(f"tiled cross-entropy, slope, all options{through}", "cross_entropy", "slope", targets,
                     **everything, **flags)
        yield _tiled(f"tiled distillation, look, 20 ids{through}", "distill", "look", targets, K=20, **flags)
        yield _tiled(f"tiled distillation, slope{through}", "distill", "slope", targets, **flags)
        for kernel in ("look", "slope"):
            yield _tiled(f"tiled distillation, {kernel}, 64 ids, all options{through}", "distill", kernel, targets,
                         launch="narrow tiles", K=64, **labels, **flags)
        for kernel, kind, name in (("look", 0, "forward KL"), ("terms", 2, "JSD"), ("slope", 2, "JSD")):
            for teacher, given in (("hidden", {"T_HEAD": True}), ("dense", {})):
                yield _tiled(f"tiled {name}, {teacher} teacher, {kernel}{through}", "dense_distill", kernel, targets,
                             launch="pairs of tiles", KIND=kind, **given, **flags)
        head = {"T_HEAD": True, "T_HAS_BIAS": True, "T_HAS_SOFTCAP": True}
        pairs = "narrow pairs of tiles" if through else "pairs of tiles"
        for kernel, kind, name in (("look", 0, "forward KL"), ("look", 1, "reverse KL"), ("slope", 2, "JSD")):
            for teacher, given in (("hidden", head), ("dense", {"HAS_TOKENS": True})):
                yield _tiled(f"tiled {name}, {teacher} teacher, {kernel}, all options{through}", "dense_distill",
                             kernel, targets, launch=pairs, KIND=kind, **given, **labels, **flags)
        yield _tiled(f"tiled log-probability, look{through}", "logprob", "look", targets, HAS_SOFTCAP=True, **flags)
        yield _tiled(f"tiled log-probability, slope{through}", "logprob", "slope", targets, HAS_SOFTCAP=True, **flags)
        for kernel in ("look", "slope"):
            yield _tiled(f"tiled cross-entropy, {kernel}, float16{through}", "cross_entropy", kernel, targets,
                         dtype="fp16", **flags)
    for precision in ("ieee", "tf32"):
        for kernel in ("look", "slope"):
            for name, op in (("cross-entropy", "cross_entropy"), ("distillation", "distill")):
                yield _tiled(f"tiled {name}, {kernel}, float32 {precision}", op, kernel,
                             TARGETS if precision == "ieee" else TARGETS[:3], dtype="fp32", PRECISION=precision,
                             launch="narrow tiles" if op == "distill" else "tiles")
            yield _tiled(f"tiled JSD, hidden teacher, {kernel}, float32 {precision}", "dense_distill", kernel,
                         TARGETS if precision == "ieee" else TARGETS[:3], dtype="fp32", PRECISION=precision, KIND=2,
                         T_HEAD=True, launch="pairs of tiles")
    for kernel, kind, name in (("look", 0, "forward KL"), ("slope", 2, "JSD")):
        yield _tiled(f"tiled {name}, float32 hidden teacher, {kernel}", "dense_distill", kernel, teacher="fp32",
                     T_HEAD=True, KIND=kind, launch="pairs of tiles")
    yield _variant("tiled cross-entropy, targets", "tiled_cross_entropy", "_targets", "targets", K=64, BLOCK_K=64,
                   **everything)
    once_more = {"LOOK": False, "GRADIENT": False, "CARRY": True, "K": 64, "BLOCK_K": 64}
    yield _variant("tiled cross-entropy, end of rows", *CE, HAS_SLOPES=True, **once_more, **everything)
    yield _variant("tiled distillation, end of rows", *SPARSE, HAS_PARTS=True, **once_more, **labels)
    yield _variant("tiled distillation, targets", "tiled_distill", "_targets", "targets", K=64, BLOCK_K=64, **labels)


# of a head, logits are float32 and the gradient that takes their place bfloat16
WIDE = {"x_ptr": "*fp32", "grad_ptr": "*bf16"}
HALF = {"x_ptr": "*fp32", "grad_ptr": "*fp16"}
# of given logits: some tokens of them, and weights of everything
SOME = {"BY_TOKEN": True, "HAS_TOKENS": True, "HAS_BIAS": True, "HAS_CLASS_WEIGHT": True, "HAS_LABEL_WEIGHT": True}
CE = ("cross_entropy", "_rows", "cross_entropy")
SPARSE, DENSE = ("distill", "_sparse_rows", "distill"), ("distill", "_dense_rows", "distill_dense")


def _held_variants():
    """Rows that are read once."""
    head, labels = {"NARROWED": True}, {"WITH_CE": True, "HAS_LABELS": True, "HAS_SOFTCAP": True}
    few, dense = {"K": 20, "BLOCK_K": 32}, {**WIDE, "t_ptr": "*fp32"}
    for name, (module, function, launch), types, held, flags in (
            ("cross-entropy, head", CE, WIDE, 1, {**head, "HARD": True}),
            ("cross-entropy, some of the logits, weights", CE, {}, 1, {"HARD": True, **SOME}),
            ("cross-entropy, all options", CE, WIDE, 4, {
                **head, **SOME, "K": 64, "BLOCK_K": 64, "HAS_SOFTCAP": True, "SMOOTH": True, "BUCKET": True}),
            ("class probabilities", (*CE[:2], "class_probabilities"), {}, 4, {"DENSE": True, "SMOOTH": True}),
            ("log-probability, head", ("logprob", "_rows", "logprob"), WIDE, 2, head),
            ("softmax", ("softmax", "_rows", "softmax"), {}, 1, {"LOG": False}),
            ("softmax, backward", ("softmax", "_rows_backward", "softmax"), {}, 2, {"LOG": False}),
            ("log-probability, softcap", ("logprob", "_rows", "logprob"), WIDE, 4, {**head, "HAS_SOFTCAP": True}),
            ("JSD, 20 ids", SPARSE, WIDE, 2, {**head, **few, "KIND": 2}),
            ("JSD, dense", DENSE, dense, 2, {**head, "KIND": 2}),
            ("forward KL, 20 ids", SPARSE, WIDE, 2, {**head, **few}),
            ("JSD, 20 ids, with cross-entropy", SPARSE, WIDE, 4, {**head, **few, **labels, "KIND": 2}),
            ("forward KL, dense", DENSE, dense, 2, head),
            ("JSD, dense, with cross-entropy", (*DENSE[:2], "distill_dense_labels"), dense, 4, {
                **head, **labels, "T_HAS_SOFTCAP": True, "KIND": 2})):
        yield _variant(f"{name}, held", module, function, f"{launch} held {held}", types, HELD=True, **flags)


LOOK, THRESHOLD, SCORE, DRAW = (("sample", f"_{name}", launch) for name, launch in (
    ("look", "sample_look"), ("threshold", "sample_threshold"), ("score", "sample_score"), ("draw", "sample")))
PLACES = {"order_ptr": "*i32"}
PRODUCT = {"out_ptr": "*fp32"}
FLOATS = {**PRODUCT, "grad_ptr": "*fp32", "x_ptr": "*fp32", "weight_ptr": "*fp32"}
VARIANTS = (
    _variant("cross-entropy, head", *CE, WIDE, HARD=True, NARROWED=True),
    _variant("cross-entropy, float16 head", *CE, HALF, HARD=True, NARROWED=True),
    _variant("cross-entropy, bfloat16 logits", *CE, HARD=True),
    _variant("cross-entropy, some of the logits, weights", *CE, HARD=True, **SOME),
    _variant("cross-entropy, softcap and smoothing", *CE, WIDE, HARD=True, NARROWED=True, HAS_SOFTCAP=True,
             SMOOTH=True),
    _variant("cross-entropy, masses of tiles", *CE, WIDE, HARD=True, NARROWED=True, LOOK=False, CARRY=True, TILE=256),
    _variant("cross-entropy, 20 ids", *CE, WIDE, K=20, BLOCK_K=32, NARROWED=True),
    _variant("cross-entropy, 64 ids and a bucket", *CE, WIDE, K=64, BLOCK_K=64, BUCKET=True, NARROWED=True),
    _variant("cross-entropy, class probabilities", *CE[:2], "class_probabilities", DENSE=True, SMOOTH=True),
    _variant("log-probability, head", "logprob", "_rows", "logprob", WIDE, NARROWED=True),
    _variant("softmax", "softmax", "_rows", "softmax", LOG=False),
    _variant("log-softmax", "softmax", "_rows", "softmax", LOG=True),
    _variant("softmax, backward", "softmax", "_rows_backward", "softmax", LOG=False),
    *(_variant(f"{kind}, 20 ids", *SPARSE, WIDE, K=20, BLOCK_K=32, KIND=number, NARROWED=True)
      for number, kind in enumerate(("forward KL", "reverse KL", "JSD"))),
    *(_variant(f"forward KL, 20 ids, {tail}", *SPARSE, WIDE, K=20, BLOCK_K=32, TAIL=number, NARROWED=True)
      for number, tail in ((1, "renormalised"), (2, "on the support"))),
    _variant("forward KL, 20 ids, with cross-entropy", *SPARSE, WIDE, K=20, BLOCK_K=32, WITH_CE=True, HAS_LABELS=True,
             NARROWED=True),
    *(_variant(f"{kind}, dense", *DENSE, {**WIDE, "t_ptr": "*fp32"}, KIND=number, NARROWED=True)
      for number, kind in enumerate(("forward KL", "reverse KL", "JSD"))),
    _variant("forward KL, dense, with cross-entropy", *DENSE[:2], "distill_dense_labels", {**WIDE, "t_ptr": "*fp32"},
             WITH_CE=True, HAS_LABELS=True, HAS_SOFTCAP=True, T_HAS_SOFTCAP=True, NARROWED=True),
    *_held_variants(),
    _variant("filter, selection", "grad_filter", "_select", "select", TILE=256),
    _variant("filter, moments", "grad_filter", "_moments", "moments", TILE=256),
    *(_variant(f"filter, d_{operand}{name}", "grad_filter", f"_{operand}_product", f"{operand}{bits}", types, TILE=256)
      for operand in ("input", "weight") for name, bits, types in (("", 16, PRODUCT), (", float32", 32, FLOATS))),
    _variant("sample, look", *LOOK),
    _variant("sample, look, greedy", *LOOK, GREEDY=True),
    _variant("sample, threshold of top-p", *THRESHOLD, TOP_P=True),
    _variant("sample, threshold of top-k and top-p", *THRESHOLD, TOP_K=True, TOP_P=True),
    _variant("sample, score of all tokens", *SCORE),
    _variant("sample, score of some tokens", *SCORE, LEAST=True, MIN_P=True),
    _variant("draw, top-k and top-p", *DRAW, PLACES, BOUNDED=True, TOP_P=True),
    _variant("draw, 512 of 1,048,576", *DRAW, PLACES, BOUNDED=True, TOP_P=True, CAPACITY=2048, LIMIT=512, BLOCK_G=4096),
    _variant("draw, of scores", *DRAW, PLACES),
    _variant("draw, greedy", *DRAW, PLACES, GREEDY=True),
    *_tiled_variants(),
)

# by argument, where a variant says nothing else
TYPES = {
    "x_ptr": "*bf16", "grad_ptr": "*bf16", "out_ptr": "*bf16", "d_ptr": "*bf16", "t_ptr": "*bf16", "bias_ptr": "*bf16",
    "t_bias_ptr": "*bf16", "dense_ptr": "*bf16", "tokens_ptr": "*i64", "ids_ptr": "*i64",
    "labels_ptr": "*i64", "seeds_ptr": "*i64", "positions_ptr": "*i64", "token_ptr": "*i64", "options_ptr": "*fp64",
    "weight_ptr": "*bf16", "order_ptr": "*i64", "active_ptr": "*i8", "list_ptr": "*i32", "count_ptr": "*i32",
    "tops_ptr": "*i64", "keys_ptr": "*i64", "least_ptr": "*i64", "scores_ptr": "*fp64", "best_ptr": "*i32",
    "counts_ptr": "*i32"}
INTEGERS = ("first_token", "rows", "columns", "t_columns", "hidden", "t_hidden", "tiles", "spans", "first_id", "vocab",
            "groups", "top_k", "parts", "width", "most")
ONE = re.compile(r".*_inner|weight_step")       # strides
FLAGS = {"LOOK": True, "FINISH": True, "GRADIENT": True, "TERMS": True, "KIND": 0, "TAIL": 0, "K": 1, "BLOCK_K": 1,
         "LIMIT": 64, "CAPACITY": 256, "SORTED": 1024, "GROUP": 256, "BLOCK_G": 1024, "PARTS": 64, "TILE": 0,
         "BLOCK_T": 1024, "PRECISION": "ieee"}
ALIGNED = re.compile(r".*_ptr|.*_stride|columns|t_columns|vocab|tiles|hidden|t_hidden|width")        # multiples of 16


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the compiler made of a variant."""

    variant: str
    target: str
    block: str
    warps: int
    registers: int          # of a thread
    spills: int             # bytes
    shared: int             # bytes of a program
    load_bits: int          # the widest load of a thread
    products: int           # instructions that multiply matrices
    own_products: int       # and those of the matrix units that this chip brought
    copies: int             # instructions of the tensor memory accelerator
    ahead: int              # copies into shared memory that a program does not wait for at once


def compiled(variant: Variant, target: str) -> Resources:
    """Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = getattr(importlib.import_module(f"ssd_core.kernels.{variant.module}"), variant.function)
    block, sizes, options = _launch(variant, target)
    types, flags = {**TYPES, **dict(variant.types)}, {**FLAGS, **sizes, **dict(variant.flags)}
    if "BLOCK_N" in sizes:
        operands = [("x_ptr", "BLOCK_N"), ("w_ptr", "BLOCK_V")]
        if flags.get("T_HEAD"):
            operands += [("t_ptr", "BLOCK_N"), ("v_ptr", "BLOCK_V")]
        for name, length in operands:
            kind = types[name]
            types[name] = f"tensordesc<{kind}[{sizes[length]}, {sizes['BLOCK_D']}]>" if flags.get("TMA") else f"*{kind}"
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or ONE.fullmatch(name):
            signature[name], constants[(place,)] = "constexpr", 1 if ONE.fullmatch(name) else flags.get(name, False)
            continue
        number = "i32" if name in INTEGERS or name.endswith("_stride") else "fp32"
        signature[name] = types.get(name, "*fp32") if name.endswith("_ptr") else number
        if ALIGNED.fullmatch(name) and not signature[name].startswith("tensordesc"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=gpu, options=options)
    common = {"variant": variant.name, "target": target, "block": block, "warps": options["num_warps"],
              "shared": built.metadata.shared}
    if target.startswith("sm_"):
        registers, spills = _cuda_usage(built.asm["cubin"])
        text = built.asm["ptx"]
        loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", text)
        copies = re.findall(r"cp\.async\.c[ag]\.\S+ \[.*?\], \[.*?\], 0x([0-9a-f]+)", text)
        loads += [(int(size, 16), 8) for size in copies]
    else:
        text = built.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spills = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
        loads = [(count, 32) for count in re.findall(r"(?:global|buffer)_load_dwordx(\d)", text)]
    widest = max((int(count or 1) * int(bits) for count, bits in loads), default=0)
    own_products = len(re.findall(PRODUCTS[target], text))
    products = len(re.findall("|".join(set(PRODUCTS.values())), text))
    copies = text.count("cp.async.bulk.tensor")
    ahead = copies + len(re.findall(r"cp\.async\.c[ag]", text))
    return Resources(**common, registers=registers, spills=spills, load_bits=widest, products=products,
                     own_products=own_products, copies=copies, ahead=ahead)


def _launch(variant: Variant, target: str):
    """What a block is, or where it is said; sizes; and options of the compiler."""
    from ssd_core.kernels.launch import HELD, Rows, configured, held_rows, tiles_of

    if variant.launch == "targets":
        return "ids of a row", {}, {"num_warps": 1}
    if variant.launch.endswith("tiles"):
        dtype = torch.float32 if "fp32" in dict(variant.types).values() else torch.bfloat16
        kind = variant.launch.removesuffix("tiles").strip()
        found = tiles_of(target, dtype, dict(variant.flags).get("TMA", False), pairs="pairs" in kind)
        found = found.narrow if "narrow" in kind else found
        sizes = {"BLOCK_N": found.rows, "BLOCK_V": found.columns, "BLOCK_D": found.terms, "GROUP": found.group}
        name = f"launch.{'PAIRS' if 'pairs' in kind else 'TILES'}" + ".narrow" * ("narrow" in kind)
        return name, sizes, {"num_warps": found.warps, "num_stages": found.stages}
    name, _, held = variant.launch.partition(" held ")
    hip = target.startswith("gfx")
    found = configured(name, hip)
    if held:
        found = held_rows(found, HELD // int(held), int(held), hip)
    sizes = ({"BLOCK_V": found.block} if isinstance(found, Rows)
             else {"BLOCK_R": found.rows, "BLOCK_C": found.columns, "BLOCK_D": found.hidden})
    return " x ".join(str(size) for size in sizes.values() if size) or "a row", sizes, {"num_warps": found.warps}


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory if it uses them, as cuobjdump says."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (subprocess.run([tool, option, file.name], check=True, text=True, capture_output=True).stdout
                       for option in ("--dump-resource-usage", "--dump-sass"))
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    used = re.search(r"\b(LDL|STL)\b", code) is not None       # a frame may be left of what was optimised away
    return int(found["REG"]), (int(found["STACK"]) + int(found["LOCAL"])) * used


def everything(targets=TARGETS, variants=VARIANTS) -> Iterator[Resources]:
    """All of them, in processes side by side."""
    pairs = [(variant, target) for target in targets for variant in variants if target in variant.targets]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_of_pair, pairs)


def _of_pair(pair):
    return compiled(*pair)


def table(found: list[Resources]) -> str:
    """Markdown: a line for each variant, registers / shared KiB of each target."""
    targets = list(dict.fromkeys(one.target for one in found))
    lines = [f"| kernel | block, warps | {' | '.join(targets)} |", "|---" * (2 + len(targets)) + "|"]
    by_variant = {}
    for one in found:
        by_variant.setdefault(one.variant, {})[one.target] = one
    for name, ones in by_variant.items():
        first = next(iter(ones.values()))
        cells = [f"{ones[t].registers} / {ones[t].shared / 1024:.1f}" + (f", {ones[t].spills} spilled" if ones[t].spills
                 else "") if t in ones else "" for t in targets]
        lines.append(f"| {name} | {first.block}, {first.warps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    targets: Annotated[str, typer.Option(help="comma-separated")] = ",".join(TARGETS),
    out: Annotated[Optional[Path], typer.Option(help="Markdown file to write")] = None,  # noqa: UP045
):
    """Registers of a thread / shared memory of a program in KiB, of every kernel on every target."""
    wanted = [target.strip() for target in targets.split(",")]
    if unknown := set(wanted) - set(TARGETS):
        raise UsageError(f"targets: expected some of {', '.join(TARGETS)}, got {sorted(unknown)}")
    found = list(everything(wanted))
    print(table(found))
    if out:
        out.write_text(f"{HEADING.format(triton=importlib.metadata.version('triton'))}\n\n{table(found)}\n")


if __name__ == "__main__":
    typer.run(main)
