"""An attempt's own folder on the worker's disk, gone with the attempt; one of a worker that was killed, with the next.

Owns the folders and who holds them; knows nothing of what is in them.
"""

import fcntl
import logging
import os
import shutil
import time
from pathlib import Path

HOLD_TRIES, HOLD_AGAIN_SECONDS = 100, 0.05
logger = logging.getLogger(__name__)


class Workspace:
    """A folder that this process holds from `hold` until it removes it, or dies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: int | None = None

    def hold(self) -> None:
        """Make it, if that is not done. Raises OSError if it cannot be made."""
        if self._held is None:
            self._held = _hold(self.folder)

    def remove(self) -> None:
        """Delete it with all that is in it."""
        if self._held is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._held)
            self._held = None


def remove_abandoned(root: Path) -> None:
    """Delete the workspaces that no process holds: activations of a killed worker would fill the disk."""
    if not root.is_dir():
        return
    for folder in root.iterdir():
        try:
            held = _try_to_hold(folder)
        except OSError:  # held, or gone
            continue
        logger.info("removing the workspace %s of a worker that has died", folder.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _hold(folder: Path) -> int:
    """As `_try_to_hold`; another worker that starts may hold the new folder for a moment, or clear it away."""
    for _ in range(HOLD_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = _try_to_hold(folder)
        except (FileNotFoundError, BlockingIOError):
            time.sleep(HOLD_AGAIN_SECONDS)
            continue
        if folder.exists() and folder.stat().st_ino == os.fstat(held).st_ino:
            return held
        os.close(held)
    raise BlockingIOError(f"another process holds {folder}")


def _try_to_hold(folder: Path) -> int:
    """A descriptor whose lock ends with this process.

    Raises:
        BlockingIOError: if another process has the folder.

    """
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(held)
        raise
    return held
