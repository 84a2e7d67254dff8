"""The few error classes a person may see, each with its exit code and optional hints.

Exit codes of `cpt`: 0 done · 1 work began and failed · 2 the person's input is wrong · 3 the machine is not as
needed · 4 a `stop_if` guard ended the run · 75 stopped and saved, the same command goes on · 130 interrupted.
"""

from __future__ import annotations

DONE, FAILED, USAGE, ENVIRONMENT, GUARD, SAVED, INTERRUPTED = 0, 1, 2, 3, 4, 75, 130


class CptError(Exception):
    """An error with a message for a person.

    Args:
        message: one sentence without a full stop; names the thing, what was found, what was wanted.
        hints: what to do, one line each.
        more: further errors of the same kind, reported together (all broken rules of a recipe at once).
    """

    exit_code = FAILED

    def __init__(self, message: str, *hints: str, more: tuple[CptError, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hints = hints
        self.more = more


class UsageError(CptError):
    """The command line, the configuration or a file it points at is wrong."""

    exit_code = USAGE


class PlanError(CptError):
    """The configuration reads well but cannot be run."""

    exit_code = USAGE


class EnvironmentProblem(CptError):
    """The machine or the cluster is not as needed."""

    exit_code = ENVIRONMENT


class StageFailed(CptError):
    """Work began and failed."""

    exit_code = FAILED


class Fenced(CptError):
    """Another attempt has taken over the work; this one publishes nothing any more."""

    exit_code = FAILED


class GuardStop(CptError):
    """A `stop_if` guard ended the run; the checkpoint is kept."""

    exit_code = GUARD


class Interrupted(CptError):
    """Ctrl-C ended a command whose work goes on elsewhere."""

    exit_code = INTERRUPTED


class StoppedAndSaved(CptError):
    """Stopped on request with everything saved; the same command goes on."""

    exit_code = SAVED
