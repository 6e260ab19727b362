"""The command `demo`: a real job on a real model through the real worker, here, and what its features look like.

By default on an embedded broker and a folder in place of the store, which it says first; owns no step of the job.
"""

import asyncio
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.text import Text

from mistudio_schemas import TopKSAE, TrainCompleted, TrainProgress, TrainRequested, new_job_id
from mistudio_train.settings import Settings

from .display import Bars, results, say, show_end
from .errors import CliError, Exit

if TYPE_CHECKING:
    from . import bus
    from .feature_view import FeatureCard

commands = typer.Typer()

PASSAGES = 700
LAYER = 9
"""Of SmolLM2's 30: blocks 3, 6 and 12 hold a few tokens of enormous norm, which a small SAE spends itself on."""


@dataclass(frozen=True)
class Inputs:
    """What the demo trains on."""

    model: Path
    texts: list[str]
    request: TrainRequested


@commands.command(epilog="Example: mistudio-train demo --to demo-output")
def demo(
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where the results go.")] = Path("demo-output"),
    stack: Annotated[
        str | None, typer.Option(metavar="native|docker", help="Run on a real Kafka and MinIO of this kind.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Train a sparse autoencoder on a real language model, on this machine, and show ten of its features.

    Exit status: 0 completed, 1 failed, 2 something that it needs is missing.
    """
    if stack not in (None, "native", "docker"):
        raise CliError(f"--stack {stack} is unknown", "Choose native or docker, or leave it out.")
    to = to.absolute()
    shutil.rmtree(to, ignore_errors=True)
    with servers(to, stack) as settings:
        inputs = demo_inputs()
        event = asyncio.run(train(settings, inputs))
        if not isinstance(event, TrainCompleted):
            raise typer.Exit(Exit.FAILED)
        folder = bring(settings, event, to)
    cards = look(folder, inputs)
    (show_json if as_json else show)(event, cards, folder)


@contextmanager
def servers(to: Path, stack: str | None) -> Iterator[Settings]:
    """Settings of a worker on an embedded broker and a folder, or on a real Kafka and MinIO."""
    common: dict[str, Any] = {"data_path": to / "data", "max_concurrent_jobs": 1, "log_level": "WARNING"}
    if stack is None:
        from mistudio_stack.embedded import embedded_kafka
        from mistudio_train.worker.kafka import topic_plans

        say("An embedded broker and a folder stand in for Kafka and MinIO; worker, contract, child and files are real.")
        plans = topic_plans(Settings(kafka_request_partitions=4))
        with embedded_kafka({plan.name: plan.partitions for plan in plans}) as servers:
            yield Settings(
                kafka_bootstrap_servers=servers,
                kafka_transactions=False,
                kafka_request_partitions=4,
                store_path=to / "store",
                **common,
            )
        return
    from mistudio_stack import StackError, open_stack

    backend: Literal["native", "docker"] = "native" if stack == "native" else "docker"
    try:
        with open_stack(backend) as opened:
            say(f"The demo uses a real Kafka and a real MinIO ({backend}).")
            yield Settings.model_validate({name.lower(): value for name, value in opened.env().items()} | common)
    except StackError as error:
        raise CliError(str(error), error.hint) from None


def demo_inputs() -> Inputs:
    """SmolLM2-135M and English text, out of installed packages."""
    from .demo_inputs import passages, smollm2_folder

    model = smollm2_folder()
    request = TrainRequested(
        job_id=new_job_id(),
        model_name=str(model),
        corpus_file="demo.txt",
        layer_number=LAYER,
        max_sequence_length=128,
        pooling="token",
        max_epochs=4,
        sae=TopKSAE(name="demo", k=32, hidden_dim=4096, learning_rate=3e-3, batch_size=1024),
    )
    return Inputs(model, passages(PASSAGES), request)


async def train(settings: Settings, inputs: Inputs) -> "bus.Terminal":
    """Put the corpus, run a worker, publish the request, and show the job until its end, which is returned."""
    from mistudio_train.logs import setup_logging
    from mistudio_train.worker.app import build_app
    from mistudio_train.worker.corpora import put_corpus
    from mistudio_train.worker.store import open_store

    from . import bus
    from .demo_inputs import write_corpus

    settings = settings.model_copy(update={"local_model_folders": [inputs.model.parent]})
    setup_logging(settings.logging)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # a new group's first steps are noisy
    corpus = settings.data_path / "demo.txt"
    corpus.parent.mkdir(parents=True)
    write_corpus(corpus, inputs.texts)
    store = open_store(settings)
    await asyncio.to_thread(store.ensure)
    await asyncio.to_thread(put_corpus, store, corpus.name, corpus)
    async with build_app(settings).start_lifespan_context():
        await bus.submit(settings, inputs.request)
        with Bars() as bars:
            async with aclosing(bus.follow(settings, str(inputs.request.job_id))) as events:
                async for event in events:
                    if isinstance(event, TrainProgress):
                        bars.show(event)
                    elif event is not None:
                        end = event
    show_end(end)
    return end


def bring(settings: Settings, event: TrainCompleted, to: Path) -> Path:
    """The run's files, fetched and verified as any reader would."""
    from mistudio_train.worker.artifacts import fetch_run
    from mistudio_train.worker.store import open_store

    folder = to / event.job_id
    fetch_run(open_store(settings), event, folder)
    return folder


def look(folder: Path, inputs: Inputs) -> "list[FeatureCard]":
    """The ten features to show."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    from .feature_view import feature_cards

    tokenizer: Any = AutoTokenizer.from_pretrained(inputs.model)
    with safe_open(inputs.model / "model.safetensors", "np") as weights:
        meaning = weights.get_tensor("model.embed_tokens.weight")
    return feature_cards(folder / "features" / "activations.parquet", inputs.texts, tokenizer, meaning)


def show(event: TrainCompleted, cards: "list[FeatureCard]", folder: Path) -> None:
    """For a person."""
    out, metrics = results(), event.saes[0].metrics
    out.print()
    out.print(
        f"[bold]{event.feature_count} features[/] on {event.corpus.tokens:,} tokens: loss {metrics.final_loss:.3f}, "
        f"L0 {metrics.l0:.1f}, unexplained variance {metrics.fvu:.1%}, dead {metrics.dead_share:.1%}",
        highlight=False,
    )
    out.print("Ten of them, chosen on one half of the texts and shown from the other:\n", highlight=False)
    for card in cards:
        words = ", ".join(card.words[:8])
        out.print(
            f"[bold cyan]feature {card.feature}[/]  on {card.frequency:.2%} of words; strongest on: {escape(words)}"
        )
        for mark in card.marks:
            style = "bold reverse" if mark.strength > 0.75 else "reverse" if mark.strength > 0.5 else "bold"
            line = Text.assemble("  … ", mark.before, (f"«{mark.word}»", style), mark.after, " …")
            out.print(line, highlight=False, soft_wrap=False, overflow="ellipsis", no_wrap=True)
        out.print()
    out.print(f"The files: {escape(str(folder))}", highlight=False, soft_wrap=True)
    out.print("In SAELens:\n", highlight=False)
    out.print("  from sae_lens import SAE", highlight=False)
    out.print(f"  sae = SAE.load_from_disk({str(folder / 'sae')!r})", markup=False, highlight=False, soft_wrap=True)
    out.print("  features = sae.encode(activations)  # [tokens, 576], the output of block 9", markup=False)


def show_json(event: TrainCompleted, cards: "list[FeatureCard]", folder: Path) -> None:
    """For a program."""
    outcome = {
        "event": json.loads(event.to_json()),
        "features": [asdict(card) for card in cards],
        "folder": str(folder),
        "saelens": str(folder / "sae"),
    }
    typer.echo(json.dumps(outcome, allow_nan=False, ensure_ascii=False))
