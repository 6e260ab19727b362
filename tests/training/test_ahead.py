"""Items made ahead: the same ones in the same order, no more than asked for, and nothing left running."""

import threading
from collections.abc import Generator

import pytest

from mistudio_train.training.ahead import ahead


class Source:
    """Counts what was made and whether it was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.made = 0
        self.closed = False
        self.count, self.fails_at = count, fails_at

    def items(self) -> Generator[int]:
        try:
            for item in range(self.count):
                if item == self.fails_at:
                    raise OSError("the disk")
                self.made += 1
                yield item
        finally:
            self.closed = True


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_same_items_in_the_same_order(count: int) -> None:
    source = Source(5)
    assert list(ahead(source.items(), count)) == [0, 1, 2, 3, 4]
    assert source.closed


def test_no_more_than_asked_for_are_made_ahead_and_closing_ends_the_source() -> None:
    source = Source(100)
    items = ahead(source.items(), 3)
    assert next(items) == 0
    items.close()
    assert source.made <= 4  # the one that was given, and three
    assert source.closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_what_the_source_raises_is_raised_in_its_turn() -> None:
    items = ahead(Source(5, fails_at=2).items(), 2)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="the disk"):
        next(items)
