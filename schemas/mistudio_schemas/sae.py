"""The sparse autoencoders that a request may ask for: a union on `kind`.

A field that is `null` takes the request's field of the same name, or the kind's own recipe where its docstring says so.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from .base import Contract

HookSite = Literal["resid_post", "mlp_out", "attn_out"]
"""Where in a block activations are read: the residual stream after it, its MLP's output, its attention's output."""

SAEName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class SAEFields(Contract):
    """What every kind has."""

    name: SAEName | None = None
    """Names the SAE in a list of several, and its folder `saes/{name}/`; `null`: its kind and position, `topk-0`."""
    layer_number: int | None = Field(None, ge=0)
    """The block to read, counted from 0; `null`: the request's."""
    hook_site: HookSite | None = None
    """Where in the block; `null`: the request's."""
    hidden_dim: int | None = Field(None, ge=1)
    """Number of latents (d_sae); `null`: the request's."""
    max_epochs: int | None = Field(None, ge=1)
    """Passes over the activations; `null`: the request's."""
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    """Seeds initialisation and the order of rows; `null`: the request's."""

    def model_post_init(self, context: Any) -> None:
        """The kind counts as given also where the class says it: no reader could tell the kind without it."""
        self.model_fields_set.add("kind")


class StandardSAE(SAEFields):
    """The seed's SAE: ReLU, `MSE(x, x_hat) + sparsity_coeff * mean(|h|)`, Xavier start, encoder bias -0.1."""

    kind: Literal["standard"] = "standard"
    sparsity_coeff: float | None = Field(None, gt=0, le=1.0)
    """Weight of the mean absolute latent; `null`: the request's."""
    learning_rate: float | None = Field(None, gt=0, le=1.0)
    """Adam's step size, constant; `null`: the request's."""
    batch_size: int | None = Field(None, ge=1, le=65536)
    """Rows a step; `null`: the request's."""
    min_loss: float | None = Field(None, ge=0)
    """Training ends after an epoch whose mean loss is below this; `null`: the request's."""
    reinitialize_dead_every: int = Field(10, ge=0)
    """Epochs between re-initialisations of dead latents, none in the last ten epochs; 0: never."""


class ScheduledFields(SAEFields):
    """What all kinds but `standard` have: a schedule, and the loss that revives dead latents."""

    learning_rate: float | None = Field(None, gt=0, le=1.0)
    """Adam's peak step size; `null`: 2e-4 / sqrt(hidden_dim / 16384)."""
    batch_size: int = Field(1024, ge=1, le=65536)
    """Rows a step (of a mean-pooled job at most a sixteenth of its rows)."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises from zero."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps at the end over which the learning rate falls to zero."""
    aux_k_coeff: float = Field(1 / 32, ge=0)
    """Weight of the loss by which dead latents learn the residual; 0: off."""
    dead_after: float = Field(0.1, gt=0, le=1)
    """A latent is dead after this share of the run's rows, or ten million rows if fewer, without being active."""


class KSparseFields(ScheduledFields):
    """What the kinds have that keep a number of latents."""

    k: int = Field(32, ge=1)
    """Latents kept a row; of `batchtopk` and `matryoshka`, in the mean over rows."""


class TopKSAE(KSparseFields):
    """Keeps the k largest latents of each row (Gao et al. 2024, arXiv:2406.04093), with the auxiliary-k loss."""

    kind: Literal["topk"] = "topk"


class BatchTopKSAE(KSparseFields):
    """Keeps k latents a row in the mean over a batch, afterwards those above a threshold that it has learned.

    Bussmann et al. 2024 (arXiv:2412.06410), with the auxiliary-k loss.
    """

    kind: Literal["batchtopk"] = "batchtopk"
    threshold_rate: float = Field(0.05, gt=0, le=1)
    """By which share of the difference each step moves the threshold to the step's smallest kept value."""


class MatryoshkaSAE(KSparseFields):
    """A `batchtopk` whose first latents alone must reconstruct, too (Bussmann et al. 2025, arXiv:2503.17547)."""

    kind: Literal["matryoshka"] = "matryoshka"
    threshold_rate: float = Field(0.05, gt=0, le=1)
    """By which share of the difference each step moves the threshold to the step's smallest kept value."""
    group_shares: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1, max_length=16)] = [
        1 / 32,
        1 / 16,
        1 / 8,
        1 / 4,
    ]
    """Shares of the latents in the groups from the first on, together below 1; one more group has the rest."""

    @field_validator("group_shares")
    @classmethod
    def _group_shares(cls, value: list[float]) -> list[float]:
        if sum(value) >= 1:
            raise ValueError("The shares of the groups must be below 1 together; the last group has the rest")
        return value


class JumpReLUSAE(ScheduledFields):
    """A threshold of its own for every latent, learned (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

    kind: Literal["jumprelu"] = "jumprelu"
    target_l0: float | None = Field(32.0, gt=0)
    """Active latents a row that the quadratic penalty aims at; `null`: the tanh penalty, which aims at no number."""
    sparsity_coeff: float = Field(1.0, gt=0)
    """Weight of the penalty."""
    sparsity_warmup: float = Field(0.2, ge=0, le=1)
    """Share of the steps over which the penalty's weight rises from zero."""
    bandwidth: float = Field(0.05, gt=0)
    """Of the thresholds' gradients, in units of rows scaled to a mean squared norm of their width."""
    initial_threshold: float = Field(0.01, gt=0)
    """Of every latent, in the same units."""


class GatedSAE(ScheduledFields):
    """Tells apart whether a latent is active and how much (Rajamanoharan et al. 2024, arXiv:2404.16014)."""

    kind: Literal["gated"] = "gated"
    sparsity_coeff: float = Field(1.0, gt=0)
    """Weight of the gates' L1 penalty, summed over latents and divided by the row's width."""
    sparsity_warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the penalty's weight rises from zero."""


SAEConfig = Annotated[
    StandardSAE | TopKSAE | BatchTopKSAE | MatryoshkaSAE | JumpReLUSAE | GatedSAE, Field(discriminator="kind")
]
KINDS: tuple[str, ...] = ("standard", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
