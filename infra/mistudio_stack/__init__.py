"""A real Kafka and a real S3 store for tests, development and experiments: servers that run already, containers, or
native processes. It imports nothing of the worker, and the worker imports nothing of it but the embedded broker.
"""

from .choose import chosen_backend, open_stack, prepare
from .errors import StackError
from .native import NativeStack, native_stack
from .process import Server
from .stack import Backend, Stack

__all__ = [
    "Backend",
    "NativeStack",
    "Server",
    "Stack",
    "StackError",
    "chosen_backend",
    "native_stack",
    "open_stack",
    "prepare",
]
