"""How long each part of a worker's finished jobs took, and what they held of the disk: a line a job in `paces.jsonl`.

Owns that file; knows not what is concluded from it, and fails no job. Imports no torch.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

KEPT: Final = 200
"""Of the latest jobs; what is older says little of the machine as it is."""
MOST_LINES: Final = 1000
"""Of the file."""
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
    child_seconds: float
    """Of the child, also what is in no part: it may have fetched a dataset, or put the result on the hub."""
    active_share: Mapping[str, float]
    """Of each kind of SAE the share of its latents that were active on a row, the median of several."""
    memory_planned: int
    memory_peak: int
    disk_planned: int
    disk: int = 0
    """Bytes of the workspace when the work was done."""
    result: int = 0
    """Bytes of the files that were delivered."""


FORM: Final = TypeAdapter(Pace)


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
    around = Part((result, 1.0), max(0.0, seconds - pace.child_seconds))
    whole = replace(pace, parts={**pace.parts, AROUND: around}, disk=disk, result=result)
    try:
        _append(path, whole)
    except Exception as error:  # its files are delivered
        logger.warning("how long job %s took is not kept in %s: %s", pace.job_id, path, error)


def paces_in(path: Path) -> list[Pace]:
    """The latest jobs of the file, the last one last; what is no whole line of this form is passed over."""
    found = (_pace(line) for line in _lines(path))
    return [one for one in found if one is not None][-KEPT:]


def _append(path: Path, pace: Pace) -> None:
    """In one write, as two slots may end at once and two workers share a disk; now and then what is old goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(asdict(pace)).encode() + b"\n")
    if len(lines := _lines(path)) > MOST_LINES:
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_bytes(b"".join(line + b"\n" for line in lines[-KEPT:]))
        aside.replace(path)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.is_file() else []


def _pace(line: bytes) -> Pace | None:
    try:
        return FORM.validate_json(line)
    except ValidationError:
        return None
