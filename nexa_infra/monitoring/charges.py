"""What an attempt held, by the scheduler's accounting: the standard library alone, for a steward counts by it too."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True)
class Charge:
    """What an attempt held, by the scheduler's accounting, and for how long, in seconds."""

    seconds: int
    cores: int
    gpus: int
    billing: int | None = None  # Slurm's billing TRES, by the partition's TRESBillingWeights
    earlier: Charge | None = None  # what it held before, by another row of accounting
    share: Decimal = Decimal(1)  # of the array task's, where that ran several trials

    def unit_seconds(self, unit: str) -> Decimal | None:
        """Return how many unit-seconds of a price's unit that is, in all; None where accounting does not say."""
        units = {"billing-hour": self.billing, "gpu-hour": self.gpus}.get(unit, self.cores)
        before = self.earlier.unit_seconds(unit) if self.earlier is not None else Decimal(0)
        return None if units is None or before is None else units * self.seconds * self.share + before
