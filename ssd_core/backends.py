"""Which code serves an op: records, and the choice among them.

A record holds module names as strings, so that nothing is imported before it is used. ``backend="auto"`` takes the
first record that can serve the call, in the order of the list, and logs why earlier ones could not; a backend that the
caller names serves the call or raises with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterable

import torch

from ssd_core.checks import UsageError

log = logging.getLogger("ssd_core")

FLOATS = ("float64", "float32", "bfloat16", "float16")
COMPILED = ("float32", "bfloat16", "float16")       # dtypes of the compiled backends


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of one op. Locations are ``"module:function"``."""

    op: str
    name: str
    location: str
    devices: tuple[str, ...] = ()               # device types; empty: any
    dtypes: tuple[str, ...] = FLOATS
    lacks: tuple[str, ...] = ()                 # options that are not in this backend yet
    needs: str = ""                             # location of a function: None, or why the backend is unavailable
    automatic: bool = True                      # whether "auto" may choose it
    counts: str = ""                            # location: (demand) -> fields of it that this backend knows better

    def __post_init__(self) -> None:
        for location in filter(None, (self.location, self.needs, self.counts)):
            if location.count(":") != 1:
                raise ValueError(f"location: expected 'module:function', got {location!r}")
        unknown = set(self.dtypes) - set(FLOATS)
        if unknown:
            raise ValueError(f"dtypes: expected some of {FLOATS}, got {sorted(unknown)}")

    def missing(self) -> str | None:
        """Why this backend cannot be used here at all, or None."""
        return _load(self.needs)() if self.needs else None

    def refuses(self, device: str, dtype: torch.dtype, options: Iterable[str]) -> str | None:
        """Why this backend cannot serve such a call, or None."""
        if self.devices and device not in self.devices:
            return f"it serves {' and '.join(self.devices)} tensors, not {device}"
        dtype_name = str(dtype).removeprefix("torch.")
        if dtype_name not in self.dtypes:
            return f"it serves {', '.join(self.dtypes)}, not {dtype_name}"
        lacking = [option for option in options if option in self.lacks]
        if lacking:
            return f"{', '.join(lacking)}: not in this backend yet"
        return self.missing()

    def load(self) -> Callable:
        """Its first argument is the tensor whose device kernels are launched on."""
        function = _load(self.location)
        return _on_its_device(function) if "cuda" in self.devices else function

    def counted(self, demand):
        """The ``plan.Demand``, with what this backend knows about its bytes."""
        return dataclasses.replace(demand, **_load(self.counts)(demand)) if self.counts else demand


_CHUNKED = "ssd_core.chunked"
_REFERENCE = "ssd_core.reference.run"


def _portable(op: str, module: str = "", *, reference_lacks: tuple[str, ...] = ()) -> tuple[Backend, Backend]:
    """The two backends that every op has."""
    return (Backend(op, "torch", f"{_CHUNKED}.{module or op}:{op}"),
            Backend(op, "reference", f"{_REFERENCE}:{op}", lacks=reference_lacks, automatic=False))


def _compiled(op: str) -> Backend:
    counts = f"ssd_core.cpu:{op}_bytes" if op.startswith("linear_") else ""
    return Backend(op, "cpu", f"ssd_core.cpu:{op}", devices=("cpu",), dtypes=COMPILED,
                   needs="ssd_core.native:missing", counts=counts)


def _triton(op: str, module: str = "ssd_core.triton") -> Backend:
    """The interpreter runs kernels on CPU tensors."""
    devices = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    counts = "ssd_core.triton:linear_bytes" if op.startswith("linear_") else ""
    return Backend(op, "triton", f"{module}:{op}", devices=devices, dtypes=COMPILED,
                   needs="ssd_core.triton:missing", counts=counts)


BACKENDS = (
    _compiled("linear_cross_entropy"),
    _triton("linear_cross_entropy"),
    *_portable("linear_cross_entropy", reference_lacks=("process_group",)),
    _compiled("linear_distill"),
    _triton("linear_distill"),
    *_portable("linear_distill", reference_lacks=("process_group",)),
    _compiled("linear_logprob"),
    _triton("linear_logprob"),
    *_portable("linear_logprob", reference_lacks=("process_group",)),
    _compiled("cross_entropy"),
    _triton("cross_entropy"),
    *_portable("cross_entropy"),
    _compiled("distill"),
    _triton("distill"),
    *_portable("distill"),
    _compiled("logprob"),
    _triton("logprob"),
    *_portable("logprob"),
    _compiled("softmax"),
    _triton("softmax", "ssd_core.kernels.softmax"),
    *_portable("softmax"),
    _compiled("softmax_backward"),
    _triton("softmax_backward", "ssd_core.kernels.softmax"),
    *_portable("softmax_backward", "softmax"),
    _compiled("log_softmax"),
    _triton("log_softmax", "ssd_core.kernels.softmax"),
    *_portable("log_softmax", "softmax"),
    _compiled("log_softmax_backward"),
    _triton("log_softmax_backward", "ssd_core.kernels.softmax"),
    *_portable("log_softmax_backward", "softmax"),
    _compiled("sample"),
    _triton("sample"),
    Backend("sample", "torch", f"{_CHUNKED}.sample:sample"),
    Backend("sample", "reference", "ssd_core.reference.sample:run", devices=("cpu",), automatic=False),
)


def resolve(op: str, device: torch.device, dtype: torch.dtype, backend: str = "auto", options: Iterable[str] = ()):
    """The function that serves this call: see ``choose``."""
    return choose(op, device, dtype, backend, options).load()


def choose(
    op: str, device: torch.device, dtype: torch.dtype, backend: str = "auto", options: Iterable[str] = ()
) -> Backend:
    """The record of the backend that serves this call. ``options`` names those that the caller set."""
    options = tuple(options)
    records = [record for record in BACKENDS if record.op == op]
    names = [record.name for record in records]
    if backend != "auto":
        if backend not in names:
            raise UsageError(f"backend: expected 'auto' or one of {names} for {op}, got {backend!r}")
        record = records[names.index(backend)]
        reason = record.refuses(device.type, dtype, options)
        if reason:
            raise UsageError(f"{op}: backend {backend!r} cannot serve this call: {reason}")
        return record
    reasons = []
    for record in records:
        if not record.automatic:
            continue
        reason = record.refuses(device.type, dtype, options)
        if reason is None:
            if reasons:
                _log_once(f"{op}: backend {record.name!r} serves {device.type} {dtype}; {'; '.join(reasons)}")
            return record
        reasons.append(f"{record.name}: {reason}")
    raise UsageError(f"{op}: no backend serves this call: {'; '.join(reasons)}")


def _on_its_device(function: Callable) -> Callable:
    """Triton launches on the current device, which need not be the tensors'."""

    @functools.wraps(function)
    def call(first, *arguments, **options):
        if first.device.type != "cuda":
            return function(first, *arguments, **options)
        with torch.cuda.device_of(first):
            return function(first, *arguments, **options)

    return call


def _load(location: str) -> Callable:
    module, function = location.split(":")
    return getattr(importlib.import_module(module), function)


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        log.debug(message)
