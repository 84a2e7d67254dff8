"""What a person says about a cluster, and the launcher that hands stages to its queue."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.registry import nearest, unknown
from cpt.base.units import parse_duration, show_duration
from cpt.launch import LAUNCHERS, Work
from cpt.launch.batch import Batch, Inside, JobState, Order

GPUS = ("none", "per_node", "gres")
EXPORTS = ("ALL", "NONE")
SIGNALS = ("USR2", "USR1", "INT", "TERM", "HUP")
CONTAINER = ("image", "mounts", "workdir")
# Options of sbatch that the script sets itself, and what a person sets instead.
OWN = {
    **dict.fromkeys(("partition", "account", "qos", "constraint", "reservation", "time", "nodes", "mem"), ""),
    **dict.fromkeys(("exclusive", "signal", "requeue", "export"), ""),
    "no-requeue": "requeue",
    "cpus-per-task": "cpus_per_rank",
    "ntasks-per-node": "ranks_per_node",
    "gpus-per-node": "gpus` and `launcher.ranks_per_node",
    "gres": "gpus` and `launcher.gres_type",
    "array": "array_limit",
}
FORBIDDEN = (
    *("job-name", "output", "error", "input", "open-mode", "chdir", "dependency", "kill-on-invalid-dep", "comment"),
    *("ntasks", "wrap", "parsable", "test-only", "wait", "hold", "export-file", "get-user-env", "uid", "gid"),
)
# What the script or the ranks set themselves: a value from outside would give ranks wrong numbers.
RESERVED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
MOST_WARN = 65_535  # seconds that sbatch takes
EARLY = 60.0  # seconds by which Slurm's warning may come before it was asked for
_WORD = re.compile(r"[\w.:@+-]+", re.ASCII)
_LIST = re.compile(r"[\w.:@+,-]+", re.ASCII)
_CONSTRAINT = re.compile(r"[\w.:@+,&|*()\[\]!-]+", re.ASCII)
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
Seconds = float  # given as a length of time: `180`, `3m`
_MEMORY = re.compile(r"\d+[KMGT]?")


def _free(kind: str) -> dict[str, str]:
    """Metadata of an option that its class reads by itself."""
    return {"unit": kind}


@LAUNCHERS.add("slurm")
@dataclass(frozen=True, kw_only=True)
class Slurm(Batch):
    """Hand one batch job a stage to Slurm, all at once, each waiting for what it needs.

    Args:
        partition: where jobs run; several with `,`
        account: that pays
        qos: quality of service
        constraint: features that nodes must have
        reservation: to run in
        time: limit of one job, such as `4h`, `90m` or `1-12:00:00`; a stage that needs longer goes on in the next
        nodes: most nodes that a job takes; by default as many as its ranks need
        ranks_per_node: most ranks on a node, which is its number of GPUs
        gpus: how GPUs are asked for: `none`, `per_node` (--gpus-per-node) or `gres` (--gres)
        gres_type: kind of GPU, such as `a100`
        cpus_per_rank: cores of a rank, and threads that it computes with
        mem: memory of a node, such as `64G`; `0` is all of it
        exclusive: take whole nodes
        extra: further options of sbatch, such as `{mail-type: END, nice: 100, contiguous: true}`
        environment: lines of shell that each job runs first, such as `module load cuda`
        variables: environment variables of each job
        export: `ALL` hands on the environment of the shell that submits, `NONE` only what is here
        interface: network interfaces of the ranks by name or its beginning, such as `ib`; the first that is there
        srun_args: further options of srun
        wrap_command: put before each rank's command, such as `[apptainer, exec, --nv, /images/cpt.sif]`
        container: of pyxis: `{image: ..., mounts: [/data], workdir: ...}`
        python: interpreter of the ranks, for a container that has its own; by default the one that submits
        signal: that ranks get before the time limit
        warn: so long before the time limit they get it
        requeue: the cluster lets jobs go back to its queue
        successors: further jobs of a stage that wait for it to end unfinished, where `requeue` is false
        max_attempts: most attempts at a stage
        retries: most attempts in a row that a fault of the machine or a preemption ended without a step gained
        array_limit: most proxies of a law that run at once
        template: Jinja template of your own, instead of the one that comes with `cpt`
        hang_after: no rank gains anything for so long: the attempt is ended, and the stacks are kept; 0 = never
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time: str | None = None
    nodes: int | None = None
    ranks_per_node: int | None = None
    gpus: str = "none"
    gres_type: str | None = None
    cpus_per_rank: int | None = None
    mem: str | None = None
    exclusive: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, metadata=_free("mapping"))
    environment: Sequence[str] = field(default=(), metadata=_free("list of lines"))
    variables: Mapping[str, str] = field(default_factory=dict, metadata=_free("mapping"))
    export: str = "ALL"
    interface: Sequence[str] = field(default=(), metadata=_free("list of names"))
    srun_args: Sequence[str] = field(default=(), metadata=_free("list of texts"))
    wrap_command: Sequence[str] = field(default=(), metadata=_free("list of texts"))
    container: Mapping[str, Any] | None = field(default=None, metadata=_free("mapping"))
    python: str | None = None
    signal: str = "USR2"
    warn: Seconds = field(default=180, metadata=_free("length of time [s]"))
    requeue: bool = True
    successors: int = 0
    max_attempts: int = 20
    retries: int = 3
    array_limit: int | None = None
    template: str | None = None
    hang_after: Seconds = field(default=1800.0, metadata=_free("length of time [s]"))

    def __post_init__(self) -> None:
        for name in ("partition", "account", "qos", "reservation"):
            self._text(name, _LIST, "letters, digits and `.`, `,`, `:`, `_`, `-`, `+`, `@`")
        self._text("constraint", _CONSTRAINT, "features joined by `&`, `|` and `,`, without blanks")
        self._text("gres_type", _WORD, "a word such as `a100`")
        self._text("mem", _MEMORY, "an amount such as `64G` or `500M`, or `0` for all of a node")
        for name in ("python", "template"):
            self._text(name)
        self._choice("gpus", GPUS)
        self._choice("export", EXPORTS)
        self._choice("signal", SIGNALS)
        for name in ("exclusive", "requeue"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "`true` or `false`")
        for name in ("nodes", "ranks_per_node", "cpus_per_rank", "array_limit"):
            self._whole(name, 1)
        self._whole("max_attempts", 1)
        for name in ("successors", "retries"):
            self._whole(name, 0)
        self._set("warn", int(_seconds("warn", self.warn, 1, MOST_WARN)))
        self._set("hang_after", _seconds("hang_after", self.hang_after, 0, 10 * 86400))
        for name in ("interface", "srun_args", "wrap_command", "environment"):
            self._list(name)
        self._check_interface()
        self._check_time()
        self._set("extra", _extra(self.extra))
        self._set("variables", _variables(self.variables))
        self._set("container", _container(self.container))
        self._check_together()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _text(self, name: str, form: re.Pattern[str] | None = None, wanted: str = "a text on one line") -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, int) and not isinstance(value, bool):  # `mem: 0`, `account: 1234`
            value = str(value)
        if not _is_line(value) or not value.strip() or (form is not None and not form.fullmatch(value)):
            raise _wrong(name, value, wanted)
        self._set(name, value)

    def _choice(self, name: str, options: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in options:
            near = nearest(str(value), options)
            hints = [f"did you mean `{near}`?"] if near else []
            raise _wrong(name, value, "one of " + ", ".join(f"`{o}`" for o in options), *hints)

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None and least == 1 and name != "max_attempts":
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least or value > 10**6:
            raise _wrong(name, value, f"a whole number of at least {least}")

    def _list(self, name: str) -> None:
        value = getattr(self, name)
        found = (value,) if isinstance(value, str) else value
        if found is None:
            found = ()
        if not isinstance(found, list | tuple):
            raise _wrong(name, value, "a list of texts")
        for entry in found:
            if not isinstance(entry, str):
                raise _wrong(name, entry, "a list of texts", *_quote(entry))
            if not _is_line(entry) or not entry.strip():
                raise _wrong(name, entry, "a text on one line, without control characters")
        self._set(name, tuple(found))

    def _check_interface(self) -> None:
        for name in self.interface:
            if not _WORD.fullmatch(name):
                raise _wrong("interface", name, "the name of a network interface or its beginning, such as `ib`")

    def _check_time(self) -> None:
        if self.time is None:
            return
        text = str(self.time).strip()
        if isinstance(self.time, bool) or re.fullmatch(r"[\d.]+", text) or not _is_line(text):
            wanted = "a length of time with its unit, such as `90m`, `4h` or `1-12:00:00`"
            raise _wrong("time", self.time, wanted, "YAML takes `4:00:00` for a number when it is not in quotes")
        try:
            seconds = parse_duration(text)
        except UsageError as error:
            raise UsageError(f"`launcher.time`: {error.message}", *error.hints) from None
        if not 60 <= seconds <= 366 * 86400:
            raise _wrong("time", text, "from a minute to a year; left out, the partition's own limit holds")
        self._set("time", text)
        if self.warn >= seconds:
            raise UsageError(
                f"`launcher.warn` is {self.warn} s, which is not before the end of `launcher.time` of `{text}`"
            )

    def _check_together(self) -> None:
        if self.gpus == "none" and self.gres_type is not None:
            raise UsageError(
                "`launcher.gres_type` would have no effect: `launcher.gpus` is `none`",
                "`gpus: gres` or `gpus: per_node` asks for GPUs",
            )
        if self.gpus != "none" and self.ranks_per_node is None:
            raise UsageError(
                f"`launcher.gpus` is `{self.gpus}`, and `launcher.ranks_per_node` is missing: each rank has one GPU"
            )
        if self.successors and self.requeue:
            raise UsageError(
                "`launcher.successors` would have no effect: `launcher.requeue` is true",
                "`requeue: false` where the cluster takes no job back",
            )
        if self.container is not None and self.wrap_command:
            raise UsageError("`launcher.container` and `launcher.wrap_command` are two ways to the same: give one")

    @property
    def seconds(self) -> float | None:
        """Time limit of a job [s]; None = the partition's."""
        return None if self.time is None else parse_duration(self.time)

    @property
    def work_seconds(self) -> float | None:
        return None if self.seconds is None else self.seconds - min(self.warn, self.seconds / 2)

    def num_devices(self) -> int | None:
        if self.nodes is None or self.ranks_per_node is None:
            return None
        return self.nodes * self.ranks_per_node

    def describe(self, work: Work) -> str:
        from cpt.launch.slurm import script

        nodes, ranks = script.shape(self, work)
        text = f"{nodes} node{'s' if nodes > 1 else ''} of {ranks} rank{'s' if ranks > 1 else ''}"
        return f"{text}, at most {show_duration(self.seconds)}" if self.seconds is not None else text

    def write_script(self, work: Work, members: Sequence[str] = ()) -> Path:
        from cpt.launch.slurm import script

        return script.write(self, work, members)

    def check(self, work: Work) -> None:
        from cpt.launch.slurm import script
        from cpt.launch.slurm.commands import Commands

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / script.NAME
            path.write_text(script.render(self, work), encoding="utf-8")
            Commands().refuse_hopeless(path)

    def log_of(self, work: Work, id: str, member: int | None = None) -> Path:
        from cpt.launch.slurm import script

        return script.log_path(work, id, member)

    def inside(self, environ: Mapping[str, str]) -> Inside | None:
        id = environ.get("SLURM_JOB_ID")
        if id is None:
            return None
        if "SLURM_ARRAY_TASK_ID" in environ:
            id = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
        left = self._seconds_left(id, environ)
        if left is None:
            return Inside(id=id)
        end = time.time() + left
        # A limit that the partition sets may be shorter than the warning: half of what is left is work.
        return Inside(id=id, stop_at=end - min(self.warn, left / 2), warned_from=end - self.warn - EARLY)

    def _seconds_left(self, id: str, environ: Mapping[str, str]) -> float | None:
        """Until the job's limit [s]; Slurm tells jobs themselves from 23.02 on, before that it is asked."""
        if (end := environ.get("SLURM_JOB_END_TIME", "")).isdigit():
            return max(0.0, int(end) - time.time())
        found = self.ask([id]).get(id)
        if found is not None and found.seconds_left is not None:
            return found.seconds_left
        return self.seconds

    def submit(self, order: Order) -> str:
        from cpt.launch.slurm.commands import Commands

        text = dependency(order.after, order.after_failed)
        return Commands().submit(order.script, order.token, text)

    def find(self, token: str) -> str | None:
        from cpt.launch.slurm.commands import Commands

        return Commands().find(token)

    def of_run(self, run_dir: Path) -> dict[str, str]:
        from cpt.launch.slurm.commands import Commands

        return Commands().printing_into(run_dir / "stages")

    def ask(self, ids: Sequence[str]) -> dict[str, JobState]:
        from cpt.launch.slurm.commands import Commands
        from cpt.launch.slurm.states import ask

        return ask(Commands(), ids)

    def lost(self, hosts: Sequence[str]) -> list[str]:
        from cpt.launch.slurm.commands import Commands
        from cpt.launch.slurm.states import lost

        return lost(Commands(), hosts)

    def cancel(self, ids: Sequence[str]) -> None:
        from cpt.launch.slurm.commands import Commands

        Commands().cancel(ids)

    def ask_to_stop(self, ids: Sequence[str]) -> None:
        from cpt.launch.slurm.commands import Commands

        Commands().signal(ids, self.signal)


def dependency(after: Sequence[Sequence[str]], after_failed: str | None = None) -> str | None:
    """What sbatch's `--dependency` takes; None for nothing.

    Slurm joins conditions by `,` (all) or by `?` (one of them), never by both. Where both are meant, a job waits until
    all alternatives have *ended*: which of them ended well is then seen by the job itself, which reads its parents'
    state before anything else and ends at once if none has.
    """
    wanted = [tuple(dict.fromkeys(one)) for one in after if one]
    for job in [*(job for one in wanted for job in one), *([after_failed] if after_failed else [])]:
        assert re.fullmatch(r"\d+(_\d+)?", job), f"`{job}` is not the id of a job"
    choices = [one for one in wanted if len(one) > 1]
    if len(wanted) == 1 and choices and not after_failed:
        return "?".join(f"afterok:{job}" for job in wanted[0])
    parts = []
    if single := list(dict.fromkeys(one[0] for one in wanted if len(one) == 1)):
        parts.append("afterok:" + ":".join(single))
    if choices:
        parts.append("afterany:" + ":".join(dict.fromkeys(job for one in choices for job in one)))
    if after_failed:
        parts.append(f"afternotok:{after_failed}")
    return ",".join(parts) or None


def _is_line(value: object) -> bool:
    """Whether a value is a text that stays on its line, however a reader splits lines."""
    return isinstance(value, str) and value.isprintable()


def _wrong(name: str, value: object, wanted: str, *hints: str) -> UsageError:
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
    text = "".join(c if c.isprintable() else "?" for c in shown)
    return UsageError(f"`launcher.{name}` is `{text if len(text) <= 60 else text[:59] + '…'}`, wanted {wanted}", *hints)


def _quote(value: object) -> list[str]:
    return ["numbers, `true` and `false` in it are written in quotes"] if isinstance(value, bool | int | float) else []


def _seconds(name: str, value: object, least: float, most: float) -> float:
    try:
        found = parse_duration(value)
    except UsageError as error:
        raise UsageError(f"`launcher.{name}`: {error.message}", *error.hints) from None
    if not least <= found <= most:
        raise _wrong(name, value, f"from {least:g} s to {most:g} s")
    return found


def _mapping(name: str, value: object) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "a mapping")
    return value


def _extra(value: object) -> dict[str, Any]:
    """Options of sbatch by their long names, without `--`."""
    found: dict[str, Any] = {}
    for key, given in _mapping("extra", value).items():
        name = str(key).removeprefix("--")
        where = f"extra.{name}"
        if not _OPTION.fullmatch(name):
            raise _wrong("extra", key, "long names of sbatch's options, such as `mail-type`")
        if name in OWN:
            raise UsageError(f"`launcher.{where}` is set by `launcher.{OWN[name] or name}`")
        if name in FORBIDDEN:
            raise UsageError(f"`launcher.{where}` cannot be set: `cpt` needs its own")
        if given is False or given is None:
            continue
        plain = isinstance(given, str | int | float) and _is_line(str(given)) and str(given).strip()
        if given is not True and not plain:
            raise _wrong(where, given, "a text on one line, a number, or `true`")
        found[name] = given
    return found


def _variables(value: object) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, given in _mapping("variables", value).items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise _wrong("variables", name, "names of environment variables")
        if name in RESERVED or name.startswith(("SLURM_", "SBATCH_", "SRUN_")):
            raise UsageError(f"`launcher.variables.{name}` cannot be set: it tells ranks who they are")
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            hint = "`true` and `false` are written in quotes"
            raise _wrong(f"variables.{name}", given, "a text", *([hint] if isinstance(given, bool) else []))
        if not _is_line(str(given)):
            raise _wrong(f"variables.{name}", given, "a text on one line")
        found[name] = str(given)
    return found


def _container(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    given = {"image": value} if isinstance(value, str) else _mapping("container", value)
    for key in given:
        if key not in CONTAINER:
            error = unknown("key", f"launcher.container.{key}", [f"launcher.container.{k}" for k in CONTAINER])
            raise UsageError(error.message, *error.hints)
    check: Callable[[Any], bool] = lambda text: _is_line(text) and bool(text.strip())  # noqa: E731
    if not check(given.get("image")):
        raise _wrong(
            "container.image", given.get("image"), "an image, such as `/images/cpt.sqsh` or `nvcr.io#nvidia/x`"
        )
    mounts = given.get("mounts") or ()
    mounts = (mounts,) if isinstance(mounts, str) else tuple(mounts)
    for mount in mounts:
        if not check(mount) or "," in mount or not str(mount).startswith("/"):
            raise _wrong("container.mounts", mount, "absolute folders such as `/data` or `/scratch/me:/scratch`")
    found: dict[str, Any] = {"image": given["image"], "mounts": [str(m) for m in mounts]}
    if (workdir := given.get("workdir")) is not None:
        if not check(workdir) or not workdir.startswith("/"):
            raise _wrong("container.workdir", workdir, "an absolute folder")
        found["workdir"] = workdir
    return found
