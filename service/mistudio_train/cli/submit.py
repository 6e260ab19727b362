"""The command `submit`: check a request here, then hand it to whichever worker is free."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from mistudio_schemas import KINDS, TrainRequested, new_job_id
from mistudio_train.settings import Settings

from .environment import load_settings
from .request_input import assign, checked, override, read_request_file
from .watch import watch_job

commands = typer.Typer()


@commands.command(
    epilog="Example: mistudio-train submit --model-name gpt2 --corpus-file stories.txt --kind batchtopk --k 32 --wait"
)
def submit(
    context: typer.Context,
    request_file: Annotated[
        Path | None, typer.Argument(metavar="REQUEST", help="YAML or JSON file; flags win over it.")
    ] = None,
    model_name: Annotated[str | None, typer.Option("--model-name", "-m", help="Hugging Face name or folder.")] = None,
    corpus_file: Annotated[
        str | None, typer.Option("--corpus-file", "-c", help="Name put by `corpus put`, s3://… or a worker's path.")
    ] = None,
    layer_number: Annotated[int | None, typer.Option("--layer-number", "-l", help="Block to read, from 0.")] = None,
    hidden_dim: Annotated[int | None, typer.Option(help="Number of latents.")] = None,
    sparsity_coeff: Annotated[float | None, typer.Option(help="L1 weight of the standard kind.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's step size of the standard kind.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step of the standard kind.")] = None,
    max_epochs: Annotated[int | None, typer.Option(help="Passes over the activations.")] = None,
    min_loss: Annotated[float | None, typer.Option(help="End early below this loss (standard kind).")] = None,
    gpu_id: Annotated[int | None, typer.Option(help="A particular GPU of the worker.")] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Tokens a text or window.")] = None,
    kind: Annotated[str | None, typer.Option(help=f"The SAE's kind: {', '.join(KINDS)}.")] = None,
    k: Annotated[int | None, typer.Option("--k", "-k", help="Latents kept a row (the topk family).")] = None,
    hook_site: Annotated[str | None, typer.Option(help="resid_pre, attn_out, mlp_in, mlp_out or resid_post.")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean: a row a text; token: a row a token.")] = None,
    corpus_column: Annotated[str | None, typer.Option(help="Column of the texts.")] = None,
    model_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    token_budget: Annotated[int | None, typer.Option(help="Extract at most about this many tokens.")] = None,
    token_name: Annotated[str | None, typer.Option(help="A hub token that the worker holds, by name.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds everything random.")] = None,
    job_id: Annotated[str | None, typer.Option(help="Names the job; made up when left out.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Any other field; may be repeated.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Then watch the job to its end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of the bare id.")] = False,
) -> None:
    """Check a request and publish it. Prints the job's id.

    Exit status: 0 sent (with --wait: as of `watch`), 2 refused or not sent.
    """
    settings = load_settings()
    raw = read_request_file(request_file) if request_file else {}
    override(raw, {name: value for name, value in context.params.items() if name in TrainRequested.model_fields})
    override(raw, {"sae.kind": kind, "sae.k": k})
    request = checked(assign(raw, assignments or []), settings.limits)
    if request.job_id is None:
        request.job_id = new_job_id()
    _publish(settings, request)
    if as_json:
        typer.echo(json.dumps({"job_id": request.job_id, "topic": settings.topics.requested}))
    else:
        typer.echo(request.job_id)
    if wait:
        watch_job(settings, request.job_id, as_json=as_json)


def _publish(settings: Settings, request: TrainRequested) -> None:
    from . import bus

    with bus.reaching_kafka(settings):
        asyncio.run(bus.submit(settings, request))
