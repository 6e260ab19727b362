"""Nothing that goes wrong outside shows a traceback: one sentence, what to do, exit status 2."""

from pathlib import Path

import pytest

from tests.cli.conftest import Cli


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    "arguments",
    [
        ("submit", "-m", "gpt2", "-c", "a.txt"),
        ("watch", "j"),
        ("jobs",),
        ("cancel", "j"),
        ("stop", "j"),
        ("replay", "--job", "j", "--yes"),
        ("init",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_broker(arguments: tuple[str, ...], cli: Cli) -> None:
    ended = cli(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("Error: Kafka at 127.0.0.1:9 cannot be used")
    assert "KAFKA_BOOTSTRAP_SERVERS" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_name: [gpt2", "line 1 is neither YAML nor JSON"),
        ("- gpt2", "holds no object"),
        ("", "holds no object"),
        ("\x00", "neither YAML nor JSON"),
    ],
)
def test_a_bad_request_file(text: str, says: str, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "request.yaml"
    file.write_text(text)
    ended = cli("submit", file)
    assert (ended.status, ended.out) == (2, "")
    assert says in ended.err
    assert "Traceback" not in ended.err


def test_a_missing_request_file(cli: Cli) -> None:
    ended = cli("submit", "nowhere.yaml")
    assert (ended.status, ended.out) == (2, "")
    assert "nowhere.yaml cannot be read (No such file or directory)" in ended.err


def test_wrong_settings_are_named_without_their_values(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CONCURRENT_JOBS", "none-of-your-business")
    ended = cli("jobs")
    assert ended.status == 2
    assert "MAX_CONCURRENT_JOBS" in ended.err
    assert "none-of-your-business" not in ended.err
