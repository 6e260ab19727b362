"""The child's job, second half: load, extract, tell the rows apart, then train, evaluate and write each SAE.

Reads top to bottom as the job goes; each step's substance is in its own module.
"""

import logging
import time
from statistics import median
from typing import Any, Final

import tokenizers
import torch
import transformers

from mistudio_schemas import TrainRequested
from mistudio_train import __version__
from mistudio_train.messages import Finished, LeftEarly
from mistudio_train.paces import Pace, Part

from . import advice
from .activations import ActivationStore
from .bundle_limits import refuse_hopeless
from .checkpoints import Checkpoints
from .device import device_name, leased_device, threads_of
from .extract import Extraction, extract
from .identity import content_of, request_digest
from .language_model import LanguageModel, is_causal, load
from .push import push_result
from .reporter import Reporter
from .results import Context
from .run import Accepted
from .saelens import Origin
from .selection import MOST_LEFT_OUT, Selection, hold_out, select
from .sites import Ends
from .start_weights import refuse_unsuitable
from .sweep import Sweep, free, make_saes
from .tokens import Rules
from .wanted import Wanted
from .work import CorpusWork, SAEWork, Work

logger = logging.getLogger(__name__)

LOADING: Final = (0.02, 0.05)
EXTRACTING: Final = (0.05, 0.4)


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
    with reporter.one_call():
        refuse_unsuitable(spec.request.resolved_saes(), job.starts)
    checkpoints = Checkpoints(spec.workspace, fingerprint, spec.checkpoint_seconds, reporter.saved)
    for warning in checkpoints.warnings:
        reporter.warn(warning)
    model = _load(job, reporter)
    extraction = _extract(job, model, checkpoints, reporter)
    rules = extraction.tokens.rules
    origins = {ends: _origin(model, ends, spec.request, rules) for ends in job.sites.of_saes}
    tokenizer = model.tokenizer
    del model  # its memory is the SAEs' now
    free(job.plan)
    context = Context(
        spec=spec,
        info=job.source.info(job.sites.selected_layer),
        corpus=extraction.corpus.model_copy(update={"commit": job.corpus_commit}),
        texts=job.texts.first(extraction.corpus.texts),
        memory_optimizations=job.plan.memory_optimizations,
        device=torch.device(job.plan.device),
        tokenizer=tokenizer,
        revision=job.source.commit,
        fingerprint=fingerprint,
    )
    refuse_hopeless(spec, extraction.corpus.texts, job.source.d_in)  # a token budget may have left too few
    selections = _select(context, job, extraction, reporter)
    wanted = [
        Wanted(position, config, ends, _stores(extraction, ends), selections[ends], origins[ends], job.starts[position])
        for position, (config, ends) in enumerate(zip(spec.request.resolved_saes(), job.sites.of_saes, strict=True))
    ]
    sweep = make_saes(wanted, context, job, extraction.tokens, checkpoints, reporter)
    if spec.push is not None:
        push_result(spec.push, spec.output, reporter)
    primary = sweep.written[0]
    return Finished(
        model_info=context.info,
        corpus=context.corpus,
        saes=[one.result for one in sweep.written],
        failed_saes=sweep.failures,
        training_stats=primary.training_results | primary.result.metrics.model_dump(mode="json"),
        bundle_rows=primary.bundle.rows,
        device=job.plan.device,
        memory_peak_bytes=reporter.memory_peak_bytes(),
        stopped_early=sweep.stopped,
        pace=_pace(job, extraction, sweep, reporter),
    )


def _pace(job: Accepted, extraction: Extraction, sweep: Sweep, reporter: Reporter) -> Pace | None:
    """What was measured, beside what there was to do; of a job that was done whole and in one go."""
    if job.spec.attempt > 1 or sweep.stopped or sweep.failures:
        return None
    try:
        return _measured(job, extraction, sweep, reporter)
    except Exception:  # the result is there, and no estimate is worth it
        logger.exception("how long the job took cannot be told")
        return None


def _measured(job: Accepted, extraction: Extraction, sweep: Sweep, reporter: Reporter) -> Pace:
    spec, corpus = job.spec, extraction.corpus
    results = [one.result for one in sweep.written]
    saes = [
        SAEWork(one.kind, one.feature_count, written.batch_size, one.steps, one.metrics.l0 or 0.0)
        for written, one in zip(sweep.written, results, strict=True)
    ]
    read = CorpusWork(job.texts.bytes, corpus.texts, corpus.tokens, corpus.windows, corpus.rows)
    work = Work(job.source, job.plan, job.sites, spec.request, read, saes)
    seconds, units = reporter.seconds({one.name: one.kind for one in results}), work.units()
    if job.source.folder is None:  # it may have been downloaded, which says nothing of the next time
        del units["loading"]
    return Pace(
        job_id=spec.job_id,
        device=device_name(leased_device(spec.lease), spec.lease),
        parts={name: Part(some, seconds.get(name, 0.0)) for name, some in units.items()},
        child_seconds=reporter.all_seconds,
        active_share={
            kind: median(sae.active / sae.d_sae for sae in saes if sae.kind == kind)
            for kind in {sae.kind for sae in saes}
        },
        memory_planned=job.plan.planned_bytes,
        memory_peak=reporter.memory_peak_bytes(),
        disk_planned=work.disk_bytes(spec.bundle_max_bytes),
    )


def _fingerprint(job: Accepted) -> dict[str, object]:
    """Everything that the numbers depend on: what another one has kept is of no use here."""
    spec, plan = job.spec, job.plan
    return {
        "version": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "request": request_digest(spec.request),
        "model": f"{job.source.name}@{content_of(job.source)}",
        "corpus": job.texts.sha256,
        "init_from": [one.sha256 if one else None for one in job.starts],
        "device": plan.device.partition(":")[0],
        "dtype": plan.dtype,
        "quantization": plan.quantization,
    }


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


def _stores(extraction: Extraction, ends: Ends) -> tuple[ActivationStore, ...]:
    return tuple(extraction.stores[site] for site in ends.sites)


def _select(context: Context, job: Accepted, extraction: Extraction, reporter: Reporter) -> dict[Ends, Selection]:
    """What each row is, at each site that is reconstructed from itself or another."""
    request, scratch = job.spec.request, job.spec.scratch
    held_out = hold_out(context.texts, extraction.tokens, request.held_out_share)
    if request.held_out_share and not held_out.any():
        reporter.warn("no text could be held out: the figures are of the rows that the SAEs were trained on")
    reporter.enter("extracting", "telling the rows apart", (EXTRACTING[1], EXTRACTING[1]))

    def on_progress(done: float) -> None:
        if reporter.due:
            reporter.say(done)

    selections = {}
    for ends in dict.fromkeys(job.sites.of_saes):
        stores, path = _stores(extraction, ends), scratch / f"rows-{ends}.bin"
        selections[ends] = select(stores, extraction.tokens, held_out, request, path, on_progress)
        _warn_of_rows(selections[ends], ends, request, reporter)
        if context.mean_pooled:
            for sentence in advice.on_rows(stores[0], lambda text: len(context.texts[text])):
                reporter.warn(f"{ends}: {sentence}")
    return selections


def _warn_of_rows(selection: Selection, ends: Ends, request: TrainRequested, reporter: Reporter) -> None:
    rows = selection.counts
    if request.left_out and not rows.left_out and rows.first_token + rows.high_norm > MOST_LEFT_OUT * rows.total:
        reporter.warn(
            f"{ends}: {rows.first_token} of {rows.total} rows are first tokens and {rows.high_norm} have a high norm, "
            "so many that none was left out"
        )


def _origin(model: LanguageModel, ends: Ends, request: TrainRequested, rules: Rules) -> Origin:
    """The sites by the paths of the modules that give them, as SAELens names places in a Hugging Face model."""
    causal = is_causal(model.source.architecture)
    prefix: Any = getattr(model.trunk, "base_model_prefix", "") if causal else ""
    names = [f"{prefix}.{path}" if path and prefix else path for path in map(model.module_of, ends.sites)]
    return Origin(
        model_name=request.model_name,
        model_class_name="AutoModelForCausalLM" if causal else "AutoModel",
        hook_name=names[0],
        layer=ends.read.layer,
        hook_site=ends.read.hook_site,
        context_size=rules.length,
        prepend_bos=bool(rules.frame.before),
        exclude_special_tokens=not request.include_special_tokens,
        dataset_path=request.corpus_file,
        pooling=request.pooling,
        model_revision=model.source.commit,
        predicts=None if ends.predicted is None else ends.predicted.hook_site,
        hook_name_out=None if ends.predicted is None else names[1],
    )
