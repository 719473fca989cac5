"""Triton kernels of ssd-core, installed as ``ssd_core.kernels``. They come with backend "triton"."""
