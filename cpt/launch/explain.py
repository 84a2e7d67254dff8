"""A rank's exception in one line for a person, with what to do about the few causes that are not the code's fault."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from cpt.base.errors import ENVIRONMENT, FAILED, CptError, Fenced

_MEMORY = ("can't allocate memory", "CUDA out of memory", "Cannot allocate memory")
_DISK = ("No space left on device", "Disk quota exceeded")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "Timed out waiting")
_DEVICE = ("uncorrectable ECC", "fallen off the bus", "NVLink error", "unhandled system error", "hardware error")
_IO = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN)


def explain(error: BaseException) -> dict[str, Any]:
    """`{kind, error, hints, exit_code}` of an exception that ended a rank.

    `kind` is what happened: disk, memory, connect (ranks cannot meet), lost (another rank is gone), device (a GPU
    or a link between GPUs failed), io (a disk or the way to it failed), fenced (another attempt is at work), or the
    class.
    """
    step = getattr(error, "step", None)
    found = _named(error)
    if isinstance(step, int):
        found["step"] = step
    return found


def _named(error: BaseException) -> dict[str, Any]:
    texts = [f"{one}" for one in _chain(error)]
    if isinstance(error, CptError):
        kind = "fenced" if isinstance(error, Fenced) else "io" if _is_io(error) else type(error).__name__
        return {"kind": kind, "error": error.message, "hints": list(error.hints), "exit_code": error.exit_code}
    if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in _chain(error)) or _has(
        texts, _DISK
    ):
        hints = ["checkpoints saved before are whole; free some space, then the same command goes on"]
        return {"kind": "disk", "error": "no space left on the disk", "hints": hints, "exit_code": ENVIRONMENT}
    if isinstance(error, MemoryError) or _has(texts, _MEMORY) or type(error).__name__ == "OutOfMemoryError":
        hints = ["a smaller `micro_batch_size`, `recompute: full` or more `tp` or `pp` lowers memory"]
        return {"kind": "memory", "error": f"out of memory: {_line(error)}", "hints": hints, "exit_code": ENVIRONMENT}
    if _was_connecting(error):
        hints = ["set `GLOO_SOCKET_IFNAME` or `NCCL_SOCKET_IFNAME` to the network interface that all ranks reach"]
        text = f"the ranks could not connect to each other: {_line(error)}"
        return {"kind": "connect", "error": text, "hints": hints, "exit_code": ENVIRONMENT}
    if _has(texts, _DEVICE):
        hints = ["`nvidia-smi -q` and the kernel's log of that machine say more; leave the machine out"]
        return {"kind": "device", "error": f"a GPU failed: {_line(error)}", "hints": hints, "exit_code": ENVIRONMENT}
    if _is_io(error):
        return {"kind": "io", "error": f"a disk failed: {_line(error)}", "hints": [], "exit_code": ENVIRONMENT}
    if _has(texts, _LOST):
        return {"kind": "lost", "error": f"lost touch with another rank: {_line(error)}", "exit_code": FAILED}
    return {"kind": type(error).__name__, "error": f"{type(error).__name__}: {_line(error)}", "exit_code": FAILED}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def _is_io(error: BaseException) -> bool:
    return any(isinstance(one, OSError) and one.errno in _IO for one in _chain(error))


def _has(texts: list[str], parts: tuple[str, ...]) -> bool:
    return any(part.lower() in text.lower() for text in texts for part in parts)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else "no message"


def _was_connecting(error: BaseException) -> bool:
    """Whether the error came while the process groups were being made."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name in ("init_process_group", "new_group"):
            return True
        trace = trace.tb_next
    return False
