"""Results by what was asked for: where an identical request finds the artifacts of an earlier one.

Keeps `results/{identity}.json`, the earlier run's event; only a result whose objects are all still there is given.
"""

import logging

from mistudio_schemas import TrainCompleted
from mistudio_train.errors import JobError

from .artifacts import read_manifest
from .objects import NotFound, Store

logger = logging.getLogger(__name__)


def keep_result(store: Store, identity: str, event: TrainCompleted) -> None:
    """Keep where the result is. Raises `StoreUnavailable`."""
    store.put_bytes(_key(store, identity), event.to_json(), "application/json")


def find_result(store: Store, identity: str) -> TrainCompleted | None:
    """An earlier run's event; `None` if there is none, or not all of its objects. Raises `StoreUnavailable`."""
    try:
        event = TrainCompleted.from_json(store.get_bytes(_key(store, identity))[0])
        manifest = read_manifest(store, event.manifest.key, event.manifest.sha256)
        if all(store.stat(ref.key).size == ref.size for ref in manifest.objects):
            return event
    except NotFound:
        pass
    except (ValueError, JobError) as error:
        logger.warning("the result kept for %s cannot be used: %s", identity, error)
    return None


def _key(store: Store, identity: str) -> str:
    return f"{store.prefix}results/{identity}.json"
