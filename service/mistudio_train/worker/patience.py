"""How a job waits for a store that is away: for as long as it takes, saying so. Knows nothing of what is asked."""

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

from mistudio_train.errors import StoreUnavailable

from .backoff import backoff

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def patiently(call: Callable[[], T]) -> T:
    """A blocking call to the store, in a thread, again and again while the store is away."""
    for delay in backoff():
        try:
            return await asyncio.to_thread(call)
        except StoreUnavailable as error:
            logger.warning("the store does not answer, trying again in %.0f s: %s. %s", delay, error, error.hint)
            await asyncio.sleep(delay)
    raise AssertionError("backoff has no end")
