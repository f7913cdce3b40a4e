"""The operations of a step that depend on other processes, or wait for the end of the step."""

from collections.abc import Callable

from torch import Tensor

from sae_lens_atm.method.selection import largest_positive
from sae_lens_atm.method.statistics import BatchStatistics


class StepContext:
    """The context of a training step in a single process, which applies updates at once.

    Subclasses reduce over several processes, or queue the updates until the step is complete.
    """

    def average(self, statistics: BatchStatistics) -> BatchStatistics:
        """Return the statistics of the whole batch."""
        return statistics

    def minimum(self, values: Tensor) -> Tensor:
        """Return values whose smallest positive one is the smallest over all processes."""
        return values

    def anywhere(self, flags: Tensor) -> Tensor:
        """Return which flags are true in any process."""
        return flags

    def largest(self, values: Tensor, per_row: float) -> tuple[Tensor, Tensor]:
        """Return places and values of the ``per_row * rows`` largest positive values of the batch.

        Args:
            values: shape ``(rows, columns)``.
            per_row: mean number of values to choose in each row.

        Returns:
            Indices into ``values.flatten()``, ascending, and the values there.
        """
        return largest_positive(values, int(per_row * len(values)))

    def after_step(self, update: Callable[[], None]) -> None:
        """Run an update that belongs to this step. A subclass may delay it."""
        update()
