"""The command `demo`: a real job on a real model through the real worker, here, and what its features look like.

By default an embedded broker and a folder stand in for Kafka and the store, which it says first. Owns no step of the
job.
"""

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mistudio_schemas import BatchTopKSAE, TrainCompleted, TrainProgress, TrainRequested, new_job_id
from mistudio_train.settings import Settings

from .display import Bars, say, show_end
from .errors import CliError, Exit

if TYPE_CHECKING:
    from mistudio_stack.stack import Backend

    from . import bus
    from .demo_outcome import Outcome
    from .feature_choice import Rule

commands = typer.Typer()

Servers = Literal["embedded", "native", "docker"]
EMBEDDED = "an embedded broker and a directory store"

PASSAGES = 800
EPOCHS = 4
LAYER = 9
"""Of 30. Blocks 3, 6 and 12 have a few tokens of enormous norm, on which a small SAE would spend itself."""
PARTITIONS = 4


@dataclass(frozen=True)
class Inputs:
    """What the demo trains on."""

    model: Path
    """A model folder."""
    texts: list[str]
    """One line each."""
    request: TrainRequested
    """Token-pooled."""
    rule: "Rule | None" = None
    """Which features may be shown; `None`: the default."""


@commands.command(epilog="Example: mistudio-train demo --to demo-output")
def demo(
    to: Annotated[
        Path, typer.Option(metavar="DIR", help="The results go into a new folder in it; made if missing.")
    ] = Path("demo-output"),
    stack: Annotated[
        Servers, typer.Option(help="embedded: all in this process; native, docker: a real Kafka and a real MinIO.")
    ] = "embedded",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Train a sparse autoencoder on a real language model, on this machine, and show ten of its features.

    Exit status: 0 completed, 1 failed, 2 something that it needs is missing, 130 interrupted.
    """
    used = EMBEDDED if stack == "embedded" else f"a real Kafka and a real MinIO ({stack})"
    say(f"This demo uses {used}; the worker, its training process, the contract and the files are the real ones.")
    try:
        outcome = run_demo(smollm2_inputs(), to, stack)
    except KeyboardInterrupt:
        say("Interrupted; no result was kept.")
        raise typer.Exit(Exit.INTERRUPTED) from None
    from .demo_outcome import print_json, show

    (print_json if as_json else show)(outcome)


def smollm2_inputs() -> Inputs:
    """SmolLM2-135M and English text, out of installed packages, and settings that give readable features in a minute.

    Raises:
        CliError: if a package is missing.

    """
    from .demo_inputs import passages, smollm2_folder

    texts, model = passages(PASSAGES), smollm2_folder()
    request = TrainRequested(
        job_id=new_job_id(),
        model_name=str(model),
        corpus_file="demo.txt",
        layer_number=LAYER,
        max_sequence_length=256,
        pooling="token",
        max_epochs=EPOCHS,
        cross_entropy_tokens=2048,
        sae=BatchTopKSAE(name="demo", k=16, hidden_dim=2048, learning_rate=3e-3, batch_size=1024),
    )
    return Inputs(model, texts, request)


def run_demo(inputs: Inputs, to: Path, stack: Servers) -> "Outcome":
    """Run the job on these servers, bring its files into a folder of its own in `to`, and look at its features.

    Raises:
        typer.Exit: if the job ended without a result.
        CliError: if the servers cannot be had.

    """
    from .demo_outcome import Outcome
    from .feature_meaning import read_features
    from .feature_view import view_features

    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to, prefix=".work-") as work, servers(stack, Path(work)) as settings:
        event = asyncio.run(train(settings, inputs))
        if not isinstance(event, TrainCompleted):
            show_end(event)
            raise typer.Exit(Exit.FAILED)
        folder = bring(settings, event, to)
    activations, words, meaning = read_features(folder, inputs.texts, inputs.model)
    return Outcome(event, view_features(activations, words, meaning, rule=inputs.rule), folder)


@contextmanager
def servers(stack: Servers, work: Path) -> Iterator[Settings]:
    """A worker's settings for servers that are there as long as the block lasts; all files lie in `work`.

    Raises:
        CliError: if they cannot be started.

    """
    from mistudio_stack import StackError, open_stack

    # what the environment says of other servers does not concern these
    own: dict[str, Any] = {
        "kafka_security_protocol": "PLAINTEXT",
        "kafka_topic_prefix": "",
        "kafka_request_partitions": PARTITIONS,
        "store_prefix": "",
        "data_path": work,
        "max_concurrent_jobs": 1,
        "log_level": "ERROR",  # warnings for the requester come with the events
    }
    try:
        if stack == "embedded":
            with embedded_broker(Settings(**own)) as address:
                yield Settings(
                    **own, kafka_bootstrap_servers=address, kafka_transactions=False, store_path=work / "store"
                )
        else:
            backend: Backend = stack
            with open_stack(backend) as opened:
                found = {name.lower(): value for name, value in opened.env().items()}
                yield Settings(**(own | found | {"store_path": None}))
    except StackError as error:
        raise CliError(str(error).removesuffix(f". {error.hint}"), error.hint) from None


@contextmanager
def embedded_broker(settings: Settings) -> Iterator[str]:
    """The embedded broker with a worker's topics, which it cannot create itself; yields its address."""
    from mistudio_stack.embedded import embedded_kafka
    from mistudio_train.worker.kafka import topic_plans

    with embedded_kafka({plan.name: plan.partitions for plan in topic_plans(settings)}) as address:
        yield address


async def train(settings: Settings, inputs: Inputs) -> "bus.Terminal":
    """Put the corpus, be a worker, publish the request, and show the job until its end, which is returned."""
    from mistudio_train.worker.app import build_app

    settings = settings.model_copy(update={"local_model_folders": [inputs.model.parent]})
    await asyncio.to_thread(put_texts, settings, inputs)
    async with build_app(settings).start_lifespan_context():
        return await submit_and_watch(settings, inputs.request)


def put_texts(settings: Settings, inputs: Inputs) -> None:
    """Store the corpus that the request names."""
    from mistudio_train.worker.corpora import put_corpus
    from mistudio_train.worker.store import open_store

    from .demo_inputs import write_corpus

    corpus = settings.data_path / inputs.request.corpus_file
    write_corpus(corpus, inputs.texts)
    store = open_store(settings)
    try:
        store.ensure()
        put_corpus(store, corpus.name, corpus)
    finally:
        store.close()


async def submit_and_watch(settings: Settings, request: TrainRequested) -> "bus.Terminal":
    """Publish the request and show a bar a phase until the job's end."""
    from . import bus

    end: bus.Terminal | None = None
    with bus.reaching_kafka(settings):
        await bus.submit(settings, request)
        with Bars() as bars:
            async with aclosing(bus.follow(settings, str(request.job_id))) as events:
                async for event in events:
                    if isinstance(event, TrainProgress):
                        bars.show(event)
                    else:
                        end = event
    assert end is not None  # the events end with it
    return end


def bring(settings: Settings, event: TrainCompleted, to: Path) -> Path:
    """The run's files in a folder of their own, verified as for any reader."""
    from mistudio_train.worker.artifacts import fetch_run
    from mistudio_train.worker.store import open_store

    store, folder = open_store(settings), to / event.job_id
    try:
        fetch_run(store, event, folder)
    finally:
        store.close()
    return folder
