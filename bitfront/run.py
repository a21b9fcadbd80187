"""A job in progress: what its stages share."""

from dataclasses import dataclass

from bitfront.plan import Plan
from bitfront.progress import Progress
from store.database import Store
from store.queries import QualityKey, reference_hash
from store.tables import Job
from workers.pool import Pool


@dataclass
class Run:
    """A job in progress: what the stages share."""

    plan: Plan
    store: Store
    pool: Pool
    progress: Progress
    job: Job

    @property
    def quality(self) -> QualityKey:
        """What all measurements of this job have in common."""
        return QualityKey(
            self.plan.checkpoint.weights_hash,
            self.plan.quantizer,
            self.plan.dtype,
        )

    @property
    def reference_hash(self) -> str:
        """Stands for the unquantized model among the map hashes."""
        return reference_hash(self.plan.checkpoint.weights_hash)
