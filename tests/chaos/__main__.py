"""`python -m tests.chaos --minutes 30 --seed 1`: jobs that train while workers, children, broker and store are killed.

Ends with a table, and with status 1 if any job was lost, ended twice, or differs from what it is undisturbed.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from .campaign import Plan, run

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


COLD = 0.2


def main() -> int:
    """Run a campaign and keep its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of deaths")
    parser.add_argument("--seed", type=int, default=None, help="of all that is random; default: a new one")
    parser.add_argument("--size", choices=["short", "long"], default="long", help="of the jobs")
    parser.add_argument("--folder", type=Path, default=None, help="keeps logs and data; default: a new one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the table")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mistudio-chaos-"))
    print(f"seed {seed}; logs in {folder}", flush=True)
    pause = (4.0, 18.0) if options.size == "long" else (0.5, 3.0)
    plan = Plan(options.size, seed, pause, seconds=options.minutes * 60, cold=COLD)
    repeat = f"make chaos MINUTES={options.minutes:g} SEED={seed}"
    outcome = asyncio.run(run(plan, folder, repeat, lambda line: print(line, flush=True)))
    text = "\n".join(outcome.lines())
    print(text)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"chaos-{time.strftime('%Y%m%d-%H%M')}-{seed}.txt").write_text(text + "\n")
    return 1 if outcome.checked.violations else 0


if __name__ == "__main__":
    sys.exit(main())
