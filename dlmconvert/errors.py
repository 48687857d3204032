"""The one error that people see, and the exit codes of every command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_DOES_NOT_FIT = 3
EXIT_SAVED_RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: schedulers requeue on it


class UserError(Exception):
    """Something the user can put right.

    what: one line that names what is wrong, with the offending value.
    why: the reason, or the nearest valid choices; may be empty.
    next_step: the command or the change that helps; may be empty.
    exit_code: EXIT_WRONG_INPUT for bad input, EXIT_FAILED for a world that did not cooperate (disk, memory).
    """

    def __init__(self, what: str, why: str = "", next_step: str = "", exit_code: int = EXIT_WRONG_INPUT):
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step
        self.exit_code = exit_code

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.next_step) if line)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, and what to tell. lost_peer: it only noticed that another rank had gone. told: another process
    has shown it, or will."""

    code: int = EXIT_DONE
    what: str = ""
    why: str = ""
    next_step: str = ""
    lost_peer: bool = False
    told: bool = False


class Told(Exception):
    """An outcome that came about in another process."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.what)
        self.outcome = outcome


class SavedAndLeft(Exception):
    """A signal asked the run to stop; everything up to `step` is in a checkpoint."""

    def __init__(self, step: int, signal_name: str):
        super().__init__(f"{signal_name}: saved at step {step}")
        self.step = step
        self.signal_name = signal_name


class Interrupted(BaseException):
    """A signal outside the training loop: leave at once; finished parts stand. Not an Exception, so that no handler on the way
    mistakes it for a failure."""

    def __init__(self, signal_name: str):
        super().__init__(signal_name)
        self.signal_name = signal_name


def nearest(word: str, choices: Iterable[str]) -> str:
    """A sentence with the valid choices nearest to `word`, or all of them when none is near."""
    choices = list(choices)
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "valid: " + ", ".join(choices)
