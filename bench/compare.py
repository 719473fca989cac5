"""What changed between two result files."""

from __future__ import annotations

SHARED = ("op", "case", "tokens", "dtype", "device", "frozen", "axis")
MEMORY = 1.1                # times, and
MEMORY_BYTES = 4 << 20      # more than the resident set moves by itself
ERROR = 1.5                 # times: seeds and thread counts move it less
TINY = 1e-7                 # errors below are rounding


def differences(before: dict, after: dict, relative: bool = False) -> list[str]:
    """A line for each, "worse", "better", "gone" or "new" first. Times count when the spreads (20th to 80th percentile)
    do not overlap. ``relative``: times over the floor of their own run, for machines that differ in speed."""
    old, new = _rows(before), _rows(after)
    found = []
    for key, row in new.items():
        name = _name(key)
        if key not in old:
            found.append(f"new: {name}: {row['status']}")
        elif row["status"] == old[key]["status"] == "timed":
            found += [f"{kind}: {name}: {text}" for kind, text in _changes(old[key], row, relative)]
        elif row["status"] != old[key]["status"]:
            kind = "worse" if old[key]["status"] == "timed" else "better" if row["status"] == "timed" else "new"
            found.append(f"{kind}: {name}: {old[key]['status']} -> {row['status']} {row['reason']}".rstrip())
    found += [f"gone: {_name(key)}" for key in old.keys() - new.keys()]
    return sorted(found, key=lambda line: not line.startswith("worse"))


def _name(key: tuple) -> str:
    return " ".join(str(part) for part in key if part not in ("", False))


def _rows(result: dict) -> dict[tuple, dict]:
    found = {}
    for one in result["results"]:
        shared = tuple(one[name] for name in SHARED)
        floor = one["floor"].get("time", {}).get("median")
        found |= {(*shared, row["variant"]): {**row, "floor": floor} for row in one["rows"]}
    return found


def _changes(old: dict, new: dict, relative: bool):
    units = [row["floor"] if relative else 1.0 for row in (old, new)]
    a, b = ({name: row["time"][name] / unit for name in ("median", "p20", "p80")}
            for row, unit in zip((old, new), units, strict=True))
    if b["p20"] > a["p80"]:
        yield "worse", f"time x {b['median'] / a['median']:.2f}"
    elif b["p80"] < a["p20"]:
        yield "better", f"time x {b['median'] / a['median']:.2f}"
    memory = [row.get("extra_bytes") for row in (old, new)]
    if None not in memory:
        for kind, (low, high) in (("worse", memory), ("better", memory[::-1])):
            if high > max(low * MEMORY, low + MEMORY_BYTES):
                yield kind, f"extra memory {memory[0] / 2**20:.0f} -> {memory[1] / 2**20:.0f} MiB"
    for name in old["errors"].keys() & new["errors"].keys():
        was, now = old["errors"][name], new["errors"][name]
        if now > max(was, TINY) * ERROR and "_row_" not in name and name != "sigmas":
            yield "worse", f"error {name} {was:.1e} -> {now:.1e}"
