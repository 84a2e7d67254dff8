"""What this process is doing, for whoever watches it: attributes that its main thread sets and a heartbeat reads.

One process is one rank, so there is one pulse, and nobody has to hand it on. Saying something costs well under a
microsecond and needs no lock: a reader that sees half of a change reads the rest at its next look.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

START, LOAD, STEP, SAVE, EVAL, END = "start", "load", "step", "save", "eval", "end"
_WINDOW = 20  # steps that shares of time are taken over


@dataclass
class Pulse:
    """How far a process is.

    Args:
        doing: one of the words above. `start` and `end` may last as long as they want: nobody has said what to expect.
        step: that it works on, or the last one done; None before the first word.
        count: small units of work done since then (micro-batches, tensors, batches of an evaluation).
        moved: when it last said something [seconds, as time.monotonic].
        gradients_ready: when the last backward pass ended, before gradients are added up [seconds, as time.monotonic].
        own_s: its own mean time in a step's forward and backward passes, without waiting for others [s]; 0 = unknown.
        data_share: share of the time of steps that went into waiting for data [fraction].
    """

    doing: str = START
    step: int | None = None
    count: int = 0
    moved: float = field(default_factory=time.monotonic)
    gradients_ready: float = 0.0
    own_s: float = 0.0
    data_share: float = 0.0
    _steps: int = 0
    _sums: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def say(self, doing: str, step: int | None = None) -> None:
        """Begin something."""
        self.moved = time.monotonic()
        self.doing, self.step, self.count = doing, step if step is not None else self.step, 0

    def tick(self) -> None:
        """Go on with it."""
        self.count += 1
        self.moved = time.monotonic()

    def spent(self, *, data_s: float, own_s: float, step_s: float) -> None:
        """Book a step's time; means are renewed every twenty steps [s]."""
        data, own, whole = self._sums
        self._steps += 1
        self._sums = (data + data_s, own + own_s, whole + step_s)
        if self._steps == _WINDOW:
            data, own, whole = self._sums
            self.own_s, self.data_share = own / _WINDOW, data / max(whole, 1e-9)
            self._steps, self._sums = 0, (0.0, 0.0, 0.0)


current = Pulse()
