"""A process that has imported torch and the training, and forks the workers' children: else each takes nine seconds.

The child's code is the real one, and so are its pipes; instead of `spawn` it has multiprocessing's `forkserver`, one
for all workers. It ends when the process that started it does.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

ADDRESS = "CHAOS_NURSERY"
"""The variable that tells a worker where the nursery listens; unset: its children are spawned as in production."""
PRELOAD = ("mistudio_train.training.run", "mistudio_train.training.pipeline", "transformers")


@contextmanager
def nursery(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A nursery that is ready, by its address; its children have `environment`."""
    address = folder / "nursery.sock"
    with (folder / "nursery.log").open("ab") as log:
        command = [sys.executable, "-m", "tests.chaos.nursery", str(address)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
        )
    assert process.stdin is not None  # both are pipes
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the nursery did not start: see {folder / 'nursery.log'}")
        yield address


def use(address: str) -> None:
    """From now on this process' children are the nursery's."""
    from mistudio_train.worker import child

    server: Any = forkserver.ForkServer()
    server._forkserver_address = address
    server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
    server.ensure_running = lambda: None
    forkserver.connect_to_new_process = server.connect_to_new_process
    child._SPAWN = get_context("forkserver")  # type: ignore[assignment]


def main() -> None:
    """Listen at the address until stdin ends."""
    from transformers import LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast  # noqa: F401  lazy otherwise

    for name in PRELOAD:
        __import__(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    alive = os.dup(0)
    print("ready", flush=True)
    serve: Any = forkserver.main
    serve(listener.detach(), alive, [])


if __name__ == "__main__":
    main()
