"""The command `cpt`. One grammar: `cpt COMMAND [--flags] key=value ...`.

A command is a file `cpt/cli/<name>.py` plus its line in `COMMANDS` below. The file defines either

    def command(overrides: Overrides = None, json: Json = False, ...) -> int | None:   one command, or
    commands = {"list": list_corpora, "show": show_corpus, "": list_corpora}           a group; "" = no subcommand given

with flags as Typer annotations (shared ones in `cpt.cli.flags`). The docstring is the help. A command returns an exit
code or nothing, and raises `CptError` for everything a person should read. `--debug`, `--quiet`, `--verbose` and `-h`
are added to every command here. A command's file is imported only when the command is called, and imports nothing heavy
at its top, so that its own `--help` is quick too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any

from cpt.cli import failures


@dataclass(frozen=True)
class Command:
    """A line of `cpt --help`."""

    group: str
    help: str  # one line without a full stop


PLAN, LOOK, DATA, LAWS, SETUP = "plan and run", "look", "data and checkpoints", "laws", "setup"

COMMANDS = {
    "plan": Command(PLAN, "Show what a run would do, checked, with its cost; start nothing"),
    "run": Command(PLAN, "Do what a recipe says, or go on with what is not done yet"),
    "resume": Command(PLAN, "Go on with what is not done of a run"),
    "cancel": Command(PLAN, "Stop a run, saved"),
    "recipes": Command(PLAN, "List recipes, show every key of one, start your own from one"),
    "status": Command(LOOK, "How far a run is"),
    "logs": Command(LOOK, "The steps of a stage, and what its ranks wrote"),
    "report": Command(LOOK, "Write one page about a run that opens without network"),
    "lineage": Command(LOOK, "The chain of a checkpoint back to its base model"),
    "diff": Command(LOOK, "How two plans or runs differ, value by value"),
    "sync": Command(LOOK, "Send an offline run to wandb"),
    "data": Command(DATA, "Prepare corpora and look at them"),
    "ckpt": Command(DATA, "List, show, verify, compare and average checkpoints"),
    "convert-ckpt": Command(DATA, "Convert a checkpoint to another format"),
    "sample": Command(DATA, "Print a continuation of a text by a checkpoint"),
    "fit-law": Command(LAWS, "Fit a law to small runs and ask it for the best mixture"),
    "predict": Command(LAWS, "Losses that a saved law predicts, or the mixture it recommends"),
    "infer-mixture": Command(LAWS, "Which mixture of texts a BPE tokenizer was trained on"),
    "doctor": Command(SETUP, "Check machine, packages and data for what is missing"),
}

INTRODUCTION = """usage: cpt COMMAND [--flags] key=value ...

Continual pretraining as one reproducible command. Flags change how a command behaves, keys change the run.
"""
CLOSING = """`cpt COMMAND --help` explains a command, `cpt recipes show NAME` lists every key of a recipe.
First time: `cpt run recipe=demo` trains a small model through all stages on this machine.
"""


def available() -> dict[str, Command]:
    """The commands whose file is there, in the order of help."""
    here = Path(__file__).parent
    return {name: c for name, c in COMMANDS.items() if (here / f"{_module_name(name)}.py").is_file()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; ends the process with its exit code when called as the console script."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that lacks `≈` shows `?` instead
            stream.reconfigure(errors="replace")
    code = failures.report(lambda: dispatch(argv), debug="--debug" in argv)
    if arguments is None:
        sys.exit(code)
    return code


def dispatch(argv: list[str]) -> int:
    """Import the one command that `argv` names and call it.

    Raises:
        UsageError: unknown command or flag.
    """
    from cpt.base.errors import UsageError
    from cpt.base.registry import unknown

    words = [a for a in argv if a != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        from cpt import __version__

        sys.stdout.write(f"cpt {__version__}\n")
        return 0
    name = words[0]
    if name not in available():
        if name.startswith("-"):
            raise UsageError(f"`{name}` is not a flag of `cpt` itself", "`cpt COMMAND [--flags] key=value ...`")
        if "=" in name:
            raise UsageError(f"`{name}` is a key, and no command was given", f"did you mean `cpt plan {name}`?")
        error = unknown("command", name, available())
        raise UsageError(error.message, *error.hints, "`cpt --help` lists the commands")
    position = argv.index(name)
    result = _typer(name)(argv[:position] + argv[position + 1 :], prog_name=f"cpt {name}", standalone_mode=False)
    return result if isinstance(result, int) else 0


def help_text() -> str:
    """What `cpt` alone and `cpt --help` print: the commands by group."""
    commands = available()
    width = max(len(name) for name in commands)
    lines = [INTRODUCTION]
    for group in (PLAN, LOOK, DATA, LAWS, SETUP):
        members = [f"  {name:<{width}}  {c.help}" for name, c in commands.items() if c.group == group]
        if members:
            lines += [f"{group}:", *members, ""]
    return "\n".join([*lines, CLOSING])


def _module_name(command: str) -> str:
    return command.replace("-", "_")


def _typer(name: str) -> Callable[..., Any]:
    import importlib

    import typer

    from cpt.cli.flags import with_common_flags

    module: ModuleType = importlib.import_module(f"cpt.cli.{_module_name(name)}")
    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=settings)
    if hasattr(module, "commands"):
        callback = _group_callback(module.commands.get(""))
        app.callback(invoke_without_command=True, help=COMMANDS[name].help)(callback)
        for sub, function in module.commands.items():
            if sub:
                app.command(sub, context_settings=settings)(with_common_flags(function))
    else:
        app.command(name, context_settings=settings)(with_common_flags(module.command))
    return app


def _group_callback(default: Callable[..., Any] | None) -> Callable[..., None]:
    """What a group does without a subcommand: its `""` entry with that one's flags, else its help."""
    import inspect

    import typer

    from cpt.cli.flags import with_common_flags

    chosen = with_common_flags(default) if default else None
    parameters = list(inspect.signature(chosen).parameters.values()) if chosen else []
    first = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    def callback(context: Any, **values: Any) -> None:
        if context.invoked_subcommand is None:
            if chosen is None:
                sys.stdout.write(context.get_help() + "\n")
                raise typer.Exit(0)
            raise typer.Exit(chosen(**values) or 0)

    callback.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    callback.__annotations__ = {p.name: p.annotation for p in [first, *parameters]}
    return callback
