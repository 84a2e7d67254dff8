"""What a person sees while a run goes on: one live block in a terminal, plain lines in a pipe or a file.

Both show the same fields in the same order: stage, step, tokens, loss, lr, tokens/s, memory, time left for the stage
and for the run.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol, TextIO

from cpt.base.events import Event
from cpt.plan.types import RunPlan
from cpt.report import show
from cpt.report.progress import Progress, StageNow
from cpt.stages.guard import guard_text

LINES_A_STAGE = 20  # plain `step` lines in a short stage
LINES_A_PROXY = 4  # in a proxy of a law, of which there are many
MOST_STEPS_BETWEEN = 100  # and at most so many steps from one to the next in a long one


class Display(Protocol):
    """Takes the events of a run as they come."""

    def event(self, stage: str, event: Event) -> None:
        """Show an event of a stage (of the run itself when `stage` is empty)."""

    def note(self, text: str) -> None:
        """Print one line that is no event, without disturbing what is live."""

    def close(self) -> None:
        """Leave the last state on the screen. May be called twice."""


def make_display(
    plan: RunPlan, stream: TextIO, is_terminal: bool, *, every: int | None = None, quiet: bool = False
) -> Display:
    """The display for a stream.

    Args:
        plan: the run.
        stream: where it is written, normally stderr.
        is_terminal: whether somebody looks at it as it happens; then it may move.
        every: steps between plain lines; without it about 20 lines in a short stage, one in 100 steps in a long one.
        quiet: only warnings.
    """
    if is_terminal and not quiet:
        return Live(plan, stream)
    return Lines(plan, stream, every=every, quiet=quiet)


def fields(now: StageNow, progress: Progress) -> dict[str, str]:
    """The figures of a stage, in the order in which they are always shown."""
    found = {
        "step": f"{now.step:,}/{now.steps:,}",
        "tokens": f"{show.show_count(now.tokens)}/{show.show_count(now.total)}",
        "loss": show.loss(now.loss),
        "lr": show.lr(now.lr),
        "tokens/s": show.speed(now.tokens_per_s),
        "memory": show.show_bytes(now.memory) if now.memory is not None else show.NOTHING,
        "stage left": show.show_duration(now.seconds_left) if now.seconds_left is not None else show.NOTHING,
        "run left": show.show_duration(progress.seconds_left) if progress.seconds_left is not None else show.NOTHING,
    }
    return found


def sentence(stage: str, event: Event, now: StageNow | None) -> str | None:
    """An event that is no step as one line, or None when it is not worth one."""
    kind, name = event.get("kind"), show.plain(stage, 60)
    whole = now is not None and not now.steps  # a stage that makes no steps: an export, an evaluation
    at = f" at step {event['step']:,}" if isinstance(event.get("step"), int) and not whole else ""
    if kind == "stage_start" and now is not None:
        how = f"goes on from step {now.step:,}" if event.get("resumed") else "starts"
        size = f"{now.steps:,} steps, {show.show_count(now.total)} tokens" if now.steps else ""
        return " · ".join(part for part in (f"{name}  {how}", size, now.layout) if part)
    if kind == "eval" and isinstance(event.get("mixture"), dict):
        shares = ", ".join(f"{show.plain(source, 40)} {share:.3g}" for source, share in event["mixture"].items())
        return f"{name}  average of {shares}: " + ", ".join(_plain_losses(event))
    if kind == "eval" and now is not None:
        return f"{name}  evaluation{at}: {losses(now)}" if now.losses else None
    if kind == "law":
        return law(name, event)
    if kind == "save":
        done = "written" if whole else "saved"
        return f"{name}  {done}{at} in {_short(event.get('seconds'))}"
    if kind == "warning":
        text = show.plain(event.get("text", ""))
        return f"warning: {name}: {text}" if f"step {event.get('step')}" in text else f"warning: {name}{at}: {text}"
    if kind == "guard":
        return f"warning: {name}{at}: {show.plain(guard_text(event))}: `stop_if` ends the run"
    if kind == "stop":
        return f"{name}  stops{at}: {show.plain(event.get('reason', ''))}"
    if kind == "stage_end":
        return f"{name}  done{at} after {_short(event.get('seconds'))}"
    if kind == "data":
        tokens = show.show_count(_number(event.get("tokens")))
        return f"data    {show.plain(event.get('source', '?'), 60)}  {tokens} tokens"
    return None


def law(name: str, event: Event) -> str:
    """What a law stage found."""
    found = event.get("values")
    values: dict[str, Any] = found if isinstance(found, dict) else {}
    if event.get("verdict") != "fit":
        reasons = event.get("reasons")
        why = "; ".join(show.plain(text) for text in reasons) if isinstance(reasons, list) else ""
        return f"warning: {name}: the law `{show.plain(event.get('law', '?'), 60)}` is unfit: {why}"
    parts = [f"{name}  law {show.plain(event.get('law', '?'), 60)}"]
    if isinstance(values.get("ratio"), int | float):
        low, high = values.get("low"), values.get("high")
        interval = f" (95 %: {low:.3f} to {high:.3f})" if isinstance(low, float) and isinstance(high, float) else ""
        parts.append(f"domain share {values['ratio']:.3f}{interval}")
    elif isinstance(values.get("mixture"), dict):
        shares = ", ".join(f"{show.plain(s, 40)} {share:.3f}" for s, share in values["mixture"].items())
        parts.append(f"mixture {shares}")
    else:
        parts.append(show.plain(event.get("no_recommendation", "")))
    predicted = {k.removeprefix("loss_"): v for k, v in values.items() if k.startswith("loss_")}
    if predicted:
        parts.append(
            "predicted losses " + ", ".join(f"{show.plain(k, 40)} {show.loss(v)}" for k, v in predicted.items())
        )
    if isinstance(event.get("heldout"), float):
        parts.append(f"missed by {100 * event['heldout']:.2g} % on runs left out")
    return " · ".join(parts)


def _plain_losses(event: Event) -> list[str]:
    found = event.get("losses")
    measured = found.items() if isinstance(found, dict) else ()
    return [f"{show.plain(source, 40)} {show.loss(v.get('loss'))}" for source, v in measured if isinstance(v, dict)]


def losses(now: StageNow) -> str:
    """Validation losses with their change since the stage's start."""
    parts = []
    for domain, loss in now.losses.items():
        first = now.first_losses.get(domain)
        moved = f" ({show.change(loss - first)})" if first is not None and first != loss else ""
        parts.append(f"{show.plain(domain, 40)} {show.loss(loss)}{moved}")
    return ", ".join(parts)


class Lines:
    """Plain lines, one every so many steps."""

    def __init__(self, plan: RunPlan, stream: TextIO, *, every: int | None = None, quiet: bool = False) -> None:
        self.progress = Progress(plan)
        self.stream = stream
        self.every = every
        self.quiet = quiet

    def event(self, stage: str, event: Event) -> None:
        now = self.progress.take(stage, event)
        line = sentence(stage, event, now)
        if line is None and now is not None and event.get("kind") == "step" and self._due(now):
            values = fields(now, self.progress)
            line = f"{show.plain(stage, 60)}  " + "  ".join(f"{name} {value}" for name, value in values.items())
        if line is not None and (not self.quiet or line.startswith("warning:")):
            self.note(line)

    def _due(self, now: StageNow) -> bool:
        lines = LINES_A_STAGE if now.plan.group is None else LINES_A_PROXY
        every = self.every or min(MOST_STEPS_BETWEEN, max(1, now.steps // lines))
        return now.step % every == 0 or now.step == now.steps

    def note(self, text: str) -> None:
        # A log on a full disk or a closed pipe must not end the run.
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text + "\n")
            self.stream.flush()

    def close(self) -> None:
        pass


class Live:
    """A block that is redrawn in place; what is worth keeping scrolls by above it."""

    def __init__(self, plan: RunPlan, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        class Screen(Console):
            def on_broken_pipe(self) -> None:
                """Say nothing more; rich would end the whole process here."""
                self.quiet = True

        self.progress = Progress(plan)
        self.console = Screen(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=False)
        # A terminal that cannot move the cursor gets the plain lines.
        self.lines = Lines(plan, stream) if self.console.is_dumb_terminal or not self.console.is_terminal else None
        self.live: RichLive | None = None
        if self.lines is None:
            self.live = RichLive(
                console=self.console,
                get_renderable=self._block,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
                transient=False,
            )

    def event(self, stage: str, event: Event) -> None:
        if self.lines is not None:
            self.lines.event(stage, event)
            return
        now = self.progress.take(stage, event)
        line = sentence(stage, event, now)
        if line is not None:
            self.note(line)
        if self.live is not None and not self.live.is_started and now is not None:
            with contextlib.suppress(OSError, ValueError):
                self.live.start()

    def note(self, text: str) -> None:
        if self.lines is not None:
            self.lines.note(text)
            return
        from rich.text import Text

        with contextlib.suppress(OSError, ValueError):
            self.console.print(Text(text, style="yellow" if text.startswith("warning:") else ""))

    def close(self) -> None:
        if self.live is not None and self.live.is_started:
            with contextlib.suppress(OSError, ValueError):
                self.live.stop()
        self.live = None

    def _block(self) -> Any:
        """The block: one line a stage in the order of the plan, the present one with its figures below."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = self.progress.stages.get(self.progress.current or "")
        if now is None:
            return Text("")
        head = Table.grid(padding=(0, 2))
        for name, stage in self.progress.stages.items():
            if stage.plan.group is not None and stage is not now:
                continue  # of the proxies of a law only the one at work; the law's line says how many are done
            mark, style = ("✓", "green") if stage.ended else ("▸", "bold") if stage is now else ("·", "dim")
            what = f"{stage.step:,} of {stage.steps:,} steps" if stage.steps else stage.plan.kind
            proxies = [s for s in self.progress.stages.values() if s.plan.group == name and s.steps]
            what += f", {sum(s.ended for s in proxies)} of {len(proxies)} proxies done" if proxies else ""
            width = max(10, min(40, self.console.width - 50))
            bar = ProgressBar(total=max(1, stage.steps), completed=stage.step, width=width) if stage.steps else Text("")
            head.add_row(Text(f"{mark} {show.plain(name, 24)}", style=style), bar, Text(what, style="dim"))
        figures = Table.grid(padding=(0, 2))
        values = fields(now, self.progress)
        columns = max(1, min(len(values), self.console.width // 24))
        row: list[Any] = []
        for name, value in values.items():
            row.append(Text.assemble((f"{name} ", "dim"), value))
            if len(row) == columns:
                figures.add_row(*row)
                row = []
        if row:
            figures.add_row(*row)
        parts: list[Any] = [head, figures]
        if now.losses:
            parts.append(Text.assemble(("validation ", "dim"), losses(now)))
        return Group(*parts)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _short(value: Any) -> str:
    """A length of time; one digit more where whole seconds say nothing."""
    seconds = _number(value)
    return f"{max(seconds, 0.1):.1f} s" if seconds < 9.95 else show.show_duration(seconds)
