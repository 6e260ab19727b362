"""Which backend a command gets, and the one function that gives it. How a backend starts is its own affair."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import containers, external, native
from .errors import StackError
from .stack import BACKENDS, Backend, Stack


@contextmanager
def open_stack(backend: Backend | None = None) -> Iterator[Stack]:
    """A real Kafka and a real S3 store, for as long as the block lasts.

    The backend is the argument, else the variable `MISTUDIO_STACK`, else the first of: the servers that the environment
    names; containers, when a Docker engine answers; native processes.

    Raises:
        StackError: if that backend cannot be had; the message says what to install or to set.

    """
    match backend or chosen_backend():
        case "external":
            yield external.external_stack()
        case "docker":
            with containers.container_stack() as stack:
                yield stack
        case "native":
            with native.native_stack() as stack:
                yield stack


def chosen_backend() -> Backend:
    """The backend that `open_stack` uses here and now.

    Raises:
        StackError: if `MISTUDIO_STACK` is no backend.

    """
    wanted = os.environ.get("MISTUDIO_STACK")
    for backend in BACKENDS:
        if wanted == backend:
            return backend
    if wanted:
        raise StackError(f"MISTUDIO_STACK={wanted} is no backend", f"Choose {', '.join(BACKENDS)}, or unset it")
    if external.is_named():
        return "external"
    return "docker" if containers.engine_answers() else "native"


def prepare(backend: Backend | None = None) -> None:
    """Build whatever the backend needs before it can start; only the native one needs anything."""
    if (backend or chosen_backend()) == "native":
        native.prepare()
