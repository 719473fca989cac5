"""Sums and maxima over the ranks that share a vocabulary, and what each of them has."""

from __future__ import annotations

import torch


def find(name: str):
    """The process group of this name; "" is none."""
    if not name:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def size(group) -> int:
    return 1 if group is None else group.size()


def all_reduce(tensor: torch.Tensor, how: str, group) -> torch.Tensor:
    """``tensor`` itself, reduced in place by "sum" or "max"; without a group as it is."""
    if group is not None:
        import torch.distributed as dist

        dist.all_reduce(tensor, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)
    return tensor


def all_gather(tensor: torch.Tensor, group) -> torch.Tensor:
    """(ranks, *shape): ``tensor`` of every rank, in their order."""
    import torch.distributed as dist

    found = tensor.new_empty(group.size(), *tensor.shape)
    dist.all_gather(list(found), tensor, group=group)
    return found


def total(count: int, device, group) -> int:
    """The sum of this number over the ranks."""
    return _reduced(count, "sum", device, group)


def largest(count: int, device, group) -> int:
    """The largest of this number on the ranks: whoever plans by it plans the same chunks on all of them."""
    return _reduced(count, "max", device, group)


def smallest(count: int, device, group) -> int:
    return -largest(-count, device, group)


def _reduced(count, how, device, group):
    return count if group is None else int(all_reduce(torch.tensor(count, device=device), how, group))
