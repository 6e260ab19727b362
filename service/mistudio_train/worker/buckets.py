"""What requests name in buckets, and how it is said that it may not be read.

Owns the words for all of them; which buckets are allowed, and what is fetched, is those' who fetch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mistudio_train.errors import JobError

from .objects import KeyRefused, Store, StoreForbids

SCHEME = "s3://"
SHOWN_CHARACTERS = 200


def is_in_a_bucket(name: str) -> bool:
    """Whether a name is a place in a bucket."""
    return name.startswith(SCHEME)


def parted(name: str) -> tuple[str, str]:
    """The bucket, and what comes behind it; empty where nothing does."""
    bucket, _, path = name.removeprefix(SCHEME).partition("/")
    return bucket, path


def shown(name: str) -> str:
    """For an error: quoted, so that no control character gets out, and not for ever."""
    return repr(name if len(name) <= SHOWN_CHARACTERS else f"{name[:SHOWN_CHARACTERS]}…")


@contextmanager
def reading(bucket: str, store: Store, what: str, not_allowed: Callable[[str], JobError]) -> Iterator[None]:
    """Around reading from a bucket that a request names.

    Args:
        bucket: the one.
        store: the worker's, whose own bucket it must be able to open: that it cannot is no fault of the request.
        what: `an object` or `a folder`.
        not_allowed: the error with a hint.

    Raises:
        JobError: `not_allowed`, of a key that is none, or a bucket that the worker's credentials do not open.

    """
    try:
        yield
    except KeyRefused:
        raise not_allowed(f"Name {what} by its plain key: no '..', no control characters.") from None
    except StoreForbids:
        if bucket == store.bucket:
            raise
        raise not_allowed("The worker's credentials do not open that bucket; ask its operator.") from None
