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
