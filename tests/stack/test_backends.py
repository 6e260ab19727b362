"""Every backend that starts servers yields a Kafka with transactions and a store with conditional writes."""

from collections.abc import Iterator
from http import HTTPStatus
from uuid import uuid4

import pytest

from mistudio_stack import NativeStack, Stack, open_stack

from .servers import create_topic, get, put, put_if_absent, read_committed, write


class BackendContract:
    """What holds for each; a subclass opens its own."""

    @pytest.fixture
    def name(self) -> str:
        return f"t{uuid4().hex}"

    async def test_committed_records_are_read_and_aborted_ones_are_not(self, opened: Stack, name: str) -> None:
        await create_topic(opened, name)
        await write(opened, name, b"first")
        await write(opened, name, b"aborted", commit=False)
        await write(opened, name, b"last")
        assert await read_committed(opened, name, 2) == [b"first", b"last"]

    def test_the_store_gives_back_what_was_put(self, opened: Stack, name: str) -> None:
        put(opened, name, "a/b", b"\x00\xff")
        assert get(opened, name, "a/b") == b"\x00\xff"

    def test_of_two_claimants_the_first_wins(self, opened: Stack, name: str) -> None:
        put(opened, name, "other", b"")
        assert put_if_absent(opened, name, "claim", b"first") == HTTPStatus.OK
        assert put_if_absent(opened, name, "claim", b"second") == HTTPStatus.PRECONDITION_FAILED
        assert get(opened, name, "claim") == b"first"

    def test_the_environment_names_the_stack(self, opened: Stack) -> None:
        assert opened.env() == {
            "KAFKA_BOOTSTRAP_SERVERS": opened.bootstrap_servers,
            "MINIO_ENDPOINT": opened.minio_endpoint,
            "MINIO_ACCESS_KEY": "mistudio",
            "MINIO_SECRET_KEY": opened.secret_key,
            "MINIO_SECURE": "false",
        }
        assert opened.secret_key not in repr(opened)


class TestNative(BackendContract):
    """Processes."""

    @pytest.fixture
    def opened(self, native: NativeStack) -> Stack:
        return native


@pytest.mark.containers
class TestDocker(BackendContract):
    """Containers."""

    @pytest.fixture(scope="class")
    @classmethod
    def opened(cls) -> Iterator[Stack]:
        with open_stack("docker") as stack:
            yield stack
