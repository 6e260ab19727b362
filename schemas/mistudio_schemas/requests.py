"""The request: what a requester may ask for, what it means when left out, and the limits that an operator may widen.

Only shape and range are judged here. What needs a network, a model or a machine is judged by the worker.
"""

import json
import secrets
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SecretStr,
    StringConstraints,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from .base import Contract
from .sae import HOOK_SITES, HookSite, KSparseFields, SAEConfig, StandardSAE

HubRepository = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
DEFAULT_LAYER = 12
HELD_OUT = 0.05
"""Share of the texts."""


def new_job_id() -> str:
    """A fresh id in the seed's form with more entropy: `train_20260802_210454_9f86d081`."""
    return f"train_{datetime.now(UTC):%Y%m%d_%H%M%S}_{secrets.token_hex(4)}"


class Limits(Contract):
    """Upper and lower bounds of a request. The defaults are the seed's; a worker's settings may widen them."""

    max_layer: int = 48
    min_hidden_dim: int = 64
    max_hidden_dim: int = 32768
    max_batch_size: int = 128
    max_sparsity_coeff: float = 1.0
    max_sequence_length: int = 131072
    max_epochs: int = 100_000


def limits_of(info: ValidationInfo) -> Limits:
    """The limits that the caller passed as `context={"limits": ...}`, else the seed's."""
    limits = (info.context or {}).get("limits")
    return limits if isinstance(limits, Limits) else Limits()


class TrainRequested(Contract):
    """Train one or more SAEs on a model's activations over a corpus. A request with only the seed's fields is valid."""

    job_id: JobId | None = None
    """Names the job everywhere. Clients make one; a raw message without one gets one from its place in the topic."""
    model_name: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    """A Hugging Face model (`microsoft/Phi-4`), an `s3://bucket/path` of a model's folder, or a folder on the worker's
    disk; of buckets and folders those that the worker's operator allows."""
    model_revision: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    """Branch, tag or commit; resolved to a commit when the job begins and kept with the run."""
    corpus_file: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    """A name under the bucket's `corpora/`, an `s3://bucket/key`, a path in a folder that the operator allows, or a
    dataset of the hub, `hf://datasets/owner/name[@revision][/path]`; the path is a file, a folder or a pattern."""
    corpus_column: Annotated[str, StringConstraints(max_length=256)] | None = None
    """The column of the texts in csv, json, jsonl or parquet; `null`: `text`, or the only column of strings."""
    label_column: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    """A column with a label of each text in csv, json, jsonl or parquet: how well a few features of each SAE tell the
    labels is measured (`probing.json`); a text whose label is null or empty is left out of that."""
    corpus_holds: Literal["texts", "conversations"] = "texts"
    """`conversations`: each row of a json, jsonl or parquet is a list of {role, content}, by default in the column
    `messages`, and its text is what the chat template of the model's tokenizer makes of it."""
    min_text_characters: int | None = Field(None, ge=1)
    """Texts of fewer characters are dropped and counted; `null`: only those that are empty or blank."""
    max_text_characters: int | None = Field(None, ge=1)
    """Texts of more characters are dropped, not cut, and counted; `null`: none is too long."""
    layer_number: int = DEFAULT_LAYER
    """Block to read, counted from 0. The default becomes the last block of a shallower model, with a warning."""
    hook_site: HookSite = "resid_post"
    """Where in the block: the residual stream before it, its attention's output, its MLP's input (behind the norm, as
    the MLP itself receives it), its MLP's output, or the residual stream after it."""
    huggingface_token: SecretStr | None = Field(None, json_schema_extra={"deprecated": True})
    """Deprecated: the worker uses it and forgets it, but the topic keeps it. Prefer `token_name`."""
    token_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,64}$")] | None = None
    """Names a model hub's token that the worker's operator holds, as the environment variable `HF_TOKEN_<NAME>`."""
    hidden_dim: int = 1024
    """Number of latents (d_sae)."""
    sparsity_coeff: float = 1e-3
    """Weight of the mean absolute latent in the `standard` kind's loss."""
    learning_rate: float = 1e-4
    """Adam's step size of the `standard` kind."""
    batch_size: int = 16
    """Rows a training step of the `standard` kind."""
    max_epochs: int = 50
    """Passes over the activations."""
    min_loss: float = Field(0.01, ge=0)
    """The `standard` kind ends early after an epoch whose mean loss is below this."""
    gpu_id: int | None = Field(None, ge=0)
    """A particular GPU of the worker; `null`: the one with most free memory."""
    max_sequence_length: int = 512
    """Tokens a text (mean pooling) or a window (token pooling) at most, special tokens included."""
    pooling: Literal["mean", "token"] = "mean"
    """`mean`: one row a text, the mean over its real tokens. `token`: one row a token, special tokens excluded."""
    packing: bool = False
    """Token pooling only: join the texts, with a special token between two, into windows of full length, as pretraining
    does. Each row is still one of its own text; what stands between texts is no row."""
    include_special_tokens: bool = False
    """Let the special tokens that the tokenizer or its chat template adds count as real tokens."""
    token_budget: int | None = Field(None, ge=1)
    """Extract at most about this many tokens; whole texts, in the corpus' order."""
    held_out: float | None = Field(None, ge=0, le=0.5)
    """Share of the texts that no SAE is trained on and all are judged by; `null`: 0.05, or 0 of the seed's requests."""
    left_out: list[Literal["first_token", "high_norm"]] = ["first_token", "high_norm"]
    """Tokens that no SAE is trained on nor judged by, as attention sinks are so large: the first that the model sees of
    a sequence, if it is no special one; those of a high norm. They are counted in either case."""
    high_norm_ratio: float = Field(3.0, gt=1)
    """A norm is high above so many times the median of all tokens' norms."""
    shuffle_bytes: int = Field(256 * 1024**2, ge=1024**2)
    """Size of the buffer that rows are shuffled in; two are held where not all rows fit into one."""
    cross_entropy_tokens: int = Field(8192, ge=0)
    """Held-out tokens that the language model predicts with each SAE in its place; 0: none."""
    sae: SAEConfig | None = None
    """The SAE; `null`: the seed's `standard` kind with the fields above."""
    saes: Annotated[list[SAEConfig], Field(min_length=1, max_length=32)] | None = None
    """Several SAEs from one extraction, instead of `sae`; the first is the primary one, at the run's root."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The language model's precision; `auto`: bfloat16 or float16 on a GPU as it supports, float32 on a CPU."""
    quantization: Literal["auto", "none", "nf4"] = "auto"
    """4-bit weights of the language model on a GPU; `auto`: only when it does not fit otherwise."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seeds everything random: the same request and seed give the same weights on the same device."""
    checkpoint_seconds: float | None = Field(None, gt=0)
    """Between two checkpoints at least; `null`: the worker's. Saving never takes more than 2% of the time."""
    bundle_max_bytes: int | None = Field(None, ge=1)
    """Size limit of `feature_activations.pt`; `null`: the worker's."""
    bundle_complete: bool = False
    """Fail rather than deliver a bundle that holds only the first rows."""
    report: bool = True
    """Write the page `report/index.html` of each SAE, which shows parts of the corpus."""
    exports: list[Literal["neuronpedia"]] = []
    """What else to make of each SAE's features; `neuronpedia`: `features/neuronpedia/batch-N.json`, as SAEDashboard
    writes them, of token pooling only."""
    push_to_hub: HubRepository | None = None
    """`owner/name` of a model repository on the hub that the SAELens folders with their cards are put in at the end; a
    private one is made where there is none. Of the owners that the worker's operator allows."""

    @field_validator("layer_number")
    @classmethod
    def _layer_number(cls, value: int, info: ValidationInfo) -> int:
        if value < 0:
            raise ValueError("Layer number must be non-negative")
        if value > (top := limits_of(info).max_layer):
            raise ValueError(f"Layer number seems too high (max {top})")
        return value

    @field_validator("hidden_dim")
    @classmethod
    def _hidden_dim(cls, value: int, info: ValidationInfo) -> int:
        check_hidden_dim(value, limits_of(info))
        return value

    @field_validator("batch_size")
    @classmethod
    def _batch_size(cls, value: int, info: ValidationInfo) -> int:
        if value < 1:
            raise ValueError("Batch size must be at least 1")
        if value > (top := limits_of(info).max_batch_size):
            raise ValueError(f"Batch size too large (max {top})")
        return value

    @field_validator("sparsity_coeff")
    @classmethod
    def _sparsity_coeff(cls, value: float, info: ValidationInfo) -> float:
        if value <= 0:
            raise ValueError("Sparsity coefficient must be positive")
        if value > (top := limits_of(info).max_sparsity_coeff):
            raise ValueError(f"Sparsity coefficient should be <= {top}")
        return value

    @field_validator("learning_rate")
    @classmethod
    def _learning_rate(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError("Learning rate must be above 0 and at most 1")
        return value

    @field_validator("max_epochs")
    @classmethod
    def _max_epochs(cls, value: int, info: ValidationInfo) -> int:
        top = limits_of(info).max_epochs
        if not 1 <= value <= top:
            raise ValueError(f"Maximum epochs must be between 1 and {top}")
        return value

    @field_validator("max_sequence_length")
    @classmethod
    def _max_sequence_length(cls, value: int, info: ValidationInfo) -> int:
        top = limits_of(info).max_sequence_length
        if not 4 <= value <= top:
            raise ValueError(f"Maximum sequence length must be between 4 and {top}")
        return value

    @model_validator(mode="after")
    def _some_length(self) -> Self:
        least, most = self.min_text_characters, self.max_text_characters
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_text_characters must be at most max_text_characters ({least} > {most})")
        return self

    @model_validator(mode="after")
    def _packing(self) -> Self:
        if self.packing and self.pooling == "mean":
            raise ValueError("packing needs pooling: token, as a window of several texts has no mean of one")
        if self.packing and self.include_special_tokens:
            raise ValueError("packing needs include_special_tokens: false, as those between two texts belong to none")
        return self

    @model_validator(mode="after")
    def _exports(self) -> Self:
        if "neuronpedia" in self.exports and self.pooling == "mean":
            raise ValueError("exports: neuronpedia needs pooling: token, as it shows how active a feature is on tokens")
        return self

    @model_validator(mode="after")
    def _several_saes(self, info: ValidationInfo) -> Self:
        if self.sae is not None and self.saes is not None:
            raise ValueError("Give either 'sae' or 'saes', not both")
        resolved = self.resolved_saes()
        names = [sae.name for sae in resolved]
        if len(set(names)) < len(names):
            raise ValueError("Each SAE of 'saes' needs a name of its own")
        limits = limits_of(info)
        for sae in resolved:
            check_hidden_dim(sae.hidden_dim or 0, limits)
            if (sae.max_epochs or 1) > limits.max_epochs:
                raise ValueError(f"Maximum epochs must be between 1 and {limits.max_epochs}")
            if sae.layer_number is not None and sae.layer_number > limits.max_layer:
                raise ValueError(f"Layer number seems too high (max {limits.max_layer})")
            if isinstance(sae, KSparseFields) and (sae.k or 0) > (sae.hidden_dim or 0):
                raise ValueError(f"k must be at most the hidden dimension ({sae.k} > {sae.hidden_dim})")
            self._check_prediction(sae)
        return self

    def _check_prediction(self, sae: SAEConfig) -> None:
        """Means do not do: what an MLP makes of a token it does not make of the mean of many."""
        if sae.predicts is None:
            return
        if self.pooling != "token":
            raise ValueError(
                "'predicts' needs pooling 'token': a site is predicted token by token, not from a text's mean"
            )
        read = sae.hook_site or self.hook_site
        if HOOK_SITES.index(sae.predicts) <= HOOK_SITES.index(read):
            raise ValueError(f"'predicts' must be a later site of the block than 'hook_site': {sae.predicts}, {read}")

    @field_serializer("huggingface_token")
    def _never_write_token(self, token: SecretStr | None) -> None:
        """A token that was read goes no further: not to a file, not to another topic."""

    def to_json(self) -> bytes:
        """Only the fields that were given, so that a reader still sees what was left to the defaults."""
        given = self.model_dump(mode="json", exclude_unset=True, exclude={"huggingface_token"})
        return json.dumps(given, allow_nan=False, ensure_ascii=False).encode()

    @property
    def names_layer(self) -> bool:
        """Whether the requester chose the layer, so that one the model has not is refused and not adjusted."""
        return "layer_number" in self.model_fields_set

    @property
    def held_out_share(self) -> float:
        """Of the texts. The seed held nothing out, and its requests mean what they meant."""
        if self.held_out is not None:
            return self.held_out
        return 0.0 if self.sae is None and self.saes is None else HELD_OUT

    @property
    def starts(self) -> list[str]:
        """What SAEs go on from (`init_from`), each once."""
        named = (sae.init_from for sae in self.saes or [self.sae or StandardSAE()])
        return list(dict.fromkeys(name for name in named if name is not None))

    def resolved_saes(self) -> list[SAEConfig]:
        """The SAEs with every inherited field filled in and a name each, the primary one first.

        `layer_number` stays `None` where neither the SAE nor the requester named a layer.
        """
        asked: list[SAEConfig] = self.saes or [self.sae or StandardSAE()]
        return [self._resolved(sae, position) for position, sae in enumerate(asked)]

    def _resolved(self, sae: SAEConfig, position: int) -> SAEConfig:
        filled: dict[str, Any] = {}
        for field in ("hook_site", "hidden_dim", "max_epochs", "seed"):
            if getattr(sae, field) is None:
                filled[field] = getattr(self, field)
        if isinstance(sae, KSparseFields) and sae.k is None:
            most = (sae.hidden_dim or self.hidden_dim) // 4
            filled["k"] = max(1, min(16 if self.pooling == "mean" else 32, most))
        if isinstance(sae, StandardSAE) and sae.is_the_seeds:
            for field in ("sparsity_coeff", "learning_rate", "batch_size", "min_loss"):
                if getattr(sae, field) is None:
                    filled[field] = getattr(self, field)
        if sae.layer_number is None and self.names_layer:
            filled["layer_number"] = self.layer_number
        if sae.name is None:
            filled["name"] = f"{sae.kind}-{position}"
        return sae.model_copy(update=filled)


def check_hidden_dim(value: int, limits: Limits) -> None:
    """Raise ValueError, in the seed's words, when a hidden dimension is outside the limits."""
    if value < limits.min_hidden_dim:
        raise ValueError(f"Hidden dimension too small (min {limits.min_hidden_dim})")
    if value > limits.max_hidden_dim:
        raise ValueError(f"Hidden dimension too large (max {limits.max_hidden_dim})")
