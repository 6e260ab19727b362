"""What a campaign came to, as a table for people."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from mistudio_schemas import TrainProgress

from .checker import Checked
from .deeds import Deed
from .world import World

RESUMED = re.compile(r"goes on with (\d+) shards and (\d+) SAEs kept")


@dataclass(frozen=True)
class Outcome:
    """A campaign that is over."""

    seed: int
    seconds: float
    reference_seconds: list[float]
    """Of undisturbed jobs."""
    checkpoints: dict[str, int]
    """By job: made by its children, all attempts together."""
    deeds: list[Deed]
    checked: Checked
    resumed: int
    steps_lost: list[int]
    """Of each attempt that went on in training, about."""
    repeat: str
    """The command that does the same again."""

    def lines(self) -> list[str]:
        """The table."""
        kills = [deed for deed in self.deeds if deed.is_kill]
        attempts = [record.attempts for record in self.checked.runs.values()]
        rows = [
            ("seed", str(self.seed)),
            ("minutes", f"{self.seconds / 60:.1f}"),
            ("jobs", str(len(self.checked.runs))),
            ("seconds a job, undisturbed, median", f"{statistics.median(self.reference_seconds):.1f}"),
            ("checkpoints a job, median", f"{statistics.median(self.checkpoints.values()):.0f}"),
            ("kills", f"{len(kills)}: {_counted(deed.kind for deed in kills)}"),
            ("other deeds", _counted(deed.kind for deed in self.deeds if not deed.is_kill)),
            ("kills by what was under way", _counted(deed.stage for deed in kills)),
            ("and by phase or named point", _counted(deed.phase for deed in kills)),
            ("jobs with more than one attempt", str(sum(len(one) > 1 for one in attempts))),
            ("attempts beyond the first", str(sum(len(one) - 1 for one in attempts))),
            ("attempts that went on from kept work", str(self.resumed)),
            ("training steps lost a death, median and most", _median_and_most(self.steps_lost)),
            ("unreachable leftovers", str(len(self.checked.leftovers))),
            ("violations", str(len(self.checked.violations))),
        ]
        width = max(len(name) for name, _ in rows)
        table = [f"{name:<{width}}  {value}" for name, value in rows]
        return [*table, *(f"VIOLATION {one}" for one in self.checked.violations), f"repeat with: {self.repeat}"]


def resumed(world: World) -> int:
    """Attempts that found kept work."""
    found = [RESUMED.findall(worker.log.read_text(errors="replace")) for worker in world.workers]
    return sum(any(int(number) for number in one) for log in found for one in log)


def checkpoints(world: World) -> dict[str, int]:
    """How many checkpoints the children of each job have made."""
    made: Counter[str] = Counter()
    for path in (world.folder / "data").glob("*/saved/*"):
        made[path.name] += path.read_text().count("\n")
    return dict(made)


def steps_lost(world: World) -> list[int]:
    """Between what one attempt said last and the next one said first, of the same SAE."""
    lost = []
    for said in world.watch.progress.values():
        trained = [event for event in said if event.phase == "training" and event.step is not None]
        trained.sort(key=lambda event: (event.attempt or 0, event.time))
        for before, after in pairwise(trained):
            if before.attempt != after.attempt and before.sae == after.sae:
                lost.append(max(0, _step(before) - _step(after)))
    return lost


def _step(event: TrainProgress) -> int:
    return event.step or 0


def _counted(names: Iterable[str]) -> str:
    counts = Counter(names)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"


def _median_and_most(numbers: list[int]) -> str:
    return f"{statistics.median(numbers):.0f} and {max(numbers)} of {len(numbers)}" if numbers else "none"
