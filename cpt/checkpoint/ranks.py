"""What the ranks of a save or load agree on: an error on one is raised on all, so that nobody waits for ever."""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from cpt.base.errors import CptError, StageFailed

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Ranks:
    """The ranks of this job on a group of their own, so that a background save never mixes with training.

    Works without torch.distributed as a single rank.
    """

    def __init__(self, timeout_s: float = 7200.0) -> None:
        import torch.distributed as dist

        self.group: Any = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            if self.size > 1:
                self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def all(self, value: T) -> list[T]:
        """`value` of every rank, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all(None)

    def on_first(self, call: Callable[[], T]) -> T:
        """What `call` gives on the first rank, on all ranks.

        Raises:
            What `call` raised, on all ranks.
        """
        value: Any = None
        error: BaseException | None = None
        if self.rank == 0:
            try:
                value = call()
            except Exception as raised:
                error = raised
        if self.size == 1:
            if error is not None:
                raise error
            return value
        import torch.distributed as dist

        answer = [(value, None if error is None else as_message(error, 0))]
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if error is not None:
            raise error
        if answer[0][1] is not None:
            raise answer[0][1]
        return answer[0][0]

    @contextlib.contextmanager
    def together(self) -> Iterator[list[Any]]:
        """A block that all ranks leave together: normally, or all with the first rank's error that has one.

        Gives a list; what a rank puts into it, all ranks find in it afterwards (one entry for each rank).
        """
        box: list[Any] = []
        error: Exception | None = None
        try:
            yield box
        except Exception as raised:
            error = raised
        answers = self.all((box[0] if box else None, None if error is None else as_message(error, self.rank)))
        failed = next((e for _, e in answers if e is not None), None)
        if error is not None:
            raise error
        if failed is not None:
            raise failed
        box[:] = [value for value, _ in answers]


def as_message(error: BaseException, rank: int) -> CptError:
    """An error as one that can travel to other ranks: our own as it is, any other with its traceback as text."""
    if isinstance(error, CptError):
        return error
    text = "".join(traceback.format_exception(error)).strip()
    return StageFailed(f"rank {rank}: {type(error).__name__}: {error}", text)


def is_disk_full(error: OSError) -> bool:
    """Whether the disk or the quota has no room left."""
    return error.errno in _FULL
