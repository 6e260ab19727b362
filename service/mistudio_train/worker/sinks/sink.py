"""What a sink is, and what it is told: the run that it shows, and the lines of its training logs as numbers.

Knows no library, no thread and no setting.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from mistudio_train.messages import JobSpec, Logged

Outcome = Literal["finished", "failed", "interrupted"]
"""How an attempt ended. A failed or interrupted one may be followed by another, which goes on in the same place."""


@dataclass(frozen=True)
class Shown:
    """The run that a sink shows."""

    name: str
    """Of job and run, the same for every attempt."""
    params: dict[str, object]
    """The request, its SAEs with every default filled in; no token, nor a token's name."""

    @classmethod
    def of(cls, spec: JobSpec) -> Self:
        """What may be shown of a job."""
        unsaid = {"job_id", "huggingface_token", "token_name", "sae", "saes"}
        fields = spec.request.model_dump(mode="json", exclude=unsaid)
        saes = {str(sae.name): sae.model_dump(mode="json", exclude={"name"}) for sae in spec.request.resolved_saes()}
        return cls(f"{spec.job_id}-r{spec.run}", dict(_flat(fields | {"saes": saes})))


@dataclass(frozen=True)
class Line:
    """A line of an SAE's training log."""

    sae: str
    number: int
    """In the log, from 0. When 0 comes again, so does the whole log, and what it held before counts no more."""
    event: str
    """`step`, `epoch` or `held_out`."""
    step: int
    figures: dict[str, float]
    """Its numbers by their names in the log, `step` and those that are not finite included."""

    @property
    def curve(self) -> str:
        """Names what its figures are points of; steps of one only rise, unless the log is said again."""
        return f"{self.sae}/{self.event}"


class Sink(Protocol):
    """Where one run is shown. It may block, and whatever it raises ends it; only one thread ever touches it."""

    def write(self, lines: Sequence[Line]) -> None:
        """Show these lines."""
        ...

    def close(self, outcome: Outcome) -> None:
        """No more lines; called once."""
        ...


class NewLines:
    """For sinks that cannot take anything back: of a log that is said again, what lies beyond what they have.

    Args:
        last_step: of a curve, before this process wrote to it; `None`: it is new.

    """

    def __init__(self, last_step: Callable[[str], float | None]) -> None:
        self._last_step = last_step
        self._last: dict[str, float] = {}

    def among(self, lines: Iterable[Line]) -> Iterator[Line]:
        """Those that the sink has not."""
        for line in lines:
            if line.curve not in self._last:
                known = self._last_step(line.curve)
                self._last[line.curve] = -1 if known is None else known
            if line.step > self._last[line.curve]:
                self._last[line.curve] = line.step
                yield line


def lines_of(said: Logged) -> Iterator[Line]:
    """The lines that the child has said."""
    for number, text in enumerate(said.lines, said.first):
        fields = json.loads(text)
        strange = {name: float(value) for name, value in fields.get("not_finite", {}).items()}
        figures = {name: float(value) for name, value in fields.items() if type(value) in (int, float)}
        yield Line(said.sae, number, fields["event"], fields["step"], figures | strange)


def _flat(fields: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested fields by dotted names, those without a value left out."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value
