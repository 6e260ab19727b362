"""`serve` is a worker until it is told to stop."""

import signal
from collections.abc import Iterator

from tests.cli.conftest import running_command


def until_ready(lines: Iterator[str]) -> None:
    assert any("ready: " in line for line in lines)


def test_serve_gets_ready_and_ends_in_good_order(process_env: dict[str, str]) -> None:
    with running_command(process_env, "serve") as process:
        assert process.stderr is not None
        until_ready(iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
