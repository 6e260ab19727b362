"""One server as a child process: started, watched until it is ready, frozen, killed and started again on the same data.

It knows nothing of Kafka or MinIO. A server does not outlive the process that started it, unless it is released.
"""

import os
import random
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

from .errors import StackError

READY_SECONDS = 90.0
STOP_SECONDS = 20.0
# Below the range from which systems take the ports of outgoing connections: a client that retries against a killed
# server would otherwise sooner or later be given the server's port itself.
PORTS = range(20_000, 32_000)

# Waits until its input says "released" or ends. Its input ends when the owner dies, however it dies.
GUARD = 'read -r released || kill -9 "$1"'


class Server:
    """A server process that is up from `start` to `stop` or `kill`.

    `is_ready` is asked with what the server has written since its start. All methods block and are meant for one thread
    at a time, whichever it is.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        log: Path,
        is_ready: Callable[[str], bool],
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._is_ready = is_ready
        self._environment = os.environ | (environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process's id.

        Raises:
            StackError: if the server is not running.

        """
        if self._process is None:
            raise StackError(f"{self.name} is not running", "Start it first")
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            StackError: if it ends or stays silent instead; the end of its log is in the message.

        """
        if self._process is not None:
            raise StackError(f"{self.name} is already running", "Kill or stop it first")
        with self.log.open("ab") as log:
            begin = log.tell()
            # A session of its own: a Ctrl-C in the terminal is for the owner, who then ends its servers in order.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        guard = ["/bin/sh", "-c", GUARD, "guard", str(self._process.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._wait_until_ready(begin)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """`kill -9`. Data and port stay, for another start. A server that is not running is left alone."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end in order, and wait for that; killed when it does not."""
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Kill it and start it again on the same port and data."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing is answered any more when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        # The signal alone is not enough: for a moment other threads of the server may still answer.
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a frozen server go on."""
        os.kill(self.pid, signal.SIGCONT)

    def release(self) -> None:
        """Let it outlive this process."""
        if self._guard is not None:
            self._guard.communicate(b"released\n")
            self._guard = None

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.release()
        self._process = None

    def _wait_until_ready(self, begin: int) -> None:
        deadline = monotonic() + READY_SECONDS
        while not self._is_ready(self._written_since(begin)):
            if self._process is not None and self._process.poll() is not None:
                raise self._not_ready(f"ended with status {self._process.returncode}", begin)
            if monotonic() > deadline:
                raise self._not_ready(f"was not ready after {READY_SECONDS:.0f} s", begin)
            sleep(0.03)

    def _written_since(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")

    def _not_ready(self, what: str, begin: int) -> StackError:
        return StackError(f"{self.name} {what}:\n{self._written_since(begin)[-2000:].strip()}\n", f"See {self.log}")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, all different, the same whenever the server starts again."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = random.choice(PORTS)  # noqa: S311
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return ports
