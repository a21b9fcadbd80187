"""The bank comes first: it is built some seconds at a time, so that everybody sees how far it is."""

from bitfront.progress import Progress
from workers.pool import Pool, Task

BANK = "quantizing every unit under every scheme"
STEPS = 100  # per cent
BANK_WEIGHT = 20  # what the bar counts it as at first, in measurements
SLICE_S = 5.0


def prepare(pool: Pool, progress: Progress) -> None:
    """Build what the bank lacks, and the statistics that it is made with.

    Between two slices another job, whose bank lies beside this one, goes on with its own.

    Raises:
        BitfrontError: a tensor that a format can't hold, a full disk, or a model that is gone.
    """
    with progress.stage(BANK, STEPS, BANK_WEIGHT / STEPS) as advance:
        told, most, left = 0, 0, 1
        while left:
            [outcome] = pool.run([Task("prepare", {"seconds": SLICE_S})])
            if outcome.error:
                raise outcome.error
            before, left = outcome.value
            most = max(most, before)
            done = STEPS * (most - left) // max(most, 1) if left else STEPS
            advance(done - told)
            told = done
