"""Flags and arguments that mean the same in every command, and what a command prints with."""

from __future__ import annotations

import functools
import inspect
import json as _json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cpt.base.files import without_nan
from cpt.cli.failures import printable

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value ...", help="`recipe=NAME` picks the run, other keys change it.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else to stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; take the stated default.")]

_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and warnings; results and errors only.")]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass
class Talk:
    """How much this process says; set once from the flags of the command."""

    quiet: bool = False
    verbose: bool = False
    debug: bool = False


talk = Talk()


def with_common_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with `--quiet`, `--verbose` and `--debug` added; they set `talk`."""
    signature = inspect.signature(function, eval_str=True)
    common = {"quiet": _Quiet, "verbose": _Verbose, "debug": _Debug}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in common.items()
        if name not in signature.parameters
    ]

    @functools.wraps(function)
    def wrapper(**values: Any) -> Any:
        for name in common:
            setattr(talk, name, bool(values.get(name, False)))
        return function(**{k: v for k, v in values.items() if k in signature.parameters})

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    wrapper.__signature__ = signature.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*parameters, *added]}
    return wrapper


def result(text: str) -> None:
    """Print a result to stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def result_json(value: Any) -> None:
    """Print one JSON value to stdout."""
    result(_json.dumps(without_nan(value), indent=1, ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """Print a `note:` line to stderr unless `--quiet`."""
    if not talk.quiet:
        sys.stderr.write(f"note: {printable(text)}\n")


def warning(text: str) -> None:
    """Print a `warning:` line to stderr unless `--quiet`."""
    if not talk.quiet:
        sys.stderr.write(f"warning: {printable(text)}\n")
