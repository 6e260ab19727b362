"""A request out of what a person wrote: a file, flags, `--set`. Refuses what a worker would; sends nothing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mistudio_schemas import JobId, Limits, TrainRequested, UnknownFields, refuse_unknown_fields
from mistudio_train.worker.intake import refusal_of

from .errors import CliError

JsonObject = dict[str, Any]


def read_request_file(path: Path) -> JsonObject:
    """The object in a YAML or JSON file.

    Raises:
        CliError: if the file cannot be read or holds no object.

    """
    hint = "Give a YAML or JSON file with the request's fields, such as `model_name: gpt2`."
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CliError(f"{path} cannot be read ({error.strerror})", hint) from None
    except UnicodeDecodeError:
        raise CliError(f"{path} is no text", hint) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise CliError(f"{path}{where} is neither YAML nor JSON ({problem})", hint) from None
    if not isinstance(raw, dict):
        raise CliError(f"{path} holds no object", hint)
    return {str(key): value for key, value in raw.items()}


def assign(raw: JsonObject, settings: Iterable[str]) -> JsonObject:
    """`raw` with each `key.path=value` applied; `saes.0.k=16` reaches into a list. Values are YAML.

    Raises:
        CliError: if one is no such assignment, or its path leads through something that holds no fields.

    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise CliError(f"'{setting}' sets nothing", "Write --set key=value or --set key.path=value.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        *way, last = path.split(".")
        holder: Any = raw
        for step in way:
            holder = _inside(holder, step, setting)
        _put(holder, last, value, setting)
    return raw


def override(raw: JsonObject, flags: Mapping[str, Any]) -> JsonObject:
    """`raw` with the flags that were given; `sae.k` sets a field of the one SAE."""
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
        holder, _, field = name.rpartition(".")
        (_inside(raw, holder, name) if holder else raw)[field] = value
    return raw


def checked(raw: JsonObject, limits: Limits) -> TrainRequested:
    """The request, if a worker with these limits would accept it as far as can be told from here.

    Raises:
        CliError: for a token, an unknown field (with a suggestion).
        RequestRefused: for a value that the contract refuses.

    """
    if raw.get("huggingface_token") is not None:
        raise CliError(
            "a token in a request would be kept with the topic, so it is not sent",
            "Leave huggingface_token out: the worker has HF_TOKEN, or name one of its tokens with token_name.",
        )
    try:
        refuse_unknown_fields(TrainRequested, raw)
        return TrainRequested.model_validate(raw, context={"limits": limits})
    except UnknownFields as error:
        raise CliError(str(error), "Correct or remove it; nothing was sent.") from None
    except ValidationError as error:
        raise refusal_of(error) from None


def checked_job_id(job: str) -> str:
    """The id, if it can be a job's.

    Raises:
        CliError: if it cannot.

    """
    try:
        return TypeAdapter[str](JobId).validate_python(job)
    except ValidationError:
        raise CliError(f"'{job}' is no job's id", "List them with `mistudio-train jobs`.") from None


def _inside(holder: Any, step: str, setting: str) -> Any:
    """What `holder` has under `step`; an empty object is put where there is nothing yet."""
    if isinstance(holder, dict):
        if holder.get(step) is None:
            holder[step] = {}
        return holder[step]
    if isinstance(holder, list) and step.isdecimal() and int(step) < len(holder):
        return holder[int(step)]
    raise CliError(f"'{setting}' leads through '{step}', which is not there", "Name fields that the request has.")


def _put(holder: Any, key: str, value: Any, setting: str) -> None:
    if isinstance(holder, dict):
        holder[key] = value
    elif isinstance(holder, list) and key.isdecimal() and int(key) < len(holder):
        holder[int(key)] = value
    else:
        raise CliError(f"'{setting}' sets a field of something that has none", "Name fields that the request has.")
