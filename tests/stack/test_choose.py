"""Which backend is chosen, and what a person is told when it cannot be had."""

from pathlib import Path

import pytest

from mistudio_stack import NativeStack, StackError, chosen_backend, native_stack, open_stack

VARIABLES = ("KAFKA_BOOTSTRAP_SERVERS", "MINIO_ENDPOINT", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", "MISTUDIO_STACK")


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")


@pytest.mark.usefixtures("_no_engine")
def test_without_an_engine_it_is_native() -> None:
    assert chosen_backend() == "native"


def test_servers_that_the_environment_names_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092")
    assert chosen_backend() == "external"


def test_a_choice_overrides_what_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092")
    monkeypatch.setenv("MISTUDIO_STACK", "native")
    assert chosen_backend() == "native"


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTUDIO_STACK", "mock")
    with pytest.raises(StackError, match=r"MISTUDIO_STACK=mock is no backend. Choose external, docker, native"):
        chosen_backend()


def test_servers_named_in_part_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092")
    with pytest.raises(StackError, match="MINIO_ENDPOINT, MINIO_ACCESS_KEY, MINIO_SECRET_KEY not set"), open_stack():
        pass


def test_a_named_server_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES[:4]:
        monkeypatch.setenv(name, "127.0.0.1:1")
    with pytest.raises(StackError, match=r"Kafka at 127.0.0.1:1 takes no connection"), open_stack():
        pass


@pytest.mark.usefixtures("_no_engine")
def test_containers_without_an_engine_are_refused() -> None:
    with pytest.raises(StackError, match="No Docker engine answers"), open_stack("docker"):
        pass


def test_what_is_missing_for_processes_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MISTUDIO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(StackError, match=r"Java runtime.*Maven.*Go.*Install these"), native_stack():
        pass


def test_servers_of_another_stack_serve_as_external_ones(native: NativeStack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in native.env().items():
        monkeypatch.setenv(name, value)
    with open_stack() as stack:
        assert (stack.backend, stack.env()) == ("external", native.env())
