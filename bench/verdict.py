"""The targets, and whether a result file meets them."""

from __future__ import annotations

import dataclasses

BUDGET = 1.05       # of the workspace; and one float32 accumulator of the head's gradient, for 16-bit heads


@dataclasses.dataclass(frozen=True)
class Target:
    """``limit`` on the best of our exact (or filtered) variants: times the floor's time, or seconds. Of so many tokens,
    or of any number."""

    device: str
    op: str
    case: str
    dtype: str
    limit: float
    filtered: bool = False
    frozen: bool = False
    workspace: int | None = None        # MiB at most
    seconds: bool = False
    threads: int | None = None          # of a variant that was run with so many (`--threads`)
    tokens: int | None = None

    def __str__(self) -> str:
        what = "ms" if self.seconds else "x floor"
        kinds = [self.op, self.case, self.dtype, self.device, *["filtered"] * self.filtered,
                 *["head frozen"] * self.frozen]
        if self.workspace:
            kinds.append(f"at most {self.workspace} MiB")
        if self.threads:
            kinds.append(thread_count(self.threads))
        if self.tokens:
            kinds.append(f"N = {self.tokens}")
        return f"{', '.join(kinds)}: <= {1e3 * self.limit if self.seconds else self.limit:g} {what}"


LCE = "linear_cross_entropy"
TARGETS = (
    *(Target("cpu", LCE, "smollm2", dtype, limit, workspace=64) for dtype, limit in
      (("float32", 0.88), ("bfloat16", 0.92))),
    *(Target("cpu", LCE, "smollm2", dtype, limit, filtered=True, workspace=64) for dtype, limit in
      (("float32", 0.42), ("bfloat16", 0.48))),
    *(Target("cpu", LCE, "smollm2", dtype, limit, filtered=True, frozen=True, workspace=64) for dtype, limit in
      (("float32", 0.60), ("bfloat16", 0.65))),
    *(Target("cpu", LCE, case, dtype, limit, workspace=256) for case in ("qwen3-0.6b", "gemma-3-1b") for dtype, limit in
      (("float32", 0.88), ("bfloat16", 0.92))),
    *(Target("cpu", "linear_distill_hidden", "smollm2", dtype, 1.05) for dtype in ("float32", "bfloat16")),
    *(Target("cpu", op, "smollm2", "float32", 1.15) for op in ("softmax", "distill")),
    Target("cpu", "sample", "qwen3-0.6b", "float32", 2.5e-3, seconds=True, threads=1),
    *(Target("cuda", LCE, case, "bfloat16", limit, workspace=mebibytes, tokens=8192) for case, limit, mebibytes in
      (("llama-3-8b", 1.08, 1024), ("qwen2.5-7b", 1.08, 1024), ("gemma-2-2b", 1.15, 2048), ("gemma-3-1b", 1.25, 2048))),
    Target("cuda", LCE, "smollm2@4096", "bfloat16", 0.65, filtered=True, tokens=8192),
    # rows that stay in cache between two readings, and rows that may not
    *(Target("cuda", op, case, "bfloat16", 1 / share, tokens=8192) for case, share in
      (("smollm2", 0.9), ("llama-3-8b", 0.65)) for op in ("softmax", "cross_entropy", "distill")),
    Target("cuda", "sample", "qwen3-0.6b", "bfloat16", 120e-6, seconds=True, tokens=256),
)
# on a CPU: ours over a peer's time, at the workspace of the floor's target whatever the peer needs
PEER_LIMITS = {
    (LCE, "cut-cross-entropy torch_compile"): {"float32": 0.95, "bfloat16": 0.80},
    (LCE, "PyTorch eager"): {"float32": 0.70, "bfloat16": 0.55},
    (LCE, "PyTorch linear_cross_entropy(options)"): {"float32": 0.33, "bfloat16": 0.09},
    ("sample", "HF warpers + multinomial"): {"float32": 1 / 80},
    ("sample", "PyTorch, top k first"): {"float32": 1 / 2},
}
# on a CPU: gradient errors against float64, of exact variants over eager's, of filtered ones as they are
EXACT_ERROR, FILTERED_ERROR = {"float32": 1.0, "bfloat16": 1 / 3}, {"float32": 4e-3, "bfloat16": 5e-3}
SCALING = 1.8       # of one thread's time over two threads'
DISTILL = {"cpu": 1.05, "cuda": 1.03}       # of hard cross-entropy's time, from a sparse teacher


def judge(result: dict) -> list[str]:
    """A line for each target and for each comparison that the results allow: "met", "missed" or "not measured"."""
    lines = []
    devices = {_kind(one) for one in result["results"]}
    for target in TARGETS:
        if target.device in devices:
            lines += _target(result, target)
    for one in result["results"]:
        lines += _peers(one) + _peer_limits(one) + _errors(one) + _workspaces(one) + _scaling(one)
    return lines + _distill(result)


def _kind(one: dict) -> str:
    return one["device"].partition(":")[0]


def _ours(one: dict, filtered: bool, workspace: int | None) -> list[dict]:
    return [row for row in one["rows"] if row["ours"] and row["status"] == "timed"
            and ("grad_filter" in row["variant"]) == filtered
            and (workspace is None or row["workspace"] is None or row["workspace"] <= workspace << 20)]


def _target(result: dict, target: Target) -> list[str]:
    found = [one for one in result["results"] if not one["axis"] and _kind(one) == target.device
             and all(one[name] == getattr(target, name) for name in ("op", "case", "dtype", "frozen"))
             and target.tokens in (None, one["tokens"])]
    lines = []
    for one in found:
        values = [row["time"]["median"] if target.seconds else row["over_floor"]
                  for row in _ours(one, target.filtered, target.workspace)
                  if target.threads is None or row["variant"].endswith(f", {thread_count(target.threads)}")]
        if values:
            shown = f"{1e3 * min(values):.3g} ms" if target.seconds else f"{min(values):.2f}"
            lines.append(f"{_met(min(values) <= target.limit)}: {target} at N = {one['tokens']}: {shown}")
    return lines or [f"not measured: {target}"]


def thread_count(number: int) -> str:
    """In the names of variants."""
    return f"{number} thread{'s' * (number > 1)}"


def _met(holds: bool) -> str:
    return "met" if holds else "missed"


def _peers(one: dict) -> list[str]:
    """Exact variants of ours that need no more memory than a peer, against its time."""
    lines = []
    ours = _ours(one, False, None)
    for peer in one["rows"]:
        if peer["ours"] or peer["status"] != "timed" or one["axis"]:
            continue
        fits = [row for row in ours if (row.get("extra_bytes") or 0) <= (peer.get("extra_bytes") or float("inf"))]
        if fits:
            ratio = min(row["time"]["median"] for row in fits) / peer["time"]["median"]
            lines.append(f"{_met(ratio <= 1)}: {_name(one)}: {ratio:.2f} of {peer['variant']}'s time, "
                         "with no more memory")
        elif ours:
            lines.append(f"not measured: {_name(one)}: none of ours needs as little memory as {peer['variant']}")
    return lines


def _name(one: dict) -> str:
    return f"{one['op']}, {one['case']}, N = {one['tokens']}, {one['dtype']}, {one['device']}"


def _peer_limits(one: dict) -> list[str]:
    lines = []
    workspaces = {target.workspace for target in TARGETS if not target.filtered
                  and all(one[name] == getattr(target, name) for name in ("device", "op", "case", "dtype", "frozen"))}
    for peer in one["rows"]:
        limit = PEER_LIMITS.get((one["op"], peer["variant"]), {}).get(one["dtype"])
        if limit is None or one["device"] != "cpu" or one["axis"] or peer["status"] != "timed":
            continue
        for workspace in workspaces:
            ours = [row["time"]["median"] for row in _ours(one, False, workspace)]
            if ours:
                ratio = min(ours) / peer["time"]["median"]
                lines.append(f"{_met(ratio <= limit)}: {_name(one)}: {ratio:.3g} of {peer['variant']}'s time, "
                             f"<= {limit:g}")
    return lines


def _errors(one: dict) -> list[str]:
    """Of the compiled variants: the worse of d_input's and d_weight's."""
    def error(row):
        return max(row["errors"][name] for name in ("d_input", "d_weight") if name in row["errors"])

    measured = [row for row in one["rows"] if row.get("errors") and row["status"] in ("right", "timed")]
    if one["op"] != LCE or one["device"] != "cpu" or one["axis"] or one["dtype"] not in EXACT_ERROR:
        return []
    lines = []
    eager = next((error(row) for row in measured if row["variant"] == "PyTorch eager"), None)
    for row in measured:
        if not row["variant"].startswith("ssd-core cpu"):
            continue
        name, found = f"{_name(one)}: {row['variant']}", error(row)
        if "grad_filter" in row["variant"]:
            limit = FILTERED_ERROR[one["dtype"]]
            lines.append(f"{_met(found <= limit)}: {name}: gradient error {found:.1e}, <= {limit:g}")
        elif eager:
            ratio, limit = found / eager, EXACT_ERROR[one["dtype"]]
            lines.append(f"{_met(ratio <= limit)}: {name}: {ratio:.2f} of eager's gradient error, <= {limit:.2f}")
    return lines


def _workspaces(one: dict) -> list[str]:
    """Only what breaks its promise."""
    itemsize = {"float64": 8, "float32": 4}.get(one["dtype"], 2)
    accumulator = 4 * one["vocab"] * one["hidden"] * (itemsize == 2 and not one["frozen"])
    lines = []
    for row in one["rows"]:
        if row["ours"] and row["workspace"] and row.get("extra_bytes") is not None:
            allowed = BUDGET * row["workspace"] + accumulator
            if row["extra_bytes"] > allowed:
                takes = f"takes {row['extra_bytes'] / 2**20:.0f} MiB, {allowed / 2**20:.0f} allowed"
                lines.append(f"missed: {one['op']}, {one['case']}, N = {one['tokens']}, {one['dtype']}: "
                             f"{row['variant']} {takes}")
    return lines


def _scaling(one: dict) -> list[str]:
    lines = []
    times = {row["variant"]: row["time"]["median"] for row in one["rows"] if row["ours"] and row["status"] == "timed"}
    for name, seconds in times.items():
        variant, _, number = name.rpartition(", ")
        alone = f"{variant}, {thread_count(1)}"
        if number == thread_count(2) and alone in times:
            ratio = times[alone] / seconds
            lines.append(f"{_met(ratio >= SCALING)}: {one['op']}, {one['case']}, {one['dtype']}: {variant} on two "
                         f"threads: {ratio:.2f} x as fast as on one, >= {SCALING}")
    return lines


def _distill(result: dict) -> list[str]:
    lines = []
    times = {}
    for one in result["results"]:
        exact = _ours(one, False, None)
        if exact and not one["axis"]:
            key = tuple(one[name] for name in ("case", "tokens", "dtype", "device", "frozen"))
            times[one["op"], key] = min(row["time"]["median"] for row in exact)
    for (op, key), seconds in times.items():
        if op == "linear_distill" and (LCE, key) in times:
            ratio, limit = seconds / times[LCE, key], DISTILL[key[3].partition(":")[0]]
            lines.append(f"{_met(ratio <= limit)}: linear_distill, {key[0]}, {key[2]}: {ratio:.2f} of hard "
                         f"cross-entropy's time, <= {limit}")
    return lines
