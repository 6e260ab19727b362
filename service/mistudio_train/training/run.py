"""The child's job, first half: everything that can be refused is refused here, in seconds, before torch is imported.

The second half, `pipeline.carry_out`, does the work. Both know a workspace folder and a pipe, and nothing else outside.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mistudio_train.messages import Finished, JobSpec, Parent

from .bundle_limits import refuse_hopeless
from .corpus import CorpusRules, Render, open_corpus
from .identity import identity_of
from .memory_plan import MemoryPlan, plan_memory
from .model_source import ModelSource, inspect
from .reporter import Reporter
from .sites import Sites, resolve_sites
from .start import Start, open_starts
from .texts import Texts


@dataclass(frozen=True)
class Accepted:
    """A job that can be done, as far as can be told without doing it."""

    spec: JobSpec
    source: ModelSource
    sites: Sites
    plan: MemoryPlan
    texts: Texts
    starts: tuple[Start | None, ...]
    """What each SAE goes on from."""
    corpus_commit: str | None = None
    """Of a dataset of the hub."""


def run_job(spec: JobSpec, parent: Parent) -> Finished:
    """Do the job: the files are under `spec.output` when it returns.

    Args:
        spec: the job.
        parent: takes what there is to say meanwhile, and may want an early end.

    Raises:
        JobError: if there is no result, with the reason and what to do.
        LeftEarly: if there is none because the parent wanted an early end.
    """
    reporter = Reporter(parent, tell_log=spec.tell_log)
    accepted = accept(spec, reporter)
    from .pipeline import carry_out  # torch and transformers take seconds to import, which a refusal need not wait for

    return carry_out(accepted, reporter)


def accept(spec: JobSpec, reporter: Reporter) -> Accepted:
    """Judge the job: model, layers, what it goes on from, memory, corpus.

    Raises:
        JobError: if it cannot be done.
    """
    request = spec.request
    reporter.enter("planning", f"looking at {request.model_name}", (0.0, 0.02))
    with reporter.one_call():
        source = inspect(
            request.model_name,
            spec.model_commit or request.model_revision,
            folders=spec.model_folders,
            brought=spec.model,
            token=spec.token,
            allow_unsafe=spec.allow_unsafe_models,
        )
    sites = resolve_sites(request, source.total_layers)
    with reporter.one_call():  # all of its bytes are read
        starts = open_starts(request.resolved_saes(), spec.starts, source.d_in)
    plan = plan_memory(source, spec)
    for warning in (*sites.warnings, *plan.warnings):
        reporter.warn(warning)
    reporter.loaded(source.info(sites.selected_layer), source.commit)
    reporter.say(0.5, f"reading {request.corpus_file}")
    spec.scratch.mkdir(parents=True, exist_ok=True)

    def on_texts(read: int) -> None:
        if reporter.due:
            reporter.say(0.5, f"read {read} texts of {request.corpus_file}")

    lengths = request.min_text_characters, request.max_text_characters
    rules = CorpusRules(request.corpus_column, *lengths, _chat_template(spec, source, reporter), request.label_column)
    files, commit = _files(spec, reporter)
    texts = open_corpus(files, spec.scratch, rules, on_texts)
    if request.token_budget is None:
        refuse_hopeless(spec, len(texts), source.d_in)
    if spec.identify:
        with reporter.one_call():
            reporter.identified(
                identity_of(request, source, texts.sha256, [one.sha256 if one else None for one in starts])
            )
    return Accepted(spec, source, sites, plan, texts, starts, commit)


def _chat_template(spec: JobSpec, source: ModelSource, reporter: Reporter) -> Render | None:
    """What makes texts of conversations; `None` where the corpus holds texts, which need no tokenizer yet."""
    if spec.request.corpus_holds == "texts":
        return None
    with reporter.one_call():
        from .conversations import ChatTemplate
        from .tokenizer import tokenizer_of

        return ChatTemplate(tokenizer_of(source, spec.token, allow_unsafe=spec.allow_unsafe_models), source.name)


def _files(spec: JobSpec, reporter: Reporter) -> tuple[Mapping[str, Path], str | None]:
    """The corpus' files, and its commit if it has one; a dataset of the hub is fetched, which may take its time."""
    if spec.corpus is not None:
        return {spec.request.corpus_file: spec.corpus}, None
    from .hub_datasets import fetch_dataset  # the hub's client takes seconds to import

    reporter.enter("fetching", f"looking at {spec.request.corpus_file}", (0.01, 0.02))

    def on_file(number: int, count: int, name: str) -> None:
        reporter.say((number - 1) / count, f"fetching {name}, file {number} of {count}")

    with reporter.one_call():
        dataset = fetch_dataset(spec.request.corpus_file, spec.corpus_commit, spec.token, on_file)
    reporter.dataset_found(dataset.commit)
    reporter.enter("planning", f"reading {spec.request.corpus_file}", (0.02, 0.02))
    return dataset.files, dataset.commit
