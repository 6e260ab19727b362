"""The curves that training logs and sinks hold, {sae/event/figure: points}, read back as their own programs would."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

Curves = dict[str, list[tuple[int, float]]]
"""Points are (step, value)."""


def of_logs(logs: dict[str, Path]) -> Curves:
    """The numbers in SAEs' `training_log.jsonl`."""
    curves: Curves = {}
    for sae, path in logs.items():
        for line in map(json.loads, path.read_text().splitlines()):
            for name, value in line.items():
                if isinstance(value, int | float):
                    curves.setdefault(f"{sae}/{line['event']}/{name}", []).append((line["step"], float(value)))
    return curves


def of_tensorboard(folder: Path) -> Curves:
    """The scalars below a run's folder as TensorBoard would draw them, in single precision."""
    curves: Curves = {}
    for sae in sorted(path for path in folder.iterdir() if path.is_dir()):
        events = EventAccumulator(str(sae), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            curves[f"{sae.name}/{tag}"] = [(point.step, point.value) for point in events.Scalars(tag)]
    return curves


def single(curves: Curves) -> Curves:
    """The same in single precision."""
    return {
        name: [(step, struct.unpack("f", struct.pack("f", value))[0]) for step, value in points]
        for name, points in curves.items()
    }


def of_mlflow(uri: str) -> tuple[Run, Curves]:
    """The only run of the only experiment."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("mistudio-train")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return run, {name: [(point.step, point.value) for point in points] for name, points in histories.items()}


def of_wandb(folder: Path) -> tuple[dict[str, object], Curves]:
    """Config and history of the newest offline run."""
    newest = max((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    config: dict[str, object] = {}
    curves: Curves = {}
    for data in _records(newest.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)  # type: ignore[attr-defined]
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if not name.startswith("_"):
                step = row[name.rpartition("/")[0] + "/step"]
                curves.setdefault(name, []).append((int(step), float(value)))
    return config, curves


def _records(data: bytes) -> Iterator[bytes]:
    """Of a file of W&B's, which is a log as LevelDB writes it; its own reader is no Python.

    Blocks of 32 KiB, in them pieces of records: checksum, length, and whether it is whole (1), first, middle or last.
    """
    assert data.startswith(b":W&B")
    position, record = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
