"""What the page on results says is so: its example runs on a real run's files, and its columns are the store's."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mistudio_train.training.features import COLUMNS, SCHEMA
from mistudio_train.training.run import run_job
from tests.models import tiny_model
from tests.training.conftest import Listener, spec_of

PAGE = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TEXTS = [f"the cat sat on mat {number} and looked at {number % 7} birds" for number in range(30)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    (root / "corpus.txt").write_text("\n".join(TEXTS))
    sae = {"kind": "topk", "k": 8, "hidden_dim": 64, "batch_size": 64}
    spec = spec_of(tiny_model("gpt2", root / "model"), root, layer_number=1, pooling="token", max_epochs=1, sae=sae)
    torch.set_num_threads(1)
    run_job(replace(spec, bundle_max_bytes=1 << 30), Listener())
    return spec.output


def printed(example: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(example, "results.md", "exec"), {})
    return said.getvalue().splitlines()


def test_the_example_finds_the_strongest_places(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pq.read_table(run / "features" / "activations.parquet").to_pandas()
    feature = int(table["feature"].mode()[0])
    lines = printed(EXAMPLE.replace('"==", 7', f'"==", {feature}'), run, monkeypatch)
    strongest = table[table["feature"] == feature].nlargest(10, "activation")
    assert [line.split()[0] for line in lines] == [f"{value:.3f}" for value in strongest["activation"]]
    assert all("the cat sat" in line for line in lines)


def test_the_columns_are_those_of_the_store() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| (int32|float32) \|", PAGE, re.MULTILINE))
    assert listed == {
        name: {"float": "float32"}.get(str(kind), str(kind)) for name, kind in zip(COLUMNS, SCHEMA.types, strict=True)
    }


def test_every_file_of_a_run_is_on_the_page(run: Path) -> None:
    names = {path.relative_to(run).parts[0] for path in run.rglob("*") if path.is_file()}
    known = set(re.findall(r"`([\w.]+)[/`]", PAGE)) | {"sae", "features", "report"}
    assert names <= known, names - known


def test_texts_are_read_by_ranges(run: Path) -> None:
    some = pq.read_table(run / "features" / "activations.parquet", filters=[("text", ">=", 3), ("text", "<", 5)])
    assert np.unique(some["text"].to_numpy()).tolist() == [3, 4]
