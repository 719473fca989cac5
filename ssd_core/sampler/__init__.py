"""Batched sampling from a causal language model, with its soft targets recorded."""

from ssd_core.sampler.sampler import Sampler

__all__ = ["Sampler"]
