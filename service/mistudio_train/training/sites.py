"""Which layers and hook sites a request means, given how many blocks the model has. Pure; imports no torch."""

from dataclasses import dataclass

from mistudio_schemas import ErrorCode, HookSite, SAEConfig, TrainRequested
from mistudio_train.errors import RequestRefused


@dataclass(frozen=True, order=True)
class Site:
    """Where activations are read."""

    layer: int
    hook_site: HookSite = "resid_post"

    def __str__(self) -> str:
        return f"{self.layer}.{self.hook_site}"

    @property
    def blocks(self) -> int:
        """How many of the first blocks must run, or begin to, before it is reached."""
        return self.layer if self.hook_site == "resid_pre" else self.layer + 1


@dataclass(frozen=True)
class Ends:
    """Where an SAE reads, and where what it reconstructs is: the same, or of a transcoder a later site of the block."""

    read: Site
    predicted: Site | None = None

    def __str__(self) -> str:
        return str(self.read) if self.predicted is None else f"{self.read}-{self.predicted.hook_site}"

    @property
    def sites(self) -> tuple[Site, ...]:
        """One or both."""
        return (self.read,) if self.predicted is None else (self.read, self.predicted)

    @property
    def reconstructed(self) -> Site:
        """Whose rows come out."""
        return self.sites[-1]


@dataclass(frozen=True)
class Sites:
    """Where each SAE of a request reads."""

    of_saes: tuple[Ends, ...]
    """In the order of `resolved_saes()`; several may be the same."""
    selected_layer: int
    """The primary SAE's."""
    warnings: tuple[str, ...] = ()

    @property
    def distinct(self) -> tuple[Site, ...]:
        """Each site once, shallow ones first: what is to be extracted."""
        return tuple(sorted({site for ends in self.of_saes for site in ends.sites}))


def resolve_sites(request: TrainRequested, total_layers: int) -> Sites:
    """Find each SAE's site; the default layer becomes the last one of a shallower model, with a warning.

    Raises:
        RequestRefused: `request.layer_out_of_range`, if a layer that the requester named is not there.

    """
    saes, last, warnings = request.resolved_saes(), total_layers - 1, []
    for sae in saes:
        if sae.layer_number is not None and sae.layer_number > last:
            raise RequestRefused(
                f"Layer {sae.layer_number} is out of range: the model has {total_layers} layers, 0..{last}",
                f"Name a layer in 0..{last}.",
                ErrorCode.REQUEST_LAYER_OUT_OF_RANGE,
            )
    default = request.layer_number
    if any(sae.layer_number is None for sae in saes) and default > last:
        warnings.append(f"The default layer {default} is not in a model of {total_layers} layers: layer {last} is used")
        default = last
    ends = tuple(_ends(sae, default if sae.layer_number is None else sae.layer_number) for sae in saes)
    return Sites(ends, ends[0].read.layer, tuple(warnings))


def _ends(sae: SAEConfig, layer: int) -> Ends:
    predicted = None if sae.predicts is None else Site(layer, sae.predicts)
    return Ends(Site(layer, sae.hook_site or "resid_post"), predicted)
