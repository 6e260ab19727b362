"""The sink for TensorBoard: a folder a run, in it a folder of event files an SAE, which it draws over each other.

Written record by record on the caller's thread: TensorBoard's own writer has a queue and a thread that hide errors.
"""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from .sink import Line, Outcome, Shown


class TensorBoardFiles:
    """Event files of one run.

    Args:
        folder: of all runs.
        shown: the run.

    """

    def __init__(self, folder: Path, shown: Shown) -> None:
        self._folder = folder / shown.name
        self._files: dict[str, _EventFile] = {}
        about = _EventFile(self._folder)
        rows = "".join(f"\n| {name} | {value} |" for name, value in shown.params.items())
        about.add(0, text_pb("request", f"| field | value |\n|---|---|{rows}"))
        about.close()

    def write(self, lines: Sequence[Line]) -> None:
        """Add a point a figure, on disk when this returns."""
        for line in lines:
            if line.sae not in self._files:
                self._files[line.sae] = _EventFile(self._folder / line.sae)
            file = self._files[line.sae]
            if line.number == 0:
                file.begin_again()
            points = [
                Summary.Value(tag=f"{line.event}/{name}", simple_value=value) for name, value in line.figures.items()
            ]
            file.add(line.step, Summary(value=points))
        for file in self._files.values():
            file.flush()

    def close(self, outcome: Outcome) -> None:
        """No more lines."""
        for file in self._files.values():
            file.close()


class _EventFile:
    """A new event file in a folder that may hold earlier attempts'."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # read in the order of their names, so later attempts' must come later, within a second too
        self._path = folder / f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(self._path.open("xb"))
        self._write(Event(file_version="brain.Event:2"))

    def begin_again(self) -> None:
        """Have readers drop all points so far, in whichever file of the folder."""
        self._write(Event(step=0, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, summary: Summary) -> None:
        self._write(Event(step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()
        if not self._path.exists():  # what is written goes nowhere, and no error says so
            raise FileNotFoundError(f"{self._path} is gone")

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
