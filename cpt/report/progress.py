"""How far a run is, from its events: one stage's figures, and the time that is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cpt.base.events import Event
from cpt.plan.types import RunPlan, StagePlan


@dataclass
class StageNow:
    """A stage while its events come in."""

    plan: StagePlan
    step: int = 0
    tokens: int = 0
    loss: float | None = None  # of the newest step that was not skipped [nats/token]
    lr: float | None = None
    tokens_per_s: float | None = None
    memory: int | None = None  # of rank 0 at its highest [bytes]
    last: float | None = None  # time of the newest event [unix seconds]
    started: bool = False
    ended: bool = False
    attempt: int = 0
    layout: str = ""
    skipped: int = 0
    losses: dict[str, float] = field(default_factory=dict)  # newest validation losses [nats/token]
    first_losses: dict[str, float] = field(default_factory=dict)  # those at the stage's start
    _since: tuple[float, int] | None = None  # (time, tokens) at the attempt's first step

    @property
    def steps(self) -> int:
        """Planned steps; 0 for a stage that makes none."""
        return self.plan.train.steps if self.plan.train else 0

    @property
    def total(self) -> int:
        """Planned tokens."""
        return self.plan.train.tokens if self.plan.train else 0

    def take(self, event: Event) -> None:
        """Take in the next event of this stage."""
        kind = event.get("kind")
        if isinstance(event.get("t"), int | float):
            self.last = float(event["t"])
        if kind == "stage_start":
            self.started, self.ended, self._since = True, False, None
            self.attempt = _int(event.get("attempt")) or self.attempt + 1
            self.step = _int(event.get("step")) or 0
            self.tokens = self.step * self.total // self.steps if self.steps else 0
            sizes = [(name, _int(event.get(name))) for name in ("tp", "pp", "dp")]
            self.layout = " × ".join(f"{name} {size}" for name, size in sizes if size)
        elif kind == "step":
            self._step(event)
        elif kind == "eval":
            losses = event.get("losses")
            found = {str(k): v["loss"] for k, v in losses.items() if _measured(v)} if isinstance(losses, dict) else {}
            if event.get("when") == "start" or not self.first_losses:
                self.first_losses = found
            self.losses = found
        elif kind == "stage_end":
            self.ended = True

    def _step(self, event: Event) -> None:
        self.started = True
        self.step = _int(event.get("step")) or self.step
        self.tokens = _int(event.get("tokens")) or self.tokens
        self.lr = _float(event.get("lr"), self.lr)
        self.loss = _float(event.get("loss"), self.loss)
        self.tokens_per_s = _float(event.get("tokens_per_s"), self.tokens_per_s)
        memory = _int(event.get("memory_bytes"))
        self.memory = memory if memory is not None else self.memory
        self.skipped += bool(event.get("skipped"))
        if self._since is None and self.last is not None:
            self._since = (self.last, self.tokens)

    @property
    def rate(self) -> float | None:
        """Tokens a second of this attempt, evaluations and saves included; the newest step's when there is only one."""
        if self._since is not None and self.last is not None:
            seconds, tokens = self.last - self._since[0], self.tokens - self._since[1]
            if seconds > 0 and tokens > 0:
                return tokens / seconds
        return self.tokens_per_s

    @property
    def seconds_left(self) -> float | None:
        """Time left for this stage at its present speed."""
        if self.ended:
            return 0.0
        return (self.total - self.tokens) / self.rate if self.rate and self.total else None


class Progress:
    """All stages of a run while its events come in."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.stages = {name: StageNow(plan=stage) for name, stage in plan.stages.items()}
        self.current: str | None = None

    def take(self, stage: str, event: Event) -> StageNow | None:
        """Take in the next event of a stage; None for a stage that the plan does not have."""
        now = self.stages.get(stage)
        if now is not None:
            parent = self.stages.get(now.plan.parent or "")
            if not now.first_losses and parent is not None and now.plan.parent_at is None:
                now.first_losses = dict(parent.losses)  # the end of the parent is the start of the stage
            now.take(event)
            self.current = stage
        return now

    @property
    def seconds_left(self) -> float | None:
        """Time left for the run: stages that have not begun at the speed of the present one."""
        now = self.stages[self.current] if self.current else None
        if now is None or not now.rate:
            return None
        order = list(self.stages)
        left = [s for s in order[order.index(self.current or order[0]) :] if not self.stages[s].ended]
        tokens = sum(self.stages[s].total - self.stages[s].tokens for s in left)
        return tokens / now.rate


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _float(value: Any, old: float | None) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else old


def _measured(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("loss"), int | float)
