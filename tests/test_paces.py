"""The file of how long jobs took: a line a job, bounded, and never a reason for a job to fail."""

import json
import logging
from pathlib import Path
from threading import Thread

import pytest

from mistudio_train.paces import AROUND, KEPT, MOST_LINES, Pace, Part, keep, paces_in


def pace(name: str = "j") -> Pace:
    parts = {"loading": Part((1e9, 1.0), 4.0)}
    return Pace(name, "CPU, 2 threads", parts, 7.0, {"topk": 0.01}, 1000, 1100, 2000)


def test_a_job_is_kept_with_what_was_around_its_child(tmp_path: Path) -> None:
    path = tmp_path / "data" / "paces.jsonl"
    keep(path, pace(), seconds=10.0, disk=1900, result=510)
    (found,) = paces_in(path)
    assert found.parts == {"loading": Part((1e9, 1.0), 4.0), AROUND: Part((510.0, 1.0), 3.0)}
    assert (found.disk, found.result, found.memory_peak) == (1900, 510, 1100)


def test_nothing_is_kept_of_a_job_that_was_not_done_in_one_go(tmp_path: Path) -> None:
    keep(tmp_path / "paces.jsonl", None, seconds=10.0, disk=1, result=1)
    assert list(tmp_path.iterdir()) == []
    assert paces_in(tmp_path / "paces.jsonl") == []


def test_only_the_latest_count_and_what_is_old_goes(tmp_path: Path) -> None:
    path = tmp_path / "paces.jsonl"
    keep(path, pace(), seconds=5.0, disk=1, result=1)
    path.write_text(path.read_text() * MOST_LINES)
    for number in range(5):
        keep(path, pace(f"j{number}"), seconds=5.0, disk=1, result=1)
    assert len(path.read_text().splitlines()) == KEPT + 4
    assert [one.job_id for one in paces_in(path)][-6:] == ["j", "j0", "j1", "j2", "j3", "j4"]
    assert len(paces_in(path)) == KEPT
    assert [one.name for one in tmp_path.iterdir()] == ["paces.jsonl"]


def test_jobs_that_end_together_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "paces.jsonl"
    threads = [
        Thread(target=keep, args=(path, pace(f"j{n}")), kwargs={"seconds": 5.0, "disk": 1, "result": 1})
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.job_id for one in paces_in(path)} == {f"j{n}" for n in range(20)}


def test_lines_of_another_form_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "paces.jsonl"
    keep(path, pace("good"), seconds=5.0, disk=1, result=1)
    good = path.read_text()
    odd = ["", "{", "[]", "7", "null", '{"parts": {}}', json.dumps({"parts": {"loading": 3}}), good[: len(good) // 2]]
    odd += [good.replace('"units": [1000000000.0, 1.0]', '"units": null'), good.replace('"topk": 0.01', '"topk": {}')]
    path.write_bytes("\n".join(odd).encode() + b"\n\xff\xfe\n" + good.encode())
    assert [one.job_id for one in paces_in(path)] == ["good"]
    keep(path, pace("next"), seconds=5.0, disk=1, result=1)
    assert [one.job_id for one in paces_in(path)] == ["good", "next"]


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        keep(tmp_path / "file" / "paces.jsonl", pace(), seconds=5.0, disk=1, result=1)
    assert "how long job j took is not kept" in caplog.text
