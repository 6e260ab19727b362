"""Which result a job will have, as one name: two jobs of the same identity give the same numbers on the same device.

Reads model files and nothing else; knows no store, and not what is done with the name.
"""

import hashlib
import json
from collections.abc import Sequence

from mistudio_schemas import TrainRequested
from mistudio_train import __version__
from mistudio_train.digest import sha256_of

from .model_source import ModelSource

NOT_OF_THE_RESULT = (
    "job_id", "huggingface_token", "token_name", "gpu_id", "checkpoint_seconds", "model_revision", "push_to_hub",
)  # fmt: skip
"""Fields that name the job, or say how it is carried out; of the revision the commit counts."""


def request_digest(request: TrainRequested) -> str:
    """Of what the request asks for, less what does not show in the numbers."""
    asked = request.model_dump(mode="json", exclude=set(NOT_OF_THE_RESULT))
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def identity_of(
    request: TrainRequested, source: ModelSource, corpus_sha256: str, starts: Sequence[str | None] = ()
) -> str:
    """A sha256 over the request, the model with its tokenizer, the corpus, what its SAEs go on from (`starts`: of each
    the content, `None` where it starts afresh) and the version of the code.

    A model on the hub counts by its commit; one in a folder by the content of every file, which takes as long as
    reading it.
    """
    parts = [
        request_digest(request),
        source.name,
        content_of(source),
        corpus_sha256,
        *filter(None, starts),
        __version__,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def content_of(source: ModelSource) -> str:
    """The model's commit on the hub; of one in a folder a sha256 over every file, which takes as long as reading it."""
    if source.commit is not None:
        return source.commit
    assert source.folder is not None  # without a commit it is a folder
    digests = {name: sha256_of(source.folder / name) for name in sorted(source.files)}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
