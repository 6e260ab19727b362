"""Makes the next items of an iterator on a thread while the last one is being used.

Knows nothing of what the items are.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Final, TypeVar

T = TypeVar("T")
_END: Final = object()


def ahead(items: Generator[T], count: int) -> Generator[T]:
    """The same items in the same order, up to `count` of them made before they are asked for.

    What `items` raises is raised here, in its turn. Closing this generator closes `items`, on no thread but this one
    and only when nothing of it runs.
    """
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        try:
            coming = deque(pool.submit(next, items, _END) for _ in range(count))
            while (item := coming.popleft().result()) is not _END:
                coming.append(pool.submit(next, items, _END))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(cancel_futures=True)
