"""A stage and a cluster's options to one complete batch script.

Nothing reaches the script as it is. Every value goes through a filter that says where it may stand: `q` (a word of the
shell), `sbatch` (the value of an `#SBATCH` line), `comment`, `word` (a name of ours), `verbatim` (a line of shell that
the person wrote). A value without one is an error of the template, also of a person's own.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base.errors import UsageError
from cpt.base.files import write_atomic
from cpt.launch import Work
from cpt.launch.fork import THREAD_VARIABLES

if TYPE_CHECKING:
    from cpt.launch.slurm.options import Slurm

NAME = "job.sbatch"
ARRAY_NAME = "proxies.sbatch"
TEMPLATE = Path(__file__).with_name("job.sbatch.j2")
_BARE = re.compile(r"[\w./:@+,=&|*()\[\]!%-]+", re.ASCII)


def write(options: Slurm, work: Work, members: Sequence[str] = ()) -> Path:
    """Write the script of a stage, or of an array of stages, and the folder that its log goes to.

    Args:
        members: stages of one layout that are one array of jobs; `work.stage` is then their law.

    Raises:
        UsageError: the ranks do not fit on the nodes, a path or the person's template cannot be used.
    """
    folder = _folder(work)
    path = folder / (ARRAY_NAME if members else NAME)
    text = render(options, work, members)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"`{path}` cannot be written: a folder in it has a name that is not UTF-8") from None
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return path


def log_path(work: Work, job: str, member: int | None = None) -> Path:
    """What a job of the script prints; `member` is the number of an array's element."""
    element = "" if member is None else f"_{member}"
    return _folder(work) / "logs" / f"{job_name(work, is_array=member is not None)}-{job}{element}.log"


def job_name(work: Work, *, is_array: bool = False) -> str:
    """The job's name in Slurm: it is part of a file's name, and so keeps to letters that mean nothing there."""
    name = f"{work.run_dir.name}-{work.stage}" + ("-proxies" if is_array else "")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-150:].lstrip("-.")


def render(options: Slurm, work: Work, members: Sequence[str] = ()) -> str:
    """The text of the script."""
    assert work.run_dir.is_absolute() and work.cwd.is_absolute(), "a job starts in another folder"
    nodes, per_node = shape(options, work)
    python = options.python or work.python
    values = {
        "stage": work.stage,
        "members": tuple(members),
        "run_dir": str(work.run_dir),
        "cwd": str(work.cwd),
        "layout": work.layout,
        "world_size": work.world_size,
        "nodes": nodes,
        "per_node": per_node,
        "cpus": options.cpus_per_rank,
        "python": work.python,
        "rank_python": python,
        "code": _code(),
        "thread_variables": THREAD_VARIABLES,
        "environment": options.environment,
        "variables": dict(options.variables),
        "interface": options.interface,
        "sbatch": tuple(_sbatch_options(options, work, members, nodes, per_node)),
        "srun_args": (*_container_args(options, work), *options.srun_args),
        "wrap_command": options.wrap_command,
        "requeue": options.requeue,
        "hang_after": f"{options.hang_after:g}",
        "afterwards": work.afterwards,
        "beside": work.beside,
    }
    return _fill(_template(options, work), values)


def shape(options: Slurm, work: Work) -> tuple[int, int]:
    """(nodes, ranks on each) of a job: as few nodes as hold the ranks, all with the same number.

    Raises:
        UsageError: there are more ranks than places.
    """
    ranks = work.world_size
    most = options.ranks_per_node or -(-ranks // (options.nodes or 1))
    nodes = next(n for n in range(-(-ranks // most), ranks + 1) if ranks % n == 0)
    if options.nodes is not None and nodes > options.nodes:
        places = f"{options.nodes} nodes of {most} ranks"
        raise UsageError(
            f"stage `{work.stage}` has {ranks} ranks ({work.layout}), which `launcher.nodes` and "
            f"`launcher.ranks_per_node` give no even places for: {places}"
        )
    return nodes, ranks // nodes


def _folder(work: Work) -> Path:
    return work.run_dir / "stages" / work.stage


def _code() -> str:
    """The folder that this `cpt` is imported from, where the interpreter would not find it by itself."""
    import cpt

    folder = Path(cpt.__file__).resolve().parents[1]
    return "" if folder.name in ("site-packages", "dist-packages") else str(folder)


def _sbatch_options(
    options: Slurm, work: Work, members: Sequence[str], nodes: int, per_node: int
) -> Iterator[tuple[str, Any]]:
    """Options of sbatch by name; True = without a value."""
    yield "job-name", job_name(work, is_array=bool(members))
    yield "comment", f"cpt {work.run_dir.name} {work.stage}"
    yield "chdir", str(work.cwd)
    yield "output", _pattern(_folder(work) / "logs") + ("/%x-%A_%a.log" if members else "/%x-%j.log")
    yield "open-mode", "append"
    if members:
        limit = f"%{options.array_limit}" if options.array_limit else ""
        yield "array", f"0-{len(members) - 1}{limit}"
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        if (value := getattr(options, name)) is not None:
            yield name, value
    yield "nodes", nodes
    yield "ntasks-per-node", per_node
    if options.cpus_per_rank is not None:
        yield "cpus-per-task", options.cpus_per_rank
    kind = f"{options.gres_type}:" if options.gres_type else ""
    if options.gpus == "per_node":
        yield "gpus-per-node", f"{kind}{per_node}"
    elif options.gpus == "gres":
        yield "gres", f"gpu:{kind}{per_node}"
    if options.mem is not None:
        yield "mem", options.mem
    if options.exclusive:
        yield "exclusive", True
    if options.seconds is not None:
        yield "time", _clock(options.seconds)
    yield "signal", f"{options.signal}@{options.warn}"  # to the ranks, not to this script
    yield ("requeue" if options.requeue else "no-requeue"), True
    yield "kill-on-invalid-dep", "yes"
    yield "export", options.export
    yield from options.extra.items()


def _container_args(options: Slurm, work: Work) -> tuple[str, ...]:
    """Options that pyxis adds to srun. On srun only: a job inside of a container could start no ranks."""
    if options.container is None:
        return ()
    folders = [str(work.run_dir), str(work.cwd), *filter(None, [_code()])]
    for folder in folders:
        if re.search(r"[,:]", folder):
            raise UsageError(f"`{folder}` cannot be mounted into a container: its name has a `,` or `:`")
    mounts = dict.fromkeys([*(f"{folder}:{folder}" for folder in folders), *options.container["mounts"]])
    workdir = options.container.get("workdir", str(work.cwd))
    return (
        f"--container-image={options.container['image']}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={workdir}",
        "--no-container-mount-home",
    )


def _pattern(folder: Path) -> str:
    """A folder as it is written into a pattern of file names of Slurm's."""
    if "\\" in str(folder):
        raise UsageError(f"Slurm writes no log into `{folder}`: the name has a backslash")
    return str(folder).replace("%", "%%")


def _clock(seconds: float) -> str:
    """`D-HH:MM:SS`. Slurm rounds up to whole minutes by itself."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:{rest:02d}"


def _template(options: Slurm, work: Work) -> Path:
    if options.template is None:
        return TEMPLATE
    path = work.cwd / Path(options.template).expanduser()
    if not path.is_file():
        raise UsageError(
            f"`launcher.template`: there is no file `{path}`", f"yours can start as a copy of `{TEMPLATE}`"
        )
    return path


class _Filtered(str):
    """Text that has been made fit for its place."""


def _quoted(value: Any) -> str:
    """A word of the shell; a list gives several."""
    words = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
    for word in words:
        if "\0" in word or "\r" in word:  # sbatch takes no script with line ends of another system
            raise UsageError(f"`{_comment(word)}` cannot be written into a script: it has control characters")
    return _Filtered(" ".join(shlex.quote(word) for word in words))


def _sbatch(value: Any) -> str:
    """The value of an `#SBATCH` line, which ends at its line's end and where `#` begins a comment."""
    text = str(value)
    if not text.isprintable() or not text:
        raise UsageError(
            f"`{_comment(text)}` cannot be written on an `#SBATCH` line: it has characters that cannot be printed"
        )
    if _BARE.fullmatch(text):
        return _Filtered(text)
    return _Filtered('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')


def _comment(value: Any) -> str:
    """Text that stays on the comment line that it is put on."""
    return _Filtered("".join(c if c.isprintable() else "?" for c in str(value)))


def _word(value: Any) -> str:
    """A name of ours: of an option or a variable."""
    assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", str(value)), f"{value!r} is no plain word"
    return _Filtered(str(value))


def _verbatim(value: Any) -> str:
    """A line of shell that the person wrote."""
    assert str(value).isprintable(), f"{value!r} is more than a line"
    return _Filtered(str(value))


def _fill(path: Path, values: dict[str, Any]) -> str:
    """The template with its values.

    Raises:
        UsageError: it is not a template, or puts a value where none may stand.
    """
    import jinja2

    def final(value: Any) -> Any:
        if isinstance(value, jinja2.Undefined | _Filtered) or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise UsageError(
            f"`{path.name}` puts `{_comment(value)}` into the script as it is",
            "every value goes through `q`, `sbatch`, `comment`, `word` or `verbatim`",
        )

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # it is no HTML: `final` sees that every value is quoted for the shell
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=final,
    )
    environment.filters |= {
        "q": _quoted, "sbatch": _sbatch, "comment": _comment, "word": _word, "verbatim": _verbatim
    }  # fmt: skip
    try:
        text = environment.from_string(path.read_text(encoding="utf-8")).render(values)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"`{path}` is not a template, line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise UsageError(f"`{path}` cannot be filled in: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"`{path}` cannot be read: {error}") from None
    if not text.startswith("#!"):
        raise UsageError(f"`{path}` makes no script: its first line must begin with `#!`")
    return text
