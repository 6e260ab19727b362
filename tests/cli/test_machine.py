"""What would fit, told from a model's folder alone."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GPT-2 of two blocks, 32 wide: its config, and no weights."""
    folder = tmp_path / "tiny-gpt2"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_validate_model_tells_what_the_config_says(cli: Cli, model: Path) -> None:
    info = json.loads(cli("validate-model", model, "--layer-number", "1", "--json").out)
    assert (info["architecture"], info["total_layers"], info["hidden_size"], info["selected_layer"]) == (
        "gpt2",
        2,
        32,
        1,
    )
    assert "gpt2" in cli("validate-model", model).out


def test_a_layer_that_the_model_has_not(cli: Cli, model: Path) -> None:
    ended = cli("validate-model", model, "--layer-number", "2")
    assert (ended.status, ended.out) == (2, "")
    assert "Its layers are 0 to 1." in ended.err


def test_no_model(cli: Cli, tmp_path: Path) -> None:
    ended = cli("validate-model", tmp_path / "none")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("Error: ")
    assert "Traceback" not in ended.err


def test_a_small_job_fits_and_a_huge_one_does_not(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = json.loads(cli("check-memory", model, "--json").out)
    assert plan["fits"] is True
    assert plan["sae_bytes"] > 0
    monkeypatch.setenv("MEMORY_LIMIT_BYTES", "1000000")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ended = cli("check-memory", model, "--json")
    assert ended.status == 1
    assert json.loads(ended.out)["fits"] is False
    assert cli("check-memory", model).err.startswith("Error: ")


def test_gpus_are_listed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert json.loads(cli("gpu", "--json").out) == []
    assert "run on the CPU" in cli("gpu").err
