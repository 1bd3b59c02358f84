"""Log of a fold's steps, and how its time is spent."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from segkit.core import distributed
from segkit.core.errors import SegkitError
from segkit.core.run import Run
from segkit.data.loader import TrainOrder
from segkit.training.state import TrainState
from segkit.training.step import StepResult


class FoldLog:
    """Logs the steps of a fold on rank 0; rates exclude the time of evaluations."""

    def __init__(self, run: Run, fold: int, batch_size: int) -> None:
        self.run, self.fold, self.batch_size = run, fold, batch_size
        self.restart(0)

    def begin(
        self, state: TrainState, order: TrainOrder, validation: int, *, resume: bool, saved: bool
    ) -> None:
        """Log that the fold starts or resumes; remove later events of an interrupted run.

        Args:
            state: Training state of the fold.
            order: Order of its training images.
            validation: Number of its validation images.
            resume: True if the run is resumed.
            saved: True if the fold resumes from a saved state.
        """
        if not distributed.is_main():
            return
        if resume:
            self.run.rewind(self.fold, state.step if saved else -1)
        if state.step < order.steps:
            self.run.reopen(self.fold)
        self.run.log(
            event="resume" if saved else "start", fold=self.fold, step=state.step,
            steps_per_epoch=order.steps_per_epoch,
            parameters=sum(parameter.numel() for parameter in state.model.parameters()),
            images=len(order.indices), validation=validation,
        )  # fmt: skip

    def restart(self, step: int) -> None:
        """Restart the measurement of the rate."""
        self._since, self._since_step = time.perf_counter(), step

    def step(self, step: int, epoch: int, result: StepResult, lr: float) -> None:
        """Log a step's loss and the rate since the last logged step."""
        if not distributed.is_main():
            return
        seconds = time.perf_counter() - self._since
        rate = (step - self._since_step) * self.batch_size / seconds
        self.restart(step)
        self.run.log(
            event="step", fold=self.fold, epoch=epoch, step=step,
            loss=round(float(result.loss), 6),
            parts={name: round(float(part), 6) for name, part in result.terms.items()},
            lr=lr, gradient_norm=float(result.gradient_norm), images_per_s=round(rate, 2),
        )  # fmt: skip

    def bad_step(self, state: TrainState, names: Sequence[str], *, limit: int) -> None:
        """Log a step with a non-finite gradient; ``limit`` of them in a row end the run."""
        if distributed.is_main():
            self.run.log(event="non-finite", fold=self.fold, step=state.step, images=names)
        if state.bad_in_row >= limit:
            raise SegkitError(
                f"fold {self.fold}: loss or gradient was not finite in {state.bad_in_row} steps in "
                f"a row, the last on {', '.join(names[:4])}; lower optim.lr, or set optim.clip_norm"
            )


class Clock:
    """Measures how the wall time after the first step is spent."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._seconds = {"loading": 0.0, "evaluation": 0.0, "saving": 0.0}

    def start(self) -> None:
        """Start, unless it has started already."""
        if self._start is None:
            self._start = time.perf_counter()

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time of the block to an activity."""
        before = time.perf_counter()
        yield
        if self._start is not None:
            self._seconds[activity] += time.perf_counter() - before

    def shares(self) -> dict[str, float]:
        """Return each activity's share of the time; ``steps`` is all that is not measured.

        ``loading`` is the time that steps wait for data.
        """
        if self._start is None:
            return {}
        total = time.perf_counter() - self._start
        shares = {name: round(seconds / total, 4) for name, seconds in self._seconds.items()}
        return {"steps": round(1 - sum(shares.values()), 4), **shares}
