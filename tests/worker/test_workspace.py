"""Workspaces: gone with their attempt, left alone while somebody works in them, cleared away after a death."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mistudio_train.disk_use import bytes_in
from mistudio_train.worker.workspace import Workspace, remove_abandoned

HOLDER = """
import sys
from pathlib import Path
from mistudio_train.worker.workspace import Workspace
workspace = Workspace(Path(sys.argv[1]))
workspace.hold()
(workspace.folder / "shard").write_bytes(b"x")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_workspace_is_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "root" / "job")
    workspace.hold()
    workspace.hold()  # which changes nothing
    (workspace.folder / "scratch").mkdir()
    workspace.remove()
    assert list((tmp_path / "root").iterdir()) == []


def test_only_workspaces_of_the_dead_are_cleared_away(tmp_path: Path) -> None:
    mine = Workspace(tmp_path / "mine")
    mine.hold()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "theirs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        remove_abandoned(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"mine", "theirs"}
        other.kill()
        other.wait()
        remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    mine.remove()


def test_a_root_that_is_not_there_has_nothing_to_clear(tmp_path: Path) -> None:
    remove_abandoned(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_worker_looks_at_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that starts holds it for the moment in which it finds out that nobody does."""
    workspace = Workspace(tmp_path / "job")
    looking = Workspace(tmp_path / "job")
    looking.hold()
    monkeypatch.setattr("mistudio_train.worker.workspace.time.sleep", lambda _: looking.remove())
    workspace.hold()
    assert workspace.folder.is_dir()
    workspace.remove()


def test_a_second_name_of_a_file_takes_no_room(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"x" * 2**20)
    before = bytes_in(tmp_path)
    os.link(tmp_path / "shard", tmp_path / "outgoing")
    assert bytes_in(tmp_path) == before >= 2**20
