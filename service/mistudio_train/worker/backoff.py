"""How long to wait before each further try. Knows nothing of what is tried."""

from collections.abc import Iterator, Sequence
from itertools import chain, repeat

BACKOFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)


def backoff(seconds: Sequence[float] = BACKOFF_SECONDS) -> Iterator[float]:
    """Seconds to wait before each further try: these, then the last of them for ever."""
    return chain(seconds, repeat(seconds[-1]))
