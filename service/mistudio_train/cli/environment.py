"""Where a command's settings come from: the environment, and the file that `--env-file` names. Reads no other file."""

import os
import shlex
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import SettingsError

from mistudio_train.settings import Settings

from .errors import CliError


def use_env_file(path: Path) -> None:
    """Put the file's lines into this process' environment; they win over what is there, as they were asked for.

    Raises:
        CliError: if the file cannot be read, or a line is not KEY=VALUE.

    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(
            f"the environment file {path} cannot be read ({_why(error)})", "Name a file of KEY=VALUE lines."
        ) from None
    for number, line in enumerate(text.splitlines(), start=1):
        for name, value in _assignment(line, f"{path}, line {number}"):
            os.environ[name] = value


def load_settings() -> Settings:
    """The settings as the environment says them.

    Raises:
        CliError: naming each variable that has a wrong value; never the value, which may be a secret.

    """
    try:
        return Settings()
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        wrong = "; ".join(f"{'__'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in found)
    except SettingsError as error:
        wrong = str(error)
    raise CliError(f"wrong settings in the environment: {wrong}", "Correct or unset the variable.")


def _assignment(line: str, place: str) -> list[tuple[str, str]]:
    """The line's name and value, quoted as a shell would have it; nothing for a blank line or a comment."""
    wrong = CliError(f"{place} is not KEY=VALUE", "Write one KEY=VALUE a line; quote a value with spaces.")
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        raise wrong from None
    if words[:1] == ["export"]:
        words = words[1:]
    if not words:
        return []
    name, equals, value = words[0].partition("=")
    if len(words) > 1 or not equals or not name.isidentifier():
        raise wrong
    return [(name, value)]


def _why(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is no text"
