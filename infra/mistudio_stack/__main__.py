"""`python -m mistudio_stack up | down | prepare`: the stack from a shell. It prints; the work is done elsewhere."""

import argparse
import sys
from pathlib import Path

from . import background, choose
from .errors import StackError
from .stack import BACKENDS, Backend


def main() -> int:
    """Run one command; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mistudio_stack", description="A real Kafka and S3 store, here.")
    parser.add_argument("command", choices=("up", "down", "prepare"), help="prepare builds what a later start needs")
    parser.add_argument("--backend", choices=BACKENDS, help="default: $MISTUDIO_STACK, else the first that can be had")
    parser.add_argument("--folder", type=Path, default=Path(".stack"), help="where its record and data lie (.stack)")
    arguments = parser.parse_args()
    try:
        match arguments.command:
            case "up":
                _up(arguments.folder, arguments.backend)
            case "down":
                print("Stack ended." if background.down(arguments.folder) else "No stack was up.")
            case _:
                choose.prepare(arguments.backend)
    except StackError as error:
        print(f"mistudio-stack: {error}", file=sys.stderr)
        return 1
    return 0


def _up(folder: Path, backend: Backend | None) -> None:
    env, is_new = background.up(folder, backend)
    for name, value in env.items():
        print(f"{name}={value}")
    state = "is up" if is_new else "was already up"
    print(f"The stack {state}. In a shell: set -a; . {folder / 'env'}; set +a", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
