"""A native stack for the tests of this folder, which may break it as long as they mend it."""

from collections.abc import Iterator

import pytest

from mistudio_stack import NativeStack, native_stack


@pytest.fixture(scope="package")
def native() -> Iterator[NativeStack]:
    """Both servers up."""
    with native_stack() as stack:
        yield stack
