"""How OpenMP's threads wait for their next piece of work. Must be decided before torch is imported."""

from __future__ import annotations

import os

# Turns of libgomp's waiting loop, some microseconds. Threads that sleep at once take longer to wake than a matrix product of a small
# model takes; threads that spin for long (the default without any of these variables) hold up other busy processes (docs/results.md).
_TURNS = "1000"


def spin_briefly() -> None:
    """Spin for some microseconds, then sleep; whatever OMP_WAIT_POLICY or GOMP_SPINCOUNT say already stands."""
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"] = "passive", _TURNS
