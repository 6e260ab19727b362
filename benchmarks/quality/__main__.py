"""The quality of SAEs from our trainer beside those from SAELens' own: equal L0, tokens and batches, on held-out rows.

What is equal: the rows, scaled once before either side sees them (about their mean, their mean squared norm is their
width); which are left out; the batches, by row number, step by step; their number and size; the shape; the decoder's
first bias, the mean of the same sample; warm-up over 5% of the steps and decay to zero over the last 20%; Adam and its
betas; how fast a threshold moves (0.05); over how many steps a penalty rises; when a latent counts as dead, a tenth of
the steps (for our `jumprelu` and `gated` a twentieth: SAELens' have nothing that minds dead ones).

Each side has the learning rate that gave the lowest FVU on validation rows with seed 0: of a grid, a factor of 3 apart,
which goes on until the best is at no edge, and then of the two places half-way to its neighbours. Figures are of other
seeds, the same ones for both sides, with the same data, on test rows; of the SAE that was written to disk by each
side's own export and loaded by `sae_lens.SAE.load_from_disk`.

Equal L0: `topk` has k. The one threshold of `batchtopk` and `matryoshka` is set, after loading, to the L0 of k on
validation rows; what it was before is reported, too. The other kinds are trained with at least four coefficients a
side, chosen by the L0 they gave with seed 0, and all figures are linear in log L0 between the two neighbours of the L0
that is wanted. Where it has no two neighbours there is no figure.

What differs is what the trainers are. SAELens' decoder begins with rows of norm 0.1, ours with norm 1 and stays there
(`standard`: 0.3, and free), and ours learns twice as fast as the encoder (`standard`: four times). Its auxiliary loss
for dead latents, in the k-sparse kinds only, has the coefficient 1 on a squared error; ours has 1/32 (`topk`: 1) on one
that is divided by the residual's, in all kinds, and those of a penalty have a loss that lifts dead latents to their
thresholds. Its `jumprelu` has the penalty on L0 that is its default, ours the quadratic one for a target, which is the
coefficient. Its `matryoshka` sums the losses of prefixes, ours takes their mean. Our `standard` holds the decoder's
norms fixed in the penalty over the last fifth. Each side is otherwise as it comes.

`defaults` is SAELens with nothing tuned: learning rate 3e-4, constant, no warm-up, dead after 1000 steps, threshold
rate 0.01, decoder bias 0, no rise of the penalty; with the scaled rows, and with coefficients for the same L0s.

Every training is a line of the raw file and is not done again; delete lines to have them measured anew.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from benchmarks.machine import machine
from benchmarks.quality.data import SHAPES
from benchmarks.quality.runs import Runs, versions
from benchmarks.quality.sides import KINDS, SIDES
from benchmarks.quality.study import Study
from benchmarks.quality.table import rows_of, show

RESULTS: Final = Path(__file__).parents[1] / "results" / "quality.json"


def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, then show all that is known; 0 always, as a comparison is no test."""
    options = _options(arguments)
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore")  # SAELens' libraries'
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=150, highlight=False)
    runs = Runs(options.raw, train=not options.table, say=console.print)
    for data in SHAPES if options.data == "both" else [options.data]:
        for kind in options.kinds if not options.table else []:
            _study(runs, data, kind, options).carry_out(options.sides)
    known = Runs(options.raw, train=False, say=console.print)
    rows = [row for data in SHAPES for kind in KINDS for row in rows_of(_study(known, data, kind, options))]
    show(rows, console)
    console.print(f"{machine()}, torch {torch.__version__}, SAELens {versions()['sae_lens']}")
    figures = {"machine": machine(), "versions": versions(), "rows": [row.figures() for row in rows]}
    options.to.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _study(runs: Runs, data: str, kind: str, options: argparse.Namespace) -> Study:
    return Study(runs, data, kind, range(1, options.seeds + 1), options.steps or SHAPES[data].steps)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", type=int, default=5, help="that figures are of")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--threads", type=int, help="of arithmetic")
    parser.add_argument("--table", action="store_true", help="train nothing, show what the raw file has")
    parser.add_argument("--raw", type=Path, default=RESULTS.with_suffix(".jsonl"), help="file of all trainings")
    parser.add_argument("--to", type=Path, default=RESULTS, help="JSON file of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
