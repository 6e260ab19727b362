"""The sparse autoencoders that a request may ask for: a union on `kind`.

A field that is `null` takes the request's field of the same name, or the kind's own recipe where its docstring says so.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, StringConstraints, field_validator, model_validator

from .base import Contract

HookSite = Literal["resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post"]
"""Where in a block activations are read: the residual stream before it, its attention's output, its MLP's input (behind
the norm, as the MLP itself receives it), its MLP's output, the residual stream after it."""

HOOK_SITES: tuple[HookSite, ...] = get_args(HookSite)
"""In the order in which a block comes to them."""

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
    init_from: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None
    """A trained SAE of the same kind and widths that training goes on from, with a fresh optimiser and schedule: a run
    in the worker's store (`job_id`, `job_id/run` or `job_id/run/name`), or a folder as SAELens writes it, an
    `s3://bucket/path` or a path in a folder that the operator allows; `null`: a fresh start."""

    def model_post_init(self, context: Any) -> None:
        """The kind counts as given also where the class says it: no reader could tell the kind without it."""
        self.model_fields_set.add("kind")


class ScheduledFields(SAEFields):
    """What all kinds have but the seed's: a schedule, a start from the data, and ways to revive dead latents."""

    predicts: HookSite | None = None
    """Makes it a transcoder: it reads `hook_site` and reconstructs this later site of the same block, token by token
    (`pooling` `token`); FVU, explained variance, cosine and losses are then of this site. `null`: reconstructs what it
    reads."""
    learning_rate: float | None = Field(None, gt=0, le=1.0)
    """Adam's peak step size; `null`: 2e-4 / sqrt(hidden_dim / 16384)."""
    batch_size: int | None = Field(None, ge=1, le=65536)
    """Rows a step; `null`: 1024, of a mean-pooled job 256 and at most a sixteenth of its rows."""
    training_rows: int | None = Field(None, ge=1)
    """Rows to train on in all, repeated ones counted again, instead of `max_epochs`; `null`: as `max_epochs` says."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises from zero."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps at the end over which the learning rate falls to zero."""
    grad_clip: float = Field(1.0, gt=0)
    """Upper bound of the gradient's norm, of a loss that is summed over a row's dimensions, as the field states it."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the operands of matrix products of whole batches are rounded to; weights, sums, thresholds and the optimiser
    are float32; `auto`: bfloat16 on a GPU that computes in it, else float32."""
    b_dec_init: Literal["mean", "geometric_median"] = "mean"
    """Where the decoder's bias begins: the mean or the geometric median of a first sample of rows."""
    dead_after: float | None = Field(None, gt=0, le=1)
    """A latent is dead after this share of the run's rows, or ten million rows if fewer, without being active; `null`:
    0.05, of a mean-pooled job five epochs."""
    aux_k_coeff: float | None = Field(None, ge=0)
    """Weight of the loss by which dead latents learn the residual; 0: off; `null`: 0.03125, of `topk` 1.0, but off for
    a mean-pooled job of fewer than 20,000 rows."""
    k_aux: int | None = Field(None, ge=1)
    """Dead latents a row that take part in it; `null`: half the row's width."""
    resample_at: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(max_length=16)] | None = None
    """Shares of the steps after which dead latents begin anew as what is reconstructed worst; `null`: never, of a
    mean-pooled job 0.2, 0.4."""
    patience: int | None = Field(None, ge=0)
    """Training ends after so many epochs without a lower FVU on held-out rows; 0: never for this reason; `null`: 0,
    of a mean-pooled job 10."""

    @model_validator(mode="after")
    def _no_transcoder_goes_on(self) -> Self:
        if self.init_from is not None and self.predicts is not None:
            raise ValueError("A transcoder cannot go on from a trained one yet: leave out 'init_from' or 'predicts'")
        return self


class PenaltyFields(ScheduledFields):
    """What the kinds have that a penalty makes sparse: each latent is active above a threshold."""

    pre_act_coeff: float | None = Field(None, ge=0)
    """Weight of the loss by which dead latents rise to their thresholds; 0: off; `null`: 0.03, but off for a
    mean-pooled job of fewer than 20,000 rows."""


class StandardSAE(PenaltyFields):
    """The seed's SAE: ReLU, `MSE(x, x_hat) + sparsity_coeff * mean(|h|)`, Xavier start, encoder bias -0.1.

    With `penalty` `decoder_norm` the one of Conerly et al. 2024 ("Update on how we train SAEs"), trained like the other
    kinds: each activation is weighted by the norm of its decoder row.
    """

    kind: Literal["standard"] = "standard"
    penalty: Literal["mean", "decoder_norm"] = "mean"
    """`mean`: the seed's, of the mean absolute latent, with none of the schedule's fields. `decoder_norm`: of latents
    times the norms of their decoder rows, summed over latents and divided by the row's width."""
    sparsity_coeff: float | None = Field(None, gt=0)
    """Weight of the penalty; `null`: the request's, with `decoder_norm` 2.0."""
    sparsity_warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the penalty's weight rises from zero; `decoder_norm` only."""
    learning_rate: float | None = Field(None, gt=0, le=1.0)
    """Adam's step size, constant; `null`: the request's. With `decoder_norm` as the other kinds'."""
    batch_size: int | None = Field(None, ge=1, le=65536)
    """Rows a step; `null`: the request's. With `decoder_norm` as the other kinds'."""
    min_loss: float | None = Field(None, ge=0)
    """Training ends after an epoch whose mean loss is below this; `null`: the request's. `mean` only."""
    reinitialize_dead_every: int = Field(10, ge=0)
    """Epochs between re-initialisations of dead latents, none in the last ten epochs; 0: never. `mean` only."""

    @model_validator(mode="after")
    def _fields_of_the_other_penalty(self) -> Self:
        mine = type(self).model_fields
        others: tuple[str, ...] = ("min_loss", "reinitialize_dead_every")
        if self.penalty == "mean":
            if self.predicts is not None:
                raise ValueError(
                    "The seed's formulas predict no other site: use penalty 'decoder_norm' or another kind"
                )
            if (self.sparsity_coeff or 0) > 1:
                raise ValueError("Sparsity coefficient should be <= 1.0")
            schedule = (name for name in PenaltyFields.model_fields if name not in SAEFields.model_fields)
            others = (*(name for name in schedule if name not in ("learning_rate", "batch_size")), "sparsity_warmup")
        given = [name for name in others if getattr(self, name) != mine[name].default]
        if given:
            raise ValueError(f"With penalty '{self.penalty}' there is no {', '.join(given)}")
        return self

    @property
    def is_the_seeds(self) -> bool:
        """Whether it has the seed's formulas."""
        return self.penalty == "mean"


class KSparseFields(ScheduledFields):
    """What the kinds have that keep a number of latents."""

    k: int | None = Field(None, ge=1)
    """Latents kept a row, of `batchtopk` and `matryoshka` in the mean over rows; `null`: 32, of a mean-pooled job 16,
    and at most a quarter of the latents."""


class TopKSAE(KSparseFields):
    """Keeps the k largest latents of each row (Gao et al. 2024, arXiv:2406.04093), with the auxiliary-k loss."""

    kind: Literal["topk"] = "topk"


class BatchKSparseFields(KSparseFields):
    """What the kinds have that keep k latents a row in the mean over a batch, and later those above a threshold."""

    threshold_rate: float = Field(0.05, gt=0, le=1)
    """By which share of the difference each step moves the threshold to the step's smallest kept value."""


class BatchTopKSAE(BatchKSparseFields):
    """Keeps k latents a row in the mean over a batch, afterwards those above a threshold that it has learned.

    Bussmann et al. 2024 (arXiv:2412.06410), with the auxiliary-k loss.
    """

    kind: Literal["batchtopk"] = "batchtopk"


class MatryoshkaSAE(BatchKSparseFields):
    """A `batchtopk` whose first latents alone must reconstruct, too (Bussmann et al. 2025, arXiv:2503.17547)."""

    kind: Literal["matryoshka"] = "matryoshka"
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


class JumpReLUSAE(PenaltyFields):
    """A threshold of its own for every latent, learned (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

    kind: Literal["jumprelu"] = "jumprelu"
    target_l0: float | None = Field(32.0, gt=0)
    """Active latents a row that the quadratic penalty aims at; `null`: the tanh penalty, which aims at no number."""
    sparsity_coeff: float = Field(1.0, gt=0)
    """Weight of the penalty."""
    sparsity_warmup: float = Field(0.2, ge=0, le=1)
    """Share of the steps over which the penalty's weight rises from zero."""
    bandwidth: float = Field(0.4, gt=0)
    """Of the thresholds' gradients, in units of rows scaled to a mean squared norm of their width."""
    initial_threshold: float = Field(1.0, gt=0)
    """Of every latent, in the same units."""


class GatedSAE(PenaltyFields):
    """Tells apart whether a latent is active and how much (Rajamanoharan et al. 2024, arXiv:2404.16014)."""

    kind: Literal["gated"] = "gated"
    sparsity_coeff: float = Field(3.0, gt=0)
    """Weight of the gates' L1 penalty, summed over latents and divided by the row's width."""
    sparsity_warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the penalty's weight rises from zero."""


SAEConfig = Annotated[
    StandardSAE | TopKSAE | BatchTopKSAE | MatryoshkaSAE | JumpReLUSAE | GatedSAE, Field(discriminator="kind")
]
KINDS: tuple[str, ...] = ("standard", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
