"""Files are whole or not there, and hold plain values only."""

import errno
import json
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mistudio_train.errors import DiskFull, ExportRefused
from mistudio_train.training.files import refuse_unless_own, refuse_unless_plain, whole, write_json


@dataclass
class Record:
    loss: float = 0.5


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.float64(0.5), "numpy.float64"),
        (np.int64(1), "numpy.int64"),
        (Path("/data/corpus.txt"), "PosixPath"),
        (Record(), "Record"),
        (Colour.RED, "Colour"),
        ((1, 2), "tuple"),
        (torch.zeros(2), "Tensor"),
        (b"bytes", "bytes"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ({1: "one"}, "no string: 1"),
        ({"huggingface_token": "hf_x"}, "secret under 'huggingface_token'"),
    ],
)
def test_guard_names_the_place_and_the_type(value: object, what: str) -> None:
    with pytest.raises(ExportRefused, match=what) as refusal:
        refuse_unless_plain({"stats": {"losses": [0.5, value]}}, "file")
    assert "file.stats.losses[1]" in str(refusal.value)


def test_guard_lets_plain_values_through() -> None:
    refuse_unless_plain({"a": ["x", 1, 0.5, True, None, {"b": []}], "requires_token": True, "token": None}, "file")


def test_guard_of_tensors() -> None:
    whole_MN = torch.ones(4, 6)
    refuse_unless_own({"weight": whole_MN, "bias": torch.zeros(4)}, "sae")
    for name, bad, message in [
        ("half", torch.zeros(2, dtype=torch.float16), "sae.half is torch.float16"),
        ("turned", torch.ones(4, 6).T, "sae.turned is not contiguous"),
        ("part", whole_MN[:2], "sae.part is a view of a larger storage"),
        ("tied", whole_MN.view(6, 4), "sae.tied shares its storage with sae.weight"),
        ("nan", torch.tensor([math.nan]), "sae.nan holds numbers that are not finite"),
    ]:
        with pytest.raises(ExportRefused, match=message):
            refuse_unless_own({"weight": whole_MN, name: bad}, "sae")


def test_json_is_strict_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"text": "naïve ☃", "rate": 0.25})
    written = (tmp_path / "new" / "a.json").read_text(encoding="utf-8")
    assert written == '{\n  "text": "naïve ☃",\n  "rate": 0.25\n}\n'
    with pytest.raises(ExportRefused, match=r"b\.json\.rate is nan"):
        write_json(tmp_path / "b.json", {"rate": math.nan})
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_file_is_as_open_as_its_folder_whatever_wrote_it(tmp_path: Path) -> None:
    for mode in (0o755, 0o700):
        tmp_path.chmod(mode)
        with whole(tmp_path / "weights.safetensors") as partial:
            save_file({"weights": torch.zeros(2)}, partial)
        assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == mode & 0o666


def test_what_fails_on_the_way_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"version": 1})

    def write_half() -> None:
        with whole(path) as partial:
            partial.write_text("{")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert json.loads(path.read_text()) == {"version": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_says_so_before_and_during(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"no room for a\.pt"), whole(tmp_path / "a.pt", size=1 << 60):
        pytest.fail("it began to write")
    with pytest.raises(DiskFull) as full, whole(tmp_path / "a.pt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.retryable
    assert list(tmp_path.iterdir()) == []
