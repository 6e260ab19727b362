"""How long a training step takes, ours and SAELens' trainer, beside the floor of a dense SAE on this machine.

The floor is 12·B·d·m floating-point operations (forward 4, backward 8) at the rate of the encoder's matrix product,
which is measured between the steps, as everything here is in turns. A trainer's share is the floor's time by its own;
steps that touch only active entries may go beyond 1.

On a GPU (`--device cuda`) the product is of bfloat16, ours trains with `precision` as given, and SAELens twice: in fp32
with TF32 products, and with its `autocast`; the faster one is shown.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine
from mistudio_schemas import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    SAEConfig,
    StandardSAE,
    TopKSAE,
)
from mistudio_train.sae.build import build_sae
from mistudio_train.sae.recipe import Precision, Recipe
from mistudio_train.sae.scaled import ScaledAutoencoder
from mistudio_train.sae.trainer import Trainer
from mistudio_train.training.allocator import freed_memory_kept

RESULTS: Final = Path(__file__).parent / "results" / "step.json"
BATCHES: Final = 8
"""In memory, taken in turns."""
WARM_UP: Final = 3
STEPS: Final = 4
"""That one measurement lasts."""
SETTLED: Final = 40
"""Steps after which a GPU repeats recordings, and knows whether latents are dead."""
RATE: Final = 1e-9
"""Of both sides: with a larger one the share of the latents that is active changes while it is timed."""
SHARES: Final = [1 / 32, 1 / 16, 1 / 8, 1 / 4]
K_SPARSE: Final = ("topk", "batchtopk", "matryoshka")
BY_THRESHOLD: Final = ("jumprelu", "gated", "l1")
"""Kinds of which any share of the latents may be active; `l1` is `standard` with the penalty weighted by norms."""
Step = Callable[[Tensor], object]


@dataclass(frozen=True)
class Case:
    """A kind and its shape."""

    kind: str
    d: int
    m: int
    batch: int
    k: int
    dead: float = 0.0
    """Share of the latents that count as dead, so that the auxiliary loss has work."""
    active: float | None = None
    """Share of the latents that is active, of the kinds whose thresholds decide that."""

    def threshold(self, deviation: float) -> float:
        """Above which that share of normally distributed numbers of such a standard deviation lies."""
        return deviation * statistics.NormalDist().inv_cdf(1 - (self.active or 0.5))


@dataclass(frozen=True)
class Measured:
    """Medians, in milliseconds a step."""

    case: Case
    floor: float
    ours: float
    saelens: float | None
    """The fastest of its settings."""

    @property
    def share(self) -> float:
        """Ours, of the dense floor."""
        return self.floor / self.ours


def config_of(case: Case) -> SAEConfig:
    """Ours."""
    shape: dict[str, Any] = {"hidden_dim": case.m, "seed": 0}
    match case.kind:
        case "topk":
            return TopKSAE(**shape, k=case.k)
        case "batchtopk":
            return BatchTopKSAE(**shape, k=case.k)
        case "matryoshka":
            return MatryoshkaSAE(**shape, k=case.k, group_shares=SHARES)
        case "jumprelu":
            threshold = case.threshold(ScaledAutoencoder.encoder_start)
            target = case.m * (case.active or 0.5)
            return JumpReLUSAE(**shape, target_l0=target, initial_threshold=max(0.03, threshold))
        case "gated":
            return GatedSAE(**shape)
        case "l1":
            return StandardSAE(**shape, penalty="decoder_norm")
        case _:
            return StandardSAE(**shape, sparsity_coeff=1e-3)


def our_step(case: Case, rows: list[Tensor], precision: Precision) -> Step:
    """A step of our trainer."""
    recipe = Recipe(
        RATE,
        case.batch,
        max_epochs=10_000,
        dead_after_rows=1000 * case.batch,
        grad_clip=1.0,
        precision=precision,
    )
    sae = build_sae(config_of(case), case.d)
    trainer = Trainer(sae, recipe, rows=BATCHES * case.batch, device=rows[0].device, seed=0)
    trainer.prepare(rows[0])
    dead = int(case.dead * case.m)
    with torch.no_grad():
        if case.kind in ("gated", "l1"):
            sae.b_enc.fill_(-case.threshold(sae.encoder_start))
        sae.b_enc[:dead] = -100.0
    trainer._rows_since_active_F[:dead] = recipe.dead_after_rows
    trainer.epoch = 1000  # long enough for latents to be dead
    return trainer.step


def saelens_step(case: Case, device: torch.device, *, autocast: bool) -> Step:
    """A step of SAELens' trainer with its own defaults."""
    from sae_lens import config, saes
    from sae_lens.training.sae_trainer import SAETrainer

    shape: dict[str, Any] = {"d_in": case.d, "d_sae": case.m, "device": device.type}
    widths = [round(case.m * sum(SHARES[:n])) for n in range(1, len(SHARES) + 1)] + [case.m]
    made: dict[str, Callable[[], Any]] = {
        "standard": lambda: saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(**shape)),
        "l1": lambda: saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(**shape)),
        "topk": lambda: saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**shape, k=case.k)),
        "batchtopk": lambda: saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**shape, k=case.k)),
        "matryoshka": lambda: saes.MatryoshkaBatchTopKTrainingSAE(
            saes.MatryoshkaBatchTopKTrainingSAEConfig(**shape, k=case.k, matryoshka_widths=widths)
        ),
        "jumprelu": lambda: saes.JumpReLUTrainingSAE(
            saes.JumpReLUTrainingSAEConfig(**shape, jumprelu_init_threshold=max(0.03, case.threshold(1.0)))
        ),
        "gated": lambda: saes.GatedTrainingSAE(saes.GatedTrainingSAEConfig(**shape)),
    }
    cfg = config.SAETrainerConfig(10**12, case.batch, lr=RATE, lr_end=RATE / 10, device=device.type, autocast=autocast)
    trainer: Any = SAETrainer(cfg, made[case.kind](), iter(()))
    dead = int(case.dead * case.m)
    with torch.no_grad():
        if case.kind == "gated":
            trainer.sae.b_gate.fill_(-case.threshold(1.0))
        elif case.kind == "l1":
            trainer.sae.b_enc.fill_(-case.threshold(trainer.sae.W_enc.norm(dim=0).mean().item()))
        else:
            trainer.sae.b_enc[:dead] = -100.0
    trainer.n_forward_passes_since_fired[:dead] = 10**6
    step: Step = trainer.step
    return step


def product(case: Case, rows: list[Tensor]) -> Step:
    """The encoder's matrix product, into memory that is there; of a GPU's fastest type that is trained in."""
    dtype = torch.bfloat16 if rows[0].is_cuda else torch.float32
    narrow = {id(x): x.to(dtype) for x in rows}
    weight, out = (
        torch.randn(shape, device=rows[0].device).to(dtype) for shape in ((case.m, case.d), (case.batch, case.m))
    )
    return lambda x: torch.mm(narrow[id(x)], weight.T, out=out)


def measure(case: Case, runs: int, device: torch.device, precision: Precision, *, peer: bool) -> Measured:
    """All in turns, `runs` times."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(case.batch, case.d, generator=generator).to(device) for _ in range(BATCHES)]
    steps = {"floor": product(case, rows), "ours": our_step(case, rows, precision)}
    if peer:
        steps["saelens"] = saelens_step(case, device, autocast=False)
        if device.type == "cuda":
            steps["saelens autocast"] = saelens_step(case, device, autocast=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 1):
        for name, step in steps.items():
            with freed_memory_kept() if name == "ours" else nullcontext():  # as the worker trains
                taken = _time(step, rows, STEPS if run else SETTLED if device.type == "cuda" else WARM_UP)
            if run:
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    peers = [taken for name, taken in medians.items() if name.startswith("saelens")]
    return Measured(case, 6 * medians["floor"], medians["ours"], min(peers, default=None))


def profiled(case: Case, device: torch.device, precision: Precision) -> str:
    """The operations of ours that take longest, by their own time."""
    rows = [torch.randn(case.batch, case.d, device=device) for _ in range(BATCHES)]
    step = our_step(case, rows, precision)
    _time(step, rows, SETTLED)
    with torch.profiler.profile() as profile:
        _time(step, rows, STEPS)
    by = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
    table: str = profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)
    return table


def _time(step: Step, rows: list[Tensor], count: int) -> float:
    step(rows[-1])  # for the memory that is kept from one to the next
    _wait(rows)
    began = time.perf_counter()
    for number in range(count):
        step(rows[number % BATCHES])
    _wait(rows)
    return 1000 * (time.perf_counter() - began) / count


def _wait(rows: list[Tensor]) -> None:
    if rows[0].is_cuda:
        torch.cuda.synchronize()


def cases(widths: list[int], kinds: list[str], d: int, batch: int, k: int) -> Iterator[Case]:
    """Every kind at every width, at both shares of active latents; and the auxiliary loss at work at the first."""
    for m in widths:
        for kind in kinds:
            shares = (0.5, 0.05, 0.01) if kind in BY_THRESHOLD else (None,)
            yield from (Case(kind, d, m, batch, k, active=active) for active in shares)
    for kind in kinds:
        if kind in K_SPARSE:
            yield Case(kind, d, widths[0], batch, k, dead=0.3)


def _keep(measured: list[Measured], about: str, to: Path) -> None:
    """Those of other cases stay in the file, if they are of the same machine and settings."""
    about_all = {"about": about, "torch": torch.__version__}
    before: dict[str, Any] = json.loads(to.read_text()) if to.exists() else {}
    stay = before["steps"] if before.items() >= about_all.items() else []
    steps = [asdict(one) for one in measured]
    new = [step["case"] for step in steps]
    steps = [step for step in stay if step["case"] not in new] + steps
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(about_all | {"steps": steps}, indent=2) + "\n")


def show(measured: list[Measured], console: Console) -> None:
    """The table that the documentation quotes."""
    columns = (
        "kind",
        "m",
        "dead",
        "active",
        "floor",
        "ours",
        "SAELens",
        "ours / floor",
        "SAELens / floor",
        "times as fast",
    )
    table = Table(*columns, title="milliseconds a step, and speed as a share of the dense floor's")
    for one in measured:
        case, peer = one.case, one.saelens
        table.add_row(
            case.kind,
            f"{case.m:,}",
            f"{case.dead:.0%}",
            f"{case.active or case.k / case.m:.1%}",
            f"{one.floor:.3g}",
            f"{one.ours:.3g}",
            "" if peer is None else f"{peer:.3g}",
            f"{one.share:.2f}",
            "" if peer is None else f"{one.floor / peer:.2f}",
            "" if peer is None else f"{peer / one.ours:.1f}",
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measure and show; 0 always, for a figure of time is no test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=[*K_SPARSE, *BY_THRESHOLD])
    parser.add_argument("--widths", nargs="+", type=int, default=[4096, 16384], help="numbers of latents")
    parser.add_argument("--d", type=int, default=384, help="width of a row")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="ours")
    parser.add_argument("--profile", action="store_true", help="show where ours spends its time, too")
    parser.add_argument("--no-peer", action="store_true", help="without SAELens")
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the figures, added to")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # SAELens' libraries'
    console = Console(width=126, highlight=False)
    torch.backends.cuda.matmul.allow_tf32 = True  # for SAELens in fp32
    about = f"precision {options.precision}, {torch.get_num_threads()} threads. {machine()}"
    measured: list[Measured] = []
    for case in cases(options.widths, options.kinds, options.d, options.batch, options.k):
        one = measure(case, options.runs, options.device, options.precision, peer=not options.no_peer)
        measured.append(one)
        console.print(f"{case}: {one.share:.2f} of the floor, {(one.saelens or 0) / one.ours:.1f} times SAELens")
        _keep(measured, about, options.to)
        if options.profile:
            console.print(profiled(case, options.device, options.precision))
    show(measured, console)
    console.print(f"d {options.d}, B {options.batch}, k {options.k}, {about}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
