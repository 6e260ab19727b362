"""Where the corpus of a request is when it is looked at here: in a folder, in the store, or a dataset of the hub."""

from pathlib import Path

from mistudio_schemas import TrainRequested
from mistudio_train.settings import Settings

from .errors import CliError


def corpus_here(request: TrainRequested, folder: Path | None, scratch: Path, settings: Settings) -> Path | None:
    """The corpus' file; `None`: a dataset of the hub.

    Args:
        request: names it.
        folder: that holds it; `None`: it is brought from the store, or where else a worker would find it.
        scratch: a folder for what is brought.
        settings: of the store.

    Raises:
        CliError: if the folder has no such file.
        JobError: if the store has none, or does not answer.

    """
    from mistudio_train.worker.corpora import fetch_corpus, is_on_the_hub
    from mistudio_train.worker.store import open_store

    if is_on_the_hub(request.corpus_file):
        return None
    if folder is not None:
        path = (folder / Path(request.corpus_file).name).resolve()
        if not path.is_file():
            raise CliError(f"there is no corpus {path}", "Name the folder that holds it with --corpus-folder.")
        return path
    store = open_store(settings)
    try:
        return fetch_corpus(request.corpus_file, scratch, settings, store)
    finally:
        store.close()
