"""One SAE of a job, from what is asked for to what came out; knows not how it is trained or written."""

from dataclasses import dataclass

from mistudio_schemas import SAEConfig

from .activations import ActivationStore
from .fit import Fitted
from .saelens import Origin
from .selection import Selection
from .sites import Ends
from .start import Start


@dataclass(frozen=True)
class Wanted:
    """An SAE that is asked for, and what it is to be trained on."""

    position: int
    config: SAEConfig
    """Resolved."""
    ends: Ends
    stores: tuple[ActivationStore, ...]
    """The rows of `ends.sites`."""
    selection: Selection
    origin: Origin
    start: Start | None = None
    """What it goes on from."""

    @property
    def targets(self) -> ActivationStore | None:
        """The rows that a transcoder reconstructs."""
        return None if self.ends.predicted is None else self.stores[1]

    @property
    def folder(self) -> str:
        """Of its files below the run's root, if it is not the primary one, whose files lie at the root itself."""
        return f"saes/{self.config.name}/"


@dataclass(frozen=True)
class Trained:
    """An SAE that was."""

    wanted: Wanted
    fitted: Fitted
