"""Help is quick and every command's has an example."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer

from mistudio_train.cli import app
from tests.cli.conftest import Cli


def leaves(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command's words."""
    for command in group.registered_commands:
        assert command.callback is not None
        yield (*path, command.name or command.callback.__name__.replace("_", "-"))
    for info in group.registered_groups:
        assert info.typer_instance is not None
        name = info.typer_instance.info.name
        yield from leaves(info.typer_instance, (*path, name) if isinstance(name, str) else path)


COMMANDS = list(leaves(app))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_and_says_its_exit_statuses(words: tuple[str, ...], cli: Cli) -> None:
    ended = cli(*words, "--help")
    text = " ".join(ended.out.split())
    assert ended.status == 0
    example = text.partition("Example: ")[2]
    assert "mistudio-train " in example
    assert f" {' '.join(words)}" in example
    assert "Exit status: 0" in text


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import json, sys\n"
        "from mistudio_train.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded = set(json.loads(out.splitlines()[-1]))
    assert loaded & {"torch", "transformers", "matplotlib", "aiokafka", "faststream", "minio", "uvicorn"} == set()
    assert "typer" in loaded


def test_no_arguments_show_the_help(cli: Cli) -> None:
    ended = cli()
    assert "submit" in ended.out + ended.err


def test_version(cli: Cli) -> None:
    assert cli("--version").out == "0.1.0\n"
