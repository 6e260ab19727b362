"""What a person sees: live bars of a running job, its end, an error. Results go to stdout, all else to stderr."""

import sys
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table

from mistudio_schemas import SAEResult, TrainCancelled, TrainCompleted, TrainFailed, TrainProgress

UNFOLDED = 1000
Terminal = TrainCompleted | TrainFailed | TrainCancelled


def results() -> Console:
    """Standard output; where it is no terminal, a program may read it, and no line is folded."""
    return Console(width=None if sys.stdout.isatty() else UNFOLDED)


def notes() -> Console:
    """Standard error."""
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty())


def say(text: str) -> None:
    """One plain line to standard error."""
    notes().print(escape(text), highlight=False)


def say_error(message: str, hint: str) -> None:
    """One sentence, and what to do."""
    notes().print(f"[bold red]Error:[/] {escape(message)}\n{escape(hint)}", highlight=False)


class Bars:
    """One bar a phase as a job goes on; on something that is no terminal, one line a phase.

    Use as a context manager; `show` each status.
    """

    def __init__(self) -> None:
        self._console = notes()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
        )
        self._phase: tuple[str, str | None] | None = None
        self._task: TaskID | None = None
        self._warnings: set[str] = set()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def show(self, status: TrainProgress) -> None:
        """Bring the phase's bar to where the job is; a new phase begins a new bar and fills the one before."""
        for warning in status.warnings:
            if warning not in self._warnings:
                self._warnings.add(warning)
                self._console.print(f"[yellow]Warning:[/] {escape(warning)}", highlight=False)
        if status.phase == "ended":
            self._close_bar()
            return
        if (status.phase, status.sae) != self._phase:
            self._close_bar()
            self._open_bar(status)
        if self._task is not None:
            self._progress.update(
                self._task, total=status.total_steps, completed=status.step or 0, facts=escape(facts(status))
            )

    def _open_bar(self, status: TrainProgress) -> None:
        self._phase = (status.phase, status.sae)
        title = f"{status.phase} {status.sae}" if status.sae else status.phase
        if self._console.is_terminal:
            self._task = self._progress.add_task(escape(title), total=None, facts="")
        else:
            self._console.print(escape(f"{status.job_id}  {title}  {facts(status)}".rstrip()), highlight=False)

    def _close_bar(self) -> None:
        if self._task is not None:
            total = self._progress.tasks[-1].total or 1
            self._progress.update(self._task, total=total, completed=total)
        self._task = self._phase = None


def facts(status: TrainProgress) -> str:
    """The numbers that are known, for people."""
    left = status.estimated_time_remaining
    known = [
        f"loss {status.current_loss:.4g}" if status.current_loss is not None else "",
        f"L0 {status.l0:.1f}" if status.l0 is not None else "",
        f"held-out FVU {status.held_out_fvu:.3f}" if status.held_out_fvu is not None else "",
        f"{status.tokens_per_second:,.0f} tokens/s" if status.tokens_per_second is not None else "",
        f"{timedelta(seconds=left)} left" if left is not None else "",
    ]
    return " · ".join(fact for fact in known if fact) or status.message


def show_end(event: Terminal) -> None:
    """How the job ended: its SAEs to stdout, a reason to stderr."""
    run = f"{event.job_id} run {event.run}"
    match event:
        case TrainCompleted():
            say(f"{run} is completed in {timedelta(seconds=round(event.duration_seconds))} on {event.device}.")
            results().print(sae_table(event.saes))
            for failure in event.failed_saes:
                say_error(f"{failure.name} failed: {failure.message} ({failure.code})", failure.hint)
        case TrainFailed():
            say_error(f"{run} failed: {event.message} ({event.code})", event.hint)
        case TrainCancelled():
            say(f"{run} was cancelled" + (f" by {event.requested_by}." if event.requested_by else "."))


def sae_table(saes: list[SAEResult]) -> Table:
    """A row an SAE: how good it is (`recovered`: of the language model's cross-entropy), and where it lies."""
    table = Table("SAE", "layer", "latents", "epochs", "loss", "L0", "FVU", "recovered", "dead", box=None)
    table.add_column("files", overflow="fold")  # a path is for copying: never cut
    for sae in saes:
        metrics = sae.metrics
        recovered = metrics.cross_entropy.recovered_zero if metrics.cross_entropy else None
        table.add_row(
            escape(sae.name),
            f"{sae.layer_number} {sae.sites}",
            str(sae.feature_count),
            str(sae.epochs_trained),
            *(number(value) for value in (metrics.final_loss, metrics.l0, metrics.fvu, recovered, metrics.dead_share)),
            escape(sae.prefix),
        )
    return table


def number(value: float | None) -> str:
    """Four digits, or a dash where there is no value."""
    return "-" if value is None else f"{value:.4g}"
