"""How long each part of a worker's finished jobs took, and what they held of the disk: a line a job in `paces.jsonl`.

Owns that file; knows not what is concluded from it, and fails no job. Imports no torch.
"""

import fcntl
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

KEPT: Final = 200
"""Of the latest jobs; what is older says little of the machine as it is."""
AROUND: Final = "around"
"""The part that is no child's: its process, and the files into and out of the workspace."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One part of a job."""

    units: tuple[float, ...]
    """Amounts that its time is a sum of multiples of, as `training.work` counts them; the main one first."""
    seconds: float


@dataclass(frozen=True)
class Pace:
    """A job that was done in one go."""

    job_id: str
    device: str
    """As `device_name` names it."""
    parts: Mapping[str, Part]
    active: Mapping[str, float]
    """Of each kind of SAE the share of its latents that were active on a row."""
    memory_planned: int
    memory_peak: int
    disk_planned: int
    result_planned: int
    disk: int = 0
    """Bytes of the workspace when the work was done."""
    result: int = 0
    """Bytes of the files that were delivered."""


def keep(path: Path, pace: Pace | None, *, seconds: float, disk: int, result: int) -> None:
    """Add a finished job to the file.

    Args:
        path: of the file.
        pace: what its child has measured; `None`: nothing that tells of other jobs.
        seconds: that the whole job took.
        disk: bytes of its workspace when the work was done.
        result: bytes of the files that were delivered.

    """
    if pace is None:
        return
    around = Part((result, 1.0), max(0.0, seconds - sum(part.seconds for part in pace.parts.values())))
    whole = replace(pace, parts={**pace.parts, AROUND: around}, disk=disk, result=result)
    try:
        _append(path, whole)
    except OSError as error:
        logger.warning("how long job %s took is not kept in %s: %s", pace.job_id, path, error.strerror)


def paces_in(path: Path) -> list[Pace]:
    """The jobs of the file, the latest last; what is no whole line of this form is passed over."""
    if not path.is_file():
        return []
    found = (_pace(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [one for one in found if one is not None]


def _append(path: Path, pace: Pace) -> None:
    """Two slots may end at once, and two workers share a disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lines = [*file.read().splitlines(), json.dumps(asdict(pace))][-KEPT:]
        file.truncate(0)
        file.write("".join(f"{line}\n" for line in lines))


def _pace(line: str) -> Pace | None:
    try:
        value: dict[str, Any] = json.loads(line)
        parts = {name: Part(_numbers(part["units"]), float(part["seconds"])) for name, part in value["parts"].items()}
        return Pace(**value | {"parts": parts})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
