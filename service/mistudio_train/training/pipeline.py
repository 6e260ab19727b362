"""The child's job, second half: load, extract, tell the rows apart, then train, evaluate and write each SAE.

Reads top to bottom as the job goes; each step's substance is in its own module.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import tokenizers
import torch
import transformers
from torch import Tensor

from mistudio_schemas import CrossEntropy, SAEConfig, TrainRequested
from mistudio_train import __version__
from mistudio_train.errors import MemoryExhausted, ModelRefused
from mistudio_train.messages import Finished, Lease, LeftEarly
from mistudio_train.sae.build import recipe_for

from . import advice
from .activations import ActivationStore
from .allocator import give_back
from .bundle_limits import refuse_hopeless
from .checkpoints import Checkpoints, KeptTraining
from .extract import Extraction, extract
from .files import write_json
from .fit import HELD_OUT_ROWS, Fitted, NothingTrained, fit
from .identity import content_of, request_digest
from .language_model import LanguageModel, is_causal, is_out_of_memory, load, load_with_head
from .memory_plan import GIB, MemoryPlan
from .reporter import Reporter
from .results import Context, Written, write_result
from .run import Accepted
from .saelens import Origin
from .selection import MOST_LEFT_OUT, Selection, hold_out, select
from .shuffle import ShuffledRows
from .sites import Site
from .spliced import Splice, cross_entropies
from .tokens import Tokens, frame_of

LOADING: Final = (0.02, 0.05)
EXTRACTING: Final = (0.05, 0.4)
TRAINING: Final = (0.4, 0.85)
SPLICING: Final = (0.85, 0.9)
WRITING: Final = (0.9, 1.0)


def carry_out(job: Accepted, reporter: Reporter) -> Finished:
    """Do the work of an accepted job.

    Raises:
        JobError: if there is no result.
    """
    spec = job.spec
    reporter.use(job.plan.device)
    torch.set_num_threads(threads_of(spec.lease))
    spec.output.mkdir(parents=True, exist_ok=True)
    (spec.output / "request.json").write_bytes(spec.request.to_json())
    with reporter.one_call():  # of a model in a folder all files are read
        fingerprint = _fingerprint(job)
    checkpoints = Checkpoints(spec.workspace, fingerprint, spec.checkpoint_seconds, reporter.saved)
    for warning in checkpoints.warnings:
        reporter.warn(warning)
    model = _load(job, reporter)
    extraction = _extract(job, model, checkpoints, reporter)
    origins = {site: _origin(model, site, spec.request, extraction.length) for site in model.sites}
    del model  # its memory is the SAEs' now
    _free(job.plan)
    context = Context(
        spec=spec,
        info=job.source.info(job.sites.selected_layer),
        corpus=extraction.corpus,
        texts=job.texts.first(extraction.corpus.texts),
        memory_optimizations=job.plan.memory_optimizations,
        device=torch.device(job.plan.device),
    )
    refuse_hopeless(spec, extraction.corpus.texts, job.source.d_in)  # a token budget may have left too few
    by_site = _select(context, job, extraction, reporter)
    stores = [extraction.stores[site] for site in job.sites.of_saes]
    selections = [by_site[site] for site in job.sites.of_saes]
    with _memory_errors(job.plan):
        fitted = _fit_all(context, job, stores, selections, checkpoints, reporter)
        losses = _cross_entropies(context, job, fitted, selections, extraction.tokens, reporter)
        origins_of_saes = [origins[site] for site in job.sites.of_saes]
        written = _write_all(context, job, fitted, stores, selections, origins_of_saes, losses, reporter)
    primary = written[0]
    return Finished(
        model_info=context.info,
        corpus=extraction.corpus,
        saes=[one.result for one in written],
        training_stats=primary.training_results | primary.result.metrics.model_dump(mode="json"),
        bundle_rows=primary.bundle.rows,
        device=job.plan.device,
        memory_peak_bytes=reporter.memory_peak_bytes(),
        stopped_early=len(fitted) < len(stores) or any(one.stop_reason == "stopped" for one in fitted),
    )


def _fingerprint(job: Accepted) -> dict[str, object]:
    """Everything that the numbers depend on: what another one has kept is of no use here."""
    spec, plan = job.spec, job.plan
    return {
        "version": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "request": request_digest(spec.request),
        "model": f"{job.source.name}@{content_of(job.source)}",
        "corpus": job.texts.sha256,
        "device": plan.device.partition(":")[0],
        "dtype": plan.dtype,
        "quantization": plan.quantization,
    }


@contextmanager
def _memory_errors(plan: MemoryPlan) -> Iterator[None]:
    """Say in our words that the SAE did not fit after all."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhausted(
            f"Memory ran out on {plan.device} while an SAE was trained or evaluated; {plan.sae_bytes / GIB:.2f} GiB "
            "were planned for it",
            "Lower hidden_dim or batch_size, or use a worker with more memory. See what else uses the device.",
        ) from error


def threads_of(lease: Lease) -> int:
    """Threads of arithmetic: the job's share of the cores, so that jobs side by side do not wait for each other."""
    cores = len(os.sched_getaffinity(0))
    return max(1, int(cores * lease.memory_share)) if lease.gpu is None else cores


def _load(job: Accepted, reporter: Reporter) -> LanguageModel:
    reporter.enter("loading", f"loading {job.source.name}", LOADING)
    with reporter.one_call():
        model = load(
            job.source,
            job.plan,
            job.sites.distinct,
            token=job.spec.token,
            allow_unsafe=job.spec.allow_unsafe_models,
        )
    for warning in model.warnings:
        reporter.warn(warning)
    return model


def _extract(job: Accepted, model: LanguageModel, checkpoints: Checkpoints, reporter: Reporter) -> Extraction:
    began = time.monotonic()

    def leave_if_asked() -> None:
        if reporter.wish == "leave" or (reporter.wish == "stop" and not checkpoints.trained):
            raise LeftEarly

    def on_tokenized(done: int, total: int) -> None:
        leave_if_asked()
        if reporter.due:
            reporter.say(0.0, f"tokenised {done} of {total} texts")

    def on_progress(done: int, total: int) -> None:
        leave_if_asked()
        if reporter.due or done == total:
            rate = done / (time.monotonic() - began)
            reporter.say(done / total, f"extracted {done} of {total} tokens", tokens_done=done, tokens_per_second=rate)

    reporter.enter("extracting", f"tokenising {len(job.texts)} texts", EXTRACTING)
    inputs = model, job.texts, job.spec.request, job.sites.distinct, job.plan
    try:
        extraction = extract(
            *inputs, job.spec.scratch, checkpoints, on_progress, on_tokenized, job.spec.workspace_max_bytes
        )
    except LeftEarly:
        checkpoints.wait()  # the parent stores the last one that it hears of
        raise
    checkpoints.wait()
    if extraction.corpus.tokens_truncated:
        reporter.warn(f"{extraction.corpus.tokens_truncated} tokens lie beyond the length limit and were not read")
    return extraction


def _select(context: Context, job: Accepted, extraction: Extraction, reporter: Reporter) -> dict[Site, Selection]:
    """What each row is, at each site."""
    request, scratch = job.spec.request, job.spec.scratch
    held_out = hold_out(context.texts, extraction.tokens, request.held_out_share)
    if request.held_out_share and not held_out.any():
        reporter.warn("no text could be held out: the figures are of the rows that the SAEs were trained on")
    reporter.enter("extracting", "telling the rows apart", (EXTRACTING[1], EXTRACTING[1]))
    selections = {}
    for site, store in extraction.stores.items():
        path = scratch / f"rows-{site}.bin"
        selections[site] = select(store, extraction.tokens, held_out, request, path, lambda done: None)
        _warn_of_rows(selections[site], site, request, reporter)
        if context.mean_pooled:
            for sentence in advice.on_rows(store, lambda text: len(context.texts[text])):
                reporter.warn(f"{site}: {sentence}")
    return selections


def _warn_of_rows(selection: Selection, site: Site, request: TrainRequested, reporter: Reporter) -> None:
    rows = selection.counts
    if request.left_out and not rows.left_out and rows.first_token + rows.high_norm > MOST_LEFT_OUT * rows.total:
        reporter.warn(
            f"{site}: {rows.first_token} of {rows.total} rows are first tokens and {rows.high_norm} have a high norm, "
            "so many that none was left out"
        )


def _fit_all(
    context: Context,
    job: Accepted,
    stores: list[ActivationStore],
    selections: list[Selection],
    checkpoints: Checkpoints,
    reporter: Reporter,
) -> list[Fitted]:
    """Train each SAE of the request; fewer if the parent has wanted what there was."""
    configs = job.spec.request.resolved_saes()
    rows = [
        ShuffledRows(store, selection, seed=config.seed or 0, buffer_bytes=job.spec.request.shuffle_bytes)
        for config, store, selection in zip(configs, stores, selections, strict=True)
    ]
    steps = [_steps(config, of_sae.rows, context) for config, of_sae in zip(configs, rows, strict=True)]
    fitted: list[Fitted] = []
    for position, config in enumerate(configs):
        share = _part(TRAINING, position, len(configs))
        log_path = job.spec.output / _place(configs, position) / "training_log.jsonl"
        reporter.enter("training", f"training {config.name}", share, config.name)
        try:
            fitted.append(
                fit(
                    config,
                    rows[position],
                    _sample_of_held_out(stores[position], selections[position]),
                    mean_pooled=context.mean_pooled,
                    device=context.device,
                    reporter=reporter,
                    log_path=log_path,
                    kept=KeptTraining(checkpoints, position, log_path),
                    steps_after=sum(steps[position + 1 :]),
                )
            )
        except NothingTrained:
            if not fitted:
                raise LeftEarly from None
            shutil.rmtree(log_path.parent)
            break
        _free(job.plan)
    return fitted


def _sample_of_held_out(store: ActivationStore, selection: Selection) -> Tensor | None:
    rows = selection.held_out_rows(HELD_OUT_ROWS)
    return store.gather(rows) if len(rows) else None


def _cross_entropies(
    context: Context,
    job: Accepted,
    fitted: list[Fitted],
    selections: list[Selection],
    tokens: Tokens,
    reporter: Reporter,
) -> Sequence[CrossEntropy | None]:
    """What the language model loses with each SAE in its place; nothing where that cannot be told."""
    nothing = [None] * len(fitted)
    if not job.plan.splices or not selections[0].counts.held_out or reporter.wish == "stop":
        return nothing

    def on_progress(done: float) -> None:
        if reporter.wish == "leave":
            raise LeftEarly
        if reporter.due:
            reporter.say(done)

    reporter.enter("evaluating", "predicting held-out tokens with each SAE in the model's place", SPLICING)
    splices = list(map(Splice, job.sites.of_saes, (one.sae for one in fitted), selections))
    try:
        with reporter.one_call():
            model = load_with_head(
                job.source,
                job.plan,
                job.sites.distinct,
                token=job.spec.token,
                allow_unsafe=job.spec.allow_unsafe_models,
            )
        measured = cross_entropies(
            model, splices, tokens, limit=job.spec.request.cross_entropy_tokens, on_progress=on_progress
        )
    except ModelRefused as error:
        reporter.warn(f"no cross-entropy: {error}")
        return nothing
    del model
    _free(job.plan)
    return measured or nothing


def _write_all(
    context: Context,
    job: Accepted,
    fitted: list[Fitted],
    stores: list[ActivationStore],
    selections: list[Selection],
    origins: list[Origin],
    losses: Sequence[CrossEntropy | None],
    reporter: Reporter,
) -> list[Written]:
    """Evaluate each SAE and write its files."""
    configs = job.spec.request.resolved_saes()
    written = []
    for position, one in enumerate(fitted):
        written.append(
            write_result(
                context,
                configs[position],
                one,
                stores[position],
                selections[position],
                origins[position],
                losses[position],
                _place(configs, position),
                reporter,
                _part(WRITING, position, len(fitted)),
            )
        )
        _free(job.plan)
    if len(configs) > 1:
        write_json(job.spec.output / "saes.json", {"saes": [one.result.model_dump(mode="json") for one in written]})
    return written


def _place(configs: list[SAEConfig], position: int) -> str:
    """The SAE's folder below the run's root; the primary one's files lie at the root itself."""
    return "" if position == 0 else f"saes/{configs[position].name}/"


def _part(share: tuple[float, float], position: int, parts: int) -> tuple[float, float]:
    """One of some equal parts of a share."""
    begin, end = share
    return begin + (end - begin) * position / parts, begin + (end - begin) * (position + 1) / parts


def _steps(config: SAEConfig, rows: int, context: Context) -> int:
    return recipe_for(config, rows=rows, mean_pooled=context.mean_pooled).total_steps(rows)


def _free(plan: MemoryPlan) -> None:
    """Give back what nobody uses, on the device and here."""
    if plan.device != "cpu":
        torch.cuda.empty_cache()
    give_back()


def _origin(model: LanguageModel, site: Site, request: TrainRequested, length: int) -> Origin:
    """The site by the path of its module, as SAELens names places in a Hugging Face model."""
    path = next(name for name, module in model.trunk.named_modules() if module is model.modules[site])
    causal = is_causal(model.source.architecture)
    prefix: Any = getattr(model.trunk, "base_model_prefix", "")
    return Origin(
        model_name=request.model_name,
        model_class_name="AutoModelForCausalLM" if causal else "AutoModel",
        hook_name=f"{prefix}.{path}" if causal and prefix else path,
        layer=site.layer,
        hook_site=site.hook_site,
        context_size=length,
        prepend_bos=bool(frame_of(model.tokenizer).before),
        exclude_special_tokens=not request.include_special_tokens,
        dataset_path=request.corpus_file,
        pooling=request.pooling,
        model_revision=model.source.commit,
    )
