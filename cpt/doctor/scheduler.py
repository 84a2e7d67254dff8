"""The queue that a launcher hands jobs to: would it take them, and what does it do with them. Submits nothing.

One function a check. Each asks Slurm with a time limit, and all together have another: a controller that is away is
named once, and the checks that need it are left out.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.base.errors import CptError
from cpt.base.file_systems import file_system, is_network
from cpt.base.registry import nearest
from cpt.base.units import show_duration
from cpt.doctor.check import Check, Status
from cpt.launch import Launcher, Work
from cpt.launch.rendezvous import own_address
from cpt.launch.slurm.commands import SEPARATOR, Away, Commands, TryLater, parse_limit, why

if TYPE_CHECKING:
    from cpt.launch.slurm.options import Slurm

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
TRIED = "22.05"  # the release that this was tried with
ALL_SECONDS, ONE_SECONDS = 7.0, 4.0  # for all questions together, and for one
CLOCK_SECONDS = 3.0  # clocks that differ by more are named
FAR_SECONDS = 366 * 86400  # a promised start that is further away means nothing
EARLY_SECONDS = 60.0  # Slurm may send the signal before the limit so much earlier than asked
SHORT_SECONDS = 60.0  # a save of a large model may take longer
_OWN = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_USABLE = ("idle", "mixed", "allocated", "completing", "reserved", "planned", "allocating", "powered_down")
_GPU = re.compile(r"\bgpu(?::([A-Za-z_][\w.-]*))?:(\d+)")


@dataclass(kw_only=True)
class Asked:
    """Slurm's answers, each asked for once, all within one time limit."""

    commands: Commands
    end: float = field(default_factory=lambda: time.monotonic() + ALL_SECONDS)
    answers: dict[tuple[str, ...], str] = field(default_factory=dict)

    def ask(self, *arguments: str) -> str:
        """What a command prints.

        Raises:
            CptError: it is not there, gives no answer in time, or complains.
        """
        if arguments not in self.answers:
            left = self.end - time.monotonic()
            if left <= 0:
                raise Away(f"`{arguments[0]}` was not asked: Slurm is too slow, {ALL_SECONDS:g} s are over")
            said = self.commands.run(*arguments, seconds=min(left, ONE_SECONDS))
            if said.code != 0:
                raise CptError(f"`{' '.join(arguments[:3])}`: {why(said)}")
            self.answers[arguments] = said.out
        return self.answers[arguments]

    def config(self) -> Mapping[str, str]:
        """The cluster's settings."""
        pairs = (line.partition("=") for line in self.ask("scontrol", "show", "config").splitlines() if "=" in line)
        return {name.strip(): value.strip() for name, _, value in pairs}

    def partitions(self) -> dict[str, Mapping[str, str]]:
        """The settings of every partition, by name."""
        lines = self.ask("scontrol", "-a", "-o", "show", "partition").splitlines()
        found = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
        return {one["PartitionName"]: one for one in found if "PartitionName" in one}

    def chosen(self, options: Slurm) -> dict[str, Mapping[str, str]]:
        """The partitions that a job would go to."""
        known = self.partitions()
        if options.partition is None:
            return {n: p for n, p in known.items() if p.get("Default") == "YES"}
        return {n: known[n] for n in options.partition.split(",") if n in known}


def checks(
    name: str,
    launcher: Launcher,
    runs: Path,
    cache: Path,
    commands: Commands | None = None,
    work: Work | None = None,
) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Every check of a launcher, with its name.

    Args:
        name: that the launcher is known by.
        runs: where run folders go.
        cache: where prepared corpora go.
        work: the stage that the queue is asked about; None = a made-up one of as many ranks as a job may have.
    """
    from cpt.launch.slurm.options import Slurm

    if not isinstance(launcher, Slurm):
        yield "launcher", lambda: _devices(name, launcher)
        return
    asked = Asked(commands=commands or Commands())
    is_there: list[Check] = []

    def noted(check: Callable[[], Check]) -> Check:
        is_there.append(Check("fail", "", ""))  # also when it breaks
        is_there[-1] = check()
        return is_there[-1]

    yield "slurm", lambda: noted(lambda: _installed(asked))
    if is_there[-1].status == "fail":
        return
    yield "controller", lambda: noted(lambda: _controller(asked))
    if is_there[-1].status == "fail":
        return
    options = launcher
    yield "partition", lambda: _partition(asked, options)
    yield "account", lambda: _account(asked, options)
    if _has_partition(asked, options):
        yield "nodes", lambda: _nodes(asked, options, work)
        yield "submission", lambda: _submission(asked, options, runs, work)
    yield "requeue", lambda: _requeue(asked, options)
    yield "stops", lambda: _stops(asked, options)
    yield "arrays", lambda: _arrays(asked, options)
    yield "clock", lambda: _clock(asked)
    if options.container is not None:
        yield "container", lambda: _container(asked)
    if options.wrap_command or (options.python is not None and options.container is None):
        yield "command", lambda: _command(asked, options)
    if options.interface:
        yield "interface", lambda: _interface(options)
    yield "shared files", lambda: _shared(runs, cache, options)


def _has_partition(asked: Asked, options: Slurm) -> bool:
    try:
        return bool(asked.chosen(options))
    except CptError:
        return False


def _devices(name: str, launcher: Launcher) -> Check:
    count = launcher.num_devices()
    if count is None:
        return Check("ok", "launcher", f"`{name}`: as many ranks as a stage's layout needs")
    return Check("ok", "launcher", f"`{name}`: {count} device{'s' if count > 1 else ''}, which `parallel.dp` fills")


def _installed(asked: Asked) -> Check:
    missing = [c for c in COMMANDS if shutil.which(c, path=asked.commands.environ.get("PATH")) is None]
    if missing:
        hint = "run `cpt` on a login node of the cluster, or with `launcher=local`"
        return Check("fail", "slurm", f"not on this machine: {', '.join(missing)}", hint)
    words = asked.ask("sinfo", "--version").split()
    version = words[-1] if words else "of an unknown version"
    tried = "" if version.startswith(f"{TRIED}.") else f"; `cpt` was tried with {TRIED} only"
    return Check("ok", "slurm", f"Slurm {version}{tried}")


def _controller(asked: Asked) -> Check:
    start = time.monotonic()
    try:
        said = asked.ask("scontrol", "ping")
    except CptError as error:
        said = error.message
    took = time.monotonic() - start
    if not re.search(r"\bis UP\b", said):
        hint = "nothing else was asked; `scontrol ping` says when it is back, jobs that run go on without it"
        return Check("fail", "controller", f"does not answer: {' '.join(said.split())}"[:300], hint)
    found = f"answers in {took:.1f} s"
    if took > 2:
        return Check("warn", "controller", found, "submissions and `cpt status` will be slow")
    return Check("ok", "controller", found)


def _partition(asked: Asked, options: Slurm) -> Check:
    """It is there and open, and allows the time that is asked for."""
    known = asked.partitions()
    if options.partition is not None:
        for name in options.partition.split(","):
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean `launcher.partition={near}`?" if near else f"there are {', '.join(known)}"
                return Check("fail", "partition", f"there is no partition `{name}`", hint)
    chosen = asked.chosen(options)
    if not chosen:
        hint = f"`launcher.partition=...`: one of {', '.join(known)}"
        return Check("fail", "partition", "none was given, and the cluster has no default one", hint)
    closed = [n for n, p in chosen.items() if p.get("State") != "UP"]
    names = ", ".join(f"`{n}`" for n in chosen)
    if closed:
        said = ", ".join(f"`{n}` is {chosen[n].get('State', '?')}" for n in closed)
        status: Status = "fail" if len(closed) == len(chosen) else "warn"
        return Check(status, "partition", said, "wait for the administrators, or `launcher.partition=...`")
    if options.account and (only := _all_refuse(chosen, "AllowAccounts", options.account)):
        return Check("fail", "partition", f"{names} is for the accounts {only}", "`launcher.account=...`")
    if options.qos and (only := _all_refuse(chosen, "AllowQos", options.qos)):
        return Check("fail", "partition", f"{names} is for the qos {only}", "`launcher.qos=...`")
    limits = [_limit(p.get("MaxTime", "")) for p in chosen.values()]
    most = None if None in limits else max(limit for limit in limits if limit is not None)
    allows = "no time limit" if most is None else f"at most {_length(most)}"
    if options.seconds is not None and most is not None and options.seconds > most:
        found = f"{names} allows {allows}, `launcher.time` is {_length(options.seconds)}"
        return Check("fail", "partition", found, f"`launcher.time={most / 60:.0f}m`: stages go on in the next job")
    asks = _length(options.seconds) if options.seconds is not None else ""
    if not asks:
        default = [_limit(p.get("DefaultTime", "")) or _limit(p.get("MaxTime", "")) for p in chosen.values()]
        asks = "no limit" if None in default else f"{_length(max(d for d in default if d is not None))} by default"
    return Check("ok", "partition", f"{names}: {allows}, a job asks for {asks}")


def _all_refuse(chosen: Mapping[str, Mapping[str, str]], key: str, value: str) -> str | None:
    """What every one of the partitions allows instead; None when one allows the value."""
    lists = [p.get(key, "ALL") for p in chosen.values()]
    return None if any(only == "ALL" or value in only.split(",") for only in lists) else " / ".join(lists)


def _limit(text: str) -> float | None:
    """A partition's time [s]; None = no limit."""
    return None if text in ("", "NONE", "UNLIMITED") else parse_limit(text)


def _length(seconds: float) -> str:
    """Whole minutes, hours and days as such: 2 min, 1 h."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f} {name}"
    return show_duration(seconds)


def _account(asked: Asked, options: Slurm) -> Check:
    """The account and the qos are the person's, where the cluster keeps accounts."""
    config = asked.config()
    given = [f"{n} `{v}`" for n, v in (("account", options.account), ("qos", options.qos)) if v is not None]
    if config.get("AccountingStorageType", "").endswith("/none"):
        if given:
            return Check("warn", "account", f"{' and '.join(given)} not checked: the cluster keeps no accounts")
        return Check("ok", "account", "the cluster keeps no accounts")
    user = pwd.getpwuid(os.geteuid()).pw_name
    try:
        said = asked.ask("sacctmgr", "-n", "-P", "show", "associations", f"user={user}", "format=account,partition,qos")
    except CptError as error:
        return Check("warn", "account", f"not checked: {error.message}")
    rows = [[*line.split("|"), "", ""][:3] for line in said.splitlines() if line.strip()]
    bad: Status = "fail" if "associations" in config.get("AccountingStorageEnforce", "") else "warn"
    accounts = sorted({row[0] for row in rows})
    if not rows:
        return Check(bad, "account", f"`{user}` has no account on this cluster", "ask its administrators for one")
    if options.account is not None and options.account.lower() not in accounts:
        hint = f"`launcher.account=...`: yours are {', '.join(accounts)}"
        return Check(bad, "account", f"`{user}` may not use account `{options.account}`", hint)
    mine = [row for row in rows if options.account is None or row[0] == options.account.lower()]
    qos = sorted({name for row in mine for name in row[2].split(",") if name})
    if options.qos is not None and qos and options.qos not in qos:
        status: Status = "fail" if "qos" in config.get("AccountingStorageEnforce", "") else "warn"
        hint = f"`launcher.qos=...`: yours are {', '.join(qos)}"
        return Check(status, "account", f"`{user}` may not use the qos `{options.qos}`", hint)
    which = options.account or f"your default one of {', '.join(accounts)}"
    return Check("ok", "account", f"{which}; qos {options.qos or 'by default, of ' + (', '.join(qos) or 'none')}")


@dataclass(frozen=True)
class _Node:
    name: str
    state: str
    cpus: int
    memory: int  # [MiB]
    gpus: Mapping[str, int]  # by kind; "" = of no named kind

    @property
    def is_usable(self) -> bool:
        return self.state.strip("*~#!%$@^-+").startswith(_USABLE)

    def num_gpus(self, kind: str | None) -> int:
        return sum(self.gpus.values()) if kind is None else self.gpus.get(kind, 0)


def _read_nodes(asked: Asked, options: Slurm) -> list[_Node]:
    """The nodes of the partitions, each once."""
    names = ",".join(asked.chosen(options))
    form = SEPARATOR.join(("%N", "%T", "%c", "%m", "%G"))
    found: dict[str, _Node] = {}
    for line in asked.ask("sinfo", "-h", "-N", "-p", names, "-o", form).splitlines():
        name, state, cpus, memory, gres = [*line.split(SEPARATOR), *[""] * 5][:5]
        gpus: dict[str, int] = {}
        for kind, count in _GPU.findall(gres):
            gpus[kind] = gpus.get(kind, 0) + int(count)
        found[name] = _Node(name, state.lower(), _number(cpus), _number(memory), gpus)
    return list(found.values())


def _number(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0


def _nodes(asked: Asked, options: Slurm, work: Work | None) -> Check:
    """As many nodes as a job takes have the CPUs, the memory and the GPUs of its ranks."""
    from cpt.launch.slurm import script

    nodes = _read_nodes(asked, options)
    if not nodes:
        return Check("fail", "nodes", "the partition has none", "`sinfo` lists nodes: `launcher.partition=...`")
    ranks, wanted, takes = options.ranks_per_node or 1, options.nodes or 1, "a job may take"
    if work is not None:
        (wanted, ranks), takes = script.shape(options, work), f"stage `{work.stage}` takes"
    cpus, gpus = ranks * (options.cpus_per_rank or 1), ranks if options.gpus != "none" else 0
    memory = _mebibytes(options.mem)
    asks = [f"{cpus} CPU{'s' if cpus > 1 else ''}"]
    asks += [f"{gpus} GPU{'s' if gpus > 1 else ''} {options.gres_type or ''}".rstrip()] if gpus else []
    asks += [f"{options.mem} memory"] if memory else []
    fit = [n for n in nodes if n.cpus >= cpus and n.memory >= memory and n.num_gpus(options.gres_type) >= gpus]
    most = max(nodes, key=lambda n: (n.num_gpus(options.gres_type), n.cpus))
    has = f"{most.cpus} CPUs, {most.num_gpus(None)} GPUs, {most.memory:,}M memory"
    found = f"{len(fit)} of {len(nodes)} have {', '.join(asks)} for {ranks} rank{'s' if ranks > 1 else ''}"
    if len(fit) < wanted:
        found = f"{found}; {takes} {wanted}"
        hint = f"the largest has {has}: `launcher.nodes`, `launcher.ranks_per_node`, `launcher.cpus_per_rank`"
        return Check("fail", "nodes", found, hint)
    up = [n for n in fit if n.is_usable]
    idle = sum(n.state.startswith("idle") for n in up)
    found = f"{found}; {idle} idle"
    if len(up) < wanted:
        found = f"{found}, {len(up)} up where {takes} {wanted}"
        return Check("warn", "nodes", found, "`sinfo -R` says why nodes are down; a job waits until they are back")
    if options.gpus == "none" and (with_gpus := max(n.num_gpus(None) for n in fit)):
        hint = f"`launcher.gpus=per_node launcher.ranks_per_node={with_gpus}`"
        return Check("warn", "nodes", f"{found}; they have {with_gpus} GPUs, and jobs ask for none", hint)
    return Check("ok", "nodes", found)


def _mebibytes(text: str | None) -> int:
    """An amount of memory as sbatch takes it [MiB]; 0 = whatever there is."""
    if text is None:
        return 0
    factor = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}.get(text[-1], 1)
    return int(_number(text) * factor)


def _submission(asked: Asked, options: Slurm, runs: Path, work: Work | None) -> Check:
    """Slurm looks at a whole script, and takes nothing."""
    from cpt.launch.slurm import script

    ranks = (options.nodes or 1) * (options.ranks_per_node or 1)
    what = "a job of" if work is None else f"the largest job, of stage `{work.stage}`:"
    work = work or Work(
        run_dir=runs / "doctor",
        stage="doctor",
        world_size=ranks,
        layout=f"{ranks} ranks",
        python=sys.executable,
        cwd=Path.cwd(),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / script.NAME
        path.write_text(script.render(options, work), encoding="utf-8")
        left = max(0.1, min(ONE_SECONDS, asked.end - time.monotonic()))
        commands = Commands(environ=asked.commands.environ, cwd=asked.commands.cwd, seconds=left)
        try:
            said = commands.test_only(path)
        except TryLater as error:
            return Check("warn", "submission", error.message, *error.hints[:1])
    size = options.describe(work).partition(",")[0]
    return Check("ok", "submission", f"Slurm would take {what} {size}{promised(said, time.time())}")


def promised(said: str, now: float) -> str:
    """Where and when a job would start, as far as that can be believed.

    Args:
        said: the answer to a test-only submission.
        now: [unix seconds].
    """
    match = re.search(r"to start at (\d{4,}-\d\d-\d\dT\d\d:\d\d:\d\d).* on nodes (\S+)", said)
    if match is None:
        return ""
    try:
        start = time.mktime(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return ", when is not known"
    if start - now > FAR_SECONDS:  # beside jobs without a limit it names a year in which nobody lives
        return ", when is not known"
    when = "now" if start - now < 60 else f"in at most {show_duration(start - now)} by what it says"
    return f", {when}, on {match[2]}"


def _requeue(asked: Asked, options: Slurm) -> Check:
    """What happens to a stage that needs longer than one job."""
    allowed = asked.config().get("JobRequeue") == "1"
    if options.requeue:
        if allowed:
            return Check("ok", "requeue", "a job that saved goes back into the queue by itself")
        found = "not the cluster's default (JobRequeue=0); jobs ask for it, which a site may forbid"
        return Check("warn", "requeue", found, "where it is refused: `launcher.requeue=false launcher.successors=3`")
    if options.successors:
        return Check("ok", "requeue", f"off; {options.successors} successors of each stage go on instead")
    hint = "`launcher.requeue=true`" if allowed else "`launcher.successors=3`"
    return Check("warn", "requeue", "off, and no successors: a stage longer than a job waits for `cpt resume`", hint)


def _stops(asked: Asked, options: Slurm) -> Check:
    """How many seconds a stop leaves to the ranks."""
    config = asked.config()
    kill = float(_number(config.get("KillWait", "30")))
    found = f"ranks save {options.warn} s before the time limit; `scancel` leaves them {kill:g} s"
    if options.seconds is not None and options.seconds - options.warn < EARLY_SECONDS + SHORT_SECONDS:
        hint = "Slurm may signal a minute early, and a job needs time to start: `launcher.time`, `launcher.warn`"
        return Check("warn", "stops", f"{found}; that leaves little of {_length(options.seconds)} for work", hint)
    if config.get("PreemptType", "").endswith("/none"):
        return Check("ok", "stops", f"{found}; no preemption")
    if config.get("PreemptType", "").endswith("/qos"):
        return Check("warn", "stops", f"{found}; a qos may preempt jobs", "`sacctmgr show qos` says which, and how")
    ways = {p.get("PreemptMode", config.get("PreemptMode", "OFF")) for p in asked.chosen(options).values()}
    if ways <= {"OFF"}:
        return Check("ok", "stops", f"{found}; jobs here are not preempted")
    grace = [_seconds_of(p.get("GraceTime", "0")) for p in asked.chosen(options).values()]
    left = min(grace, default=0.0) + kill
    found = f"{found}; a preempted job ({', '.join(sorted(ways))}) has {left:g} s"
    if any("CANCEL" in way for way in ways):
        return Check("warn", "stops", found, "it does not come back by itself: `cpt resume RUN`")
    if left < SHORT_SECONDS:
        return Check("warn", "stops", found, "a save that takes longer is lost: `checkpoint.every` bounds how much")
    return Check("ok", "stops", found)


def _seconds_of(text: str) -> float:
    """Slurm's `120`, or `00:02:00` [s]."""
    return float(text) if text.isdigit() else parse_limit(text) or 0.0


def _arrays(asked: Asked, options: Slurm) -> Check:
    size = _number(asked.config().get("MaxArraySize", "0"))
    if size < 2:
        return Check("warn", "arrays", "the cluster has none: laws with proxies cannot be sent to it")
    at_once = f", {options.array_limit} at once" if options.array_limit else ""
    return Check("ok", "arrays", f"at most {size - 1:,} proxies of a law{at_once}")


def _clock(asked: Asked) -> Check:
    """This machine's clock against the controller's, which says its time in whole seconds."""
    before = time.time()
    try:
        said = asked.ask("sdiag")
    except CptError as error:
        return Check("ok", "clock", f"not compared: {error.message}")
    match = re.search(r"sdiag output at .*\((\d{9,})\)", said)
    if match is None:
        return Check("ok", "clock", "not compared: `sdiag` does not say the controller's time")
    there = float(match[1])
    ahead = min(there + 1 - before, 0.0) + max(there - time.time(), 0.0)
    if abs(ahead) > CLOCK_SECONDS:
        found = f"the controller is {show_duration(abs(ahead))} {'ahead' if ahead > 0 else 'behind'}"
        hint = "times in logs will not fit together, and a lock may look old: chrony or ntpd"
        return Check("warn", "clock", found, hint)
    return Check("ok", "clock", "that of the controller; those of nodes cannot be seen without a job")


def _container(asked: Asked) -> Check:
    if "--container-image" in asked.ask("srun", "--help"):
        return Check("ok", "container", "`srun` takes container images (pyxis)")
    hint = "without pyxis: `launcher.wrap_command=[apptainer, exec, --nv, IMAGE]`"
    return Check("fail", "container", "`srun` does not know `--container-image`: no pyxis here", hint)


def _interface(options: Slurm) -> Check:
    """The network of the ranks is looked for here, where it may be missing although nodes have it."""
    try:
        _, name = own_address(options.interface)
    except CptError as error:
        hint = "fine where the nodes have one: `srun -N1 ip -brief address` lists those of a node"
        return Check("warn", "interface", error.message, hint)
    return Check("ok", "interface", f"this machine has `{name}`; those of nodes cannot be seen without a job")


def _command(asked: Asked, options: Slurm) -> Check:
    """What starts the ranks can be executed, as far as this machine is like the nodes."""
    key = "wrap_command" if options.wrap_command else "python"
    word = options.wrap_command[0] if options.wrap_command else str(options.python)
    found = shutil.which(word, path=asked.commands.environ.get("PATH"))
    if found is not None:
        return Check("ok", "command", f"`launcher.{key}`: `{found}`")
    why = "cannot be executed" if os.path.exists(word) else "is not there"
    hint = "fine where the nodes have it, or `launcher.environment` brings it; else every stage fails at its start"
    return Check("warn", "command", f"`launcher.{key}`: `{word}` {why} on this machine", hint)


def _shared(runs: Path, cache: Path, options: Slurm) -> Check:
    """Jobs find the run folder, prepared data, code and interpreter under the same paths."""
    import cpt

    places = {"run folder": runs, "cache": cache, "code": Path(cpt.__file__).parent}
    places["interpreter"] = Path(options.python or sys.executable)
    kinds = {what: file_system(path) for what, path in places.items()}
    own = {what: kind for what, kind in kinds.items() if not is_network(kind) or _is_own(places[what])}
    if not own:
        return Check("ok", "shared files", ", ".join(f"{what} on {kind}" for what, kind in kinds.items()))
    named = ", ".join(f"{what} `{places[what]}` ({kind or 'unknown'})" for what, kind in own.items())
    hint = "fine where all nodes see the same under these paths; else work in a folder that they share"
    return Check("warn", "shared files", f"may be of this machine alone: {named}", hint)


def _is_own(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _OWN)
