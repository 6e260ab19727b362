"""A report of a hostile corpus, and a browser to look at it with."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium import webdriver

from mistudio_train.training.run import run_job
from tests.training.conftest import Listener, spec_of

HOSTILE = [
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'> the cat",
    "</script><script>window.pwned = 3</script> sat on the mat",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} `backticks` the dog",
    "\u202e reversed \u2066 isolated \u2069 text of the bird \u200b",
    "\x1b[31mred\x1b]0;title\x07 bell \x00 nul \x85 next line",
    "javascript:alert(1) data:text/html,<script>window.pwned = 4</script>",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 the cat \U0001f98a",
]
PLAIN = [f"the cat sat on mat {number} and looked at {number % 7} birds" for number in range(60)]
LONG_WORD = "W" * 1_000_000
"""Of a tiny model's tokenizer a token a letter: where rows are tokens a shorter one will do."""


def report_of(model: Path, workspace: Path, **fields: Any) -> tuple[Path, Listener]:
    """The folder of a job's files, its texts hostile and plain."""
    workspace.mkdir(parents=True, exist_ok=True)
    corpus = workspace / "corpus.jsonl"
    long_word = LONG_WORD[:5000] if fields.get("pooling") == "token" else LONG_WORD
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*HOSTILE, long_word, *PLAIN]))
    asked: dict[str, Any] = {"layer_number": 1, "hidden_dim": 64, "max_epochs": 3, "max_sequence_length": 32}
    parent = Listener()
    spec = replace(
        spec_of(model, workspace, **(asked | {"corpus_file": corpus.name} | fields)),
        corpus=corpus,
        bundle_max_bytes=1 << 30,
    )
    torch.set_num_threads(1)
    run_job(spec, parent)
    return spec.output, parent


@pytest.fixture(scope="session")
def token_report(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Listener]:
    saes = [
        {"name": "k4", "kind": "topk", "k": 4, "hidden_dim": 128, "batch_size": 64},
        {"name": "k8", "kind": "batchtopk", "k": 8, "hidden_dim": 64, "batch_size": 64},
    ]
    fields: dict[str, Any] = {"pooling": "token", "saes": saes, "cross_entropy_tokens": 256, "held_out": 0.2}
    return report_of(model_folder("llama"), tmp_path_factory.mktemp("report"), **fields)


@pytest.fixture(scope="session")
def mean_report(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Listener]:
    return report_of(model_folder("bert"), tmp_path_factory.mktemp("report"), sae={"kind": "topk", "k": 4})


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    """Chromium without a window, which notes what it says and what it asks of a network."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    assert not missing, f"{missing} not found: install Debian's packages chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()
