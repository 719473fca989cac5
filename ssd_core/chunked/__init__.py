"""Backend "torch": the definitions of ``ssd_core.reference`` in chunks of plain PyTorch, on any device."""
