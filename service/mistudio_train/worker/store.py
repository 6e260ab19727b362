"""The one door to the object store: its protocol, its errors, and which store the settings ask for.

Knows no job; what lies where is register.py's, artifacts.py's and corpora.py's to say.
"""

from mistudio_train.errors import StoreUnavailable
from mistudio_train.settings import Settings

from .directory_store import DirectoryStore
from .objects import Copied, KeyRefused, NotFound, ObjectInfo, Store, StoreForbids
from .s3_store import S3Store

__all__ = [
    "Copied",
    "DirectoryStore",
    "KeyRefused",
    "NotFound",
    "ObjectInfo",
    "S3Store",
    "Store",
    "StoreForbids",
    "StoreUnavailable",
    "open_store",
]


def open_store(settings: Settings) -> Store:
    """The folder that `STORE_PATH` names, else the S3 store; nothing is asked of it yet."""
    if settings.store_path is not None:
        return DirectoryStore(settings.store_path, settings.store_prefix)
    return S3Store(settings)
