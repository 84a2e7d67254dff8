"""The one place where an error becomes text on stderr and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from cpt.base.errors import (
    ENVIRONMENT,
    FAILED,
    INTERRUPTED,
    USAGE,
    CptError,
    GuardStop,
    Interrupted,
    StoppedAndSaved,
    UsageError,
)
from cpt.base.files import closed_at

_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO}


def report(work: Callable[[], int], debug: bool = False) -> int:
    """Call `work` and give its exit code; an exception becomes its message on stderr and the exit code it stands for.

    Args:
        work: the command.
        debug: print the traceback too.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except CptError as error:
        _debug(debug)
        write_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        _debug(debug)
        write_error(CptError("interrupted"))
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe went away (`cpt plan | head`): not an error. Keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _other(error, debug)


def _other(error: Exception, debug: bool) -> int:
    name = type(error).__name__
    if name == "Exit" and hasattr(error, "exit_code"):  # typer.Exit of any typer version
        return int(error.exit_code)
    if name == "Abort":
        write_error(CptError("interrupted"))
        return INTERRUPTED
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a ClickException: wrong flags
        _debug(debug)
        write_error(_flag_error(error))
        return USAGE
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # a path of the person's
        _debug(debug)
        write_error(UsageError(f"{(error.strerror or 'no such path').lower()}: `{error.filename}`"))
        return USAGE
    if isinstance(error, OSError) and error.errno in _MACHINE:
        _debug(debug)
        where = f" `{closed_at(error.filename)}`" if isinstance(error.filename, str) else ""
        write_error(CptError(f"{(error.strerror or str(error)).lower()}{where}"))
        return ENVIRONMENT
    return _bug(error, debug)


def _bug(error: Exception, debug: bool) -> int:
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    hints = ["this is a fault of `cpt`, not of your input; please report it with the command as typed and that file"]
    try:
        fd, path = tempfile.mkstemp(prefix="cpt-traceback-", suffix=".txt")
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"command: {sys.argv}\npython: {sys.version}\n\n{text}")
        hints.insert(0, f"the traceback is in `{path}`")
    except OSError:
        debug = True
    if debug:
        sys.stderr.write(text)
    write_error(CptError(f"unexpected {message}", *hints))
    return FAILED


def _debug(debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()


def _flag_error(error: Exception) -> UsageError:
    """A wrong flag in the project's words."""
    message = str(error.format_message()).strip().rstrip(".")  # type: ignore[attr-defined]
    option = getattr(error, "option_name", None)
    possible = getattr(error, "possibilities", None) or ()
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "cpt")
    hints = [f"did you mean `{p}`?" for p in list(possible)[:1]]
    if type(error).__name__ == "NoSuchOption" and option:
        message = f"unknown flag `{option}`"
    elif message.startswith("No such command"):
        from cpt.base.registry import unknown

        name = message.split("'")[1] if "'" in message else message
        known = getattr(getattr(context, "command", None), "commands", {})
        wrong = unknown("command", name, [k for k in known if k])
        message, hints = f"`{path}` has no command `{name}`", list(wrong.hints)
    elif type(error).__name__ == "MissingParameter":
        param = getattr(error, "param", None)
        metavar = getattr(param, "metavar", None) or "argument"
        flag = next((f for f in getattr(param, "opts", ()) if f.startswith("--")), None)
        message = f"`{path}` wants " + (f"`{flag} {metavar}`" if flag else metavar)
        if "RUN" in metavar:
            from cpt.report.runs import hints as runs_there

            hints += runs_there("", Path("runs"))
    elif number := _wrong_number(error):
        message = number
    elif message:
        message = message[0].lower() + message[1:].replace("'", "`")
    return UsageError(message, *hints, f"`{path} --help` explains the command")


def _wrong_number(error: Exception) -> str | None:
    """What is wrong with a flag's number; None if that is not the error."""
    param = getattr(error, "param", None)
    kind = getattr(param, "type", None)
    name = type(kind).__name__  # IntRange, FloatParamType, ...: click's, which Typer brings along or needs
    given, what, why = getattr(error, "message", "").rpartition(" is not ")
    if not what or not name.startswith(("Int", "Float")):
        return None
    given = given.strip("'")
    flag = f"`{param.opts[0]} {given}`"  # type: ignore[union-attr]
    if not why.startswith("in the range"):
        return f"{flag}: wanted is a {'whole ' * name.startswith('Int')}number"
    least, most = getattr(kind, "min", None), getattr(kind, "max", None)
    if least is not None and float(given) < least:
        return f"{flag} is too small, the least is {least}"
    return f"{flag} is too large, the most is {most}"


def blocks(error: CptError) -> Iterator[CptError]:
    """The error and everything reported together with it, each once."""
    seen = set()
    pending = [error]
    while pending:
        one = pending.pop(0)
        pending = [*one.more, *pending]
        if (one.message, one.hints) not in seen:
            seen.add((one.message, one.hints))
            yield one


def _word(error: CptError) -> str:
    """What a line begins with: a stop that went as planned is no error."""
    if isinstance(error, StoppedAndSaved | Interrupted):
        return "note"
    return "warning" if isinstance(error, GuardStop) else "error"


def error_text(error: CptError) -> str:
    """`error: ...` lines, each followed by its own hints after an empty line.

    A stop that was asked for is a `note: ...`, and one by a guard a `warning: ...`.
    """
    lines: list[str] = []
    previous_had_hints = False
    for one in blocks(error):
        if previous_had_hints:
            lines.append("")
        lines.append(f"{_word(one)}: {printable(one.message)}")
        if one.hints:
            lines += ["", *(f"hint: {printable(h)}" for h in dict.fromkeys(one.hints))]
        previous_had_hints = bool(one.hints)
    return "\n".join(lines) + "\n"


def write_error(error: CptError, stream: TextIO | None = None) -> None:
    """Print an error for a person; the words `error` and `hint` in colour in a terminal that wants it."""
    stream = stream or sys.stderr
    text = error_text(error)
    if stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        text = "\n".join(
            f"\x1b[1;31merror:\x1b[0m{line[6:]}"
            if line.startswith("error:")
            else f"\x1b[36mhint:\x1b[0m{line[5:]}"
            if line.startswith("hint:")
            else line
            for line in text.split("\n")
        )
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        stream.write(text)
        stream.flush()


def printable(text: str, limit: int = 2000) -> str:
    """`text` on one line without control characters, so that hostile input cannot move the cursor, and not too long."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
