"""Corpus to SAE, whole run: the worker's child job beside SAELens' own runner, on a CPU.

Both get the same model folder, corpus file, layer, kind (`batchtopk`), width, k, batch, number of training rows and
cores, each in a fresh process of its own, in turns. Time counts from the start of the process to its last word, with
all its files written. Both SAEs are then loaded by SAELens and judged by the same code on texts that neither was given:
FVU and L0 without first tokens and norms above three times the median, as ours reads texts (each by itself) and as
SAELens does (joined into full contexts).

What each does that the other does not:

- ours keeps all rows on disk and shuffles them all; reads all of the model's files once more for their digest; saves
  checkpoints each minute; runs the SAE over all rows afterwards for its figures, and writes the bundle, the features'
  store and its metadata beside the folder for SAELens;
- SAELens' runner extracts a few rows more than it trains on: two batches for its scale, what its mixing buffer holds at
  the end, and with them the corpus' beginning once more. It evaluates nothing without wandb, and writes weights, config
  and sparsity.

SAELens has its own defaults, but for the learning rate with warm-up and decay and the threshold's rate, as
`benchmarks.quality` tunes them; the scale by the mean norm, without which that rate would not be the right one; a
mixing buffer of 64 contexts, for more mixing; and no special tokens in training, as their rows' norms are so high.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.one_job import done, spec_of
from mistudio_schemas import BatchTopKSAE, TrainRequested
from mistudio_train.messages import ChildMessage, Progress, Warned

if TYPE_CHECKING:  # each side's process imports this module, and is to import of the libraries what it needs itself
    from torch import Tensor

RESULTS: Final = Path(__file__).parent / "results" / "corpus.json"
SIDES: Final = ("ours", "saelens")
READINGS: Final = ("by itself", "joined")
"""How the model reads a held-out text: the worker's way and SAELens'."""
HELD_OUT: Final = 0.1
"""Held-out tokens, of those to train on."""
SHORTEST: Final = 100
"""Fewer tokens no passage of the Bible has in the mean, so that there are enough of them."""
HIGH_NORM: Final = 3.0
OWN_HELD_OUT: Final = 0.05
"""Of the texts, in ours' request where the language model is to predict: the worker's default."""
WARMUP: Final = 0.05
DECAY: Final = 0.2
DEAD_AFTER: Final = 0.1
"""Share of the steps, as the two above."""
THRESHOLD_RATE: Final = 0.05
CONTEXTS_IN_BUFFER: Final = 64
NORM_BATCHES: Final = 2
"""That SAELens reads for its scale; its default, 1000, is more than the whole corpus."""
ROWS_AT_ONCE: Final = 4096
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What both sides are told."""

    model: Path
    layer: int = 9
    context: int = 128
    d_sae: int = 2048
    k: int = 32
    batch: int = 1024
    learning_rate: float = 3e-3
    peer_learning_rate: float = 3e-3
    cross_entropy_tokens: int = 0
    """Ours only."""

    @property
    def hook(self) -> str:
        """The block, as SAELens names it in a Hugging Face model."""
        return f"model.layers.{self.layer}"


@dataclass
class Phases:
    """Seconds from one phase's first sign to the next one's."""

    say: Say
    seconds: dict[str, float] = field(default_factory=dict)
    _name: str = "starting"
    _began: float = field(default_factory=time.perf_counter)

    def enter(self, name: str) -> None:
        """The phase has begun, or goes on."""
        if name != self._name:
            self.end()
            self._name = name
            self.say(f"  {name} …")

    def end(self) -> None:
        """The phase has ended, and nothing follows."""
        now = time.perf_counter()
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._began
        self._began = now


@dataclass(frozen=True)
class Ran:
    """One run of one side."""

    side: str
    seed: int
    rows: int
    """Trained on."""
    phases: dict[str, float]
    """Seconds."""
    within: dict[str, float]
    """Seconds of what happened within one of them."""
    judged: dict[str, dict[str, float]]
    """By the reading of the held-out texts."""

    @property
    def seconds(self) -> float:
        """Of it all."""
        return sum(self.phases.values())

    @property
    def rows_per_second(self) -> float:
        """Trained rows by the whole time."""
        return self.rows / self.seconds


def split(texts: Iterable[str], tokens: int, count: Callable[[str], int]) -> tuple[list[str], list[str]]:
    """Texts to train on with so many tokens, and others that are held out from both sides, from everywhere."""
    training: list[str] = []
    held_out: list[str] = []
    trained = judged = 0
    for text in texts:
        if judged < HELD_OUT * trained or (judged == 0 and trained > 0):
            held_out.append(text)
            judged += count(text)
        elif trained < tokens:
            training.append(text)
            trained += count(text)
        else:
            break
    return training, held_out


def english(tokens: int) -> list[str]:
    """Enough passages of the Bible and paragraphs of Python's help, mixed."""
    from mistudio_train.cli.demo_inputs import _bible, _evenly, _help_texts

    passages = round((1 + HELD_OUT) * tokens / SHORTEST)
    texts = [*_help_texts(), *_evenly(_bible(), passages)]
    random.Random(0).shuffle(texts)
    return texts


def request_of(setting: Setting, corpus: Path, seed: int) -> TrainRequested:
    """Ours; it is trained on all texts, unless it needs some for the language model to predict."""
    sae = BatchTopKSAE(
        hidden_dim=setting.d_sae,
        k=setting.k,
        max_epochs=1,
        batch_size=setting.batch,
        learning_rate=setting.learning_rate,
        warmup=WARMUP,
        decay=DECAY,
        dead_after=DEAD_AFTER,
        threshold_rate=THRESHOLD_RATE,
        seed=seed,
    )
    return TrainRequested(
        model_name=str(setting.model),
        corpus_file=corpus.name,
        layer_number=setting.layer,
        pooling="token",
        max_sequence_length=setting.context,
        held_out=OWN_HELD_OUT if setting.cross_entropy_tokens else 0,
        cross_entropy_tokens=setting.cross_entropy_tokens,
        sae=sae,
    )


def ours(setting: Setting, corpus: Path, seed: int, folder: Path, say: Say) -> tuple[int, Phases]:
    """The worker's child does a job; its SAE lies in `folder/output/sae`. Also the number of rows trained on."""
    phases = Phases(say)

    def hear(message: ChildMessage) -> None:
        match message:
            case Progress():
                phases.enter(message.phase)
            case Warned():
                phases.say(f"  warned: {message.message}")

    finished = done(spec_of(request_of(setting, corpus, seed), corpus, folder), hear)
    phases.end()
    rows = finished.saes[0].rows
    assert rows is not None  # a result of token pooling says what its rows are
    return rows.training, phases


def peer(
    setting: Setting, corpus: Path, rows: int, seed: int, folder: Path, say: Say
) -> tuple[dict[str, float], Phases]:
    """SAELens' runner in a new process; its SAE lies in `folder`. Also the seconds of extraction within training.

    Raises:
        SystemExit: if its process ended without its last word.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    phases = Phases(say)
    process = context.Process(target=peer_process, args=(setting, corpus, rows, seed, folder, send), daemon=True)
    process.start()
    send.close()  # else the pipe never ends
    with closing(receive):
        try:
            while isinstance(said := receive.recv(), str):
                phases.enter(said)
            phases.end()
        except EOFError:
            raise SystemExit("SAELens' process has ended before its work was done") from None
        finally:
            process.join()
    return said, phases


def peer_process(setting: Setting, corpus: Path, rows: int, seed: int, folder: Path, say: Connection) -> None:
    """Tell the phases as they begin, and at last what took how long within them."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    import warnings

    warnings.simplefilter("ignore")
    import sae_lens
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as the worker does
    torch.manual_seed(seed)
    say.send("loading")
    runner = sae_lens.LanguageModelSAETrainingRunner(peer_config(setting, corpus, rows, seed, folder))
    within: dict[str, float] = {"extracting": 0.0}
    _time(runner.activations_store, "get_raw_llm_batch", within)
    save = runner.save_final_sae

    def save_and_say(*arguments: Any, **named: Any) -> None:
        say.send("exporting")
        save(*arguments, **named)

    runner.save_final_sae = save_and_say
    say.send("training")
    runner.run()
    say.send(within)


def _time(owner: Any, method: str, seconds: dict[str, float]) -> None:
    """Add up under `extracting` how long the method takes."""
    original = getattr(owner, method)

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            seconds["extracting"] += time.perf_counter() - began

    setattr(owner, method, timed)


def peer_config(setting: Setting, corpus: Path, rows: int, seed: int, folder: Path) -> Any:
    """SAELens' runner's; the corpus' folder is a dataset with a text a line."""
    from sae_lens import BatchTopKTrainingSAEConfig, LanguageModelSAERunnerConfig, LoggingConfig
    from transformers import AutoConfig

    steps = rows // setting.batch
    return LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=AutoConfig.from_pretrained(setting.model).hidden_size,
            d_sae=setting.d_sae,
            k=setting.k,
            topk_threshold_lr=THRESHOLD_RATE,
            normalize_activations="expected_average_only_in",
        ),
        model_name=str(setting.model),
        model_class_name="AutoModelForCausalLM",
        hook_name=setting.hook,
        dataset_path=str(corpus.parent),
        dataset_trust_remote_code=False,
        is_dataset_tokenized=False,
        context_size=setting.context,
        training_tokens=rows,
        train_batch_size_tokens=setting.batch,
        n_batches_in_buffer=CONTEXTS_IN_BUFFER,
        n_batches_for_norm_estimate=NORM_BATCHES,
        exclude_special_tokens=True,
        lr=setting.peer_learning_rate,
        lr_warm_up_steps=round(WARMUP * steps),
        lr_decay_steps=round(DECAY * steps),
        dead_feature_window=round(DEAD_AFTER * steps),
        device="cpu",
        seed=seed,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(folder),
        verbose=False,
    )


def windows(ids: Iterable[list[int]], context: int, first: int | None) -> Iterator[list[int]]:
    """What the model sees at once: pieces of a text, or with a `first` token pieces of all, which it is put between."""
    if first is None:
        for text in ids:
            yield from (text[start : start + context] for start in range(0, len(text), context))
        return
    joined = [token for text in ids for token in (first, *text)][1:]
    for start in range(0, len(joined), context - 1):
        yield [first, *joined[start : start + context - 1]]


def held_out_rows(setting: Setting, texts: list[str]) -> dict[str, "Tensor"]:
    """What the SAEs are judged by, for each reading: the block's output by the model's library alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    quiet: Any = logging.disable_progress_bar
    quiet()
    tokenizer: Any = AutoTokenizer.from_pretrained(setting.model)
    model: Any = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    model.model.layers = model.model.layers[: setting.layer + 1]
    caught: list[Tensor] = []
    model.get_submodule(setting.hook).register_forward_hook(lambda module, given, out: caught.append(out))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    special = torch.tensor(tokenizer.all_special_ids)
    found = {}
    for reading, first in zip(READINGS, (None, tokenizer.bos_token_id), strict=True):
        caught.clear()
        kept = []
        for window in windows(ids, setting.context, first):
            seen = torch.tensor(window)
            with torch.inference_mode():
                model.model(seen[None])
            kept.append(~torch.isin(seen, special) & (torch.arange(len(seen)) > 0))
        found[reading] = ordinary(torch.cat([out.reshape(-1, out.shape[-1]) for out in caught])[torch.cat(kept)])
    return found


def ordinary(rows_ND: "Tensor") -> "Tensor":
    """Those whose norm is not high."""
    norms_N = rows_ND.norm(dim=1)
    return rows_ND[norms_N <= HIGH_NORM * norms_N.median()].clone()


def judge(folder: Path, rows: dict[str, "Tensor"]) -> dict[str, dict[str, float]]:
    """FVU and L0 of the SAE in a folder for SAELens."""
    import torch
    from sae_lens import SAE

    from mistudio_train.sae.statistics import FeatureStatistics

    sae: Any = SAE.load_from_disk(folder)
    judged = {}
    for reading, rows_ND in rows.items():
        counted = FeatureStatistics(sae.cfg.d_sae, sae.cfg.d_in)
        with torch.no_grad():
            for x_BD in torch.split(rows_ND, ROWS_AT_ONCE):
                acts_BF = sae.encode(x_BD)
                counted.update(x_BD, sae.decode(acts_BF), acts_BF)
        metrics = counted.metrics()
        judged[reading] = {"fvu": metrics.fvu or 0.0, "l0": metrics.l0 or 0.0, "rows": float(counted.rows)}
    return judged


def compare(setting: Setting, training: list[str], held_out: list[str], runs: int, say: Say) -> list[Ran]:
    """Both sides in turns; SAELens trains on as many rows as ours has, which leaves out first tokens and high norms."""
    from mistudio_train.cli.demo_inputs import write_corpus

    say(f"reading {len(held_out)} held-out texts …")
    rows = held_out_rows(setting, held_out)  # before all runs: from now on the model's files are in memory
    ran: list[Ran] = []
    with tempfile.TemporaryDirectory(prefix="mistudio-corpus-") as name:
        corpus = Path(name) / "corpus" / "corpus.txt"
        corpus.parent.mkdir()
        write_corpus(corpus, training)
        for seed in range(runs):
            folder = Path(name) / str(seed)
            say(f"run {seed + 1} of {runs}, ours")
            count, phases = ours(setting, corpus, seed, folder / "ours", say)
            ran.append(Ran("ours", seed, count, phases.seconds, {}, judge(folder / "ours" / "output" / "sae", rows)))
            say(f"{told(ran[-1])}\nrun {seed + 1} of {runs}, SAELens")
            within, phases = peer(setting, corpus, count, seed, folder / "saelens", say)
            ran.append(Ran("saelens", seed, count, phases.seconds, within, judge(folder / "saelens", rows)))
            say(told(ran[-1]))
    return ran


def told(ran: Ran) -> str:
    """A line on it."""
    judged = ", ".join(f"{reading} FVU {one['fvu']:.4f} at L0 {one['l0']:.1f}" for reading, one in ran.judged.items())
    return f"{ran.side}: {ran.seconds:.1f} s, {ran.rows_per_second:,.0f} rows a second; {judged}"


def summary(ran: list[Ran]) -> dict[str, dict[str, float]]:
    """Medians over each side's runs."""
    found: dict[str, dict[str, float]] = {}
    for side in SIDES:
        mine = [one for one in ran if one.side == side]
        figures = [
            {"seconds": one.seconds, "rows_per_second": one.rows_per_second}
            | {f"{name} {reading}": one.judged[reading][name] for reading in READINGS for name in ("fvu", "l0")}
            for one in mine
        ]
        found[side] = {name: statistics.median(one[name] for one in figures) for name in figures[0]}
    return found


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times as fast ours is, and its FVU by SAELens'."""
    mine, theirs = (found[side] for side in SIDES)
    fvus = {f"fvu {reading}": mine[f"fvu {reading}"] / theirs[f"fvu {reading}"] for reading in READINGS}
    return {"times as fast": theirs["seconds"] / mine["seconds"]} | fvus


def show(ran: list[Ran], about: str, console: Console) -> None:
    """The table that the documentation quotes."""
    columns = [f"{name}, {reading}" for reading in READINGS for name in ("FVU", "L0")]
    table = Table("side", "seconds", "rows a second", *columns, title="corpus to SAE, medians of the runs")
    for column in table.columns[1:]:
        column.justify = "right"
    found = summary(ran)
    for side, one in found.items():
        judged = [f"{one[f'{name} {reading}']:.{digits}f}" for reading in READINGS for name, digits in _DIGITS]
        table.add_row(side, f"{one['seconds']:.1f}", f"{one['rows_per_second']:,.0f}", *judged)
    console.print(table)
    for side in SIDES:
        mine = [one for one in ran if one.side == side]
        phases = ", ".join(f"{name} {_median(one.phases[name] for one in mine):.1f}" for name in mine[0].phases)
        within = "".join(f" (within: {name} {_median(o.within[name] for o in mine):.1f})" for name in mine[0].within)
        console.print(f"{side}, seconds: {phases}{within}")
    console.print(", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios(found).items()))
    console.print(about)


_DIGITS: Final = (("fvu", 4), ("l0", 1))


def _median(numbers: Iterable[float]) -> float:
    return statistics.median(numbers)


def report(setting: Setting, ran: list[Ran], about: str) -> dict[str, Any]:
    """The figures as plain data, without anybody's paths."""
    found = summary(ran)
    return {
        "about": about,
        "setting": asdict(setting) | {"model": setting.model.name},
        "ratios": ratios(found),
        "medians": found,
        "runs": [asdict(one) | {"seconds": one.seconds} for one in ran],
    }


def versions() -> str:
    """Of what decides a time or a figure."""
    names = ("mistudio-train", "sae-lens", "torch", "transformers", "datasets")
    return ", ".join(f"{name} {version(name)}" for name in names)


@contextmanager
def cores(count: int | None) -> Iterator[None]:
    """Meanwhile this process and those it starts have so many cores; both sides take as many threads as they have."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def tokens_of(model: Path) -> Callable[[str], int]:
    """Counts a text's."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer(text)["input_ids"])


def setting_of(options: argparse.Namespace) -> Setting:
    """On SmolLM2-135M."""
    from mistudio_train.cli.demo_inputs import smollm2_folder

    return Setting(
        smollm2_folder(),
        d_sae=options.latents,
        learning_rate=options.learning_rate,
        peer_learning_rate=options.peer_learning_rate,
        cross_entropy_tokens=options.cross_entropy_tokens,
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure and show; 0 always, for a figure of time is no test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the corpus, about")
    parser.add_argument("--runs", type=int, default=2, help="of each side, in turns")
    parser.add_argument("--threads", type=int, help="cores for either side; all")
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="ours")
    parser.add_argument("--peer-learning-rate", type=float, default=3e-3, help="SAELens'")
    parser.add_argument(
        "--cross-entropy-tokens", type=int, default=0, help="ours predicts besides, with the SAE in place"
    )
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    setting = setting_of(options)
    console = Console(width=126, highlight=False)
    training, held_out = split(english(options.tokens), options.tokens, tokens_of(setting.model))
    with cores(options.threads):
        ran = compare(setting, training, held_out, options.runs, console.print)
        about = f"{len(training)} texts, {setting.d_sae} latents, fp32. {machine()}; {versions()}"
    show(ran, about, console)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(report(setting, ran, about), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
