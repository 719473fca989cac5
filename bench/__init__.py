"""Benchmarks against peers, installed as ``ssd_core.bench``."""
