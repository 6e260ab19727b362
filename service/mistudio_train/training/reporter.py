"""How the child says where it is: often enough to be seen alive, seldom enough to cost nothing, never more than true.

Only the work itself speaks: inside one long library call a ticker says that the process lives, not that it moves.
Imports torch only to ask a GPU.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from mistudio_schemas import ModelInfo, Phase
from mistudio_train.errors import DiskFull
from mistudio_train.messages import (
    ChildMessage,
    DatasetFound,
    Identified,
    Loaded,
    Logged,
    Parent,
    Progress,
    Saved,
    Warned,
    Wish,
)

logger = logging.getLogger(__name__)

INTERVAL = 0.5
"""Seconds between two messages of the same phase."""
TICK = 5.0
"""Seconds between two signs of life from a long library call."""


class Reporter:
    """Speaks over the pipe.

    Args:
        parent: spoken to from the ticker's thread too.
        tell_log: whether it wants the lines of the training logs.

    """

    def __init__(self, parent: Parent, *, tell_log: bool = False) -> None:
        self._parent, self._tell_log, self._lock = parent, tell_log, threading.Lock()
        self._phase: Phase = "accepting"
        self._message = ""
        self._sae: str | None = None
        self._share = (0.0, 0.0)
        self._sent_at = float("-inf")
        self._laps: defaultdict[tuple[Phase, str | None], float] = defaultdict(float)
        self._began = self._entered_at = time.monotonic()
        self._device: str | None = None
        self.warnings: list[str] = []
        """All that the requester was warned of by now."""

    @property
    def wish(self) -> Wish | None:
        """What the parent wants by now, if anything."""
        return self._parent.wish

    def identified(self, identity: str) -> None:
        """It is known which result it will be."""
        self._send(Identified(identity))

    def saved(self, number: int) -> None:
        """A checkpoint is whole."""
        self._send(Saved(number))

    def logged(self, sae: str, first: int, lines: Sequence[str]) -> None:
        """These lines are in the SAE's training log, from the line with that number on."""
        if self._tell_log:
            self._send(Logged(sae, first, tuple(lines)))

    def use(self, device: str) -> None:
        """Report this device's memory from now on: `cpu` or `cuda:0`."""
        self._device = device

    def enter(self, phase: Phase, message: str, share: tuple[float, float], sae: str | None = None) -> None:
        """A phase begins, which is this part of the child's whole work; of one SAE, if it is named."""
        self._end_lap()
        self._phase, self._message, self._share, self._sae = phase, message, share, sae
        self.say(0.0)

    def seconds(self, kinds: Mapping[str, str]) -> dict[str, float]:
        """How long each part of the work took by now.

        Args:
            kinds: of the SAEs, by their names.

        Returns:
            Seconds by phase; of a training by its SAE's kind, `training topk`; `predicting` is what the evaluation of
            no single SAE took.

        """
        self._end_lap()
        parts: defaultdict[str, float] = defaultdict(float)
        for (phase, sae), seconds in self._laps.items():
            name = f"training {kinds[sae]}" if phase == "training" and sae is not None else str(phase)
            parts["predicting" if phase == "evaluating" and sae is None else name] += seconds
        return dict(parts)

    @property
    def all_seconds(self) -> float:
        """Since it is there."""
        return time.monotonic() - self._began

    def _end_lap(self) -> None:
        now = time.monotonic()
        self._laps[self._phase, self._sae] += now - self._entered_at
        self._entered_at = now

    @property
    def due(self) -> bool:
        """Whether it is time to measure something and say it."""
        return time.monotonic() - self._sent_at >= INTERVAL

    def say(self, done: float, message: str | None = None, **figures: Any) -> None:
        """The phase is done to this share; figures are `Progress` fields."""
        self._message = message or self._message
        self._sent_at = time.monotonic()
        self._send(self._progress(done, moved=True, **figures))

    def warn(self, message: str) -> None:
        """Something that the requester should know."""
        self.warnings.append(message)
        self._send(Warned(message))

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Around work without which a job has a result all the same: what goes wrong is a warning.

        Args:
            what: is then so: `NAME has no report`.

        Raises:
            DiskFull: as nothing else could be whole then.

        """
        try:
            yield
        except DiskFull:
            raise
        except Exception as error:
            logger.exception("%s", what)
            self.warn(f"{what}: {type(error).__name__}: {error}")

    def loaded(self, info: ModelInfo, commit: str | None) -> None:
        """The model is known."""
        self._send(Loaded(info, commit))

    def dataset_found(self, commit: str) -> None:
        """The corpus' commit is known."""
        self._send(DatasetFound(commit))

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Around a library call that may take minutes and cannot report."""
        ended = threading.Event()
        began = time.monotonic()

        def tick() -> None:
            while not ended.wait(TICK):
                message = f"{self._message} ({time.monotonic() - began:.0f} s)"
                self._send(self._progress(0.0, moved=False, message=message))

        ticker = threading.Thread(target=tick, name="ticker", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            ended.set()
            ticker.join()

    def memory_peak_bytes(self) -> int:
        """The most memory that the job has held: GPU memory, or the process' resident memory on a CPU."""
        if self._on_gpu:
            import torch

            return torch.cuda.max_memory_reserved(self._device)
        return peak_resident_bytes()

    @property
    def _on_gpu(self) -> bool:
        return self._device is not None and self._device.startswith("cuda")

    def _progress(self, done: float, *, moved: bool, message: str | None = None, **figures: Any) -> Progress:
        begin, end = self._share
        return Progress(
            phase=self._phase,
            message=message or self._message,
            progress=begin + (end - begin) * min(1.0, max(0.0, done)),
            moved=moved,
            sae=self._sae,
            device=self._device,
            memory_allocated_bytes=self._memory_bytes(),
            memory_peak_bytes=self.memory_peak_bytes(),
            **figures,
        )

    def _memory_bytes(self) -> int:
        if self._on_gpu:
            import torch

            return torch.cuda.memory_allocated(self._device)
        resident: int = psutil.Process().memory_info().rss
        return resident

    def _send(self, message: ChildMessage) -> None:
        with self._lock:  # two threads must not mix their messages in the pipe
            self._parent(message)


def peak_resident_bytes() -> int:
    """The most resident memory that this process has had, VmHWM."""
    with open("/proc/self/status") as status:  # noqa: PTH123
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0
