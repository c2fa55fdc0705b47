"""What validation has shown so far in a run: the lowest loss, which is kept, and whether it has been rising."""

import math

RISES = 3  # validations in a row that end in a warning


class Watch:
    """Validation losses as they come; `best` is the lowest, of the checkpoints that are there before the first."""

    def __init__(self, best: float = math.inf):
        self.best, self._last, self._rises = best, math.inf, 0

    def is_best(self, loss: float) -> bool:
        """Count one validation; whether no earlier one was as low."""
        self._rises = self._rises + 1 if loss > self._last else 0
        self._last = loss
        if not loss < self.best:
            return False
        self.best = loss
        return True

    @property
    def warning(self) -> str | None:
        """What to say when it has risen so often: once, until it falls."""
        if self._rises != RISES:
            return None
        return (
            f"the validation loss has risen {RISES} times running, to {self._last:.3f} from {self.best:.3f} at its lowest: "
            "the model learns its training text by heart; more text, or fewer steps (trainer.max_steps), end better"
        )
