"""Log of a fold's steps, and how its time is spent."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from segkit.core import distributed
from segkit.core.config import TrainConfig
from segkit.core.errors import SegkitError
from segkit.core.run import Run
from segkit.training.preparation import Fold
from segkit.training.state import TrainState
from segkit.training.step import StepResult


class FoldLog:
    """Logs the steps of a fold on rank 0 and shows their progress; rates exclude evaluations."""

    def __init__(self, run: Run, fold: Fold, names: Sequence[str], cfg: TrainConfig) -> None:
        self.run, self.number, self.order = run, fold.number, fold.order
        self.validation, self.names, self.cfg = len(fold.validation), names, cfg

    def begin(self, state: TrainState, *, resume: bool, saved: bool) -> None:
        """Log that the fold starts, or resumes from a ``saved`` state.

        If the run is resumed, later events of an interrupted run are removed.
        """
        order, size = self.order, self.cfg.batch_size
        if distributed.is_main():
            if resume:
                self.run.rewind(self.number, state.step if saved else -1)
            if state.step < order.steps:
                self.run.reopen(self.number)
            self.run.log(
                event="resume" if saved else "start", fold=self.number, step=state.step,
                steps_per_epoch=order.steps_per_epoch,
                parameters=sum(parameter.numel() for parameter in state.model.parameters()),
                images=len(order.indices), validation=self.validation,
            )  # fmt: skip
        self._progress = distributed.Progress(
            None, f"fold {self.number}", total=order.steps * size, initial=state.step * size,
            unit="image", parts=self.cfg.epochs, delay=0,
        )  # fmt: skip
        self.restart(state.step)

    def restart(self, step: int) -> None:
        """Restart the measurement of the rate."""
        self._since, self._since_step = time.perf_counter(), step

    def step(self, state: TrainState, result: StepResult, *, lr: float) -> None:
        """Show a step's progress, and log it if its turn has come or its gradient is not finite.

        Raises:
            SegkitError: The gradients of ``train.max_bad_steps`` steps in a row were not finite.
        """
        epoch, step_of_epoch = divmod(state.step, self.order.steps_per_epoch)

        def note() -> str:
            epochs = f"epoch {state.step / self.order.steps_per_epoch:.3g} of {self.order.epochs}"
            return f"{epochs}, loss {float(result.loss):.4g}, lr {lr:.3g}"

        self._progress.update(self.cfg.batch_size, note)
        if not result.finite:
            self._bad_step(state)
        turn = state.step % self.cfg.log_every == 0 or step_of_epoch == 0
        if not turn or not distributed.is_main():
            return
        seconds = time.perf_counter() - self._since
        rate = (state.step - self._since_step) * self.cfg.batch_size / seconds
        self.restart(state.step)
        self.run.log(
            event="step", fold=self.number, epoch=epoch, step=state.step,
            loss=round(float(result.loss), 6),
            parts={name: round(float(part), 6) for name, part in result.terms.items()},
            lr=lr, gradient_norm=float(result.gradient_norm), images_per_s=round(rate, 2),
        )  # fmt: skip

    def _bad_step(self, state: TrainState) -> None:
        names = [self.names[index] for _, index in self.order.batch(state.step - 1)]
        if distributed.is_main():
            self.run.log(event="non-finite", fold=self.number, step=state.step, images=names)
        if state.bad_in_row >= self.cfg.max_bad_steps:
            raise SegkitError(
                f"fold {self.number}: loss or gradient was not finite in {state.bad_in_row} steps "
                f"in a row, the last on {', '.join(names[:4])}; lower optim.lr, or set "
                "optim.clip_norm"
            )

    def close(self) -> None:
        """Remove the progress bar."""
        self._progress.close()


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
