"""The sha256 of a file, read piece by piece. Knows nothing of what is in it."""

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Of all its bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
