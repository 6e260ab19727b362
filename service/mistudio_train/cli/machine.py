"""The commands `gpu`, `check-memory` and `validate-model`: what this machine has, and what would fit it.

They judge from configs and shapes alone; no model is loaded and nothing is trained.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mistudio_schemas import TrainRequested
from mistudio_train.errors import ModelRefused, NotEnoughMemory
from mistudio_train.messages import JobSpec, Lease
from mistudio_train.settings import Settings

from .display import results, say, say_error
from .environment import load_settings
from .errors import Exit
from .local_model import folder_of_model, hub_token, with_model_folder
from .request_input import assign, checked

if TYPE_CHECKING:
    from mistudio_train.training.model_source import ModelSource

commands = typer.Typer()
GIB = 1024**3

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face name, or a folder.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Any field of the request; repeatable.")
]


@commands.command(epilog="Example: mistudio-train gpu --json")
def gpu(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the GPUs of this machine with their memory, other processes' use included.

    Exit status: 0, also when there is none.
    """
    from mistudio_train.gpu import list_gpus

    gpus = list_gpus()
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in gpus]))
    elif gpus:
        table = Table("GPU", "name", "free GiB", "total GiB", "in use", "capability", box=None)
        for one in gpus:
            sizes = f"{one.free_bytes / GIB:.1f}", f"{one.total_bytes / GIB:.1f}"
            table.add_row(str(one.index), one.name, *sizes, f"{one.utilization:.0%}", one.compute_capability)
        results().print(table)
    else:
        say("No GPU here; jobs run on the CPU.")


@commands.command(epilog="Example: mistudio-train check-memory gpt2 --set hidden_dim=8192 --json")
def check_memory(
    model: Model,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
) -> None:
    """Plan a job on this machine's device as a worker would, and say whether it fits.

    Exit status: 0 it fits, 1 it does not, 2 the model or the request is refused.
    """
    from mistudio_train.training.memory_plan import plan_memory

    settings = load_settings()
    request = _request(model, assignments, settings)
    try:
        plan = plan_memory(_inspected(request, settings), planned_spec(request, settings, Path("any.txt"), Path()))
    except NotEnoughMemory as error:
        if as_json:
            typer.echo(json.dumps({"fits": False, "message": str(error), "hint": error.hint}))
        else:
            say_error(str(error), error.hint)
        raise typer.Exit(Exit.FAILED) from None
    if as_json:
        typer.echo(json.dumps({"fits": True} | asdict(plan)))
        return
    sizes = {"model": plan.model_bytes, "SAE in training": plan.sae_bytes, "peak planned": plan.planned_bytes}
    facts = {name: f"{size / GIB:.2f} GiB" for name, size in sizes.items()}
    facts |= {"available": f"{plan.available_bytes / GIB:.2f} GiB on {plan.device}", "precision": plan.dtype}
    facts |= {"quantisation": plan.quantization, "tokens a forward pass": str(plan.tokens_per_batch)}
    _show(facts)
    say("It fits.")


@commands.command(epilog="Example: mistudio-train validate-model gpt2 --layer-number 6")
def validate_model(
    model: Model,
    layer_number: Annotated[int | None, typer.Option("--layer-number", "-l", min=0, help="Block, from 0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
) -> None:
    """Find a model and say what it is, as its config tells.

    Exit status: 0 it can be used, 2 it cannot, or it has no such layer.
    """
    settings = load_settings()
    source = _inspected(_request(model, None, settings), settings)
    last = source.total_layers - 1
    if layer_number is not None and layer_number > last:
        raise ModelRefused(f"{model} has no layer {layer_number}", f"Its layers are 0 to {last}.")
    info = source.info(last if layer_number is None else layer_number).model_dump()
    if as_json:
        typer.echo(json.dumps(info))
    else:
        _show({name.replace("_", " "): str(value) for name, value in info.items()})


def _request(model: str, assignments: list[str] | None, settings: Settings) -> TrainRequested:
    raw = assign({"model_name": model, "corpus_file": "any.txt"}, assignments or [])
    return with_model_folder(checked(raw, settings.limits))


def _inspected(request: TrainRequested, settings: Settings) -> "ModelSource":
    from mistudio_train.training.model_source import inspect

    return inspect(
        request.model_name,
        request.model_revision,
        folders=[*settings.local_model_folders, *folder_of_model(request)],
        token=hub_token(request, settings),
        allow_unsafe=settings.allow_unsafe_models,
    )


def planned_spec(request: TrainRequested, settings: Settings, corpus: Path | None, workspace: Path) -> JobSpec:
    """A job that is only planned, on the best device of this machine."""
    from mistudio_train.gpu import best_gpu, list_gpus

    best = best_gpu(list_gpus())
    lease = Lease(gpu=None)
    if best is not None:
        wanted = best.index if request.gpu_id is None else request.gpu_id
        lease = Lease(wanted, settings.cuda_memory_fraction)
    return JobSpec(
        job_id="plan",
        run=1,
        attempt=1,
        request=request,
        corpus=corpus,
        workspace=workspace,
        lease=lease,
        uri_prefix="",
        bundle_max_bytes=request.bundle_max_bytes or settings.bundle_max_bytes,
        model_folders=(*settings.local_model_folders, *folder_of_model(request)),
        allow_unsafe_models=settings.allow_unsafe_models,
        memory_limit_bytes=settings.memory_limit_bytes,
        token=hub_token(request, settings),
    )


def _show(facts: dict[str, Any]) -> None:
    table = Table("", "", box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    results().print(table)
