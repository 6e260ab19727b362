"""Measures the most memory that a job's process holds, for a corpus and for a tenth of it: it must not grow.

Runs the worker's own child, once in a new process for every figure; changes nothing in it and must not import torch
into the process that measures, except to make a model.
"""

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.one_job import child_of, spec_of
from mistudio_schemas import CorpusInfo, SAEConfig, StandardSAE, TopKSAE, TrainRequested
from mistudio_train.messages import Failed, Finished, JobSpec, Progress

RESULTS: Final = Path(__file__).parent / "results" / "memory.json"
LIMIT: Final = 1.1
"""The corpus' peak may be so many times that of a tenth of it."""
BYTES: Final = 1024**3
"""Of activations of the larger corpus."""
LEAST_BYTES: Final = 10**9
"""With fewer nothing is shown."""
D_IN: Final = 512
WORDS: Final = 512
POSITIONS: Final = 128
LONGEST: Final = {"token": 3 * POSITIONS, "mean": 4}
"""Words of a text at most: in token pooling some are split into windows, in mean pooling each text is a row."""
BATCH: Final = 2048
SHUFFLE_BYTES: Final = 16 * 1024**2
"""Of the buffer that rows are shuffled in: the smaller corpus must not fit into two of them."""
SAMPLE_SECONDS: Final = 0.02


@dataclass(frozen=True)
class Case:
    """One kind of job, run with two corpora that differ in nothing but their length."""

    pooling: Literal["token", "mean"]
    saes: tuple[SAEConfig, ...] = (
        TopKSAE(name="topk", hidden_dim=256, k=8, batch_size=BATCH, max_epochs=1),
        StandardSAE(name="standard", hidden_dim=64, batch_size=BATCH, max_epochs=1),
    )


CASES: Final = (Case("token"), Case("mean"))


@dataclass
class Resident:
    """The most resident bytes of a process in one step of its job."""

    peak: int = 0
    """As the kernel counts it, VmHWM: nothing escapes it."""
    anonymous: int = 0
    """Of samples, as the next."""
    file: int = 0
    seconds: float = 0.0

    def sample(self, status: dict[str, int]) -> None:
        """Take a look into account."""
        self.anonymous = max(self.anonymous, status["RssAnon"])
        self.file = max(self.file, status["RssFile"] + status["RssShmem"])


@dataclass(frozen=True)
class Measured:
    """What one job's process held."""

    corpus: CorpusInfo
    base_bytes: int
    """Resident when the model was loaded and nothing had been extracted."""
    steps: dict[str, Resident]
    """From then on to the job's end."""

    @property
    def activation_bytes(self) -> int:
        """Of the rows, in the precision that they are stored in on a CPU."""
        return self.corpus.rows * D_IN * 4

    @property
    def above_bytes(self) -> int:
        """The peak above what the process held when its model was loaded."""
        return max(step.peak for step in self.steps.values()) - self.base_bytes

    @property
    def seconds(self) -> float:
        """Of extraction and all that follows."""
        return sum(step.seconds for step in self.steps.values())


@dataclass(frozen=True)
class Compared:
    """A case with its two corpora."""

    case: Case
    small: Measured
    large: Measured

    @property
    def ratio(self) -> float:
        """Growth of the peak above the loaded model, from a tenth of the corpus to the whole."""
        return self.large.above_bytes / self.small.above_bytes


class _Watch:
    """Follows a child from step to step, and makes the kernel's peak begin anew with each."""

    def __init__(self, pid: int) -> None:
        self.base_bytes = 0
        self.steps: dict[str, Resident] = {}
        self._pid, self._name, self._began = pid, "accepting", 0.0
        self._step: Resident | None = None
        self._ended = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._looking.join()

    def hear(self, message: Progress) -> None:
        """Told everything that the child says of its progress."""
        name = f"{message.phase} {message.sae or ''}".rstrip()
        if name == self._name:
            return
        self._name = name
        if message.phase == "extracting":
            self.base_bytes = message.memory_allocated_bytes or 0
        if self.base_bytes:
            self.close(status_of(self._pid)["VmHWM"])
            self._step = self.steps[name] = Resident()
            # 5: "reset the peak resident set size to the process's current value", proc_pid_clear_refs(5).
            Path(f"/proc/{self._pid}/clear_refs").write_text("5")

    def close(self, peak_bytes: int) -> None:
        """The step, if there is one, has ended with this peak."""
        if self._step is not None:
            self._step.peak, self._step.seconds = peak_bytes, time.monotonic() - self._began
        self._began = time.monotonic()

    def _look(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            status = status_of(self._pid)
            if self._step is not None and "VmRSS" in status:
                self._step.sample(status)


def status_of(pid: int) -> dict[str, int]:
    """The memory figures of `/proc/PID/status` in bytes; empty when the process has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def make_model(folder: Path) -> Path:
    """A decoder of two blocks with random weights, and a tokenizer that makes a token of every word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    quiet: Any = logging.disable_progress_bar
    quiet()

    words = Tokenizer(models.WordLevel({word(i): i for i in range(WORDS)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast
    tokenizer = made(tokenizer_object=words, pad_token=word(0), unk_token=word(0))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=D_IN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def word(number: int) -> str:
    """A word of the tokenizer's."""
    return f"word{number}"


def make_corpus(path: Path, rows: int, pooling: str) -> None:
    """Lines of random words, so many that they make this number of rows or a few more."""
    draw = random.Random(0)
    vocabulary = [word(i) for i in range(WORDS)]
    done = 0
    with path.open("w") as file:
        while done < rows:
            words = draw.choices(vocabulary, k=draw.randint(1, LONGEST[pooling]))
            file.write(" ".join(words) + "\n")
            done += len(words) if pooling == "token" else 1


def measure(case: Case, rows: int, model: Path, folder: Path) -> Measured:
    """Run the case in a new process on a corpus of this many rows, and leave nothing of it on the disk."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        workspace = Path(name)
        corpus = workspace / "corpus.txt"
        make_corpus(corpus, rows, case.pooling)
        request = TrainRequested(
            model_name=str(model),
            corpus_file=corpus.name,
            layer_number=0,
            pooling=case.pooling,
            max_sequence_length=POSITIONS,
            saes=list(case.saes),
            shuffle_bytes=SHUFFLE_BYTES,
            cross_entropy_tokens=0,
        )
        return asyncio.run(_measured(spec_of(request, corpus, workspace / "job", memory_share=0.5)))


async def _measured(spec: JobSpec) -> Measured:
    async with child_of(spec) as child:
        assert child.pid is not None  # it has been started
        with _Watch(child.pid) as watch:
            async for message in child.messages():
                match message:
                    case Progress():
                        watch.hear(message)
                    case Failed():
                        raise SystemExit(f"the job failed: {message.message}. {message.hint}")
                    case Finished():
                        watch.close(message.memory_peak_bytes)
                        return Measured(message.corpus, watch.base_bytes, watch.steps)
    raise AssertionError("a child's messages end with its last word, or with an error")


def compare(case: Case, activation_bytes: int, folder: Path) -> Compared:
    """Both corpora of a case: one of so many bytes of activations, and a tenth of it."""
    model = folder / "model"
    if not model.exists():
        make_model(model)
    rows = math.ceil(activation_bytes / (D_IN * 4))
    return Compared(case, measure(case, rows // 10, model, folder), measure(case, rows, model, folder))


def report(compared: list[Compared]) -> dict[str, Any]:
    """The figures as plain data."""
    return {
        "limit": LIMIT,
        "d_in": D_IN,
        "machine": machine(),
        "cases": [
            {
                "pooling": one.case.pooling,
                "saes": [sae.model_dump(mode="json", exclude_none=True) for sae in one.case.saes],
                "ratio": round(one.ratio, 4),
                "tenth": _figures(one.small),
                "whole": _figures(one.large),
            }
            for one in compared
        ],
    }


def _figures(measured: Measured) -> dict[str, Any]:
    return {
        "texts": measured.corpus.texts,
        "rows": measured.corpus.rows,
        "activation_bytes": measured.activation_bytes,
        "base_bytes": measured.base_bytes,
        "peak_above_base_bytes": measured.above_bytes,
        "seconds": round(measured.seconds, 1),
        "steps": {
            name: asdict(step) | {"peak_above_base": step.peak - measured.base_bytes}
            for name, step in measured.steps.items()
        },
    }


def show(compared: list[Compared], console: Console) -> None:
    """The table that the README quotes."""
    table = Table("pooling", "texts", "rows", "activations", "model loaded", "peak above it", "ratio")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in compared:
        for measured in (one.small, one.large):
            table.add_row(
                one.case.pooling,
                f"{measured.corpus.texts:,}",
                f"{measured.corpus.rows:,}",
                f"{measured.activation_bytes / 1e9:.3f} GB",
                f"{measured.base_bytes / 1e6:.1f} MB",
                f"{measured.above_bytes / 1e6:.1f} MB",
                f"{one.ratio:.3f}" if measured is one.large else "",
            )
    console.print(table)
    console.print(machine())


def verdict(compared: list[Compared]) -> list[str]:
    """What is not as promised; nothing when all is well."""
    said = []
    for one in compared:
        name, activations = one.case.pooling, one.large.activation_bytes
        if one.ratio > LIMIT:
            said.append(f"{name}: the peak grows {one.ratio:.3f} times, and {LIMIT} is the limit.")
        if activations < LEAST_BYTES:
            said.append(
                f"{name}: {activations / 1e9:.3f} GB of activations are fewer than the 1 GB that is to be shown."
            )
    return said


def main(arguments: list[str] | None = None) -> int:
    """Measure all cases; 1 when the memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=BYTES, help="of activations of the larger corpus")
    parser.add_argument("--case", action="append", choices=[case.pooling for case in CASES], help="only this one")
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    console = Console(width=120, highlight=False)
    compared = []
    with tempfile.TemporaryDirectory(prefix="mistudio-memory-") as folder:
        for case in CASES:
            if not options.case or case.pooling in options.case:
                console.print(f"{case.pooling} …")
                compared.append(compare(case, options.bytes, Path(folder)))
    show(compared, console)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(report(compared), indent=2) + "\n")
    broken = verdict(compared)
    for line in broken:
        console.print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
