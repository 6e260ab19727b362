"""Whether a request's result may be put on the hub, and with what; speaks to nobody.

Owns the operator's word on it; the child does it, which has the files.
"""

from mistudio_schemas import TrainRequested
from mistudio_train.errors import RequestRefused
from mistudio_train.messages import Push
from mistudio_train.settings import Settings


def push_of(request: TrainRequested, settings: Settings) -> Push | None:
    """What the request asks for; with the worker's own token, never one that a request names or brings.

    Raises:
        RequestRefused: if the operator does not allow it, or the worker has no token of its own.

    """
    if request.push_to_hub is None:
        return None
    owner = request.push_to_hub.partition("/")[0]
    if owner.casefold() not in {allowed.casefold() for allowed in settings.hub_push_owners}:
        raise RequestRefused(
            f"this worker puts no result into repositories of {owner}",
            "Ask the operator to name the owner in HUB_PUSH_OWNERS, or leave push_to_hub out.",
        )
    if settings.hf_token is None:
        raise RequestRefused(
            "this worker has no token of its own to put a result on the hub with",
            "Ask the operator to set HF_TOKEN, or leave push_to_hub out.",
        )
    return Push(request.push_to_hub, settings.hf_token.get_secret_value(), settings.hub_push_seconds)
