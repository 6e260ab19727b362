"""Workspaces: gone with their attempt, left alone while somebody works in them, cleared away after a death."""

import subprocess
import sys
from pathlib import Path

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
