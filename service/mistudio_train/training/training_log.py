"""`training_log.jsonl`: one strict JSON object a line, a line a logged step or epoch.

Owns the file while training runs, each line on disk before the next step; must not decide what is logged.
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from .disk import disk_errors
from .files import refuse_unless_plain

LINES_AT_ONCE = 1000
"""Of those that were there before, in one word to the listener."""

Listen = Callable[[int, Sequence[str]], None]
"""Takes lines that are in the file, and the number of the first of them, from 0."""
Value = str | int | float | bool | None


class TrainingLog:
    """The log, open for appending. A line that a killed process left half written is cut off first.

    Args:
        path: of the file.
        listen: is told every line, those that are in the file already first.

    """

    def __init__(self, path: Path, listen: Listen = lambda first, lines: None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._listen, self._lines = path, listen, 0
        self._file = path.open("a+b")
        self._file.truncate(_end_of_last_line(path))
        self._tell_what_is_there()

    def write(self, **fields: Value) -> None:
        """Append one line and flush it.

        A number that JSON cannot hold becomes `null`, and `not_finite` says what it was: `{"loss": "nan"}`.

        Raises:
            ExportRefused: if a value is of another type, a numpy scalar say.
            DiskFull: if the disk is full.

        """
        strange = {
            name: value for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)
        }
        line: dict[str, object] = {name: None if name in strange else value for name, value in fields.items()}
        if strange:
            line["not_finite"] = {name: str(value) for name, value in strange.items()}
        refuse_unless_plain(line, self._path.name)
        text = json.dumps(line, allow_nan=False, ensure_ascii=False)
        with disk_errors():
            self._file.write(text.encode() + b"\n")
            self._file.flush()
        self._tell([text])

    def _tell_what_is_there(self) -> None:
        with self._path.open(encoding="utf-8", newline="\n") as lines:
            while some := [line.removesuffix("\n") for line in islice(lines, LINES_AT_ONCE)]:
                self._tell(some)

    def _tell(self, lines: Sequence[str]) -> None:
        self._listen(self._lines, lines)
        self._lines += len(lines)

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _end_of_last_line(path: Path) -> int:
    """Where the last whole line ends, in bytes; read from the end, for a log may be long."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        while end:
            begin = max(0, end - 4096)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1
            end = begin
    return 0
