"""Which model a request means when it is done here: whoever types the command may use their own folders and tokens."""

from pathlib import Path

from mistudio_schemas import TrainRequested
from mistudio_train.settings import Settings

from .errors import CliError


def with_model_folder(request: TrainRequested) -> TrainRequested:
    """The request with the absolute path of a model that is a folder here; a hub's name stays as it is."""
    model = Path(request.model_name).expanduser()
    if not model.is_dir():
        return request
    return request.model_copy(update={"model_name": str(model.resolve())})


def folder_of_model(request: TrainRequested) -> list[Path]:
    """The folder that holds the model's, to be allowed; none for a hub's name."""
    model = Path(request.model_name)
    return [model.parent] if model.is_absolute() and model.is_dir() else []


def starts_of(request: TrainRequested) -> dict[str, Path]:
    """The folders of the SAEs that the request's go on from, by the names that it has for them.

    Raises:
        CliError: if one is no folder here.

    """
    folders = {name: Path(name).expanduser().resolve() for name in request.starts}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise CliError(
                f"there is no folder {name} here, to go on from",
                "Without a store init_from is a local folder; of a run: mistudio-train fetch JOB --to DIR, DIR/sae.",
            )
    return folders


def hub_token(request: TrainRequested, settings: Settings) -> str | None:
    """The hub's token from this environment.

    Raises:
        CliError: if the request names one that is not there.

    """
    name = request.token_name
    try:
        token = settings.hub_token(name)
    except KeyError:
        raise CliError(f"there is no token named {name}", f"Set HF_TOKEN_{str(name).upper()}.") from None
    return token.get_secret_value() if token else None
