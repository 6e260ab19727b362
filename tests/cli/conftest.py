"""The command line as a person meets it: arguments in, exit status and both streams out."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mistudio_train.cli import main
from mistudio_train.settings import Settings
from tests.cli.topics import create_topics

COMMAND = str(Path(sys.executable).with_name("mistudio-train"))


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def logging_kept() -> Iterator[None]:
    """What a command does to this process' logging is undone."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("", "aiokafka")}
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers
    for logger, level in loggers.items():
        logger.setLevel(level)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], logging_kept: None) -> Cli:
    """Run a command in this process."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), written.out, written.err)

    return call


@pytest.fixture
def process_env(worker_env: dict[str, str]) -> dict[str, str]:
    """The environment of a command's own process."""
    return os.environ | worker_env


@pytest.fixture
def cli_process(process_env: dict[str, str]) -> Cli:
    """Run a command in a process of its own."""

    def call(*arguments: str | Path) -> Outcome:
        command = [COMMAND, *map(str, arguments)]
        ended = subprocess.run(command, env=process_env, capture_output=True, text=True, timeout=120, check=False)
        return Outcome(ended.returncode, ended.stdout, ended.stderr)

    return call


@contextmanager
def running_command(env: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that has not ended, in a process of its own."""
    command = [COMMAND, *arguments]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def settings(worker_env: dict[str, str], worker_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """This test's own topics, created, and this process' environment pointing at them."""
    for name, value in worker_env.items():
        monkeypatch.setenv(name, value)
    create_topics(worker_settings)
    return worker_settings


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a Kafka nor a store at the places that the environment names."""
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9")
    monkeypatch.setenv("MINIO_ENDPOINT", "127.0.0.1:9")
