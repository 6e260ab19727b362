"""Checkpoints on the workspace's disk: files that never change, and indexes that name them by size and sha256.

Owns the folder `checkpoints/`; must not know what a trainer's state means, and reaches no network: the parent takes
what `Saved` announces to the store, and brings it back to whichever worker goes on.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from typing import Any, BinaryIO, Final

import torch

from .disk import disk_errors

logger = logging.getLogger(__name__)

FORMAT: Final = 1
"""Of the indexes; a checkpoint of another format is not used."""
KEPT: Final = 2
SHARE_OF_TIME: Final = 0.02
"""Of the training that saving may take."""


@dataclass(frozen=True)
class FileRef:
    """A file of the workspace as it was when it was kept."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class TrainingRef:
    """The files of one SAE's training, by their paths in the workspace."""

    state: str
    log: str


class Checkpoints:
    """What a job has kept so far, and what it goes on from.

    Args:
        workspace: the job's folder; names of files are paths in it.
        fingerprint: everything that results depend on; kept work of another one is not used.
        seconds: between two checkpoints at least.
        announce: told the number of each new checkpoint, from any thread.

    """

    def __init__(
        self, workspace: Path, fingerprint: Mapping[str, object], seconds: float, announce: Callable[[int], None]
    ) -> None:
        self._workspace, self._folder = workspace, workspace / "checkpoints"
        self._fingerprint, self._seconds, self._announce = dict(fingerprint), seconds, announce
        self._files: dict[str, FileRef] = {}
        self._shards: dict[int, tuple[int, tuple[str, ...]]] = {}
        self._trainings: list[TrainingRef] = []
        self._lock, self._hashing = RLock(), ThreadPoolExecutor(1, "hashing")
        self._pending: list[Future[None]] = []
        self._number, self._saved_at, self._interval = 0, time.monotonic(), seconds
        self.warnings: list[str] = []
        """Why kept work was not used."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._go_on()

    @property
    def trained(self) -> bool:
        """Whether some SAE has begun to train."""
        return bool(self._trainings)

    @property
    def due(self) -> bool:
        """Whether it is time to save: at least the interval after the last time, and 98% of the time for training."""
        return time.monotonic() - self._saved_at >= self._interval

    def shard(self, number: int) -> int | None:
        """A shard of activations that is there whole: tokens of a forward pass when it was done; `None`: it is not."""
        kept = self._shards.get(number)
        return None if kept is None else kept[0]

    def keep_shard(self, number: int, tokens_per_batch: int, files: Iterable[Path]) -> None:
        """Keep the files of a shard, which will not change; they are read in the background."""
        names = tuple(path.relative_to(self._workspace).as_posix() for path in files)
        for one in self._pending:
            if one.done():
                one.result()  # its error is the job's
        self._pending = [one for one in self._pending if not one.done()]
        self._pending.append(self._hashing.submit(self._keep_shard, number, tokens_per_batch, names))

    def wait(self) -> None:
        """Until every shard is kept, and to the clock of the first checkpoint in training."""
        for one in self._pending:
            one.result()
        self._pending, self._saved_at = [], time.monotonic()

    def training(self, position: int) -> dict[str, Any] | None:
        """What `keep_training` has last kept of the SAE at this position; `None`: it has not begun.

        Tensors are on the CPU.
        """
        if position >= len(self._trainings):
            return None
        path = self._workspace / self._trainings[position].state
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def restore_log(self, position: int, path: Path) -> None:
        """Write the SAE's training log to `path` as it was then."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._workspace / self._trainings[position].log, path)

    def keep_training(self, position: int, state: dict[str, Any], log: Path) -> None:
        """Keep how far the training of the SAE at `position` is; those before it keep their last one.

        Args:
            position: among the job's SAEs.
            state: tensors and plain values; written before this returns.
            log: its training log so far.

        Raises:
            DiskFull: if the disk has no room.

        """
        began = time.monotonic()
        with self._lock:
            name = f"checkpoints/{self._number + 1:06d}-sae{position}"
            ref = TrainingRef(f"{name}.pt", f"{name}.jsonl")
            with disk_errors():
                self._files[ref.state] = _write(self._workspace / ref.state, lambda file: torch.save(state, file))
                log.parent.mkdir(parents=True, exist_ok=True)
                log.touch()  # of one that could not even begin
                self._files[ref.log] = _write(self._workspace / ref.log, lambda file: _copy(log, file))
            self._trainings[position:] = [ref]
            self._save()
        self._saved_at = time.monotonic()
        self._interval = max(self._seconds, (self._saved_at - began) / SHARE_OF_TIME)

    def _keep_shard(self, number: int, tokens_per_batch: int, names: tuple[str, ...]) -> None:
        refs = {name: _read(self._workspace / name) for name in names}
        with self._lock, disk_errors():
            self._files |= refs
            self._shards[number] = (tokens_per_batch, names)
            self._save()

    def _save(self) -> None:
        """Write the next index, and let go of what only older ones name."""
        self._number += 1
        index = {
            "format": FORMAT,
            "number": self._number,
            "fingerprint": self._fingerprint,
            "shards": {str(number): [tokens, list(names)] for number, (tokens, names) in self._shards.items()},
            "trainings": [asdict(one) for one in self._trainings],
            "files": {name: asdict(self._files[name]) for name in self._named()},
        }
        data = json.dumps(index | {"seal": _seal(index)}).encode()
        _write(self._index(self._number), lambda file: file.write(data))
        self._prune()
        self._announce(self._number)

    def _named(self) -> list[str]:
        """The files that the present state is made of."""
        shards = [name for _, names in self._shards.values() for name in names]
        return [*shards, *(name for one in self._trainings for name in (one.state, one.log))]

    def _index(self, number: int) -> Path:
        return self._folder / f"{number:06d}.json"

    def _numbers(self) -> list[int]:
        """Of the indexes that are there, the newest first."""
        return sorted((int(path.stem) for path in self._folder.glob("*.json")), reverse=True)

    def _prune(self) -> None:
        numbers = self._numbers()
        for number in numbers[KEPT:]:
            self._index(number).unlink()
        named = {name for number in numbers[:KEPT] for name in (self._load(number) or {"files": {}})["files"]}
        for path in self._folder.iterdir():
            if path.suffix != ".json" and f"checkpoints/{path.name}" not in named:
                path.unlink()
        self._files = {name: ref for name, ref in self._files.items() if name in named}

    def _go_on(self) -> None:
        """Take up the newest checkpoint whose training is whole; of shards, whichever are."""
        numbers = self._numbers()
        self._number = max(numbers, default=0)
        indexes = [index for number in numbers if (index := self._load(number)) is not None]
        if len(indexes) < len(numbers):
            self.warnings.append("the index of a checkpoint is damaged, or of another version, and is not used")
        usable = [index for index in indexes if index["fingerprint"] == self._fingerprint]
        if indexes and not usable:
            self.warnings.append(f"kept work is not used: {_difference(indexes[0]['fingerprint'], self._fingerprint)}")
        whole: dict[str, bool] = {}

        def is_whole(index: dict[str, Any], name: str) -> bool:
            if name not in whole:
                whole[name] = _is_whole(self._workspace / name, FileRef(**index["files"][name]))
            return whole[name]

        for index in usable:
            for number, (tokens, names) in index["shards"].items():
                if int(number) not in self._shards and all(is_whole(index, name) for name in names):
                    self._shards[int(number)] = (tokens, tuple(names))
                    self._files |= {name: FileRef(**index["files"][name]) for name in names}
        for index in usable:
            trainings = [TrainingRef(**one) for one in index["trainings"]]
            names = [name for one in trainings for name in (one.state, one.log)]
            if all(is_whole(index, name) for name in names):
                self._trainings = trainings
                self._files |= {name: FileRef(**index["files"][name]) for name in names}
                break
            self.warnings.append(f"checkpoint {index['number']} is damaged; the one before it is used")
        if usable:
            logger.info("goes on with %d shards and %d SAEs kept", len(self._shards), len(self._trainings))

    def _load(self, number: int) -> dict[str, Any] | None:
        """An index; `None` if it is damaged, or of another format."""
        try:
            index: dict[str, Any] = json.loads(self._index(number).read_bytes())
            whole = index.pop("seal") == _seal(index)
        except (ValueError, KeyError, AttributeError, OSError):
            return None
        return index if whole and index["format"] == FORMAT else None


class KeptTraining:
    """The training of one SAE, as `fit` keeps it."""

    def __init__(self, checkpoints: Checkpoints, position: int, log: Path) -> None:
        self._checkpoints, self._position, self._log = checkpoints, position, log

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return self._checkpoints.due

    def load(self) -> dict[str, Any] | None:
        """What was saved last, `None` if nothing was; the log is as it was then, or gone."""
        self._log.unlink(missing_ok=True)
        state = self._checkpoints.training(self._position)
        if state is not None:
            self._checkpoints.restore_log(self._position, self._log)
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Save the state, and the log with it."""
        self._checkpoints.keep_training(self._position, state, self._log)


class _Hashed:
    """A file to write to that knows what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self._size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._sha256.update(view)
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    @property
    def ref(self) -> FileRef:
        return FileRef(self._size, self._sha256.hexdigest())


def _write(path: Path, fill: Callable[[Any], object]) -> FileRef:
    """A file that has its name only once it is whole."""
    aside = path.with_name(f"{path.name}.partial")
    with aside.open("wb") as file:
        hashed = _Hashed(file)
        fill(hashed)
    aside.replace(path)
    return hashed.ref


def _copy(source: Path, file: Any) -> None:
    with source.open("rb") as original:
        shutil.copyfileobj(original, file, 1 << 20)


def _read(path: Path) -> FileRef:
    with path.open("rb") as file:
        return FileRef(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _is_whole(path: Path, ref: FileRef) -> bool:
    try:
        return path.stat().st_size == ref.size and _read(path) == ref
    except OSError:
        return False


def _seal(index: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _difference(kept: Mapping[str, object], now: Mapping[str, object]) -> str:
    names = [name for name in {**kept, **now} if kept.get(name) != now.get(name)]
    return ", ".join(f"{name} was {kept.get(name)} and is {now.get(name)}" for name in names)
