# SPDX-License-Identifier: MIT
"""SKILL: distil groups of similar teacher layers while pruning the student, then again.

Paper
-----
L. Zampierin et al., "SKILL: Similarity-aware Knowledge distILLation for Speech Self-Supervised
Learning", ICASSP workshop SASB 2024, arXiv 2402.16830. It builds on DPHuBERT: Y. Peng et al.,
Interspeech 2023, arXiv 2305.17651, authors' code: pyf98/DPHuBERT.

Idea
----
DPHuBERT prunes a copy of its teacher while distilling it: learned gates close channels, heads and
feed-forward units; the targets are layers 0, 4, 8, 12, chosen by hand. SKILL measures how similar
the teacher's layers are, clusters them, and distils the mean of each cluster (second hand).

    act 1  measure   teacher, some utterances -> similarity of each pair of layers
    act 2  group     join the most similar groups of layers until three are left
    act 3  prune     copy of the teacher with gates, distilled -> 25 % of the parameters
    act 4  distil    the pruned student, without gates

Equations
---------
CKA, (3): SKILL, second hand; its kernel, (2), (4): ours; (5) - (10): DPHuBERT's code. i, j: layers;
y, s: hidden states of teacher, student; X_i: y_i of all frames, centred; A, B, g: groups; b, t, d:
utterance, frame, feature; a: log alpha of a gate; u: uniform in (0, 1); beta 2/3, gamma -0.1,
zeta 1.1; m_c, k_c: channels, kernel of convolution c; e_i, f_i: heads, units (while pruning all
sums of (7)); tau: target of rho; N_0: size of the teacher; W, w, lambda: learned, lambda by ascent.

    (1)  CKA(i, j) = ||X_i' X_j||_F^2 / (||X_i' X_i||_F ||X_j' X_j||_F)         similarity
    (2)  dist(A, B) = mean over i in A, j in B of 1 - CKA(i, j)
    (3)  h_g = mean over i in g of y_i                                           target
    (4)  p_g = W (mean over i in g of s_i) + w                                   prediction
    (5)  L_dis = mean |p_g,b,t,d - h_g,b,t,d| - mean cos(p_g,b,t, h_g,b,t)
    (6)  z = clamp((zeta - gamma) q + gamma, 0, 1),  q = sigmoid((log u - log(1-u) + a) / beta)
    (7)  P(z > 0) = sigmoid(a - beta log(-gamma / zeta))
    (8)  z = sigmoid(0.8 a / beta), of n gates the round(n - sum of (7)) smallest: 0
    (9)  N = sum_c k_c m_{c-1} m_c + 2 m_1 + 771 m_7 + sum_i (196,800 e_i + 1,537 f_i) + 4,777,088
    (10)  L = L_dis + lambda_1 (rho - tau) + lambda_2 (rho - tau)^2,  rho = 1 - N / N_0

Paper vs this code
------------------
Of SKILL only title, abstract and start of the introduction could be read. With the same weights
DPHuBERT's code and ours agree to 2e-6. D: done otherwise. S: SKILL is silent or could not be read.

id  topic          DPHuBERT's code             here                   why
D1  empty block    goes with its output bias   the bias stays         pruned = with gates
D2  position bias  belongs to layer 1          to the student         layer 1 may lose all heads
D3  last channel   an error if none is left    the strongest stays    no failure at the end
S1  similarity     CKA (second hand); linear kernel, biased, one sample per frame (ours)
S2  groups         hierarchical (abstract); average linkage, three groups (ours)
S3  layer 0        before the positional convolution (code), a group of its own (ours)
S4  student side   mean of the same layers (ours), one projection for layer 0, one for others (code)
S5  gates          start at a mean of .99, units at .5; new ones for each part of a batch (code)
S6  convolution 7  its LayerNorm sees only what is left: pruned is not as with gates (code)

Run
---
    python skill.py --toy                 # offline, minutes on a CPU
    python skill.py --data LibriSpeech    # the recipe, WavLM Base+ is downloaded
    python skill.py --toy --claim         # similar, hand-picked and random groups, three seeds

Result
------
Phone accuracy (toy), 360 updates of 4 s, three seeds: distilled .860 (sd .002), hand-picked .859,
random .857 (not reproduced), pruned .853, teacher .878, untrained .336. 75,000 updates: not run.

Copy
----
What stands above the copy boundary needs torch alone: leave the imports of tqdm and common out.

    student, hard_concrete = Student(Shape(), dropout=0.1), HardConcrete(Shape())
    waveforms, teacher_hidden = torch.randn(2, 16000), torch.randn(13, 2, 49, 768)
    groups, projections = [(0,), (1, 2, 3, 4), (5, 12)], Projections(768)
    student_hidden, _ = student(waveforms, gates=hard_concrete.sample())
    predicted = projections(group_means(student_hidden, groups), groups)
    loss, terms = distillation_loss(predicted, group_means(teacher_hidden, groups))
    loss.backward()
"""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import InputError

# B batch, S samples, T frames, D width, C conv channels, G groups, L layers

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""  # folder of audio, or a manifest.tsv (code: LibriSpeech, 960 h)
    teacher: str = "wavlm_base_plus"  # or hubert_base, "toy", a checkpoint file (paper)
    out: str = "runs/skill"  # run folder
    seed: int = 0  # of calibration set, gates, dropout, crops and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 4  # processes that load audio
    calibration_utterances: int = 500  # of act 1, the first crop_seconds of each (ours)
    clusters: int = 3  # groups of Transformer layers; layer 0 is one more (S2)
    groups: str = ""  # empty: by similarity; random; or by hand, as in 0/1,2,3,4/8/9,10
    sparsity: float = 0.75  # tau: share of the teacher's parameters to remove (code)
    sparsity_warmup: float = 0.1  # share of act 3 over which the target rises (code: 5,000)
    gate_lr: float = 0.02  # peak learning rate of the gates (code)
    multiplier_lr: float = 0.02  # peak learning rate of lambda_1 and lambda_2 (code)
    dropout: float = 0.1  # after all parts and on attention weights, also in act 3 (code)
    steps: int = 75_000  # updates: two thirds in act 3, one third in act 4 (code)
    batch_seconds: float = 640.0  # audio per update: 4 GPUs with 160 s each (code)
    crop_seconds: float = 15.625  # longest crop: 250,000 samples (code: longest utterance)
    accumulate: int = 4  # parts a batch is cut into to save memory (ours)
    lr: float = 2e-4  # peak learning rate of act 3; act 4: half of it (code)
    warmup: float = 0.3  # share of act 3 before the peak; linear up, linear down (code)
    betas: tuple[float, ...] = (0.9, 0.999)  # of AdamW, without weight decay (code)
    clip: float = 10.0  # largest norm of the gradient, gates and lambdas included (code)
    amp: bool | None = None  # bf16 autocast; None: on GPUs that have bf16 (ours)
    compile: bool = False  # torch.compile: slow at first, then faster (ours)
    log_every: int = 50  # updates between two lines of the log (ours)
    save_every: int = 1_000  # updates between checkpoints with held-out distance (ours)


# --toy: the same method on the toy world, for minutes on two CPU cores instead of days on a GPU.
# In so few updates gates need high learning rates, low betas (else the size swings past its target)
# and a target that rises slowly: Eq. 7 counts many gates that are nearly closed, Eq. 8 closes them.
TOY = dict(
    teacher="toy",
    out="runs/skill-toy",
    workers=0,
    calibration_utterances=100,
    sparsity_warmup=0.5,
    gate_lr=1.5,
    multiplier_lr=6.0,
    steps=360,
    batch_seconds=4.0,
    crop_seconds=3.0,
    accumulate=1,
    lr=2e-3,
    warmup=0.1,
    betas=(0.3, 0.9),
    log_every=10,
    save_every=120,
)

# --claim: groups of similar layers, hand-picked layers, random groups, each at two sparsities.
CLAIM = {
    "hand-picked 0/4/8/12": dict(groups="0/4/8/12"),
    "random groups": dict(groups="random"),
    "similar, 85 % pruned": dict(sparsity=0.85),
    "hand-picked, 85 % pruned": dict(groups="0/4/8/12", sparsity=0.85),
    "random, 85 % pruned": dict(groups="random", sparsity=0.85),
}

KERNELS = (10, 3, 3, 3, 3, 2, 2)  # of the seven convolutions of HuBERT and WavLM
STRIDES = (5, 2, 2, 2, 2, 2, 2)
BETA = 2 / 3  # temperature of the hard-concrete gates (code)
GAMMA = -0.1  # they are stretched from (0, 1) to (GAMMA, ZETA) and clamped (code)
ZETA = 1.1
FINAL_LR = 0.5  # peak learning rate of act 4 over that of act 3 (code: 1e-4, 2e-4)
FINAL_WARMUP = 0.2  # share of act 4 before the peak (code)
PICKED = (4, 8, 12)  # Transformer layers that DPHuBERT distils

Groups = list[tuple[int, ...]]  # of layers: [(0,), (1, 2, 3), ...]


@dataclass
class Shape:
    """What is left of each layer. The default is the whole WavLM Base+."""

    conv_channels: tuple[int, ...] = (512,) * 7
    width: int = 768
    attention_heads: int = 12  # of the teacher; a head has width / attention_heads channels
    kept_heads: tuple[tuple[int, ...], ...] = (tuple(range(12)),) * 12  # their numbers, by layer
    feed_forward: tuple[int, ...] = (3072,) * 12
    position_kernel: int = 128
    position_groups: int = 16
    position_buckets: int = 320  # of WavLM's position bias; HuBERT has none: 0
    max_distance: int = 800  # frames; all greater distances share a bucket


# ------------------------------------------------------------------------------------------------
# Acts 1 and 2: similarity of layers, groups of layers
# ------------------------------------------------------------------------------------------------


def layer_moments(hidden_states: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What Eq. 1 needs of L layers (B, T, D), in float64: frames, sums (L, D), products (LD, LD).

    Moments of several batches may be added, so that no frame is kept. For a Base model the
    products take 0.8 GB, and Eq. 1 takes 2.6 GB.
    """
    x = torch.stack([hidden.flatten(0, 1) for hidden in hidden_states], 1)  # BT x L x D
    x = x.double()  # S1: a sample is a frame, without pooling
    flat = x.flatten(1)  # BT x LD
    return torch.tensor(len(x), dtype=x.dtype, device=x.device), x.sum(0), flat.T @ flat


def centred_kernel_alignment(frames: Tensor, sums: Tensor, products: Tensor) -> Tensor:
    """Eq. 1 with a linear kernel (S1) for each pair of layers: (L, L), between 0 and 1."""
    flat = sums.flatten()
    centred = products - flat[:, None] * (flat / frames)  # X_i' X_j of all pairs, LD x LD
    blocks = centred.unflatten(0, sums.shape).unflatten(2, sums.shape)  # L x D x L x D
    norms = blocks.square().sum((1, 3))  # ||X_i' X_j||_F^2, L x L
    return norms / (norms.diagonal()[:, None] * norms.diagonal()).sqrt()


def group_distance(similarity: Tensor, first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Eq. 2, average linkage (S2): the distance of two groups of layers."""
    return float((1 - similarity[list(first)][:, list(second)]).mean())


def agglomerate(similarity: Tensor, layers: Iterable[int], clusters: int) -> Groups:
    """Join the two nearest groups of layers until ``clusters`` are left; at a tie the lowest."""
    groups = [(layer,) for layer in layers]
    while len(groups) > clusters:
        pairs = itertools.combinations(groups, 2)
        first, second = min(pairs, key=lambda pair: group_distance(similarity, *pair))
        others = [group for group in groups if group not in (first, second)]
        groups = sorted([*others, tuple(sorted(first + second))])
    return groups


# ------------------------------------------------------------------------------------------------
# Student
# ------------------------------------------------------------------------------------------------


class Gates(NamedTuple):
    """Gates from 0 (closed) to 1: a vector for each convolution, or for each Transformer layer."""

    channels: Sequence[Tensor]
    heads: Sequence[Tensor]
    units: Sequence[Tensor]


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A Linear layer with BERT's random start; it may have no inputs, or no outputs."""
    layer = nn.Linear(inputs, outputs, device="meta")  # draws nothing, and takes sizes of 0
    layer.weight = nn.Parameter(nn.init.normal_(torch.empty(outputs, inputs), std=0.02))
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


class ConvLayer(nn.Module):
    """Convolution, GroupNorm in the first layer only, GELU: (B, C_in, S) -> (B, C, S / stride)."""

    def __init__(self, inputs: int, channels: int, kernel: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, channels, kernel, stride, bias=False)
        # One channel per group: each channel is normalised over the whole utterance.
        self.layer_norm = nn.GroupNorm(channels, channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer_norm(self.conv(x)))


class PrunableExtractor(nn.Module):
    """Seven convolutions, each with a width of its own: (B, S) at 16 kHz -> (B, T, C) at 50 Hz."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        sizes = zip((1, *channels), channels, KERNELS, STRIDES, strict=False)
        self.conv_layers = nn.ModuleList(
            ConvLayer(inputs, outputs, kernel, stride, norm=i == 0)
            for i, (inputs, outputs, kernel, stride) in enumerate(sizes)
        )
        for layer in self.conv_layers:
            nn.init.kaiming_normal_(layer.conv.weight)
        # Gates of the last convolution, after act 3: between its GELU and the LayerNorm that
        # follows there is no weight that they could be multiplied into. Not trained.
        self.scale = nn.Parameter(torch.ones(channels[-1]), requires_grad=False)

    def forward(self, waveforms: Tensor, gates: Sequence[Tensor] | None = None) -> Tensor:
        x = waveforms[:, None]  # B x 1 x S
        for i, layer in enumerate(self.conv_layers):
            x = layer(x)
            if gates is not None:
                x = x * gates[i].to(x.dtype)[:, None]
        return x.transpose(1, 2) * self.scale  # B x T x C

    def frame_count(self, samples: Tensor) -> Tensor:
        """Number of frames computed from so many samples, at least 0."""
        for layer in self.conv_layers:
            samples = (samples - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1
        return samples.clamp(min=0)


class PositionalConv(nn.Module):
    """Relative position from a wide grouped convolution over time: (B, T, D) -> (B, T, D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        kernel, groups = shape.position_kernel, shape.position_groups
        conv = nn.Conv1d(shape.width, shape.width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * shape.width)))
        nn.init.zeros_(conv.bias)
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2))[..., : x.shape[1]]  # an even kernel gives a frame too many
        return F.gelu(y).transpose(1, 2)


class PositionBias(nn.Embedding):
    """WavLM's bias for each head and distance of two frames: (B, T, D) -> (heads, T, T).

    Small distances have a bucket each, large ones share buckets that widen logarithmically.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.position_buckets, shape.attention_heads)
        self.max_distance = shape.max_distance

    def forward(self, x: Tensor) -> Tensor:
        time = torch.arange(x.shape[1], device=x.device)
        offset = time[None, :] - time[:, None]  # key - query, T x T
        half = self.num_embeddings // 2  # of the buckets: keys before the query, keys after it
        near, distance = half // 2, offset.abs()
        log = (distance.clamp(min=1) / near).log() / math.log(self.max_distance / near)
        far = (near + (log * (half - near)).long()).clamp(max=half - 1)
        bucket = torch.where(distance < near, distance, far) + half * (offset > 0)
        return super().forward(bucket).permute(2, 0, 1)  # heads x T x T


class Attention(nn.Module):
    """Self-attention of the heads that are kept: (B, T, D) -> (B, T, D).

    With a position bias it is WavLM's, without one HuBERT's.
    """

    def __init__(self, shape: Shape, kept_heads: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.all_heads, self.dropout = shape.attention_heads, dropout
        self.head_width = shape.width // shape.attention_heads
        numbers = torch.tensor(kept_heads, dtype=torch.long, device="cpu")  # never on "meta"
        self.register_buffer("kept_heads", numbers, persistent=False)
        inner = len(kept_heads) * self.head_width
        self.q_proj, self.k_proj = linear(shape.width, inner), linear(shape.width, inner)
        self.v_proj, self.out_proj = linear(shape.width, inner), linear(inner, shape.width)
        if shape.position_buckets:
            self.gru_rel_pos_linear = linear(self.head_width, 8)
            self.gru_rel_pos_const = nn.Parameter(torch.ones(1, shape.attention_heads, 1, 1))

    def scaled_bias(self, x: Tensor, position_bias: Tensor) -> Tensor:
        """WavLM: each frame scales the bias, (heads, T, T) -> (B, kept heads, T, T).

        The scale follows from the layer's input, cut into one piece for each head of the teacher,
        and not from the queries: a head that is kept needs its number.
        """
        x = x.unflatten(-1, (self.all_heads, -1)).transpose(1, 2)  # B x heads x T x D/heads
        sums = self.gru_rel_pos_linear(x).unflatten(-1, (2, 4)).sum(-1)  # B x heads x T x 2
        first, second = sums.sigmoid().split(1, dim=-1)
        scale = first * (second * self.gru_rel_pos_const - 1) + 2  # B x heads x T x 1
        scale = scale[:, self.kept_heads].to(position_bias.dtype)
        return scale * position_bias[self.kept_heads]

    def forward(
        self, x: Tensor, mask: Tensor | None, position_bias: Tensor | None, gates: Tensor | None
    ) -> Tensor:
        """``mask`` (B, 1, 1, T) is True at frames that may be attended to; None: all of them."""
        if len(self.kept_heads) == 0:
            return torch.zeros_like(x) + self.out_proj.bias  # D1: an empty block keeps its bias
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # B x kept heads x T x D/heads
        attn_mask = mask
        if position_bias is not None:
            # Cast to q's dtype first: B x heads x T x T is the largest tensor of the layer.
            attn_mask = self.scaled_bias(x, position_bias.to(q.dtype))
            if mask is not None:
                attn_mask = attn_mask.masked_fill(~mask, -math.inf)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate)
        if gates is not None:
            y = y * gates.to(y.dtype)[:, None, None]
        return self.out_proj(y.transpose(1, 2).flatten(2))  # B x T x D


class FeedForward(nn.Module):
    """Two linear layers with GELU between them: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.intermediate_dense = linear(width, units)
        self.output_dense = linear(units, width)

    def forward(self, x: Tensor, gates: Tensor | None) -> Tensor:
        x = F.gelu(self.intermediate_dense(x))  # B x T x units
        if gates is not None:
            x = x * gates.to(x.dtype)
        return self.output_dense(x)


class TransformerLayer(nn.Module):
    """Post-norm Transformer layer: (B, T, D) -> (B, T, D)."""

    def __init__(self, shape: Shape, number: int, dropout: float) -> None:
        super().__init__()
        self.number = number  # from 0
        self.attention = Attention(shape, shape.kept_heads[number], dropout)
        self.layer_norm = nn.LayerNorm(shape.width)
        self.feed_forward = FeedForward(shape.width, shape.feed_forward[number])
        self.final_layer_norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, position_bias: Tensor | None, gates: Gates | None
    ) -> Tensor:
        head_gates = None if gates is None else gates.heads[self.number]
        unit_gates = None if gates is None else gates.units[self.number]
        x = self.layer_norm(x + self.dropout(self.attention(x, mask, position_bias, head_gates)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x, unit_gates)))


class Student(nn.Module):
    """The teacher's architecture with a width of its own in each layer.

    It serves as the copy of the teacher, with gates from outside, and as the pruned student. Its
    modules are named as in Hugging Face's HubertModel, without the prefix "encoder.".
    """

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape, channels = shape, shape.conv_channels[-1]
        self.feature_extractor = PrunableExtractor(shape.conv_channels)
        # S6: the LayerNorm averages over the channels that are left.
        parts = {"layer_norm": nn.LayerNorm(channels), "projection": linear(channels, shape.width)}
        self.feature_projection = nn.ModuleDict(parts)
        self.pos_conv_embed = PositionalConv(shape)
        self.layer_norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(dropout)
        self.rel_attn_embed = None
        if shape.position_buckets:  # D2: the position bias belongs to no layer
            self.rel_attn_embed = PositionBias(shape)
        self.layers = nn.ModuleList(
            TransformerLayer(shape, number, dropout) for number in range(len(shape.kept_heads))
        )

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None, gates: Gates | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states [(B, T, D)] and their lengths (B,).

        ``waveforms`` (B, S) at 16 kHz, not normalised; ``lengths`` (B,) valid samples of a
        right-padded batch, None where nothing is padded; ``gates`` in act 3 only. Entry 0 is the
        output of the feature projection (S3), entry i the output of layer i.
        """
        x = self.feature_extractor(waveforms, None if gates is None else gates.channels)
        x = self.feature_projection["layer_norm"](x)
        x = self.dropout(self.feature_projection["projection"](x))  # B x T x D
        mask = None
        if lengths is not None:
            lengths = self.feature_extractor.frame_count(lengths)
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # B x T
            x = x * valid[:, :, None]
            mask = valid[:, None, None, :]
        hidden_states = [x]  # S3: layer 0 stands before the positional convolution
        x = self.dropout(self.layer_norm(x + self.pos_conv_embed(x)))
        position_bias = None if self.rel_attn_embed is None else self.rel_attn_embed(x)
        for layer in self.layers:
            x = layer(x, mask, position_bias, gates)
            hidden_states.append(x)
        return hidden_states, lengths


def initialise_from_teacher(student: Student, weights: dict[str, Tensor]) -> None:
    """Copy all weights of the teacher: without dropout and with open gates the student equals it.

    ``weights``: the teacher's, under the student's names. The teacher has no scale, which becomes
    one; any other difference in names or sizes is a RuntimeError.
    """
    scale = torch.ones_like(student.feature_extractor.scale)
    student.load_state_dict(weights | {"feature_extractor.scale": scale})


# ------------------------------------------------------------------------------------------------
# Acts 3 and 4: loss
# ------------------------------------------------------------------------------------------------


def group_means(hidden_states: Sequence[Tensor], groups: Groups) -> Tensor:
    """Eq. 3, and the mean of Eq. 4 (S4: the same layers): [(B, T, D)] -> (G, B, T, D)."""
    return torch.stack([sum(hidden_states[i] for i in group) / len(group) for group in groups])


class Projections(nn.Module):
    """W and w of Eq. 4, at first the identity: (G, B, T, D) -> (G, B, T, D). Training only.

    S4: all groups share one projection, but layer 0 as a group of its own has another one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_0, self.others = nn.Linear(width, width), nn.Linear(width, width)
        for projection in (self.layer_0, self.others):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, means: Tensor, groups: Groups) -> Tensor:
        projections = [self.layer_0 if group == (0,) else self.others for group in groups]
        return torch.stack([project(x) for project, x in zip(projections, means, strict=True)])


def distillation_loss(
    predicted: Tensor, teacher_hidden: Tensor, frame_mask: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 5, and its parts "l1" and "cos" for each group, (G,) each.

    ``predicted`` and ``teacher_hidden`` are (G, B, T, D), ``frame_mask`` (B, T) True at valid
    frames, None where all are. Means are taken over groups, valid frames, and in L1 over D.
    """
    exact = torch.promote_types(predicted.dtype, torch.float32)  # bf16 would round the sums
    predicted, teacher_hidden = predicted.to(exact), teacher_hidden.to(exact)
    if frame_mask is not None:  # G x 1 x frames x D
        predicted = predicted[:, None, frame_mask]
        teacher_hidden = teacher_hidden[:, None, frame_mask]
    l1 = (predicted - teacher_hidden).abs().mean((1, 2, 3))  # G
    cos = F.cosine_similarity(predicted, teacher_hidden, dim=-1).mean((1, 2))  # G
    return l1.mean() - cos.mean(), {"l1": l1.detach(), "cos": cos.detach()}


# ------------------------------------------------------------------------------------------------
# Act 3: gates, size and pruning
# ------------------------------------------------------------------------------------------------


def sample_gate(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Eq. 6: ``u`` uniform in (0, 1) -> a gate in [0, 1] that is often exactly 0 or 1."""
    q = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (q * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Eq. 7: the probability that Eq. 6 does not close a gate."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def fixed_gate(log_alpha: Tensor, at_least: int = 0) -> Tensor:
    """Eq. 8: gates without noise. As many are closed as Eq. 7 expects, and ``at_least`` are not."""
    closed = round(len(log_alpha) - float(open_probability(log_alpha).sum()))
    z = torch.sigmoid(0.8 * log_alpha / BETA).clamp(min=1e-30)  # 0 means closed, whatever its alpha
    smallest = z.argsort(stable=True)[: min(closed, len(z) - at_least)]
    return z.index_fill(0, smallest, 0.0)


class HardConcrete(nn.Module):
    """The distributions of all gates, and the two multipliers of Eq. 10. Training only."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        heads = [len(numbers) for numbers in shape.kept_heads]
        self.lengths = [*shape.conv_channels, *heads, *shape.feed_forward]  # of 7 + L + L vectors
        self.layers = len(heads)
        mean_closed = torch.full((sum(self.lengths),), 0.01)  # S5: gates start nearly open,
        mean_closed[len(mean_closed) - sum(shape.feed_forward) :] = 0.5  # those of units half open
        noise = torch.randn_like(mean_closed) * 0.01
        self.log_alpha = nn.Parameter(noise - mean_closed.logit())
        self.multipliers = nn.Parameter(torch.zeros(2))

    def split(self, values: Tensor) -> Gates:
        """Values of all gates, one after another -> a vector for each convolution or layer."""
        vectors = values.split(self.lengths)
        return Gates(vectors[:7], vectors[7 : 7 + self.layers], vectors[7 + self.layers :])

    def sample(self) -> Gates:
        """The gates of one forward pass, the same for all utterances and frames."""
        u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
        return self.split(sample_gate(self.log_alpha, u))

    @torch.no_grad()
    def fixed(self) -> Gates:
        """The gates of evaluation and pruning; D3: a convolution keeps its strongest channel."""
        channels, heads, units = self.split(self.log_alpha)
        channels = [fixed_gate(log_alpha, at_least=1) for log_alpha in channels]
        return Gates(channels, list(map(fixed_gate, heads)), list(map(fixed_gate, units)))

    def expected_size(self, shape: Shape) -> Tensor:
        """Eq. 9 with the sums of Eq. 7: the parameters that Eq. 6 leaves on average."""
        probabilities = self.split(open_probability(self.log_alpha))
        channels, heads, units = ([vector.sum() for vector in kind] for kind in probabilities)
        return count_size(shape, channels, heads, units)


def count_size(shape: Shape, channels: list, heads: list, units: list) -> Any:
    """Eq. 9: parameters of a student with so many channels, heads and units, ints or tensors.

    As in DPHuBERT's code, WavLM's position bias is not counted.
    """
    width, head_width = shape.width, shape.width // shape.attention_heads
    sizes = zip(KERNELS, (1, *channels), channels, strict=False)
    convs = sum(kernel * inputs * outputs for kernel, inputs, outputs in sizes)
    convs = convs + 2 * channels[0] + channels[-1]  # GroupNorm, scale
    projection = 2 * channels[-1] + width * (channels[-1] + 1)  # LayerNorm, Linear
    kernel = shape.position_kernel  # positional convolution: gain, weight, bias; LayerNorm
    position = kernel + width * (width // shape.position_groups) * kernel + width + 2 * width
    head = 4 * width * head_width + 3 * head_width  # q, k, v, out; biases of q, k, v
    unit = 2 * width + 1  # a row and its bias, a column
    layers = [head * h + unit * f + 2 * width for h, f in zip(heads, units, strict=True)]
    return convs + projection + position + sum(layers) + 4 * width * len(layers)  # two LayerNorms


def shape_size(shape: Shape) -> int:
    """Eq. 9 of a student as it is."""
    heads = [len(numbers) for numbers in shape.kept_heads]
    return count_size(shape, [*shape.conv_channels], heads, [*shape.feed_forward])


def full_size(shape: Shape) -> int:
    """N_0 of Eq. 10: parameters of the teacher, unlike Eq. 9 with its position bias (code)."""
    heads, layers = shape.attention_heads, len(shape.kept_heads)
    bias = shape.position_buckets * heads + layers * (8 * (shape.width // heads) + 8 + heads)
    return shape_size(shape) + (bias if shape.position_buckets else 0)


def sparsity_loss(sparsity: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """The part of Eq. 10 after L_dis, an augmented Lagrangian; 0 where the target is met."""
    miss = sparsity - target
    return multipliers[0] * miss + multipliers[1] * miss**2


@torch.no_grad()
def prune(student: Student, hard_concrete: HardConcrete) -> Student:
    """The student without what Eq. 8 closes; gates between 0 and 1 go into the weights behind them.

    It computes what the student with gates does, unless gates of the last convolution are closed:
    the LayerNorm behind it then averages over fewer channels (S6).
    """
    gates, shape, weights = hard_concrete.fixed(), student.shape, student.state_dict()

    def cut_outputs(name: str, z: Tensor) -> None:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in weights:
                weights[key] = weights[key][z > 0]

    def cut_inputs(name: str, z: Tensor) -> None:
        weight = weights[f"{name}.weight"][:, z > 0]  # outputs x inputs (x kernel)
        weights[f"{name}.weight"] = weight * z[z > 0].view(-1, *[1] * (weight.ndim - 2))

    convolutions = [f"feature_extractor.conv_layers.{i}.conv" for i in range(len(KERNELS))]
    for name, z in zip(convolutions, gates.channels, strict=True):
        cut_outputs(name, z)
    for name, z in zip(convolutions[1:], gates.channels, strict=False):
        cut_inputs(name, z)
    cut_outputs("feature_extractor.conv_layers.0.layer_norm", gates.channels[0])
    last = gates.channels[-1]
    weights["feature_extractor.scale"] = (weights["feature_extractor.scale"] * last)[last > 0]
    cut_outputs("feature_projection.layer_norm", last)
    cut_inputs("feature_projection.projection", (last > 0).to(last.dtype))
    for i, (heads, units) in enumerate(zip(gates.heads, gates.units, strict=True)):
        rows = heads.repeat_interleave(shape.width // shape.attention_heads)
        for name in ("q_proj", "k_proj", "v_proj"):
            cut_outputs(f"layers.{i}.attention.{name}", rows)
        cut_inputs(f"layers.{i}.attention.out_proj", rows)
        cut_outputs(f"layers.{i}.feed_forward.intermediate_dense", units)
        cut_inputs(f"layers.{i}.feed_forward.output_dense", units)

    left = replace(
        shape,
        conv_channels=tuple(int((z > 0).sum()) for z in gates.channels),
        kept_heads=tuple(
            tuple(number for number, z in zip(numbers, heads, strict=True) if z > 0)
            for numbers, heads in zip(shape.kept_heads, gates.heads, strict=True)
        ),
        feed_forward=tuple(int((z > 0).sum()) for z in gates.units),
    )
    pruned = Student(left, student.dropout.p).to(last.device, last.dtype)
    pruned.load_state_dict(weights)
    return pruned.train(student.training)


# ---- copy boundary: above this line the file needs torch only -----------------------------------


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def pruning_steps(config: Config) -> int:
    """Updates of act 3; the others are act 4's."""
    return 2 * config.steps // 3


def schedule(step: int, config: Config) -> float:
    """Factor on all learning rates: in each act linear from 0 to 1, then linear to 0.

    ``step`` counts from 1, over both acts.
    """
    steps, warmup = pruning_steps(config), config.warmup
    if step > steps:
        step, steps, warmup = step - steps, config.steps - steps, FINAL_WARMUP
    rising = max(1, round(warmup * steps))
    return step / rising if step <= rising else (steps - step) / (steps - rising)


def target_sparsity(step: int, config: Config) -> float:
    """tau of Eq. 10: linear from 0 at the first update to its final value."""
    rising = max(1, round(config.sparsity_warmup * pruning_steps(config)))
    return config.sparsity * min(1.0, (step - 1) / rising)


def read_groups(text: str, last: int) -> Groups:
    """Groups of layers up to ``last``: "0/1,2/4" -> [(0,), (1, 2), (4,)]."""
    try:
        groups = [tuple(int(layer) for layer in part.split(",")) for part in text.split("/")]
    except ValueError:
        groups = []
    layers = [layer for group in groups for layer in group]
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(last + 1)):
        raise InputError(
            f"--groups {text}: layers from 0 to {last}, each once at most, as in 0/1,2,3,4/8/9,10"
        )
    return groups


def name_groups(groups: Groups) -> str:
    """As --groups has them."""
    return "/".join(",".join(map(str, layers)) for layers in groups)


def teacher_shape(teacher: common.Teacher) -> Shape:
    """The shape of a student that has everything its teacher has."""
    sizes, layers = dict(teacher.shape), teacher.num_layers
    return Shape(
        conv_channels=(sizes.pop("conv_channels"),) * len(KERNELS),
        kept_heads=(tuple(range(sizes["attention_heads"])),) * layers,
        feed_forward=(sizes.pop("feed_forward"),) * layers,
        position_buckets=teacher.position_buckets,
        max_distance=teacher.max_distance,
        **sizes,
    )


def check(config: Config, teacher: common.Teacher) -> None:
    """Refuse, before any work, what cannot be done to this teacher."""
    layers = teacher.num_layers
    convs = [layer.conv for layer in teacher.model.feature_extractor.conv_layers]
    sizes = [(conv.kernel_size[0], conv.stride[0], conv.bias) for conv in convs]
    base = sizes == [(k, stride, None) for k, stride in zip(KERNELS, STRIDES, strict=True)]
    if teacher.pre_norm or teacher.normalise or not base:
        raise InputError(
            f"--teacher {teacher.name} cannot be pruned here: Base models only, post-norm and with "
            "one GroupNorm, without biases in convolutions, such as wavlm_base_plus or hubert_base"
        )
    if not 1 <= config.clusters <= layers:
        raise InputError(f"--clusters: {teacher.name} has {layers} Transformer layers")
    if config.calibration_utterances < 1:
        raise InputError("--calibration-utterances: at least one is needed")
    if config.groups not in ("", "random"):
        read_groups(config.groups, layers)
    shape = teacher_shape(teacher)
    smallest = count_size(shape, [1] * len(KERNELS), [0] * layers, [0] * layers)
    highest = math.floor(1000 * (1 - smallest / full_size(shape))) / 1000
    if config.sparsity > highest:
        raise InputError(
            f"--sparsity {config.sparsity}: with all gates closed {teacher.name} has a sparsity of "
            f"{highest:.3f}, more cannot be reached"
        )


def build(config: Config, teacher: common.Teacher) -> tuple[Student, Projections, HardConcrete]:
    """The student of act 3, which is a copy of its teacher, with projections and gates."""
    shape = teacher_shape(teacher)
    torch.manual_seed(config.seed)
    student = Student(shape, config.dropout)
    initialise_from_teacher(student, teacher.weights())
    device = next(teacher.parameters()).device
    projections, hard_concrete = Projections(shape.width), HardConcrete(shape)
    return student.to(device), projections.to(device), hard_concrete.to(device)


def load_student(path: Path | str, device: torch.device | str = "cpu") -> Student:
    """The student of a ``student.pt`` or ``pruned.pt``, in eval mode; else an InputError."""

    def make(saved: dict) -> Student:
        return Student(Shape(**saved["shape"]), Config(**saved["config"]).dropout)

    return common.load_student(path, "skill", make, device)


@torch.no_grad()
def teacher_states(teacher: common.Teacher, waveforms: Tensor) -> list[Tensor]:
    """Teacher layers 0 to L, (B, T, D) each; 0 is the output of the feature projection (S3)."""
    features, _ = teacher.model.feature_extractor(waveforms, None)
    x = teacher.model.encoder.feature_projection(features)
    with x.device:  # torchaudio would compute WavLM's position bias on the CPU
        return [x, *teacher.model.encoder.transformer.get_intermediate_outputs(x)]


def measure(config: Config, teacher: common.Teacher, utterances: list) -> Tensor:
    """Act 1: similarity (L + 1, L + 1) of the teacher's layers on some training utterances."""
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(utterances), generator=generator)[: config.calibration_utterances]
    longest = int(config.crop_seconds * common.SAMPLE_RATE)
    device, frames, sums, products = next(teacher.parameters()).device, 0, 0, 0
    for i in tqdm(chosen.tolist(), "act 1: measure", unit="file", disable=common.rank() > 0):
        piece, samples = utterances[i], min(longest, utterances[i].samples)
        waveform = common.load_audio(piece.path, piece.start, samples).to(device)
        new_frames, new_sums, new_products = layer_moments(teacher_states(teacher, waveform[None]))
        frames, sums, products = frames + new_frames, sums + new_sums, products + new_products
    similarity = centred_kernel_alignment(frames, sums, products).cpu()
    return common.average({"cka": similarity}, 1)["cka"]  # the same in all processes


def find_groups(config: Config, similarity: Tensor) -> Groups:
    """Act 2: the groups to distil; layer 0 is one of its own (S3)."""
    last = len(similarity) - 1
    if config.groups not in ("", "random"):
        return read_groups(config.groups, last)
    groups = agglomerate(similarity, range(1, last + 1), config.clusters)
    if config.groups == "random":  # of the same sizes
        generator = torch.Generator().manual_seed(config.seed)
        layers = iter((torch.randperm(last, generator=generator) + 1).tolist())
        groups = [tuple(sorted(next(layers) for _ in group)) for group in groups]
    return [(0,), *groups]


def start(
    config: Config, teacher: common.Teacher, training: list, saved: dict[str, Any] | None
) -> tuple[Groups, Student, Projections, HardConcrete | None]:
    """Acts 1 and 2, and what act 3 trains; or all this as it is in the checkpoint ``saved``."""
    student, projections, hard_concrete = build(config, teacher)
    if saved is None:
        similarity = measure(config, teacher, training)  # act 1
        groups = find_groups(config, similarity)  # act 2
        common.say(f"act 2: groups {name_groups(groups)}")
        found = json.dumps({"cka": similarity.tolist(), "groups": groups})
        common.write_text(Path(config.out) / "similarity.json", found)
    else:
        with common.reading(Path(config.out) / "last.pt"):
            groups = saved["groups"]
            if "hard_concrete" not in saved:  # stopped in act 4
                student = Student(Shape(**saved["shape"]), config.dropout)
                hard_concrete = None
    return groups, student.to(next(teacher.parameters()).device), projections, hard_concrete


def make_optimizer(
    config: Config, student: Student, projections: Projections, hard_concrete: HardConcrete | None
) -> torch.optim.AdamW:
    """Act 3 has three peak learning rates, act 4, without gates, has one."""
    weights = [p for p in [*student.parameters(), *projections.parameters()] if p.requires_grad]
    if hard_concrete is None:
        groups = [{"params": weights, "peak": FINAL_LR * config.lr}]
    else:
        groups = [
            {"params": weights, "peak": config.lr},
            {"params": [hard_concrete.log_alpha], "peak": config.gate_lr},
            {"params": [hard_concrete.multipliers], "peak": config.multiplier_lr, "maximize": True},
        ]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=0.0, fused=True)


def end_act_3(
    config: Config,
    student: Student,
    projections: Projections,
    hard_concrete: HardConcrete,
    groups: Groups,
) -> tuple[Student, Projections]:
    """The student and projections of act 4; ``pruned.pt`` has the student before it learns on."""
    pruned = prune(student, hard_concrete)
    sparsity = 1 - shape_size(pruned.shape) / full_size(student.shape)
    common.say(
        f"act 3: sparsity {sparsity:.4f}, target {config.sparsity}; "
        f"{common.count_parameters(pruned):,} parameters are left"
    )
    content = common.student_content("skill", config, pruned, groups=groups)
    path = Path(config.out) / "pruned.pt"
    common.write_atomically(path, lambda file: torch.save(content, file))
    projections_4 = Projections(pruned.shape.width)
    projections_4.load_state_dict(projections.state_dict())
    return pruned, projections_4.to(next(pruned.parameters()).device)


def train(config: Config, resume: bool = False) -> tuple[Student, Projections, list[dict]]:
    """The four acts in the run folder ``config.out``; returns student, projections and the log."""
    device, out = common.pick_device(config.device), Path(config.out)
    saved = common.open_run("skill", config, resume)
    with common.first_process_first():
        teacher = common.load_teacher(config.teacher, device)  # frozen, in eval mode
        check(config, teacher)
        utterances = common.scan(config.data, out / "scan.jsonl", config.workers)
    training, heldout = common.train_and_heldout(utterances)
    groups, student, projections, hard_concrete = start(config, teacher, training, saved)
    optimizer = make_optimizer(config, student, projections, hard_concrete)
    checkpointed = dict(projections=projections, optimizer=optimizer)
    if hard_concrete:
        checkpointed["hard_concrete"] = hard_concrete
    done, history = common.start_run(config, saved, state_dict=student, **checkpointed)

    batches = common.load_batches(
        training,
        config.batch_seconds,
        config.crop_seconds,
        seed=config.seed,
        first=done,
        last=config.steps,
        workers=config.workers,
    )
    forward, amp = common.speed_up(config, device, student, teacher)
    skipped = torch.zeros((), device=device)  # updates whose gradient was not finite
    bar = tqdm(desc="distil", total=config.steps, initial=done, disable=common.rank() > 0)
    for step, waveforms, stopping in common.updates(batches, done, bar):
        if step == pruning_steps(config) + 1:  # act 4 begins
            student, projections = end_act_3(config, student, projections, hard_concrete, groups)
            forward, _ = common.speed_up(config, device, student)
            hard_concrete = None
            optimizer = make_optimizer(config, student, projections, hard_concrete)
            checkpointed = dict(projections=projections, optimizer=optimizer)
        student.train()
        factor = schedule(step, config)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        optimizer.zero_grad(set_to_none=True)
        sums = {"loss": 0.0, "l1": 0.0, "cos": 0.0}
        for part in waveforms.chunk(config.accumulate):
            share = len(part) / len(waveforms)
            part = part.to(device, non_blocking=True)  # B x S
            gates = hard_concrete.sample() if hard_concrete else None  # S5: new ones for each part
            with torch.autocast(device.type, torch.bfloat16, amp):
                teacher_hidden = group_means(teacher_states(teacher, part), groups)
                student_hidden = group_means(forward(part, gates=gates)[0], groups)
                predicted = projections(student_hidden, groups)  # like both above G x B x T x D
                loss, terms = distillation_loss(predicted, teacher_hidden)
            (share * loss).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + share * value
        if hard_concrete:
            size, target = hard_concrete.expected_size(student.shape), target_sparsity(step, config)
            sparsity = 1 - size / full_size(student.shape)
            penalty = sparsity_loss(sparsity, target, hard_concrete.multipliers)
            penalty.backward()
            sums["loss"] = sums["loss"] + penalty.detach()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        common.sum_gradients(parameters, len(waveforms))  # over all processes
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.found_inf = (~norm.isfinite()).float()  # where it is 1, nothing is updated
        skipped += optimizer.found_inf
        optimizer.step()

        saving = step % config.save_every == 0 or step in (pruning_steps(config), config.steps)
        if saving or step % config.log_every == 0:
            sums = common.average(sums, len(waveforms))
            lr = optimizer.param_groups[0]["lr"]
            line = {"step": step, "act": 3 if hard_concrete else 4, "lr": lr}
            line |= {"grad_norm": norm.item(), "loss": sums["loss"].item()}
            if hard_concrete:
                line |= {"sparsity": sparsity.item(), "target": target, "size": round(size.item())}
                line["lambda1"], line["lambda2"] = hard_concrete.multipliers.tolist()
            for name in ("l1", "cos"):
                for layers, value in zip(groups, sums[name], strict=True):
                    line[f"{name}_{name_groups([layers])}"] = value.item()
            if saving and common.rank() == 0:
                line["heldout"] = distance(
                    config, teacher, student, projections, hard_concrete, groups, heldout
                )
            common.write_log(config, history, line, skipped)
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        if saving or stopping:
            content = common.student_content("skill", config, student, groups=groups)
            whole = hard_concrete is None
            common.save_run(config, content, step, history, whole=whole, **checkpointed)
    return student.eval(), projections, history


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def score(
    student: Student, tasks: list, device: torch.device, seed: int, speed: float | None = None
) -> dict[str, float]:
    """Size, speed and probes on the student's features: all layers, as in DPHuBERT."""
    return common.score(
        student, lambda waveforms: student(waveforms)[0], tasks, device, seed, speed
    )


def distance(
    config: Config,
    teacher: common.Teacher,
    student: Student,
    projections: Projections,
    hard_concrete: HardConcrete | None,
    groups: Groups,
    heldout: list,
) -> dict[str, list[float]]:
    """L1 and cosine of each group on held-out audio, in eval mode, with the gates of Eq. 8."""
    student.eval()
    gates = hard_concrete.fixed() if hard_concrete else None
    return common.layer_distance(
        lambda waves: projections(group_means(student(waves, gates=gates)[0], groups), groups),
        lambda waves: group_means(teacher_states(teacher, waves), groups),
        common.heldout_batches(
            heldout, config.batch_seconds, config.crop_seconds, config.accumulate
        ),
        next(student.parameters()).device,
    )


def evaluate(
    config: Config, student: Student, projections: Projections, baselines: bool = True
) -> dict[str, dict[str, float]]:
    """Rows of the table: the distilled student and, as ``baselines``, its teacher, a student of the
    same shape with random weights, and the pruned student before act 4.

    Columns: parameters, MACs and speed; L1 and cosine of student and teacher on held-out audio,
    averaged over the Transformer layers; the cosine of the layers that DPHuBERT picks, and of the
    others; probes on frozen features. ``layers.json`` has L1 and cosine of each layer. The
    ``projections`` are dropped: states are compared as users get them.
    """
    device = next(student.parameters()).device
    utterances = common.scan(config.data, Path(config.out) / "scan.jsonl", config.workers)
    tasks, (_, heldout) = common.find_tasks(utterances), common.train_and_heldout(utterances)
    teacher = common.load_teacher(config.teacher, device)
    student.eval()
    timed = {"teacher": teacher, "student": lambda waveforms: student(waveforms)[0]}
    speeds = common.measure_speed(timed, device)
    speed = speeds["student"] / speeds["teacher"]
    models, rows, layers = {"distilled": student}, {}, {}
    if baselines:
        rows["teacher"] = common.score(teacher.model, teacher, tasks, device, config.seed, 1.0)
        torch.manual_seed(config.seed)
        untrained = Student(student.shape, config.dropout).to(device)
        pruned = load_student(Path(config.out) / "pruned.pt", device)
        models = {"untrained": untrained, "pruned": pruned} | models
    single = [(layer,) for layer in range(teacher.num_layers + 1)]
    identity = Projections(student.shape.width).to(device)
    for name, model in models.items():
        layers[name] = distance(config, teacher, model, identity, None, single, heldout)
        rows[name] = {column: fmean(values[1:]) for column, values in layers[name].items()}
        rows[name] |= score(model, tasks, device, config.seed, speed)
        if teacher.num_layers >= max(PICKED):
            cosines = layers[name]["cosine"]
            others = [value for layer, value in enumerate(cosines) if layer not in (0, *PICKED)]
            rows[name]["cosine, layers 4 8 12"] = fmean(cosines[layer] for layer in PICKED)
            rows[name]["cosine, other layers"] = fmean(others)
    common.write_text(Path(config.out) / "layers.json", json.dumps(layers, indent=1))
    return rows


def describe(config: Config) -> dict[str, dict[str, float]]:
    """WavLM Base+ part by part: parameters, MACs per second of audio; and what is to be left."""
    shape = Shape()
    student = Student(shape, config.dropout).eval()
    left = round((1 - config.sparsity) * full_size(shape))
    title = f"left at sparsity {config.sparsity:g}"
    return common.describe([student], student) | {title: {"parameters": left}}


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the flags and do what they say; results go to stdout, progress to stderr."""
    config, args = common.parse_flags(Config, TOY, __doc__)
    if args.describe:
        print(common.format_table(describe(config)))
    elif args.evaluate:
        print(common.score_file(load_student, score, config, args))
    else:
        print(common.make_table(train, evaluate, config, args, CLAIM))


if __name__ == "__main__":
    main()
