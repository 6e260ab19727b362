"""Does a GPU's update from a recording, a CUDA graph: its hundred small kernels start without Python between them.

Owns the recordings; must not know what is computed.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

EAGER: Final = 3
"""Updates that are done as they come before the next one like them is recorded: libraries set themselves up."""
MOST_RECORDINGS: Final = 4
Update = Callable[[Tensor, bool], None]


class Replay:
    """Calls an update, and where it has been recorded repeats it with other rows.

    The update may depend on nothing but its arguments and tensors that stay where they are, change nothing else, and
    wait for nothing. A recording is of one number of rows and one value of the flag.
    """

    def __init__(self, update: Update) -> None:
        self._update = update
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.forget()

    def __call__(self, x_BD: Tensor, flag: bool) -> None:
        """Update with rows that are on the GPU."""
        key = len(x_BD), flag
        self._seen[key] += 1
        if key not in self._recordings and self._seen[key] > EAGER and len(self._recordings) < MOST_RECORDINGS:
            self._recordings[key] = self._record(x_BD, flag)
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

    def _by_itself(self, x_BD: Tensor, flag: bool) -> None:
        """On the stream of the recordings, as whatever autograd keeps belongs to one."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._update(x_BD, flag)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self, x_BD: Tensor, flag: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        rows_BD, graph = x_BD.clone(), torch.cuda.CUDAGraph()
        # other threads, which read ahead, may go on allocating
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._update(rows_BD, flag)
        return graph, rows_BD
