"""The command `estimate`: what a job would take of time, memory and disk here, before anybody submits it.

Accepts the job as a worker's child does, counts its tokens on a sample of the corpus, and trains nothing.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.table import Table

from mistudio_schemas import TrainRequested
from mistudio_train.messages import ChildMessage, JobSpec, Warned, Wish
from mistudio_train.paces import AROUND, Pace, paces_in
from mistudio_train.settings import Settings

from .display import results, say
from .environment import load_settings
from .errors import CliError
from .local_corpus import corpus_here
from .local_model import with_model_folder
from .machine import GIB, planned_spec
from .request_input import assign, checked, read_request_file

if TYPE_CHECKING:
    from mistudio_train.training.run import Accepted
    from mistudio_train.training.work import CorpusWork, Work

    from .expected import Error, Expected

commands = typer.Typer()
SAMPLED: Final = 4_000_000
"""Bytes of texts from all over the corpus that are tokenised, to know how many tokens all have."""
CPU: Final = "CPU"


@dataclass(frozen=True)
class Estimate:
    """What is said of a job."""

    device: str
    jobs: int
    """Earlier ones on it that this is concluded from."""
    time: "Expected"
    tokens: int
    texts: int
    memory_bytes: int
    memory_available_bytes: int
    memory_error: "Error | None"
    disk_bytes: int
    result_bytes: int
    disk_error: "Error | None"
    warnings: list[str]


@commands.command(epilog="Example: mistudio-train estimate request.yaml --set sae.hidden_dim=16384")
def estimate(
    request_file: Annotated[Path, typer.Argument(metavar="REQUEST", help="YAML or JSON file.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Any field; may be repeated.")
    ] = None,
    corpus_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the corpus is; the store's corpora when left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how long a job would take here, and what of memory and disk, from how long earlier jobs took.

    Exit status: 0 it is said, 2 a worker would refuse the job, or none was done here yet.
    """
    settings = load_settings()
    request = with_model_folder(checked(assign(read_request_file(request_file), assignments or []), settings.limits))
    found = estimated(request, corpus_folder, settings)
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"seconds": found.time.seconds}))
    else:
        _show(found)


def estimated(request: TrainRequested, corpus_folder: Path | None, settings: Settings) -> Estimate:
    """What the job would take.

    Raises:
        CliError: if no job was done on this device yet.
        JobError: if a worker would refuse it.

    """
    from mistudio_train.worker.hub_push import push_of

    from .expected import expected, share_error

    push_of(request, settings)
    request, disk = _from_scratch(request), settings.data_path if settings.data_path.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="mistudio-", dir=disk) as scratch:
        corpus = corpus_here(request, corpus_folder, Path(scratch), settings)
        spec = planned_spec(request, settings, corpus, Path(scratch))
        parent = _Listener()
        accepted = _accepted(spec, parent)
        device, paces = _paces(spec, settings)
        read = _read(accepted, Path(scratch))
    work = _work(accepted, read, paces)
    result = work.result_bytes(spec.bundle_max_bytes)
    return Estimate(
        device=device,
        jobs=len(paces),
        time=expected({**work.units(), AROUND: (result, 1)}, paces),
        tokens=read.tokens,
        texts=read.texts,
        memory_bytes=accepted.plan.planned_bytes,
        memory_available_bytes=accepted.plan.available_bytes,
        memory_error=share_error((one.memory_planned, one.memory_peak) for one in paces),
        disk_bytes=work.disk_bytes(spec.bundle_max_bytes),
        result_bytes=result,
        disk_error=share_error((one.disk_planned, one.disk) for one in paces),
        warnings=parent.warnings,
    )


class _Listener:
    """Of the child's work only its warnings are of interest."""

    wish: Wish | None = None

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def __call__(self, message: ChildMessage, /) -> None:
        if isinstance(message, Warned):
            self.warnings.append(message.message)


def _from_scratch(request: TrainRequested) -> TrainRequested:
    """What SAEs go on from changes nothing of what they take."""
    saes = [sae.model_copy(update={"init_from": None}) for sae in request.resolved_saes()]
    return request.model_copy(update={"sae": None, "saes": saes})


def _accepted(spec: JobSpec, parent: _Listener) -> "Accepted":
    from mistudio_train.training.reporter import Reporter
    from mistudio_train.training.run import accept

    return accept(spec, Reporter(parent))


def _paces(spec: JobSpec, settings: Settings) -> tuple[str, list[Pace]]:
    """The device, and the earlier jobs on it; of a CPU those with as many threads as the latest had."""
    from mistudio_train.training.device import device_name, leased_device

    all_paces, device = paces_in(settings.paces), device_name(leased_device(spec.lease), spec.lease)
    if spec.lease.gpu is None:
        device = next((one.device for one in reversed(all_paces) if one.device.startswith(CPU)), device)
    paces = [one for one in all_paces if one.device == device]
    if not paces:
        raise CliError(
            f"no job on {device} is noted in {settings.paces}, so nothing is known of how fast it is",
            "Let a small job be done there first (mistudio-train run, or the worker of this DATA_PATH).",
        )
    return device, paces


def _read(accepted: "Accepted", scratch: Path) -> "CorpusWork":
    """What will go through the model, as far as a sample tells."""
    from mistudio_train.training.texts import Texts, TextsWriter
    from mistudio_train.training.tokenization import rules_of, tokenize
    from mistudio_train.training.tokenizer import tokenizer_of
    from mistudio_train.training.work import CorpusWork

    spec, texts = accepted.spec, accepted.texts
    tokenizer = tokenizer_of(accepted.source, spec.token, allow_unsafe=spec.allow_unsafe_models)
    whole = spec.request.model_copy(update={"token_budget": None})
    rules = rules_of(whole, tokenizer, accepted.source.positions, texts[0])
    every = max(1, -(-texts.bytes // SAMPLED))
    with TextsWriter(scratch / "sample") as writer:
        for number in range(0, len(texts), every):
            writer.append(texts[number])
    sample = Texts(scratch / "sample")
    seen = tokenize(sample, tokenizer, rules, scratch / "sampled-tokens", lambda done, total: None).corpus
    share = texts.bytes / max(1, sample.bytes)
    if budget := spec.request.token_budget:
        share = min(share, budget / max(1, seen.tokens))
    mean = spec.request.pooling == "mean"
    count, tokens = min(len(texts), round(seen.texts * share)), round(seen.tokens * share)
    return CorpusWork(texts.bytes, count, tokens, round(seen.windows * share), count if mean else tokens)


def _work(accepted: "Accepted", read: "CorpusWork", paces: list[Pace]) -> "Work":
    """What there is to do, if no SAE ends its training early."""
    from mistudio_train.sae.build import recipe_for
    from mistudio_train.training.work import SAEWork, Work, expected_active

    from .expected import active_share

    request, saes = accepted.spec.request, []
    rows = max(1, round(read.rows * (1 - request.held_out_share)))
    for config in request.resolved_saes():
        recipe, d_sae = recipe_for(config, rows=rows, mean_pooled=request.pooling == "mean"), config.hidden_dim or 0
        active = expected_active(config, d_sae, active_share(config.kind, paces))
        saes.append(SAEWork(config.kind, d_sae, recipe.batch_size, recipe.total_steps(rows), active))
    return Work(accepted.source, accepted.plan, accepted.sites, request, read, saes)


def _show(found: Estimate) -> None:
    table = Table("", "", "", box=None, show_header=False)
    time, parts = found.time, sorted(found.time.parts.items(), key=lambda item: -item[1])
    table.add_row("time", _long(time.seconds), _error(time.error, "each from the others"))
    for name, seconds in parts:
        table.add_row(f"  {name}", _long(seconds), "")
    memory = f"{found.memory_bytes / GIB:.2f} GiB of {found.memory_available_bytes / GIB:.2f}"
    table.add_row("memory at its peak", memory, _error(found.memory_error))
    table.add_row("disk while it runs", _size(found.disk_bytes), _error(found.disk_error))
    table.add_row("result", _size(found.result_bytes), "")
    results().print(table)
    say(
        f"About {found.tokens:,} tokens of {found.texts:,} texts. What is known: {_jobs(found.jobs)} on {found.device}."
    )
    say("SAEs that stop early, as nothing is learned any more, take less.")
    if time.beyond:
        say(f"No earlier job was nearly like this one in {', '.join(time.beyond)}: it may be far off there.")
    if time.unknown:
        say(f"Nothing is known of {', '.join(time.unknown)}, which is not counted.")
    for warning in found.warnings:
        say(f"Warning: {warning}")


def _error(error: "Error | None", how: str = "") -> str:
    if error is None:
        return "one earlier job: its error is not known" if how else ""
    of = _jobs(error.jobs, "earlier ") + (f", {how}" if how else "")
    return f"missed by {error.median:.0%}, at worst {error.worst:.0%} ({of})"


def _jobs(count: int, which: str = "") -> str:
    return f"{count} {which}job{'' if count == 1 else 's'}"


def _long(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 1024**2:.0f} MiB"
