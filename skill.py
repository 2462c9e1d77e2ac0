# SPDX-License-Identifier: MIT
"""SKILL: distil groups of similar teacher layers while pruning the student to size, then again.

Paper
-----
L. Zampierin, G. Boukli Hacene, B. Nguyen, M. Ravanelli, "SKILL: Similarity-aware Knowledge
distILLation for Speech Self-Supervised Learning", SASB workshop at ICASSP 2024, arXiv 2402.16830.
It builds on Y. Peng, Y. Sudo, S. Muhammad, S. Watanabe, "DPHuBERT: Joint Distillation and Pruning
of Self-Supervised Speech Models", Interspeech 2023, arXiv 2305.17651, code: pyf98/DPHuBERT.

Idea
----
DPHuBERT takes the whole teacher as the student, hangs a gate on every convolution channel,
attention head and feed-forward unit, and lets distillation decide which quarter of the weights to
keep. It compares student and teacher at layers 0, 4, 8 and 12, picked by hand, and so says nothing
about those between. SKILL looks first which layers of the teacher are alike, and distils the mean
of each group of similar layers: no layer is left out.

    act 1  measure           teacher on some utterances -> how similar is layer i to layer j?
    act 2  group             similarity -> join the most similar layers until K groups are left
    act 3  distil and prune  copy of the teacher + gates -> a quarter of its weights
    act 4  distil again      the small student, without gates, goes on learning

Equations
---------
Numbered by us. CKA (1), clustering (2) and the mean of a group (3) are SKILL's, as others tell it;
the kernel, the distance and the student's side (4) are ours (S1, S4, S7); (5) to (10) are those of
DPHuBERT's code. X, Y: frames of two layers (N x D), centred; g: a group of layers; T_l, S_l:
teacher and student state of layer l (B x T x D); a: the log alpha of a gate, n gates in a vector;
beta = 2/3, l = -0.1, r = 1.1; c_0 = 1.

    (1)  CKA(X, Y) = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)                 similarity of two layers
    (2)  d(A, B) = mean over a in A, b in B of 1 - CKA(a, b)             distance of two groups
    (3)  t_g = 1/|g| sum_{l in g} T_l                                    target
    (4)  p_g = W (1/|g| sum_{l in g} S_l) + b                            prediction
    (5)  L_dis = mean_{g,b,t,d} |p_g - t_g| - mean_{g,b,t} cos(p_g, t_g)
    (6)  z = clamp(s (r - l) + l, 0, 1),  s = sigmoid((log u - log(1-u) + a) / beta),  u uniform
    (7)  E[open gates] = sum sigmoid(a - beta log(-l/r))
    (8)  z = sigmoid(0.8 a / beta), the round(n - (7)) smallest of a vector set to 0
    (9)  N = sum_i k_i c_{i-1} c_i + 2 c_1 + 771 c_7 + sum_j (196,800 h_j + 1,537 f_j) + 4,777,088
    (10)  L = L_dis + lambda1 (rho - rho_t) + lambda2 (rho - rho_t)^2,  rho = 1 - N / N_teacher

(6) draws the gates while training, (8) fixes them. (9) counts WavLM Base's c_i channels of kernel
k_i, h_j heads and f_j units, each a number or (7). Weights and gates descend on (10), lambda1 and
lambda2 ascend: lambda1 moves with the sign of rho - rho_t, lambda2 only grows, so that missing the
target sparsity rho_t for long costs ever more.

Paper vs this code
------------------
Of SKILL only title, abstract and the start of the introduction could be read, the rest is second
hand (reviews), and no code is public. "Code" is DPHuBERT's. D: done otherwise than there. S: SKILL
is silent or could not be had on this; what is here is DPHuBERT's choice or ours.

id  topic            paper or DPHuBERT's code            here                     why
D1  batch            code: 2 to 15.6 s, others dropped,  640 s of audio, drawn    as in the other
                     fixed groups of similar length,     anew, each cut to one    files
                     4 x 160 s, same order each epoch    of 15.6 s x 0.8^n
D2  precision        code: fp16                          bf16; size and loss in   no loss scaling
                                                         fp32
D3  empty block      code: without heads or units a      its output bias stays    pruned = masked
                     block goes, with its bias
D4  position bias    code: in the attention of layer 1,  outside of all           layer 1 may lose
                     gone if that loses all heads        attention                all heads
D5  last channel     code: fails if a convolution loses  the strongest one stays  no failure at the
                     all channels                                                 end
D6  missed target    code: takes the size as it comes    a miss of more than .01  the size is the
                                                         stops the run            point
D7  held out         code: dev-clean and dev-other       10 minutes of dev, or    any data
                                                         of 1 % of the files
D8  evaluation       SUPERB                              probes of common.py      minutes, not days
S1  kernel           CKA (second hand)                   linear, biased           the usual one
S2  sample           unknown                             a frame                  no pooling
S3  calibration set  "small" (second hand)               500 training utterances  toy: halves of
                                                                                  100 differ by .01
S4  linkage          hierarchical (abstract)             1 - CKA, average
S5  groups           number unknown                      3 for layers 1 to L      as 4, 8, 12
S6  layer 0          code: feature projection, before    as the code; a group by
                     the positional convolution          itself
S7  student side     unknown                             mean of the same layers  no forced twins
S8  projections      code: Linear, identity at first,    as the code
                     layer 0 has its own
S9  loss             code: (5), over singletons          (5), over groups
S10  recipe          code: updates, rates, schedules     as the code
S11  gates           code: start at a mean of .99,       as the code
                     units at .5; new ones for each
                     part of a batch
S12  dropout         code: stays on in the student       as the code
S13  conv 7          code: its LayerNorm sees what is    as the code              act 4 repairs it
                     left, so pruned is not masked
S14  size            code: N without the position bias,  as the code
                     N_teacher with it

Run
---
    python skill.py --toy                       # offline, minutes on a CPU
    python skill.py --data LibriSpeech          # the recipe, WavLM Base+ is downloaded
    python skill.py --toy --claim               # similar, hand-picked and random layers, 3 seeds

--stage measure (or prune) stops after act 2 (or 3), --resume goes on with a stopped run; --groups
0/4/8/12 is DPHuBERT, 0/1,2,3,4/5,6,7,8 other groups; --describe, --evaluate, --help as everywhere.
In Python:
``student = load_student("RUN/student.pt")``.

Result
------
Toy world, 360 updates of 4 s, one CPU core, 3 seeds: phones per frame .860 after act 4 and .853
before it (teacher .878, untrained .336) with 25 % of the parameters and twice the speed. Layers
that nobody picked are closer to the teacher than with hand-picked layers (cosine .955 against .950
with 85 % pruned; real recordings .947 against .939); probes are a tie. The recipe's 75,000 updates:
not yet run.

Copy
----
Everything from Config down to the copy boundary needs torch alone: leave the imports of common out.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

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
    stage: Literal["measure", "prune", "distil"] = "distil"  # last act to run: 2, 3 or 4 (ours)
    seed: int = 0  # of calibration set, gates, dropout, crops and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 4  # processes that load audio
    calibration_utterances: int = 500  # that act 1 listens to (S3)
    clusters: int = 3  # groups of Transformer layers; layer 0 is one more (S5)
    groups: str = ""  # empty: found by similarity; random; or by hand, as in 0/1,2,3,4/8/9,10
    sparsity: float = 0.75  # share of the teacher's parameters that goes (code)
    tolerance: float = 0.01  # largest miss of the sparsity after act 3 (ours, D6)
    sparsity_warmup: float = 0.1  # share of act 3 over which the target rises (code: 5,000)
    gate_lr: float = 0.02  # peak learning rate of the gates (code)
    multiplier_lr: float = 0.02  # peak learning rate of lambda1 and lambda2 (code)
    dropout: float = 0.1  # after projection, positional conv, attention and feed-forward (code)
    steps: int = 75_000  # updates: two thirds in act 3, one third in act 4 (code, S10)
    lr: float = 2e-4  # peak learning rate of act 3 (code)
    warmup: float = 0.3  # share of act 3 before the peak; linear up, linear down (code)
    final_lr: float = 1e-4  # peak learning rate of act 4 (code)
    final_warmup: float = 0.2  # share of act 4 before the peak (code)
    batch_seconds: float = 640.0  # audio per update: 4 GPUs with 160 s each (code, D1)
    crop_seconds: float = 15.625  # longest crop: 250,000 samples (code: longest utterance, D1)
    accumulate: int = 4  # parts a batch is cut into to save memory (ours)
    betas: tuple[float, ...] = (0.9, 0.999)  # of AdamW, without weight decay (code)
    eps: float = 1e-8  # of AdamW (code)
    clip: float = 10.0  # largest norm of the gradient, gates and lambdas included (code)
    amp: bool | None = None  # bf16 autocast; None: on GPUs that have bf16 (D2)
    compile: bool = False  # torch.compile: slow at first, then faster (ours)
    log_every: int = 50  # updates between two lines of the log (ours)
    save_every: int = 1_000  # updates between checkpoints with held-out distance (ours, D7)


# --toy: the same method on the toy world, for minutes on two CPU cores instead of days on a GPU.
# In few updates gates must go far, hence the high rates. With inertia (betas) the size would swing
# past its target. Twenty nearly closed heads of 0.02 count as 0.4 of a head in Eq. 7, and Eq. 8
# rounds that to none: a target that rises slowly (sparsity_warmup) gives gates time to close fully.
TOY = dict(
    teacher="toy",
    out="runs/skill-toy",
    workers=0,
    calibration_utterances=100,
    sparsity_warmup=0.5,
    gate_lr=1.5,
    multiplier_lr=6.0,
    betas=(0.3, 0.9),
    steps=360,
    lr=2e-3,
    warmup=0.1,
    final_lr=1e-3,
    batch_seconds=4.0,
    crop_seconds=3.0,
    accumulate=1,
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

KERNELS = (10, 3, 3, 3, 3, 2, 2)  # of the seven convolutions of every HuBERT and WavLM
STRIDES = (5, 2, 2, 2, 2, 2, 2)
BETA = 2 / 3  # temperature of the hard-concrete gates (code)
LEFT = -0.1  # they are stretched from (0, 1) to (LEFT, RIGHT) and clamped (code)
RIGHT = 1.1
PICKED = (4, 8, 12)  # Transformer layers that DPHuBERT distils


@dataclass
class Shape:
    """What is left of each layer. The default is WavLM Base+ itself: everything."""

    conv_channels: tuple[int, ...] = (512,) * 7
    width: int = 768
    attention_heads: int = 12  # of the teacher; a head has width / attention_heads channels
    heads: tuple[tuple[int, ...], ...] = (tuple(range(12)),) * 12  # numbers of those kept
    feed_forward: tuple[int, ...] = (3072,) * 12
    position_kernel: int = 128
    position_groups: int = 16
    position_buckets: int = 320  # of WavLM's relative position; HuBERT has 0
    max_distance: int = 800  # frames; all that are further away share a bucket


class Masks(NamedTuple):
    """A gate value for each channel, head and unit, one vector for each layer."""

    channels: Sequence[Tensor]
    heads: Sequence[Tensor]
    units: Sequence[Tensor]


# ------------------------------------------------------------------------------------------------
# Student
# ------------------------------------------------------------------------------------------------

Maybe = Tensor | None
Groups = list[tuple[int, ...]]  # of layers, [(0,), (1, 2, 3), ...]


class Linear(nn.Linear):
    """With BERT's random start; it may have no inputs, or no outputs."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class PrunableConvs(nn.Module):
    """Seven convolutions, each as wide as it is left: (B, S) at 16 kHz -> (B, T, C) at 50 Hz."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(inputs, outputs, kernel, stride, bias=False)
            for inputs, outputs, kernel, stride in zip(
                (1, *channels), channels, KERNELS, STRIDES, strict=False
            )
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
        self.group_norm = nn.GroupNorm(channels[0], channels[0])  # each channel over the utterance
        # What the gates of the last convolution were: no weight behind it could take that up.
        self.scale = nn.Parameter(torch.ones(channels[-1]), requires_grad=False)

    def forward(self, waveforms: Tensor, masks: list[Tensor] | None) -> Tensor:
        x = waveforms[:, None]  # B x 1 x S
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = F.gelu(self.group_norm(x) if i == 0 else x)
            if masks is not None:
                x = x * masks[i].to(x.dtype)[:, None]
        return x.transpose(1, 2) * self.scale  # B x T x C

    def frames(self, samples: Tensor) -> Tensor:
        """Valid frames of so many valid samples."""
        for conv in self.convs:
            samples = (samples - conv.kernel_size[0]) // conv.stride[0] + 1
        return samples


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


class PositionBias(nn.Module):
    """WavLM's bias for each head and distance of two frames, from T to (heads, T, T).

    All layers share it, and it belongs to none, so that each may lose all its heads (D4). Near
    distances have a bucket each, far ones share buckets that widen logarithmically.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.buckets, self.max_distance = shape.position_buckets, shape.max_distance
        self.embedding = nn.Embedding(shape.position_buckets, shape.attention_heads)

    def forward(self, frames: int) -> Tensor:
        time = torch.arange(frames, device=self.embedding.weight.device)
        offset = time[None, :] - time[:, None]  # key - query, T x T
        half = self.buckets // 2  # one half for keys before the query, one for those behind it
        near, distance = half // 2, offset.abs()
        log = (distance.clamp(min=1) / near).log() / math.log(self.max_distance / near)
        far = (near + (log * (half - near)).long()).clamp(max=half - 1)
        bucket = torch.where(distance < near, distance, far) + half * (offset > 0)
        return self.embedding(bucket).permute(2, 0, 1)  # heads x T x T


class Attention(nn.Module):
    """Self-attention of the heads that are kept: (B, T, D) -> (B, T, D).

    With a position bias it is WavLM's, without one HuBERT's. It serves the copy of the teacher,
    the student with gates and the pruned student alike.
    """

    def __init__(self, shape: Shape, keep: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.all_heads, self.dropout = shape.attention_heads, dropout
        self.head_width = shape.width // shape.attention_heads
        numbers = torch.tensor(keep, dtype=torch.long, device="cpu")  # also on the meta device
        self.register_buffer("keep", numbers, persistent=False)
        inner = len(keep) * self.head_width
        self.q_proj, self.k_proj = Linear(shape.width, inner), Linear(shape.width, inner)
        self.v_proj, self.out_proj = Linear(shape.width, inner), Linear(inner, shape.width)
        if shape.position_buckets:
            self.bias_gate = Linear(self.head_width, 8)
            self.bias_constant = nn.Parameter(torch.ones(shape.attention_heads))

    def gated_bias(self, x: Tensor, position_bias: Tensor) -> Tensor:
        """WavLM: each frame scales the bias, (heads, T, T) -> (B, kept heads, T, T).

        The gate sees the layer's input cut into one chunk for each head, not the queries, so a
        head takes its number with it when others are pruned.
        """
        gates = self.bias_gate(x.unflatten(-1, (self.all_heads, -1)))  # B x T x heads x 8
        gates = gates.unflatten(-1, (2, 4)).sum(-1).sigmoid()[:, :, self.keep]
        first, second = gates.unbind(-1)  # B x T x kept
        factor = first * (second * self.bias_constant[self.keep] - 1) + 2
        factor = factor.transpose(1, 2)[..., None].to(position_bias.dtype)
        return factor * position_bias[self.keep]

    def forward(self, x: Tensor, mask: Maybe, position_bias: Maybe, gate: Maybe) -> Tensor:
        """``mask`` (B, 1, 1, T) is True at frames that may be attended to; None: all may."""
        if len(self.keep) == 0:
            return torch.zeros_like(x) + self.out_proj.bias  # D3
        q, k, v = (
            project(x)
            .unflatten(-1, (-1, self.head_width))
            .transpose(1, 2)  # B x kept x T x D/heads
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_bias is not None:
            # As precise as q: its product with the gates is B x heads x T x T.
            bias = self.gated_bias(x, position_bias.to(q.dtype))
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        if gate is not None:
            y = y * gate.to(y.dtype)[:, None, None]
        return self.out_proj(y.transpose(1, 2).flatten(2))  # B x T x D


class TransformerLayer(nn.Module):
    """Post-norm Transformer layer: (B, T, D) -> (B, T, D)."""

    def __init__(self, shape: Shape, number: int, dropout: float) -> None:
        super().__init__()
        width, units = shape.width, shape.feed_forward[number]
        self.dropout = dropout
        self.attention = Attention(shape, shape.heads[number], dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.up, self.down = Linear(width, units), Linear(units, width)
        self.final_norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, mask: Maybe, position_bias: Maybe, gates: Sequence[Maybe]
    ) -> Tensor:
        rate, (head_gate, unit_gate) = self.dropout if self.training else 0.0, gates
        y = self.attention(x, mask, position_bias, head_gate)
        x = self.attention_norm(x + F.dropout(y, rate))
        y = F.gelu(self.up(x))  # B x T x units
        if unit_gate is not None:
            y = y * unit_gate.to(y.dtype)
        return self.final_norm(x + F.dropout(self.down(y), rate))


class Student(nn.Module):
    """The teacher's architecture with its own width in each layer; gates come from outside."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.feature_extractor = PrunableConvs(shape.conv_channels)
        self.feature_norm = nn.LayerNorm(shape.conv_channels[-1])  # over what is left: S13
        self.projection = Linear(shape.conv_channels[-1], shape.width)
        self.positional_conv = PositionalConv(shape)
        self.norm = nn.LayerNorm(shape.width)
        self.position_bias = PositionBias(shape) if shape.position_buckets else None
        self.layers = nn.ModuleList(
            TransformerLayer(shape, number, dropout) for number in range(len(shape.heads))
        )

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None, masks: Masks | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states [(B, T, D)] and their lengths (B,).

        ``waveforms`` (B, S) at 16 kHz, not normalised; ``lengths`` (B,) valid samples of a
        right-padded batch, None where nothing is padded; ``masks`` in act 3 only. Entry 0 is the
        projection of the convolutions, before the positional one (S6); entry i the output of
        layer i.
        """
        x = self.feature_extractor(waveforms, None if masks is None else masks.channels)
        x = self.projection(self.feature_norm(x))  # B x T x D
        x = F.dropout(x, self.dropout, self.training)  # S12
        mask = None
        if lengths is not None:
            lengths = self.feature_extractor.frames(lengths)
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # B x T
            x = x * valid[:, :, None]
            mask = valid[:, None, None, :]
        hidden_states = [x]
        x = self.norm(x + self.positional_conv(x))
        x = F.dropout(x, self.dropout, self.training)
        bias = self.position_bias(x.shape[1]) if self.position_bias is not None else None
        for i, layer in enumerate(self.layers):
            gates = (None, None) if masks is None else (masks.heads[i], masks.units[i])
            x = layer(x, mask, bias, gates)
            hidden_states.append(x)
        return hidden_states, lengths


@torch.no_grad()
def initialise_from_teacher(student: Student, teacher: nn.Module) -> None:
    """Copy every weight: with dropout off and all gates open the student is its teacher.

    ``teacher`` is a torchaudio Wav2Vec2Model like HuBERT Base or WavLM Base: GroupNorm, post-norm.
    """
    ours, theirs = student.feature_extractor, teacher.feature_extractor.conv_layers
    for conv, block in zip(ours.convs, theirs, strict=True):
        conv.load_state_dict(block.conv.state_dict())
    ours.group_norm.load_state_dict(theirs[0].layer_norm.state_dict())
    nn.init.ones_(ours.scale)
    projection, transformer = teacher.encoder.feature_projection, teacher.encoder.transformer
    student.feature_norm.load_state_dict(projection.layer_norm.state_dict())
    student.projection.load_state_dict(projection.projection.state_dict())
    student.positional_conv.load_state_dict(transformer.pos_conv_embed.state_dict())
    student.norm.load_state_dict(transformer.layer_norm.state_dict())
    for layer, source in zip(student.layers, transformer.layers, strict=True):
        attention, names = source.attention, ("q_proj", "k_proj", "v_proj")
        if student.position_bias is not None:  # WavLM keeps q, k and v in one matrix
            layer.attention.bias_gate.load_state_dict(attention.gru_rel_pos_linear.state_dict())
            layer.attention.bias_constant.copy_(attention.gru_rel_pos_const.flatten())
            attention = attention.attention
            weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
            for name, weight, bias in zip(names, weights, biases, strict=True):
                getattr(layer.attention, name).load_state_dict({"weight": weight, "bias": bias})
        else:
            for name in names:
                state = getattr(attention, name).state_dict()
                getattr(layer.attention, name).load_state_dict(state)
        layer.attention.out_proj.load_state_dict(attention.out_proj.state_dict())
        layer.attention_norm.load_state_dict(source.layer_norm.state_dict())
        layer.up.load_state_dict(source.feed_forward.intermediate_dense.state_dict())
        layer.down.load_state_dict(source.feed_forward.output_dense.state_dict())
        layer.final_norm.load_state_dict(source.final_layer_norm.state_dict())
    if student.position_bias is not None:  # torchaudio keeps it in layer 1
        embedding = transformer.layers[0].attention.rel_attn_embed
        student.position_bias.embedding.load_state_dict(embedding.state_dict())


# ------------------------------------------------------------------------------------------------
# Gates and size
# ------------------------------------------------------------------------------------------------


def sample_gate(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Eq. 6: ``u`` uniform in (0, 1) -> a gate in [0, 1] that is often exactly 0 or 1."""
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (s * (RIGHT - LEFT) + LEFT).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Eq. 7 before the sum: how probably Eq. 6 does not close a gate."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LEFT / RIGHT))


def fixed_gate(log_alpha: Tensor, at_least: int = 0) -> Tensor:
    """Eq. 8: gates without noise. As many close as Eq. 7 expects, the others keep soft values."""
    closed = round(len(log_alpha) - float(open_probability(log_alpha).sum()))
    z = torch.sigmoid(0.8 * log_alpha / BETA).clamp(min=1e-30)  # only what is closed is 0
    return z.index_fill(0, z.argsort(stable=True)[: min(closed, len(z) - at_least)], 0.0)


class Gates(nn.Module):
    """The log alphas of all gates, and the two multipliers of Eq. 10. Training only."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        heads, units = [len(keep) for keep in shape.heads], [*shape.feed_forward]
        self.lengths = [*shape.conv_channels, *heads, *units]  # of the 7 + L + L vectors
        self.layers = len(heads)
        closed = torch.full((sum(self.lengths),), 0.01)
        closed[len(closed) - sum(units) :] = 0.5  # S11
        self.log_alpha = nn.Parameter(torch.randn_like(closed) * 0.01 - closed.logit())
        self.multipliers = nn.Parameter(torch.zeros(2))

    def split(self, values: Tensor) -> Masks:
        """(all gates,) -> a vector for each layer, by kind."""
        vectors = values.split(self.lengths)
        return Masks(vectors[:7], vectors[7 : 7 + self.layers], vectors[7 + self.layers :])

    def sample(self) -> Masks:
        """Gates of one forward pass, the same for all its utterances and frames: S11."""
        u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
        return self.split(sample_gate(self.log_alpha, u))

    @torch.no_grad()
    def fixed(self) -> Masks:
        """Gates of evaluation and pruning; a convolution keeps a channel at least (D5)."""
        channels, heads, units = self.split(self.log_alpha)
        channels = [fixed_gate(a, at_least=1) for a in channels]
        return Masks(channels, [fixed_gate(a) for a in heads], [fixed_gate(a) for a in units])

    def size(self, shape: Shape) -> Tensor:
        """Parameters that Eq. 6 leaves on average: Eq. 9 of Eq. 7."""
        probabilities = self.split(open_probability(self.log_alpha))
        return count_size(shape, *([p.sum() for p in kind] for kind in probabilities))


def count_size(shape: Shape, channels: list, heads: list, units: list) -> Any:
    """Eq. 9: parameters of a student with so many channels, heads and units in its layers.

    Numbers or tensors. WavLM's position bias is not in it (S14).
    """
    width, head_width = shape.width, shape.width // shape.attention_heads
    sizes = zip(KERNELS, (1, *channels), channels, strict=False)
    convs = sum(kernel * inputs * outputs for kernel, inputs, outputs in sizes)
    convs = convs + 2 * channels[0] + channels[-1]  # GroupNorm, scale vector
    projection = 2 * channels[-1] + width * (channels[-1] + 1)  # LayerNorm, Linear
    kernel = shape.position_kernel  # of the positional convolution: gain, weight, bias; LayerNorm
    position = kernel + width * (width // shape.position_groups) * kernel + width + 2 * width
    head = 4 * width * head_width + 3 * head_width  # q, k, v, out; biases of q, k, v
    unit = 2 * width + 1  # a row and its bias, a column
    layers = [head * h + unit * f + 2 * width for h, f in zip(heads, units, strict=True)]
    return convs + projection + position + sum(layers) + 4 * width * len(layers)  # two LayerNorms


def shape_size(shape: Shape) -> int:
    """Eq. 9 of what a student has."""
    heads = [len(keep) for keep in shape.heads]
    return count_size(shape, [*shape.conv_channels], heads, [*shape.feed_forward])


def full_size(shape: Shape) -> int:
    """N_teacher of Eq. 10: everything open, and the position bias as well (S14)."""
    heads, layers = shape.attention_heads, len(shape.heads)
    bias = shape.position_buckets * heads + layers * (8 * (shape.width // heads) + 8 + heads)
    return shape_size(shape) + (bias if shape.position_buckets else 0)


def sparsity_loss(sparsity: Tensor, target: float, multipliers: Tensor) -> Tensor:
    """The part of Eq. 10 after L_dis: an augmented Lagrangian, 0 where the target is met."""
    miss = sparsity - target
    return multipliers[0] * miss + multipliers[1] * miss**2


@torch.no_grad()
def materialise(student: Student, gates: Gates) -> Student:
    """The pruned student: what Eq. 8 closes is gone, soft values are in the weights behind them.

    With the gates of convolution 7 open it computes what the masked student does. Otherwise its
    LayerNorm sees fewer channels than before (S13).
    """
    masks, before = gates.fixed(), student.shape
    channels, heads, units = ([z.nonzero()[:, 0] for z in kind] for kind in masks)
    kept = [tuple(keep[i] for i in open_) for keep, open_ in zip(before.heads, heads, strict=True)]
    widths = dict(conv_channels=tuple(map(len, channels)), feed_forward=tuple(map(len, units)))
    shape = replace(before, heads=tuple(kept), **widths)
    state = dict(student.state_dict())

    def cut(name: str, outputs: Any = None, inputs: Any = None, gain: Any = None) -> None:
        """Keep these outputs of a module, and these inputs, each times its gain."""
        for key in (f"{name}.weight", f"{name}.bias"):
            if outputs is not None and key in state:
                state[key] = state[key][outputs]
        if inputs is not None:
            weight = state[f"{name}.weight"][:, inputs]  # out x in, and a kernel if it is a conv
            state[f"{name}.weight"] = weight * gain.view(-1, *[1] * (weight.ndim - 2))

    inputs, gain = None, None  # the waveform has no gate
    for i, (keep, z) in enumerate(zip(channels, masks.channels, strict=True)):
        cut(f"feature_extractor.convs.{i}", keep, inputs, gain)
        inputs, gain = keep, z[keep]
    cut("feature_extractor.group_norm", channels[0])
    state["feature_extractor.scale"] = state["feature_extractor.scale"][inputs] * gain
    cut("feature_norm", inputs)
    cut("projection", None, inputs, torch.ones_like(gain))
    width = before.width // before.attention_heads
    for i in range(len(heads)):
        rows = (heads[i][:, None] * width + torch.arange(width, device=gain.device)).flatten()
        for name in ("q_proj", "k_proj", "v_proj"):
            cut(f"layers.{i}.attention.{name}", rows)
        gain = masks.heads[i][heads[i]].repeat_interleave(width)
        cut(f"layers.{i}.attention.out_proj", None, rows, gain)
        cut(f"layers.{i}.up", units[i])
        cut(f"layers.{i}.down", None, units[i], masks.units[i][units[i]])
    small = Student(shape, student.dropout).to(gain)
    small.load_state_dict(state)
    return small


# ------------------------------------------------------------------------------------------------
# Similarity and groups
# ------------------------------------------------------------------------------------------------


def layer_moments(hidden_states: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What Eq. 1 needs of L layers (B, T, D), in float64: frames, sums (L, D), products (LD, LD).

    Moments of several batches may be added: no frame need be kept, but 0.8 GB of products for a
    Base model, and Eq. 1 takes 2.6 GB. A sample is a frame (S2).
    """
    x = torch.stack([h.flatten(0, 1) for h in hidden_states], 1).double()  # BT x L x D
    flat = x.flatten(1)  # BT x LD
    return torch.tensor(len(x), dtype=x.dtype, device=x.device), x.sum(0), flat.T @ flat


def centred_kernel_alignment(frames: Tensor, sums: Tensor, products: Tensor) -> Tensor:
    """Eq. 1 with a linear kernel (S1) for each pair of layers: (L, L), between 0 and 1."""
    layers, width = sums.shape
    flat = sums.flatten()
    centred = products - flat[:, None] * (flat / frames)  # Y'X of centred frames, LD x LD
    power = centred.unflatten(0, (layers, width)).unflatten(2, (layers, width)).square()
    power = power.sum((1, 3))  # ||Y'X||_F^2, L x L
    return power / (power.diagonal()[:, None] * power.diagonal()).sqrt()


def agglomerate(distance: Tensor, clusters: int) -> tuple[list[list[int]], list[tuple]]:
    """Join the two nearest groups until ``clusters`` are left: (groups, merges).

    ``distance`` (n, n). A merge is (height, members of one group, members of the other); ties go
    to the lowest items.
    """
    groups, merges = [[i] for i in range(len(distance))], []
    while len(groups) > clusters:
        pairs = []
        for i, first in enumerate(groups):
            for second in groups[i + 1 :]:
                linkage = float(distance[first][:, second].mean())  # Eq. 2, average linkage: S4
                pairs.append((linkage, first, second))
        height, first, second = min(pairs)
        merges.append((height, first, second))
        groups = [g for g in groups if g not in (first, second)]
        groups = sorted([*groups, sorted(first + second)])
    return groups, merges


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def group_means(hidden_states: list[Tensor], groups: Groups) -> Tensor:
    """Eq. 3, and the student's side of Eq. 4 (S7): layers (B, T, D) -> (G, B, T, D)."""
    return torch.stack([sum(hidden_states[i] for i in group) / len(group) for group in groups])


class Projections(nn.Module):
    """Eq. 4 from the means on: (G, B, T, D) twice. Training only.

    Identity at the start; the groups share one, but layer 0 has its own where it is a group by
    itself (S8).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_0, self.others = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.layer_0, self.others):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, means: Tensor, groups: Groups) -> Tensor:
        pairs = zip(means, groups, strict=True)
        return torch.stack([(self.layer_0 if g == (0,) else self.others)(x) for x, g in pairs])


def distillation_loss(predicted: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 5 (S9) of (G, B, T, D) twice, and its parts "l1" and "cos" for each group, (G,) each.

    Everything is averaged: over groups, whatever their size, frames, and in L1 over D. Frames of
    training batches are all valid, so there is no mask.
    """
    exact = torch.promote_types(predicted.dtype, torch.float32)  # bf16 would round the sums
    predicted, target = predicted.to(exact), target.to(exact)
    l1 = (predicted - target).abs().mean((1, 2, 3))  # G
    cos = F.cosine_similarity(predicted, target, dim=-1).mean((1, 2))  # G
    return l1.mean() - cos.mean(), {"l1": l1.detach(), "cos": cos.detach()}


# ---- copy boundary: above this line the file needs torch only -----------------------------------


def pruning_steps(config: Config) -> int:
    """Updates of act 3; the others are act 4's."""
    return 2 * config.steps // 3


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on all learning rates: linear from 0 to 1, then to 0; ``step`` counts from 1."""
    rising = max(1, round(warmup * steps))
    return step / rising if step <= rising else (steps - step) / (steps - rising)


def target_sparsity(step: int, config: Config) -> float:
    """rho_t of Eq. 10: linear from 0 at the first update to its final value."""
    rising = max(1, round(config.sparsity_warmup * pruning_steps(config)))
    return config.sparsity * min(1.0, (step - 1) / rising)


def teacher_shape(teacher: common.Teacher) -> Shape:
    """The shape of a student that has everything its teacher has."""
    sizes, layers = dict(teacher.shape), teacher.num_layers
    return Shape(
        conv_channels=(sizes.pop("conv_channels"),) * len(KERNELS),
        heads=(tuple(range(sizes["attention_heads"])),) * layers,
        feed_forward=(sizes.pop("feed_forward"),) * layers,
        position_buckets=teacher.position_buckets,
        max_distance=teacher.max_distance,
        **sizes,
    )


def check(config: Config, teacher: common.Teacher) -> None:
    """Refuse, before any work, what cannot be done to this teacher."""
    if config.sparsity >= 1:
        raise InputError(f"--sparsity {config.sparsity}: the number must be below one")
    if config.calibration_utterances < 2 or config.steps < 2:
        raise InputError("--calibration-utterances and --steps must be at least 2")
    if teacher.pre_norm or teacher.normalise:
        raise InputError(
            f"--teacher {teacher.name} cannot be pruned here: Base models only, post-norm and with "
            "one GroupNorm, such as wavlm_base_plus or hubert_base"
        )
    if not 1 <= config.clusters <= teacher.num_layers:
        raise InputError(f"--clusters: {teacher.name} has {teacher.num_layers} Transformer layers")
    read_groups(config.groups, teacher.num_layers)
    shape, layers = teacher_shape(teacher), teacher.num_layers
    smallest = count_size(shape, [1] * len(KERNELS), [0] * layers, [0] * layers)
    reachable = math.floor(1000 * (1 - smallest / full_size(shape))) / 1000
    if config.sparsity > reachable:
        raise InputError(
            f"--sparsity {config.sparsity}: with all gates closed {teacher.name} has a sparsity of "
            f"{reachable:.3f}, more cannot be reached"
        )


def build(config: Config, teacher: common.Teacher) -> tuple[Student, Projections, Gates]:
    """The student of act 3, which is a copy of its teacher, with projections and gates."""
    shape = teacher_shape(teacher)
    torch.manual_seed(config.seed)
    student = Student(shape, config.dropout)
    try:
        initialise_from_teacher(student, teacher.model)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--teacher {teacher.name}: its convolutions are not those of HuBERT Base"
        ) from error
    device = next(teacher.model.parameters()).device
    return student.to(device), Projections(shape.width).to(device), Gates(shape).to(device)


def read_groups(text: str, last: int) -> Groups:
    """Groups written by hand, "0/1,2/4" -> [(0,), (1, 2), (4,)]; none for other settings."""
    if text in ("", "random"):
        return []
    try:
        groups = [tuple(int(layer) for layer in part.split(",")) for part in text.split("/")]
    except ValueError:
        groups = []
    layers = [layer for group in groups for layer in group]
    if not layers or len(set(layers)) < len(layers) or not 0 <= min(layers) <= max(layers) <= last:
        raise InputError(
            f"--groups {text}: layers from 0 to {last}, each once at most, as in 0/1,2,3,4/8/9,10"
        )
    return groups


def name_groups(groups: Groups) -> str:
    """As --groups has them."""
    return "/".join(",".join(map(str, layers)) for layers in groups)


def student_file(run: "Run", student: Student) -> dict[str, Any]:
    """Content of ``student.pt``; which groups were distilled is said in it."""
    return common.student_content("skill", run.config, student, groups=name_groups(run.groups))


def load_student(path: Path | str, device: torch.device | str = "cpu") -> Student:
    """The student of a ``student.pt`` or ``pruned.pt``, in eval mode; else an InputError."""

    def make(saved: dict) -> Student:
        return Student(Shape(**saved["shape"]), Config(**saved["config"]).dropout)

    return common.load_student(path, "skill", make, device)


def load_pruned(out: Path, device: torch.device) -> tuple[Student, Projections]:
    """What act 3 left."""
    path = out / "pruned.pt"
    if not path.exists():
        raise InputError(f"{path}, which act 3 left, is gone: start again in a new --out")
    student = load_student(path, device)
    projections = Projections(student.shape.width)
    with common.reading(path):
        projections.load_state_dict(common.load_checkpoint(path)["projections"])
    return student, projections.to(device)


@torch.no_grad()
def teacher_states(teacher: common.Teacher, waveforms: Tensor) -> list[Tensor]:
    """Teacher layers 0 to L, (B, T, D) each; 0 is the output of the feature projection (S6)."""
    features, _ = teacher.model.feature_extractor(waveforms, None)
    x = teacher.model.encoder.feature_projection(features)
    with x.device:  # torchaudio would compute WavLM's position bias on the CPU
        return [x, *teacher.model.encoder.transformer.get_intermediate_outputs(x)]


# ------------------------------------------------------------------------------------------------
# Training: the four acts
# ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the acts share."""

    config: Config
    out: Path
    device: torch.device
    teacher: common.Teacher  # frozen, always in eval mode
    training: list[common.Utterance]
    heldout: list[common.Utterance]
    history: list[dict[str, Any]]  # lines of log.jsonl
    saved: dict[str, Any] | None  # the checkpoint to go on from
    groups: Groups = field(default_factory=list)  # after act 2
    student: Student | None = None  # after act 3 and again after act 4
    projections: Projections | None = None


def train(config: Config, resume: bool = False) -> tuple[Run, list[dict]]:
    """The four acts, each with what the one before left in the run folder ``config.out``."""
    device, out = common.pick_device(config.device), Path(config.out)
    saved = common.open_run("skill", config, resume, free=("stage", "tolerance"))
    with common.first_process_first():
        utterances = common.scan(config.data, out / "scan.jsonl", config.workers)
        teacher = common.load_teacher(config.teacher, device)
    check(config, teacher)
    done, history = common.restore(saved)  # updates; the weights follow in optimise
    if done and config.stage == "measure":
        raise InputError(f"{out} is past act 2: leave --stage measure out")
    run = Run(config, out, device, teacher, *common.train_and_heldout(utterances), history, saved)
    common.start_run(config, run.history)

    with common.first_process_first():
        if common.rank() == 0 and not (resume and (out / "similarity.json").exists()):
            make_groups(run, measure(run))  # acts 1 and 2
        with common.reading(out / "similarity.json"):
            similarity = json.loads((out / "similarity.json").read_text())
            run.groups = [tuple(layers) for layers in similarity["groups"]]
    if config.stage == "measure":
        return run, history
    in_act_4 = done > pruning_steps(config)
    if not in_act_4:  # act 3: distil, and close gates until the size is right
        whole, projections, gates = build(config, teacher)
        optimise(run, whole, projections, gates, done > 0)
    with common.first_process_first():
        if common.rank() == 0 and not in_act_4:
            take_away(run, whole, projections, gates)
        run.student, run.projections = load_pruned(out, device)
    if config.stage == "distil":  # act 4: go on without gates
        optimise(run, run.student, run.projections, None, in_act_4)
        run.student.eval()
    return run, history


def measure(run: Run) -> Tensor:
    """Act 1: similarity (L + 1, L + 1) of the teacher's layers on some training utterances (S3)."""
    draw = torch.Generator().manual_seed(run.config.seed)
    chosen = torch.randperm(len(run.training), generator=draw)
    chosen = chosen[: run.config.calibration_utterances].tolist()
    longest = int(run.config.crop_seconds * common.SAMPLE_RATE)
    moments: Any = None
    for i in tqdm(chosen, "act 1: measure", unit="file"):
        wave = common.load_audio(run.training[i].path, 0, min(longest, run.training[i].samples))
        new = layer_moments(teacher_states(run.teacher, wave[None].to(run.device)))
        moments = [a.add_(b) for a, b in zip(moments, new, strict=True)] if moments else new
    return centred_kernel_alignment(*moments).cpu()


def make_groups(run: Run, similarity: Tensor) -> None:
    """Act 2: the groups to distil, kept in ``similarity.json`` with all that led to them.

    Layer 0 is a group of its own (S6). Random groups have the sizes of the similar ones.
    """
    config, last = run.config, run.teacher.num_layers
    apart = 1 - similarity[1:, 1:]  # of layers 1 to L
    found, _ = agglomerate(apart, config.clusters)
    _, merges = agglomerate(apart, 1)
    groups = [(0,)] + [tuple(i + 1 for i in members) for members in found]
    if config.groups == "random":
        draw = torch.Generator().manual_seed(config.seed)
        layers = iter((torch.randperm(last, generator=draw) + 1).tolist())
        groups = [(0,)] + [tuple(sorted(next(layers) for _ in members)) for members in found]
    elif config.groups:
        groups = read_groups(config.groups, last)
    heights = ", ".join(f"{height:.3f}" for height, _, _ in merges)
    gaps = any(len(layers) <= layers[-1] - layers[0] for layers in groups)
    common.say(
        f"act 2: groups {name_groups(groups)}; layers joined at distances {heights}"
        + ("; not all groups are of neighbours" if gaps else "")
    )
    # Layer 1 is item 0 of a merge.
    result = {"cka": similarity.tolist(), "merges": merges, "groups": groups}
    common.write_text(run.out / "similarity.json", json.dumps(result))


def take_away(run: Run, whole: Student, projections: Projections, gates: Gates) -> None:
    """The end of act 3: ``pruned.pt`` has what its gates leave of the student."""
    config = run.config
    small = materialise(whole, gates).eval()
    sparsity = 1 - shape_size(small.shape) / full_size(whole.shape)
    if abs(sparsity - config.sparsity) > config.tolerance:  # D6
        raise InputError(
            f"act 3 ended at sparsity {sparsity:.3f}, too far from {config.sparsity}: --resume "
            "with a higher --tolerance, or start again with more --steps or a higher --gate-lr"
        )
    before = distance(run, whole, projections, run.groups, gates)["cosine"]
    after = distance(run, small, projections, run.groups)["cosine"]
    common.say(
        f"act 3: {common.count_parameters(small):,} parameters, sparsity {sparsity:.4f}; cosine to "
        f"the teacher {fmean(before):.3f} with gates, {fmean(after):.3f} pruned"
    )
    pruned = student_file(run, small) | {"projections": projections.state_dict()}
    common.write_atomically(run.out / "pruned.pt", lambda file: torch.save(pruned, file))


def optimise(
    run: Run, student: Student, projections: Projections, gates: Gates | None, resume: bool
) -> None:
    """The updates of act 3, or without gates those of act 4; ``resume`` from the checkpoint on."""
    config, device = run.config, run.device
    middle = pruning_steps(config)
    if gates:
        title, begin, end = "act 3: distil and prune", 0, middle
        peak_lr, warmup = config.lr, config.warmup
    else:
        title, begin, end = "act 4: distil again", middle, config.steps
        peak_lr, warmup = config.final_lr, config.final_warmup
    weights = [*student.parameters(), *projections.parameters()]
    rates = [{"params": [p for p in weights if p.requires_grad], "peak": peak_lr}]
    if gates:
        rates += [{"params": [gates.log_alpha], "peak": config.gate_lr}]
        rates += [{"params": [gates.multipliers], "peak": config.multiplier_lr, "maximize": True}]
    parameters = [p for rate in rates for p in rate["params"]]
    optimizer = torch.optim.AdamW(
        rates, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
    )
    done, rest = begin, dict(projections=projections, optimizer=optimizer)
    rest |= {"gates": gates} if gates else {}
    if resume:
        done, _ = common.restore(run.saved, state_dict=student, **rest)

    batches = common.load_batches(
        run.training,
        config.batch_seconds,
        config.crop_seconds,
        seed=config.seed,
        first=done,
        last=end,
        workers=config.workers,
    )
    forward = torch.compile(student) if config.compile else student  # of the same weights
    if config.compile:  # most of what the teacher moves to and from memory
        run.teacher.model.feature_extractor.compile()
    amp = common.bf16_pays(device) if config.amp is None else config.amp
    skipped = torch.zeros((), device=device)  # updates whose gradient was not finite
    bar = tqdm(None, title, end - begin, initial=done - begin, disable=common.rank() > 0)
    for step, waveforms, stopping in common.updates(batches, done, bar):
        student.train()
        factor = schedule(step - begin, end - begin, warmup)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        optimizer.zero_grad(set_to_none=True)
        sums = {"loss": 0.0, "l1": 0.0, "cos": 0.0}
        for part in waveforms.chunk(config.accumulate):
            share = len(part) / len(waveforms)
            part = part.to(device, non_blocking=True)  # B x S
            masks = gates.sample() if gates else None  # new ones for each part: S11
            with torch.autocast(device.type, torch.bfloat16, amp):
                target = group_means(teacher_states(run.teacher, part), run.groups)
                student_hidden, _ = forward(part, masks=masks)
                predicted = projections(group_means(student_hidden, run.groups), run.groups)
                loss, terms = distillation_loss(predicted, target)  # of G x B x T x D twice
            (share * loss).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + share * value
        if gates:
            size = gates.size(student.shape)
            sparsity, goal = 1 - size / full_size(student.shape), target_sparsity(step, config)
            penalty = sparsity_loss(sparsity, goal, gates.multipliers)
            penalty.backward()
            sums["loss"] = sums["loss"] + penalty.detach()
        common.sum_gradients(parameters, len(waveforms))  # over all processes
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.found_inf = (~norm.isfinite()).float()  # where it is 1, nothing is updated
        skipped += optimizer.found_inf
        optimizer.step()

        saving = step % config.save_every == 0 or step == end
        if saving or step % config.log_every == 0:
            sums = common.average(sums, len(waveforms))
            line = {"step": step, "act": 3 if gates else 4, "lr": optimizer.param_groups[0]["lr"]}
            line |= {"grad_norm": norm.item(), "loss": sums["loss"].item()}
            if gates:
                line |= {"sparsity": sparsity.item(), "target": goal, "size": round(size.item())}
                line["lambda1"], line["lambda2"] = gates.multipliers.tolist()
            shown = {name: f"{v:.4g}" for name, v in line.items() if name not in ("step", "act")}
            for name in ("l1", "cos"):
                for layers, value in zip(run.groups, sums[name], strict=True):
                    line[f"{name}_{name_groups([layers])}"] = value.item()
            if saving and common.rank() == 0:
                line["heldout"] = distance(run, student, projections, run.groups, gates)
            common.write_log(config, run.history, line, skipped)
            bar.set_postfix(**shown)
        if saving or stopping:
            content = student_file(run, student)
            common.save_run(config, content, step, run.history, whole=not gates, **rest)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def score(
    student: Student, tasks: list, device: torch.device, seed: int, speed: float | None = None
) -> dict[str, float]:
    """Size, speed, and probes (D8) on the student's features: all layers, as in DPHuBERT."""
    return common.score(
        student, lambda waveforms: student(waveforms)[0], tasks, device, seed, speed
    )


@torch.no_grad()
def distance(
    run: Run, student: Student, projections: Projections, groups: Groups, gates: Gates | None = None
) -> dict[str, list[float]]:
    """L1 and cosine of each group on held-out audio, in eval mode, with the gates of Eq. 8."""
    student.eval()
    masks, config = gates.fixed() if gates else None, run.config
    return common.layer_distance(
        lambda waves: projections(group_means(student(waves, masks=masks)[0], groups), groups),
        lambda waves: group_means(teacher_states(run.teacher, waves), groups),
        common.heldout_batches(
            run.heldout, config.batch_seconds, config.crop_seconds, config.accumulate
        ),
        run.device,
    )


def evaluate(config: Config, run: Run, baselines: bool = True) -> dict[str, dict[str, float]]:
    """Rows of the table: the student and, as ``baselines``, its teacher, one of the student's shape
    with random weights, and the pruned student before act 4; after act 2 the similarity of layers.

    Columns: L1 and cosine to the teacher on held-out audio, mean over Transformer layers, whatever
    was distilled; the cosine of the layers that DPHuBERT picks, and of the others; parameters, MACs
    and speed; probes on frozen features. ``layers.json`` has the distances of each layer.
    """
    found = json.loads((run.out / "similarity.json").read_text())
    draw(run, found)
    if run.student is None:
        return {
            f"layer {i}": {f"{j}": cka for j, cka in enumerate(row)}
            for i, row in enumerate(found["cka"])
        }
    device, student = run.device, run.student
    utterances = common.scan(config.data, run.out / "scan.jsonl", config.workers)
    tasks = common.find_tasks(utterances)
    timed = {"teacher": run.teacher, "student": lambda waveforms: student(waveforms)[0]}
    speeds = common.measure_speed(timed, device)
    speed = speeds["student"] / speeds["teacher"]
    models, rows, layers = {}, {}, {}
    if baselines:
        torch.manual_seed(config.seed)
        models["untrained"] = Student(student.shape, config.dropout).to(device).eval()
        models["pruned"], _ = load_pruned(run.out, device)
        teacher = run.teacher
        rows["teacher"] = common.score(teacher.model, teacher, tasks, device, config.seed, 1.0)
    models["pruned" if config.stage == "prune" else "distilled"] = student
    singles = [(layer,) for layer in range(run.teacher.num_layers + 1)]
    plain = Projections(student.shape.width).to(device)  # identity: states as users get them
    for name, model in models.items():
        layers[name] = distance(run, model, plain, singles)
        rows[name] = {column: fmean(values[1:]) for column, values in layers[name].items()}
        rows[name] |= score(model, tasks, device, config.seed, speed)
        if run.teacher.num_layers >= max(PICKED):
            picked, others = split_layers(layers[name]["cosine"])
            rows[name]["cosine, layers 4 8 12"] = fmean(picked)
            rows[name]["cosine, other layers"] = fmean(others)
    common.write_text(run.out / "layers.json", json.dumps(layers, indent=1))
    return rows


def split_layers(values: list[float]) -> tuple[list[float], list[float]]:
    """Values of layers 0 to L -> those of the layers that DPHuBERT picks, and of the others."""
    others = [value for layer, value in enumerate(values) if layer and layer not in PICKED]
    return [values[layer] for layer in PICKED], others


def draw(run: Run, found: dict[str, Any]) -> None:
    """``skill.png``: the merge tree, the similarity, and after act 3 the share of each layer kept.

    Without matplotlib one line says so.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        common.say("no picture skill.png: matplotlib is not installed")
        return
    figure = Figure((13, 4), layout="constrained")
    tree, matrix, bars = figure.subplots(1, 3)
    places = {(i,): (i + 1.0, 0.0) for i in range(len(found["cka"]) - 1)}  # centre, height
    for height, first, second in found["merges"]:
        (x, low), (y, other) = places[tuple(first)], places[tuple(second)]
        tree.plot([x, x, y, y], [low, height, height, other], "k", lw=1)
        places[tuple(sorted(first + second))] = (x + y) / 2, height
    tree.set(title="merge tree", xlabel="layer", ylabel="1 - similarity")
    figure.colorbar(matrix.imshow(found["cka"], vmin=0, vmax=1, origin="lower"), ax=matrix)
    title = f"similarity; groups {name_groups(found['groups'])}"
    matrix.set(title=title, xlabel="layer", ylabel="layer")
    if run.student is not None:
        left, full = run.student.shape, teacher_shape(run.teacher)
        kept = {
            "channels": [n / full.conv_channels[0] for n in left.conv_channels],
            "heads": [len(numbers) / full.attention_heads for numbers in left.heads],
            "units": [n / full.feed_forward[0] for n in left.feed_forward],
        }
        for i, (name, shares) in enumerate(kept.items()):
            places_x = [n + 1 + 0.27 * (i - 1) for n in range(len(shares))]
            bars.bar(places_x, shares, 0.25, label=name)
        bars.set(title="kept", xlabel="convolution or Transformer layer", ylabel="share")
        bars.legend()
    common.write_atomically(run.out / "skill.png", lambda file: figure.savefig(file, format="png"))


def describe(config: Config) -> dict[str, dict[str, float]]:
    """WavLM Base+ part by part: parameters, MACs per second; and what the target leaves."""
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
    if config.stage != "distil" and (args.claim or args.seeds > 1):
        raise InputError("--claim and --seeds run the whole method: leave --stage out")
    if args.describe:
        print(common.format_table(describe(config)))
    elif args.evaluate:
        print(common.score_file(load_student, score, config, args))
    else:
        print(common.make_table(train, evaluate, config, args, CLAIM))


if __name__ == "__main__":
    main()
