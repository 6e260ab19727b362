"""The child's job, second half: load, extract, then for each SAE train, evaluate and write.

Reads top to bottom as the job goes; each step's substance is in its own module.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import tokenizers
import torch
import transformers
from transformers.models.auto import modeling_auto

from mistudio_schemas import SAEConfig, TrainRequested
from mistudio_train import __version__
from mistudio_train.errors import MemoryExhausted
from mistudio_train.messages import Finished, Lease, LeftEarly
from mistudio_train.sae.build import recipe_for

from .activations import ActivationStore
from .allocator import give_back
from .bundle_limits import refuse_hopeless
from .checkpoints import Checkpoints, KeptTraining
from .extract import Extraction, extract
from .files import write_json
from .fit import NothingTrained, fit
from .identity import content_of, request_digest
from .language_model import LanguageModel, is_out_of_memory, load
from .memory_plan import GIB, MemoryPlan
from .reporter import Reporter
from .results import Context, Written, write_result
from .run import Accepted
from .saelens import Origin
from .sites import Site
from .tokens import frame_of

LOADING: Final = (0.02, 0.05)
EXTRACTING: Final = (0.05, 0.4)
TRAINING: Final = (0.4, 1.0)
FITTING: Final = 0.8
"""Of an SAE's share, training; the rest is evaluation and files."""


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
    with _memory_errors(job.plan):
        written, stopped = _train_all(context, job, extraction, origins, checkpoints, reporter)
    primary = written[0]
    return Finished(
        model_info=context.info,
        corpus=extraction.corpus,
        saes=[one.result for one in written],
        training_stats=primary.training_results | primary.result.metrics.model_dump(mode="json"),
        bundle_rows=primary.bundle.rows,
        device=job.plan.device,
        memory_peak_bytes=reporter.memory_peak_bytes(),
        stopped_early=stopped,
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


def _train_all(
    context: Context,
    job: Accepted,
    extraction: Extraction,
    origins: dict[Site, Origin],
    checkpoints: Checkpoints,
    reporter: Reporter,
) -> tuple[list[Written], bool]:
    """Each SAE of the request, and whether the parent has wanted what there was before all were trained."""
    configs = job.spec.request.resolved_saes()
    stores = [extraction.stores[site] for site in job.sites.of_saes]
    steps = [_steps(config, store, context) for config, store in zip(configs, stores, strict=True)]
    written: list[Written] = []
    for position, (config, site) in enumerate(zip(configs, job.sites.of_saes, strict=True)):
        begin, end = (TRAINING[0] + (TRAINING[1] - TRAINING[0]) * i / len(configs) for i in (position, position + 1))
        middle = begin + FITTING * (end - begin)
        place = "" if position == 0 else f"saes/{config.name}/"
        log_path = job.spec.output / place / "training_log.jsonl"
        reporter.enter("training", f"training {config.name}", (begin, middle))
        try:
            fitted = fit(
                config,
                stores[position],
                mean_pooled=context.mean_pooled,
                device=context.device,
                reporter=reporter,
                log_path=log_path,
                kept=KeptTraining(checkpoints, position, log_path),
                steps_after=sum(steps[position + 1 :]),
            )
        except NothingTrained:
            if not written:
                raise LeftEarly from None
            shutil.rmtree(log_path.parent)
            break
        _free(job.plan)
        written.append(
            write_result(context, config, fitted, stores[position], origins[site], place, reporter, (middle, end))
        )
        _free(job.plan)
    if len(configs) > 1:
        write_json(job.spec.output / "saes.json", {"saes": [one.result.model_dump(mode="json") for one in written]})
    return written, len(written) < len(configs) or any(one.result.stop_reason == "stopped" for one in written)


def _steps(config: SAEConfig, store: ActivationStore, context: Context) -> int:
    return recipe_for(config, rows=store.rows, mean_pooled=context.mean_pooled).total_steps(store.rows)


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


def is_causal(architecture: str) -> bool:
    """Whether the family is a decoder: it has a causal head and no masked one, which encoders have."""
    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return architecture in causal and architecture not in masked
