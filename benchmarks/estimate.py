"""`estimate` beside what jobs then took: earlier jobs make the rates, then five others are estimated, and done.

All are on a real model, by the commands that anybody would type, one after another in a `DATA_PATH` of their own. The
five are unlike the earlier ones in their corpus, layer, width and number of SAEs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from mistudio_train.cli.demo_inputs import passages, smollm2_folder, write_corpus
from mistudio_train.paces import paces_in

RESULTS: Final = Path(__file__).parent / "results" / "estimate.json"
LIMIT: Final = 0.25
"""By which share of what was so a figure may be wrong."""
COMMAND: Final = (sys.executable, "-c", "from mistudio_train.cli import main; main()")
Fields = dict[str, Any]


def _token(passages: int, layer: int, epochs: int, *saes: Fields) -> tuple[int, Fields]:
    return passages, {"pooling": "token", "layer_number": layer, "max_epochs": epochs, "saes": list(saes)}


def _mean(passages: int, layer: int, epochs: int, *saes: Fields) -> tuple[int, Fields]:
    return passages, {"pooling": "mean", "layer_number": layer, "max_epochs": epochs, "saes": list(saes)}


def _sae(kind: str, d_sae: int, **fields: Any) -> Fields:
    return {"name": f"{kind}-{d_sae}", "kind": kind, "hidden_dim": d_sae} | fields


EARLIER: Final[dict[str, tuple[int, Fields]]] = {
    "batchtopk, m 2,048": _token(200, 9, 1, _sae("batchtopk", 2048, k=16)),
    "topk, m 1,024, layer 4": _token(100, 4, 2, _sae("topk", 1024, k=8)),
    "topk, m 8,192, layer 20": _token(200, 20, 1, _sae("topk", 8192, k=32)),
    "jumprelu, m 2,048": _token(200, 9, 2, _sae("jumprelu", 2048)),
    "batchtopk, m 4,096, layer 14": _token(400, 14, 2, _sae("batchtopk", 4096, k=32)),
    "mean-pooled topk, m 512": _mean(300, 15, 40, _sae("topk", 512, k=8, patience=0)),
    "three batchtopk": _token(150, 6, 2, *(_sae("batchtopk", m, k=16) for m in (512, 1024, 2048))),
    "jumprelu, m 4,096, layer 12": _token(100, 12, 2, _sae("jumprelu", 4096)),
}
ASKED: Final[dict[str, tuple[int, Fields]]] = {
    "batchtopk, m 8,192, layer 11": _token(300, 11, 1, _sae("batchtopk", 8192, k=24)),
    "topk, m 2,048, layer 6, 4 passes": _token(350, 6, 4, _sae("topk", 2048, k=16)),
    "jumprelu, m 3,072, layer 16": _token(250, 16, 2, _sae("jumprelu", 3072)),
    "two of m 2,048 and 6,144, layer 25": _token(120, 25, 2, _sae("topk", 2048, k=32), _sae("batchtopk", 6144, k=32)),
    "mean-pooled topk, m 1,024": _mean(600, 9, 60, _sae("topk", 1024, k=8, patience=0)),
}


@dataclass(frozen=True)
class Compared:
    """A job's figures, said and so."""

    job: str
    seconds: tuple[float, float]
    memory: tuple[int, int]
    disk: tuple[int, int]
    result: tuple[int, int]
    error_said: float
    """The median error of the earlier jobs that was said with it."""

    @property
    def off(self) -> float:
        """By how much the time was missed, as a share of what it was."""
        return _off(self.seconds)


def compare(name: str, folder: Path, request: Path) -> Compared:
    """Estimate a job, then do it."""
    said = json.loads(_typed(folder, "estimate", str(request), "--corpus-folder", str(folder), "--json"))
    do(name, folder, request)
    so = paces_in(folder / "data" / "paces.jsonl")[-1]
    return Compared(
        name,
        (said["seconds"], sum(part.seconds for part in so.parts.values())),
        (said["memory_bytes"], so.memory_peak),
        (said["disk_bytes"], so.disk),
        (said["result_bytes"], so.result),
        said["time"]["error"]["median"],
    )


def do(name: str, folder: Path, request: Path) -> None:
    """Do a job, and throw its files away."""
    with tempfile.TemporaryDirectory(dir=folder) as to:
        _typed(folder, "run", str(request), "--to", to, "--corpus-folder", str(folder), "--json")


def written(folder: Path, number: int, count: int, fields: Fields) -> Path:
    """The request's file, and the corpus of so many passages."""
    write_corpus(folder / f"{number}.txt", passages(count))
    request = folder / f"{number}.json"
    asked = {"model_name": str(smollm2_folder()), "corpus_file": f"{number}.txt", "max_sequence_length": 256}
    request.write_text(json.dumps(asked | fields))
    return request


def show(compared: list[Compared], console: Console) -> None:
    """The table that the README quotes."""
    table = Table("job", "time said", "took", "off", "memory", "disk", "result")
    for one in compared:
        off = (f"{_off(pair):+.0%}" for pair in (one.memory, one.disk, one.result))
        table.add_row(one.job, f"{one.seconds[0]:.0f} s", f"{one.seconds[1]:.0f} s", f"{one.off:+.0%}", *off)
    console.print(table)
    console.print(machine())


def _off(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1] - 1


def _typed(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"DATA_PATH": str(folder / "data")}
    ended = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-2000:]}")
    return ended.stdout


def main(arguments: list[str] | None = None) -> int:
    """Do all; 1 when a time, or what is held of memory or disk, is too far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    parser.add_argument("--scale", type=float, default=1.0, help="of the passages of all corpora")
    options = parser.parse_args(arguments)
    console = Console(width=120, highlight=False)
    compared = []
    with tempfile.TemporaryDirectory(prefix="mistudio-estimate-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        for number, (job, (count, fields)) in enumerate((EARLIER | ASKED).items()):
            request = written(folder, number, max(40, round(count * options.scale)), fields)
            if job in EARLIER:
                do(job, folder, request)
                console.print(f"{job}: done")
            else:
                compared.append(compare(job, folder, request))
                console.print(f"{job}: {compared[-1].off:+.0%}")
        paces = [asdict(one) for one in paces_in(folder / "data" / "paces.jsonl")]
    show(compared, console)
    figures = {"machine": machine(), "limit": LIMIT, "jobs": [asdict(one) for one in compared], "paces": paces}
    options.to.write_text(json.dumps(figures, indent=2) + "\n")
    return int(any(abs(_off(pair)) > LIMIT for one in compared for pair in (one.seconds, one.memory, one.disk)))


if __name__ == "__main__":
    sys.exit(main())
