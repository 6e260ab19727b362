"""Texts go into the real store and out of it by their names."""

import json
from pathlib import Path

import pytest

from mistudio_train.settings import Settings
from tests.cli.conftest import Cli


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("Once upon a time.\n")
    return path


@pytest.fixture
def store_env(worker_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in worker_env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("store_env")
def test_put_list_and_rm(cli: Cli, stories: Path) -> None:
    assert cli("corpus", "put", stories).out == "stories.txt\n"
    assert json.loads(cli("corpus", "put", stories, "--name", "b.txt", "--json").out) == {"name": "b.txt", "size": 18}
    listed = json.loads(cli("corpus", "list", "--json").out)
    assert [(one["name"], one["size"]) for one in listed] == [("b.txt", 18), ("stories.txt", 18)]
    assert cli("corpus", "rm", "b.txt").status == 0
    rows = cli("corpus", "list").out.splitlines()[1:]
    assert [row.split()[:2] for row in rows] == [["stories.txt", "18"]]


@pytest.mark.usefixtures("store_env")
def test_what_cannot_be_done_is_said(cli: Cli, stories: Path, tmp_path: Path) -> None:
    cli("corpus", "put", stories)
    for arguments, says in (
        (("put", tmp_path / "missing.txt"), "there is no file"),
        (("put", stories, "--name", "../x.txt"), "is no name of a corpus"),
        (("put", stories, "--name", "x.exe"), "format"),
        (("rm", "storys.txt"), "Did you mean stories.txt?"),
    ):
        ended = cli("corpus", *arguments)
        assert (ended.status, ended.out) == (2, "")
        assert says in ended.err
        assert "Traceback" not in ended.err


def test_an_empty_store_says_how_to_fill_it(cli: Cli, settings: Settings, stories: Path) -> None:
    cli("corpus", "put", stories)
    cli("corpus", "rm", "stories.txt")
    ended = cli("corpus", "list")
    assert (ended.status, ended.out) == (0, "")
    assert "corpus put FILE" in ended.err


@pytest.mark.usefixtures("nowhere")
def test_no_store(cli: Cli, stories: Path) -> None:
    ended = cli("corpus", "put", stories)
    assert (ended.status, ended.out) == (2, "")
    assert "127.0.0.1:9" in ended.err
    assert "Traceback" not in ended.err
