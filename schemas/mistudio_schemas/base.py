"""What every contract model shares: tolerant reading, strict numbers, one JSON form.

Knows nothing of any particular event; the unknown-field check lives here because it needs only the models.
"""

import difflib
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Self, Union

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json

JsonObject = dict[str, Any]


class Contract(BaseModel):
    """A model of the contract: unknown fields are ignored on reading, NaN and Infinity are refused."""

    model_config = ConfigDict(
        extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    def to_json(self) -> bytes:
        """The event's value on the wire: UTF-8 JSON.

        Raises:
            ValueError: if a number is NaN or Infinity, which JSON cannot hold.

        """
        return json.dumps(self.model_dump(mode="json"), allow_nan=False, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, value: bytes, **kwargs: Any) -> Self:
        """Read an event's value.

        Raises:
            ValueError: if the bytes are not JSON, or do not fit the model (pydantic's ValidationError is one).

        """
        return cls.model_validate(read_object(value), **kwargs)


def read_object(value: bytes) -> JsonObject:
    """The JSON object in `value`.

    Raises:
        ValueError: if the bytes are not strict JSON (NaN included), or are JSON but no object.

    """
    parsed = from_json(value, allow_inf_nan=False)
    if not isinstance(parsed, dict):
        raise ValueError(f"a JSON object is expected, not {type(parsed).__name__}")
    return parsed


class UnknownFields(ValueError):
    """A client wrote fields that the contract does not have."""

    def __init__(self, fields: dict[str, str | None]) -> None:
        self.fields = fields
        named = [f"'{name}'" + (f" (did you mean '{near}'?)" if near else "") for name, near in fields.items()]
        super().__init__(f"unknown field{'s' if len(named) > 1 else ''} {', '.join(named)}")


def unknown_fields(model: type[BaseModel], raw: JsonObject) -> Iterator[str]:
    """Dotted names of the fields in `raw` that `model` ignores, nested models and tagged unions included."""
    return (path for path, _ in _unknown(model, raw, ""))


def refuse_unknown_fields(model: type[BaseModel], raw: JsonObject) -> None:
    """Check a request before it is sent.

    Raises:
        UnknownFields: naming each field that would be ignored, with the nearest field that exists.

    """
    unknown = {path: _nearest(path, there) for path, there in _unknown(model, raw, "")}
    if unknown:
        raise UnknownFields(unknown)


def _nearest(path: str, model: type[BaseModel]) -> str | None:
    near = difflib.get_close_matches(path.rpartition(".")[2], model.model_fields, n=1)
    return near[0] if near else None


def _unknown(model: type[BaseModel], raw: JsonObject, prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Each unknown field, and the model that lacks it."""
    for key, value in raw.items():
        field = model.model_fields.get(key)
        if field is None:
            yield prefix + key, model
            continue
        members = list(_models_in(field.annotation))
        for suffix, child in _objects_in(value):
            nested = _member_for(members, child)
            if nested is not None:
                yield from _unknown(nested, child, f"{prefix}{key}{suffix}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
    elif typing.get_origin(annotation) in (Union, types.UnionType, list, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)


def _objects_in(value: Any) -> Iterator[tuple[str, JsonObject]]:
    if isinstance(value, dict):
        yield "", value
    elif isinstance(value, list):
        yield from ((f"[{i}]", item) for i, item in enumerate(value) if isinstance(item, dict))


def _member_for(members: list[type[BaseModel]], raw: JsonObject) -> type[BaseModel] | None:
    """The union's member that `raw` selects by its `kind`; the only member of a plain field."""
    if len(members) == 1:
        return members[0]
    for member in members:
        kind = member.model_fields.get("kind")
        if kind is not None and raw.get("kind", kind.default) in typing.get_args(kind.annotation):
            return member
    return None
