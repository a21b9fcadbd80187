"""The bank comes first: its worker says every few seconds how far it is."""

from bitfront.progress import Progress
from workers.pool import Pool, Task

BANK = "quantizing every unit under every scheme"
STEPS = 100  # per cent
BANK_WEIGHT = 20  # what the bar counts it as at first, in measurements
SLICE_S = 5.0


def prepare(pool: Pool, progress: Progress) -> None:
    """Collect the statistics that the bank is made with, and build what it lacks.

    The worker that has begun goes on, since tasks that come one at a time go to the same one.

    Raises:
        BitfrontError: a tensor that a format can't hold, a full disk, or a model that is gone.
    """
    with progress.stage(BANK, STEPS, BANK_WEIGHT / STEPS) as advance:
        told, left = 0, 1
        while left:
            [outcome] = pool.run([Task("prepare", {"seconds": SLICE_S})])
            if outcome.error:
                raise outcome.error
            lacked, left = outcome.value
            done = STEPS * (lacked - left) // lacked if left else STEPS
            if done > told:
                advance(done - told)
                told = done
