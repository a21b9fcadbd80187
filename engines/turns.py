"""Timing in turns: what slows the machine for a while slows what is timed and its reference alike."""

import time
from collections.abc import Callable

import numpy as np

from engines.base import Timing
from engines.power import Counter

REPEATS, LEAST_S = 5, 0.02
Seconds = Callable[[], float]
"""Runs something once and tells how long it took."""


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one run, from as many as make a measurable time."""
    runs, start = 0, time.perf_counter()
    while runs == 0 or time.perf_counter() - start < LEAST_S:
        run()
        runs += 1
    return (time.perf_counter() - start) / runs


def usual_of(reference: Seconds) -> float:
    """What a reference takes now."""
    return float(np.median([reference() for _ in range(REPEATS)]))


def timing_beside(own: Seconds, reference: Seconds, usual_s: float) -> Timing:
    """The time of something, the reference timed before and after each repeat of it.

    Args:
        own: what is timed.
        reference: what takes turns with it.
        usual_s: what the reference usually takes, in whose terms the time is told.
    """
    ratios, before = [], reference()
    for _ in range(REPEATS):
        taken, after = own(), reference()
        ratios.append(2 * taken / (before + after))
        before = after
    low, median, high = np.percentile(np.array(ratios) * usual_s, [25, 50, 75])
    return Timing(float(median), float(high - low) / 2)


def joules_of(
    counter: Counter | None,
    prompt: Callable[[], object],
    start: Callable[[], object],
    step: Callable[[], object],
    steps: int,
    least_s: float = 0.0,
) -> tuple[float | None, float | None]:
    """Joules of a prompt and of a token, with nobody in turns; None without a counter.

    Args:
        counter: of the chip that runs them.
        prompt: processes one.
        start: prepares for tokens.
        step: generates one.
        steps: how many tokens, at least.
        least_s: what prompts and tokens take each, at least: a counter tells only now and then.
    """
    if counter is None:
        return None, None
    spent = _joules_each(counter, prompt, 1, least_s)
    start()
    return spent, _joules_each(counter, step, steps, least_s)


def _joules_each(counter: Counter, run: Callable[[], object], count: int, least_s: float) -> float:
    runs, start, before = 0, time.perf_counter(), counter.read_j()
    while runs < count or time.perf_counter() - start < least_s:
        run()
        runs += 1
    return (counter.read_j() - before) / runs
