"""Who this process is, and the few collectives that are not part of a loss."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from audiotext_dist.errors import UserError

Item = TypeVar("Item")
# For what ranks agree on without waiting for their devices; None where the process group is itself on the CPU.
_cpu_group: Any = None


@dataclass(frozen=True, kw_only=True)
class World:
    """One process among all: ``rank`` of ``size``, and the same on its own node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """As the launcher's environment variables say; alone without them.

        DeepSpeed's launcher says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE.
        """
        local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_size=int(local_size),
        )

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and speaks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's accelerator, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def is_parallel() -> bool:
    """True when a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def open_cpu_group(timeout: timedelta) -> None:
    """Give ``any_over_ranks`` and ``raise_together`` their way over the CPU; every rank calls it once, at the start."""
    global _cpu_group
    beside = is_parallel() and dist.get_backend() != "gloo"
    # Without a timeout it would take torch's own half hour, whatever the process group has.
    _cpu_group = dist.new_group(backend="gloo", timeout=timeout) if beside else None


def barrier() -> None:
    """Wait for every rank."""
    if is_parallel():
        dist.barrier()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean over ranks of a tensor that has the same shape everywhere."""
    if not is_parallel():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def max_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """The greatest over ranks of each of some numbers, as many on every rank."""
    greatest = torch.tensor(values, dtype=torch.float64, device=device)
    if is_parallel():
        dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
    found: list[float] = greatest.tolist()
    return found


def sums_over_ranks(values: Sequence[int], device: torch.device) -> list[int]:
    """The sum over ranks of each of some counts, as many on every rank."""
    totals = torch.tensor(values, dtype=torch.int64, device=device)
    if is_parallel():
        dist.all_reduce(totals)
    sums: list[int] = totals.tolist()
    return sums


def any_over_ranks(flag: bool) -> bool:
    """Whether the flag is set on any rank; agreed over the CPU, so no device has to finish its work first."""
    if not is_parallel():
        return flag
    one = torch.tensor([flag], dtype=torch.int64)
    dist.all_reduce(one, op=dist.ReduceOp.MAX, group=_cpu_group)
    return bool(one.item())


def raise_together(error: UserError | None) -> None:
    """Raise on every rank what one of them has met; return where none has.

    The ranks agree over the CPU, so no device has to finish its work first.
    """
    if not is_parallel():
        if error is not None:
            raise error
    elif any_over_ranks(error is not None):
        told = gather_items(None if error is None else str(error))
        raise UserError(next(message for message in told if message is not None))


def from_main(item: Item | None) -> Item:
    """What rank 0 holds, on every rank."""
    box: list[Any] = [item]
    if is_parallel():
        dist.broadcast_object_list(box, src=0)
    found: Item = box[0]
    return found


def gather_items(item: Item) -> list[Item]:
    """Every rank's item, in rank order, on every rank."""
    if not is_parallel():
        return [item]
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, item)
    return boxes
