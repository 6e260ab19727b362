"""The commands `report`, `show` and `compare`: what came out of finished runs, in a browser and in the terminal.

Own what is shown of them; nothing is measured here. No character of a corpus reaches the terminal as it is.
"""

import json
import webbrowser
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mistudio_schemas import SAEResult

from .display import number, results, sae_table, say
from .errors import CliError
from .finished import PAGE, SAES, FinishedRun, finished_run

if TYPE_CHECKING:
    from mistudio_train.training.report.packs import Card

commands = typer.Typer()
FEATURES = 5
CONTEXTS = 3
RARE = 0.01
"""Features are shown that are active on at most this share of the rows: others are seldom one idea."""
LEAST_MARK = 30
"""Of 99: a token of less strength is not marked."""

Job = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, or a folder that `run` or `fetch` has written.")]
Run = Annotated[int | None, typer.Option(min=1, help="This run; the newest finished one when left out.")]
SAEName = Annotated[str | None, typer.Option("--sae", help="Of several; the primary one when left out.")]


@commands.command(epilog="Example: mistudio-train report train_20260802_210454_9f86d081 --to results")
def report(
    job: Job,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the page goes; a folder of the job's name when left out.")
    ] = None,
    run: Run = None,
    sae: SAEName = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Fetch a run's report and open it. Prints the page's path.

    Exit status: 0, or 2 when there is no such run or page, or the store cannot be used.
    """
    with finished_run(job, _is_page, run, (to or Path(job)).resolve()) as found:
        page = _page(found, found.sae(sae))
    typer.echo(page)
    if open_ and not webbrowser.open(page.as_uri()):
        say("No browser could be opened; open the page yourself.")


@commands.command(epilog="Example: mistudio-train show train_20260802_210454_9f86d081 --feature 799")
def show(
    job: Job,
    feature: Annotated[list[int] | None, typer.Option(min=0, help="This feature; may be repeated.")] = None,
    run: Run = None,
    sae: SAEName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a run's figures, and five of its features with their strongest contexts.

    Exit status: 0, or 2 when there is no such run or feature, or the store cannot be used.
    """
    with finished_run(job, lambda name: name.endswith(str(PAGE)), run) as found:
        one = found.sae(sae)
        cards = _cards(found, one, feature or [])
    if as_json:
        typer.echo(json.dumps({"sae": one.model_dump(mode="json"), "features": cards}, ensure_ascii=False))
        return
    out = results()
    out.print(sae_table([one]))
    out.print(_figures(one))
    for card in cards:
        for line in _lines(card):
            out.print(line, highlight=False)


@commands.command(epilog="Example: mistudio-train compare JOB1 JOB2 results/ --plot frontier.png")
def compare(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB…", help="Jobs' ids, or folders of finished runs.")],
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw FVU against L0 into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, an object an SAE.")] = False,
) -> None:
    """Compare all SAEs of some runs: one table, the least FVU first, and one plot.

    Exit status: 0, or 2 when a run is not there or the store cannot be used.
    """
    with ExitStack() as stack:
        found = [stack.enter_context(finished_run(job, lambda name: False)) for job in jobs]
        rows = [(run.name, sae) for run in found for sae in run.saes]
    rows.sort(key=lambda row: (row[1].metrics.fvu is None, row[1].metrics.fvu))
    if plot is not None:
        from mistudio_train.training.frontier import write_frontier

        named = [sae.model_copy(update={"kind": f"{Path(run).name}: {sae.kind}"}) for run, sae in rows]
        write_frontier(plot, named)
        say(f"The plot is {plot}.")
    if as_json:
        typer.echo(json.dumps([{"run": run, **sae.model_dump(mode="json")} for run, sae in rows]))
        return
    results().print(_compared(rows))


def _is_page(name: str) -> bool:
    return name == SAES or name.endswith((str(PAGE), ".png"))


def _page(found: FinishedRun, sae: SAEResult) -> Path:
    page = (found.folder_of(sae) / PAGE).resolve()
    if not page.is_file():
        raise CliError(f"{found.name} has no report of {sae.name}", "It was asked for without one (`report: false`).")
    return page


def _cards(found: FinishedRun, sae: SAEResult, features: Sequence[int]) -> list["Card"]:
    """Those asked for, in that order; else the strongest of those that are rarely active.

    Raises:
        CliError: if one asked for has no card.

    """
    from mistudio_train.training.report.packs import cards_of

    cards = cards_of(_page(found, sae))
    if not features:
        return list(islice((card for card in cards if card["r"] <= RARE), FEATURES))
    by_number = {card["n"]: card for card in cards if card["n"] in features}
    if missing := [feature for feature in features if feature not in by_number]:
        raise CliError(
            f"feature {missing[0]} of {sae.name} has no card",
            f"It has features 0 to {sae.feature_count - 1}; those that are never active have none.",
        )
    return [by_number[feature] for feature in features]


def _figures(sae: SAEResult) -> Table:
    metrics: dict[str, Any] = sae.metrics.model_dump()
    table = Table("figure", "value", "what it means", box=None)
    for name, field in type(sae.metrics).model_fields.items():
        value = metrics[name]
        if isinstance(value, int | float) and not isinstance(value, bool):
            table.add_row(name, number(value), escape(field.description or ""))
    if (probing := sae.metrics.probing) is not None:
        for count, accuracy in zip(probing.features, probing.balanced_accuracy, strict=True):
            meaning = "Balanced accuracy with which so many features tell a label of the texts; 0.5 is chance."
            table.add_row(f"probing, {count}", number(accuracy), meaning)
    return table


def _lines(card: "Card") -> list[Text]:
    """A feature: what it is strongest on, how often, what it promotes, and where."""
    words = ", ".join(card["w"])
    lines = [Text(""), Text(f"feature {card['n']}: {words}", "bold")]
    lines.append(Text(f"  active on {card['r']:.2%} of the rows, at most {card['m']:.4g}", "dim"))
    if "u" in card:
        lines.append(Text(f"  promotes {' | '.join(token for token, _ in card['u'])}", "dim"))
    return lines + [_context(one) for one in card["c"][:CONTEXTS]]


def _context(one: "Card") -> Text:
    line = Text(f"  {one['a']:8.3g}  ")
    for piece, strength in zip(one["p"], one["s"], strict=True):
        marked = strength >= LEAST_MARK and len(one["p"]) > 1
        line.append(f"«{piece}»" if marked else piece, "bold yellow" if marked else "")
    return line


def _compared(rows: Sequence[tuple[str, SAEResult]]) -> Table:
    table = Table("run", "SAE", "kind", "site", "latents", "L0", "FVU", "cosine", "never active", "recovered", box=None)
    for run, sae in rows:
        metrics = sae.metrics
        recovered = metrics.cross_entropy.recovered_zero if metrics.cross_entropy else None
        figures = (metrics.l0, metrics.fvu, metrics.cosine, metrics.never_active_share, recovered)
        site = f"{sae.layer_number}.{sae.sites}"
        table.add_row(escape(run), escape(sae.name), sae.kind, site, str(sae.feature_count), *map(number, figures))
    return table
