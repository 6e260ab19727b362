"""What the kinds share that train in a scaled space: the scale and its folding, a decoder of norm 1, reviving the dead.

Owns scale, centre, the decoder's norm and the losses of dead latents; which latents are active, and what else is
minimised, is the kinds'; which are dead is the trainer's to say.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import SparseAutoencoder, StepInput, StepOutput, sides
from .folded import LEAST_NORM, CannotStart, FoldedSAE, plain
from .kernels import fused
from .largest import largest_of_rows
from .sparse import Active, Everywhere, centred_bias, decode_at, encode_at, with_bias

DECODER_RATE = 2.0
"""The decoder's learning rate by the others': its rows have norm 1, where those of others begin at 0.1 and turn sooner.
This, the encoder's smaller start, and a clipping that truly clips, are from a language model's rows: the FVU of `topk`
after 189 steps was 0.168 without them and is 0.156 (`benchmarks/quality`)."""
SAMPLE_AT_ONCE = 1024
"""Rows whose double precision is held at a time."""
RIDGE = 0.1
"""Of the mean variance of what is read. SmolLM2-135M, block 9, from an MLP's input to its output, `batchtopk` of 1,024
latents, batches of 256, seed 0: FVU after 22, 88 and 176 steps 0.440, 0.335, 0.305; with the rows as they are drawn
0.853, 0.370, 0.309."""
RESAMPLED_NORM = 0.5
"""Of the mean encoder norm, where a latent begins anew: with Bricken et al.'s 0.2 the kinds that choose the largest
latents do not choose it, and a third were dead again."""


@dataclass(frozen=True)
class ScaledOptions:
    """What a request may choose for all of these kinds."""

    aux_k_coeff: float = 1 / 32
    """c, the weight of the auxiliary loss; 0: off."""
    k_aux: int | None = None
    """Dead latents a row that take part in it; `None`: half the row's width."""
    pre_act_coeff: float = 0.0
    """c', the weight of the pre-activation loss, of kinds that have one; 0: off."""
    b_dec_init: Literal["mean", "geometric_median"] = "mean"
    transcodes: bool = False
    """Whether it reconstructs rows of another site than those it reads."""


class ScaledAutoencoder(SparseAutoencoder):
    """Trains on z = s x, for rows x of width D, with p = W_enc (z - b_dec) + b_enc before any choice of latents.

    A transcoder (Dunefsky et al. 2024, arXiv:2406.11944) reconstructs z = s y for rows y of another site, and reads x
    in a scale and about a centre of their own, which stay as the sample had them: p = W_enc (r x - c) + b_enc. Nothing
    else is different but two starts. W_dec begins with the directions that a ridge regression of z on r x - c over the
    sample takes W_enc's to, as an SAE's are W_enc's own. And a latent that begins anew has that of what was read.

    Start: `prepare` sets b_dec to the sample's centre, its mean or its geometric median, and s such that the encoder's
    input z - b_dec has mean squared norm D, so that a mean squared error is about the fraction of variance unexplained.
    W_dec has rows of norm 1 at all times (the gradient along a row is removed), and learns twice as fast as the rest;
    W_enc starts as half of it, and b_enc = 0.

    The loss by which dead latents learn the residual, for kinds that add it (Gao et al. 2024, arXiv:2406.04093):

        L_aux = c · ||W_decᵀ a - e||² / ||e||²,   e = z - ẑ held fixed,
        a     = the k_aux (D / 2, if not asked for otherwise) largest of the dead latents of each row of ReLU(p)

    ||e||² is the residual's variance about zero, over the batch, as in the authors' code: defined for one row, too. As
    there, and not as in others, a few dead latents weigh as much as many: else the last ones stay dead.

    The loss that lifts dead latents to where they are active, for kinds where each is so above a threshold θ_f of its
    own, or above 0 (Conerly et al. 2025, "Dictionary Learning Optimization Techniques", where it is all latents'):

        L_pre = c' · mean over rows of Σ over dead f of ReLU(θ_f - p_f) / D,   b_dec held fixed

    L_aux alone does not revive them there: a latent that is dead because p < 0 on every row has no gradient of it.
    """

    scale: Tensor
    """s, of what is reconstructed."""
    x_scale: Tensor
    x_centre: Tensor
    """r and c, of a transcoder only."""
    encoder_start = 0.5
    has_unit_rows: ClassVar[bool] = True
    """Whether the decoder's rows are held at norm 1."""

    def __init__(self, d_in: int, d_sae: int, options: ScaledOptions, generator: torch.Generator) -> None:
        super().__init__(d_in, d_sae, generator)
        self.aux_k_coeff, self.pre_act_coeff = options.aux_k_coeff, options.pre_act_coeff
        self.b_dec_init = options.b_dec_init
        self.k_aux = min(options.k_aux or max(1, round(d_in / 2)), d_sae)
        self.register_buffer("scale", torch.ones(()))
        self.transcodes = options.transcodes
        if options.transcodes:
            self.register_buffer("x_scale", torch.ones(()))
            self.register_buffer("x_centre", torch.zeros(d_in))
        self._pre_memory: Tensor | None = None

    def draw_encoder(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Directions uniform on the sphere, bias 0."""
        weight_FD = torch.randn(self.d_sae, self.d_in, generator=generator)
        return functional.normalize(weight_FD, dim=1), torch.zeros(self.d_sae)

    def relative_rates(self) -> dict[nn.Parameter, float]:
        """The decoder's."""
        return {self.W_dec: DECODER_RATE}

    @property
    def read_scale(self) -> Tensor:
        """By what rows are multiplied that the encoder reads."""
        return self.x_scale if self.transcodes else self.scale

    @property
    def read_centre(self) -> Tensor:
        """What is then taken from them."""
        return self.x_centre if self.transcodes else self.b_dec

    @torch.no_grad()
    def prepare(self, rows_ND: Tensor) -> None:
        """Set s and b_dec, of a transcoder r and c, too, from a sample; one without variance leaves a scale at 1."""
        x_ND, y_ND = sides(rows_ND, self.d_in)
        centre_D, scale = self._centre_and_scale(x_ND if y_ND is None else y_ND)
        self.scale.copy_(scale)
        self.b_dec.copy_(centre_D * scale)
        if self.transcodes:
            centre_D, scale = self._centre_and_scale(x_ND)
            self.x_scale.copy_(scale)
            self.x_centre.copy_(centre_D * scale)
            assert y_ND is not None  # a transcoder's rows have both
            self._point_decoder(x_ND, y_ND)

    @torch.no_grad()
    def start_from(self, trained: FoldedSAE) -> None:
        """`folded` the other way round: b_dec is s times its bias, b_enc = s b + W_enc b_dec, for its own W_enc and b.

        Of the sample only s is left, which any value of would give the same function.
        """
        if self.transcodes:
            raise CannotStart("a transcoder cannot go on from a trained SAE", "Leave out 'init_from' or 'predicts'.")
        if self.has_unit_rows:
            trained = trained.with_unit_rows()
        self.W_dec.copy_(trained.decoder_weight.T)
        self.b_dec.copy_(trained.decoder_bias.double() * self.scale.double())
        self.W_enc.copy_(trained.encoder_weight)
        self.b_enc.copy_(self.unfolded_bias(trained))
        self.start_choice(trained)

    def unfolded_bias(self, trained: FoldedSAE) -> Tensor:
        """What is added to W (z - b_dec), for its own W, to give s times its pre-activations: fp64 [d_sae]."""
        weight_FD, bias_F = trained.encoder_weight.double(), trained.encoder_bias.double()
        return bias_F * self.scale.double() + weight_FD @ self.b_dec.detach().double()

    def start_choice(self, trained: FoldedSAE) -> None:
        """Let the same latents be active; weights and biases are set. Raises `CannotStart`."""
        if trained.k is not None or trained.threshold is not None:
            raise CannotStart("it keeps fewer latents than a ReLU does", "Train it as the kind that it is.")

    def _point_decoder(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Where y does not vary with x, the rows stay as they were drawn."""
        gram_DD = torch.zeros(self.d_in, self.d_in, dtype=torch.float64, device=x_ND.device)
        moved_DD = torch.zeros_like(gram_DD)
        for rows in range(0, len(x_ND), SAMPLE_AT_ONCE):
            which = slice(rows, rows + SAMPLE_AT_ONCE)
            read_BD = x_ND[which].float() * self.x_scale - self.x_centre
            gram_DD += read_BD.T @ read_BD
            moved_DD += read_BD.T @ (y_ND[which].float() * self.scale - self.b_dec)
        gram_DD.diagonal().add_(RIDGE * len(x_ND))
        map_DD = torch.linalg.solve(gram_DD, moved_DD).to(self.W_enc.dtype)
        pointed_FD = self.W_enc @ map_DD
        norm_F1 = torch.linalg.vector_norm(pointed_FD, dim=1, keepdim=True)
        self.W_dec.copy_(torch.where(norm_F1 > LEAST_NORM, self.decoder_start * pointed_FD / norm_F1, self.W_dec))

    def _centre_and_scale(self, sample_ND: Tensor) -> tuple[Tensor, Tensor]:
        some = sample_ND.split(SAMPLE_AT_ONCE)  # type: ignore[no-untyped-call]
        if self.b_dec_init == "mean":
            centre_D = sum(rows_BD.double().sum(0) for rows_BD in some) / len(sample_ND)
        else:
            centre_D = geometric_median(sample_ND.double())
        mean_square = sum((rows_BD.double() - centre_D).square().sum() for rows_BD in some) / sample_ND.numel()
        return centre_D, torch.where(mean_square > 0, mean_square.rsqrt(), torch.ones_like(mean_square))

    def ends(self, inputs: StepInput) -> tuple[Tensor, Tensor]:
        """What the encoder reads, scaled and about its centre, without gradients; and z, to be reconstructed."""
        read_BD = inputs.x_BD * self.read_scale
        with torch.no_grad():
            centred_BD = read_BD - self.read_centre
        return centred_BD, read_BD if inputs.y_BD is None else inputs.y_BD * self.scale

    @torch.no_grad()
    def resample(self, dead_F: Tensor, rows_BD: Tensor, generator: torch.Generator) -> Tensor:
        """As Bricken et al. 2023 ("Towards Monosemanticity") draw them: rows by the square of their loss.

        A latent's decoder row is the direction of its row's residual, its encoder row the same at half of the mean
        norm of those that live; a transcoder's the direction of what it read there.
        """
        x_BD, y_BD = sides(rows_BD, self.d_in)
        residual_BD = ((x_BD if y_BD is None else y_BD) - self.decode(self.encode(x_BD))).float()
        loss_B = residual_BD.square().sum(1).cpu().double()
        places = dead_F.nonzero().squeeze(1)[: int((loss_B > 0).sum())]
        which_F = torch.zeros_like(dead_F)
        which_F[places] = True
        norm = torch.linalg.vector_norm(self.W_enc[~dead_F], dim=1).mean() if bool((~dead_F).any()) else 1.0
        self.reset_latents(which_F, generator)
        if len(places):
            rows = torch.multinomial(loss_B.square(), len(places), generator=generator)
            rows = rows.to(residual_BD.device)
            directions = functional.normalize(residual_BD[rows], dim=1)
            self.W_dec[places] = self.decoder_start * directions
            if self.transcodes:
                directions = functional.normalize(x_BD[rows] * self.read_scale - self.read_centre, dim=1)
            self.W_enc[places] = RESAMPLED_NORM * norm * directions
        return which_F

    def decode(self, acts_BF: Tensor) -> Tensor:
        """Of activations that make up x, or y, and not z."""
        return functional.linear(acts_BF, self.W_dec.T, self.b_dec / self.scale)

    @torch.no_grad()
    def before_update(self) -> None:
        """Remove the part of the decoder's gradient along each row: the norm is fixed."""
        if self.W_dec.grad is not None:
            _remove_along(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def after_update(self) -> None:
        """Bring the decoder's rows back to norm 1."""
        _normalise(self.W_dec)

    def folded(self) -> FoldedSAE:
        """As ReLU and the choice of the largest do not mind a positive factor, the activations are h / s.

        p / s = (r / s) W_enc x + (b_enc - W_enc c) / s, and x̂ = W_decᵀ (h / s) + b_dec / s for the activations h of z.
        """
        weight_FD, bias_F = self.folded_encoder(self.W_enc.detach().double(), self.b_enc.detach().double())
        return FoldedSAE(
            kind=self.kind,
            encoder_weight=weight_FD,
            encoder_bias=bias_F,
            decoder_weight=plain(self.W_dec.T),
            decoder_bias=plain(self.b_dec.detach().double() / self.scale.double()),
        )

    def folded_encoder(self, weight_FD: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor]:
        """The fp64 weight and bias of what is read, as plain ones of x that give activations of x, or y."""
        scale, centre_D = self.scale.double(), self.read_centre.detach().double()
        bias_F = (bias_F - weight_FD @ centre_D) / scale
        return plain(weight_FD * (self.x_scale / scale) if self.transcodes else weight_FD), plain(bias_F)

    def pre_activations(self, x_BD: Tensor) -> Tensor:
        """The p of rows as extracted."""
        return functional.linear(x_BD * self.read_scale - self.read_centre, self.W_enc, self.b_enc)

    def _pre(self, centred_BD: Tensor) -> Tensor:
        """The p of z - b_dec, in the same memory at every step: fresh memory of this size costs a fifth more."""
        dtype = self.operands if centred_BD.dtype == torch.float32 else centred_BD.dtype
        bias_F, weight_FD = self.b_enc.to(dtype), self.W_enc.to(dtype)
        if centred_BD.is_cuda:  # whose allocator keeps it
            return torch.addmm(bias_F, centred_BD.to(dtype), weight_FD.T)
        rows, memory = len(centred_BD), self._pre_memory
        as_before = memory is not None and (memory.dtype, memory.device) == (dtype, centred_BD.device)
        if memory is None or not as_before or len(memory) < rows:
            memory = self._pre_memory = centred_BD.new_empty(rows, self.d_sae, dtype=dtype)
        return torch.addmm(bias_F, centred_BD.to(dtype), weight_FD.T, out=memory[:rows])

    def values_at(self, active: Active, pre_BF: Tensor, centred_BD: Tensor) -> Tensor:
        """The p at the active places, with a gradient of W_enc."""
        with torch.no_grad():
            values_N = active.scores(pre_BF, centred_BD, self.W_enc, self.b_enc)
        return encode_at(active, values_N, centred_BD, self.W_enc)

    def bias(self) -> Tensor:
        """The b_enc of p, with gradients of itself and, where that is the centre, of b_dec."""
        return self.b_enc if self.transcodes else centred_bias(self.b_dec, self.W_enc, self.b_enc)

    def rectified_at(self, active: Active, pre_BF: Tensor, centred_BD: Tensor) -> Tensor:
        """The ReLU(p) at the active places, with all gradients."""
        return with_bias(active, self.values_at(active, pre_BF, centred_BD), self.bias()).relu()

    @staticmethod
    def output(active_rows_F: Tensor, rows: int, reconstruction_loss: Tensor, sparsity_loss: Tensor) -> StepOutput:
        """What a step says on whose rows each latent was active so many times."""
        return StepOutput(
            loss=reconstruction_loss + sparsity_loss,
            reconstruction_loss=reconstruction_loss,
            sparsity_loss=sparsity_loss,
            l0=active_rows_F.sum() / rows,
            active_rows_F=active_rows_F,
        )

    def aux_k_loss(self, pre_BF: Tensor, centred_BD: Tensor, residual_BD: Tensor, dead_F: Tensor | None) -> Tensor:
        """L_aux, c included; its gradient reaches the decoder and, through the values, the encoder."""
        if dead_F is None or self.aux_k_coeff == 0 or _surely_none(dead_F):
            return residual_BD.new_zeros(())
        with torch.no_grad():
            active, taken = self._largest_dead(pre_BF, dead_F)
        values_N = self.rectified_at(active, pre_BF, centred_BD) * taken
        error = (decode_at(active, values_N, self.W_dec) - residual_BD).square().sum()
        energy = residual_BD.square().sum().clamp_min(torch.finfo(residual_BD.dtype).tiny)
        return self.aux_k_coeff * error / energy * dead_F.any()  # else a GPU's is that of reconstructing nothing

    def pre_act_loss(
        self, pre_BF: Tensor, centred_BD: Tensor, dead_F: Tensor | None, threshold_F: Tensor | None = None
    ) -> Tensor:
        """L_pre, c' included, for thresholds of 0 if none are given; its gradient reaches the encoder and these."""
        if dead_F is None or self.pre_act_coeff == 0 or _surely_none(dead_F):
            return centred_BD.new_zeros(())
        places = slice(None) if dead_F.is_cuda else dead_F.nonzero().squeeze(1)  # a GPU would wait for their number
        threshold_F = torch.zeros_like(self.b_enc) if threshold_F is None else threshold_F
        height_F = (threshold_F - self.b_enc)[places]
        # Linear in weights and thresholds, once it is known where p is below: no product of the encoder's is needed.
        with torch.no_grad():
            below_BF, rows_below_F = _below(pre_BF[:, places], threshold_F[places], dead_F[places])
            sums_FD = Everywhere(*below_BF.shape).transpose_times(below_BF, centred_BD)
        lack = (rows_below_F * height_F).sum() - (self.W_enc[places] * sums_FD).sum()
        return self.pre_act_coeff * lack / centred_BD.numel()

    def _largest_dead(self, pre_BF: Tensor, dead_F: Tensor) -> tuple[Active, Tensor | float]:
        """At most k_aux latents a row; where a GPU would have to wait for their number, all, and 1 for those."""
        if pre_BF.is_cuda:
            of_dead_BF = pre_BF.masked_fill(~dead_F, -torch.inf)
            least_B = of_dead_BF.topk(self.k_aux, dim=1, sorted=False).values.amin(1, keepdim=True).clamp_min(0)
            return Everywhere(*pre_BF.shape), (of_dead_BF >= least_B).to(pre_BF.dtype)
        dead_latents = dead_F.nonzero().squeeze(1)
        chosen_BK = dead_latents[largest_of_rows(pre_BF[:, dead_latents], min(self.k_aux, len(dead_latents)))]
        return Active.same_number(chosen_BK, self.d_sae), 1.0


def _surely_none(dead_F: Tensor) -> bool:
    """Whether no latent is dead; reading a flag would make a GPU wait, while on a CPU it spares the work of a loss."""
    return not dead_F.is_cuda and not bool(dead_F.any())


@fused
def _below(pre_BF: Tensor, threshold_F: Tensor, of_these_F: Tensor) -> tuple[Tensor, Tensor]:
    """Where these latents are below their thresholds, as numbers, and on how many rows."""
    below_BF = (pre_BF < threshold_F) & of_these_F
    return below_BF.to(pre_BF.dtype), below_BF.sum(0, dtype=torch.int32)


@fused
def _remove_along(slope_FD: Tensor, weight_FD: Tensor) -> None:
    along_F = torch.linalg.vecdot(slope_FD, weight_FD)
    slope_FD.addcmul_(along_F[:, None], weight_FD, value=-1)


@fused
def _normalise(weight_FD: Tensor) -> None:
    weight_FD.div_(torch.linalg.vector_norm(weight_FD, dim=1, keepdim=True).clamp_min(LEAST_NORM))


def geometric_median(rows_ND: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point whose distances to the rows have the least sum, by Weiszfeld's iteration (1937): [D].

    Ends when a step is shorter than `tolerance` of the rows' mean distance to it.
    """
    median_D = rows_ND.mean(0)
    for _ in range(iterations):
        distance_N = torch.linalg.vector_norm(rows_ND - median_D, dim=1).clamp_min(LEAST_NORM)
        weight_N = distance_N.reciprocal()
        moved_D = weight_N @ rows_ND / weight_N.sum()
        step, median_D = torch.linalg.vector_norm(moved_D - median_D), moved_D
        if bool(step <= tolerance * distance_N.mean()):
            break
    return median_D
