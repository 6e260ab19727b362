"""Does a GPU's update from a recording, a CUDA graph: its hundred small kernels start without Python between them.

Owns the recordings; must not know what is computed.
"""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final
from weakref import WeakMethod

import torch
from torch import Tensor

EAGER: Final = 3
"""Updates that are done as they come before the next one like them is recorded: libraries set themselves up."""
MOST_RECORDINGS: Final = 4
Update = Callable[[Tensor, bool], None]
log = logging.getLogger(__name__)


class Replay:
    """Calls an update, and where it has been recorded repeats it with other rows.

    The update may depend on nothing but its arguments and tensors that stay where they are, change nothing else, and
    wait for nothing. A recording is of one number of rows and one value of the flag. Where recording fails, updates
    are done as they come, which is slower and nothing else. The update is a method, of an owner that need not be kept.
    """

    def __init__(self, update: Update) -> None:
        self._method = WeakMethod(update)  # or its owner, which has this one, would outlive its use, with all weights
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._records = True
        self.forget()

    def __call__(self, x_BD: Tensor, flag: bool) -> None:
        """Update with rows that are on the GPU."""
        key = len(x_BD), flag
        self._seen[key] += 1
        if self._records and key not in self._recordings and self._seen[key] > EAGER:
            self._record(key, x_BD)
        if recording := self._recordings.get(key):
            graph, rows_BD = recording
            rows_BD.copy_(x_BD)
            graph.replay()
        else:
            self._by_itself(x_BD, flag)

    def forget(self) -> None:
        """Record anew: tensors are elsewhere now."""
        self._recordings: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._seen: Counter[tuple[int, bool]] = Counter()
        self._pool = torch.cuda.graph_pool_handle()

    def _update(self, x_BD: Tensor, flag: bool) -> None:
        update = self._method()
        assert update is not None, "its owner calls this"
        update(x_BD, flag)

    def _by_itself(self, x_BD: Tensor, flag: bool) -> None:
        """On the stream of the recordings, as whatever autograd keeps belongs to one."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._update(x_BD, flag)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self, key: tuple[int, bool], x_BD: Tensor) -> None:
        rows_BD, graph = x_BD.clone(), torch.cuda.CUDAGraph()
        try:
            # other threads, which read ahead, may go on allocating
            with (
                nothing_freed(),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                self._update(rows_BD, key[1])
        except RuntimeError as error:
            self._records = False
            log.warning("a training step could not be recorded, so each is done by itself, slower: %s", error)
        else:
            self._recordings[key] = graph, rows_BD
            self._records = len(self._recordings) < MOST_RECORDINGS


@contextmanager
def nothing_freed() -> Iterator[None]:
    """No garbage is collected: an older recording, or a stream's event, that is freed spoils the one being made."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
