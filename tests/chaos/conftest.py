"""Worlds to die in: one with workers that stand ready for traps, and the folder where logs of a failure stay."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from .mixture import SIZES
from .world import Base, World, a_base, a_world


@pytest.fixture(scope="session")
async def base(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Base]:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    async with a_base(tmp_path_factory.mktemp("chaos"), SIZES["short"]) as base:
        yield base


@asynccontextmanager
async def lane(base: Base, name: str) -> AsyncIterator[World]:
    """A world with one worker that is ready."""
    async with a_world(base, name) as world:
        await world.ready(world.start_worker(1))
        yield world
