# SPDX-License-Identifier: MIT
"""GenDistiller: the student generates its teacher's layers one after another.

Paper
-----
v1: Y. Gao, S. Zhang, Z. Cui et al., "GenDistiller: Distilling Pre-trained Language Models based on
Generative Models", arXiv 2310.13418. v2: Y. Gao, S. Zhang, C. Deng, J. Feng, arXiv 2406.09444.

Idea
----
DistilHuBERT predicts layers 4, 8 and 12 independently. But layer 8 should be easier to predict once
layer 4 is known. So here layers are generated one after another, each from the student's own
predictions of those before (in training from the teacher's too: S7). v1 (sketch): the T frames of a
layer are a block, which attends to itself and to all blocks before: attention is causal over layers
and full over time. v2: each layer is predicted from the previous one by one layer with a skip.

    block 0: speech   ->  2 Transformer layers  ->  O  ->  layer 4     attends to block 0
    block 1: layer 4  ->  the same 2 layers     ->  O  ->  layer 8     to blocks 0, 1
    block 2: layer 8  ->  the same 2 layers     ->  O  ->  layer 12    to blocks 0, 1, 2

Equations
---------
Numbered by us. Step k = 0 .. K-1 predicts the k-th target layer. h: hidden states of the teacher,
p: predictions, v: history, v_0 = a, v_(k+1) = p_k or h_k. z: projected convolutions, P: positional
convolution, O: output layer; e, c, r: learned. g, g': sigmoid of the sums of the first and last
four of 8 outputs of a Linear layer at frame t. b: utterance, t, s: frames, d: feature.

    (1)  a = LN( z + P(z) )                                      speech
    (2)  x_k = v_k + e_k                                         v1: block k
    (3)  y_k = Layers( queries x_k, keys and values x_0 .. x_k )
    (4)  p_k = O( y_k )
    (5)  u_k = Layer( v_k )                                      v2
    (6)  p_k = O( u_k + v_k )
    (7)  score(t, s) += ( g (g' c - 1) + 2 ) r(s - t)            WavLM's layers
    (8)  L_L1  = mean over k, b, t, d of  | p_k[b,t,d] - h_k[b,t,d] |
    (9)  L_cos = mean over k, b, t of     - log sigmoid( cos( p_k[b,t], h_k[b,t] ) )
    (10)  L    = L_L1 + lambda L_cos,     lambda = 1

Paper vs this code
------------------
No reproduction: of both papers only the abstracts could be read, of v2 also three machine-written
reviews; there is no public code. "sizes", "time": derived from v2's 82 % fewer parameters than
WavLM and 33 % fewer than its baseline in similar time. DH: as DistilHuBERT's code. S: not read.

id  topic         known                                    here
S1  targets       v2: three layers of WavLM (time)         4, 8, 12 (DH) of WavLM Base
S2  recipe        v2: L1 and cosine (one review)           DH: loss, optimizer, start (LayerNorms
                                                           too), conv gradient times 0.1
S3  position      v2: no embedding named (reviews)         P in (1), e in v1; r the same for all k
S4  depth         v2: 1 (reviews); baseline: 2 (sizes)     the same; v1: 2
S5  skip          v2: around the layer (two reviews)       the same; without: recurrent-no-skip
S6  output layer  v2: one for all steps; baseline: one a   Linear, in v1 too; starts as identity,
                  layer (sizes); v2: then GELU (a review)  halved for v2. GELU: recurrent-gelu
S7  history       nothing on training                      h in a share of utterances, from 1 to 0
S8  features      SUPERB's weighted sum (its protocol)     of a and all p_k

Run
---
    python gendistiller.py --toy                  # v1, offline, minutes; v2: --variant recurrent
    python gendistiller.py --data LibriSpeech     # paper size, WavLM Base is downloaded
    python gendistiller.py --toy --claim          # v1, v2 and the baseline, three seeds

Result
------
Toy world, 200 updates of 16 s, three seeds: L1 to the teacher v1 .123, baseline .129, v2 .169 (no
skip .153, GELU .393); phone accuracy .864, .867, .858. Reproduced: v1 is closer to the teacher than
the baseline. Not reproduced: better phones than the baseline; that v2's skip helps. 800 updates: L1
v1 .081, baseline .103, v2 .122 (no skip .110). Paper size: not run.

Copy
----
What stands above the copy boundary needs torch alone: leave the imports of tqdm and common out.

    student = Student(Shape(), "2d", targets=3, dropout=0.1, conv_gradient=0.1)
    waveforms, teacher_hidden = torch.randn(2, 16000), torch.randn(3, 2, 49, 768)
    hidden_states, _ = student(waveforms)  # speech and three predictions, 2 x 49 x 768
    loss, terms = distillation_loss(torch.stack(hidden_states[1:]), teacher_hidden, 1.0)
    loss.backward()
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import InputError

# B batch, S samples, T frames, D width, C conv channels, K target layers

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


Variant = Literal["2d", "recurrent", "recurrent-gelu", "recurrent-no-skip", "parallel"]


@dataclass
class Config:
    data: str = ""  # folder of audio, or a manifest.tsv (DH: LibriSpeech, 960 h)
    teacher: str = "wavlm_base"  # torchaudio bundle, "toy", or a checkpoint file (S1)
    out: str = "runs/gendistiller"  # run folder
    seed: int = 0  # of weights, dropout, history, crops and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 4  # processes that load audio
    variant: Variant = "2d"  # v1; v2, also with GELU (S6), without skip (S5); baseline (S4)
    target_layers: tuple[int, ...] = (4, 8, 12)  # teacher layers in order of generation (S1)
    init_from_teacher: bool = True  # start from the teacher's first layers (S2)
    cosine_weight: float = 1.0  # lambda of Eq. 10 (DH)
    dropout: float = 0.1  # on the input, in and after attention, in and after feed-forward (DH)
    conv_gradient: float = 0.1  # factor on the gradient into the convolutions (DH)
    steps: int = 200_000  # updates (DH)
    batch_seconds: float = 290.0  # audio per update: 24 utterances on average (DH)
    crop_seconds: float = 15.625  # longest crop, 250,000 samples (DH)
    accumulate: int = 1  # parts a batch is cut into to save memory (ours)
    lr: float = 2e-4  # peak learning rate (DH)
    warmup: float = 0.07  # share of updates before the peak; linear up, linear down (DH)
    betas: tuple[float, ...] = (0.9, 0.98)  # of AdamW (DH)
    eps: float = 1e-6  # of AdamW (DH)
    weight_decay: float = 0.01  # not on vectors: biases and the gains of norms (ours)
    clip: float = 5.0  # largest norm of the gradient (DH)
    amp: bool | None = None  # bf16 autocast; None: on GPUs that have bf16 (ours)
    compile: bool = False  # torch.compile: slow at first, then faster (ours)
    log_every: int = 50  # updates between two lines of the log (DH)
    save_every: int = 1_000  # updates between checkpoints with held-out distance (ours)


# --toy: the same method on the toy world, for minutes on two CPU cores instead of days on a GPU.
TOY = dict(
    teacher="toy",
    out="runs/gendistiller-toy",
    workers=0,
    steps=200,
    batch_seconds=16.0,
    crop_seconds=3.0,
    dropout=0.0,  # 200 updates do not overfit: L1 is .123, with dropout 0.1 it is .154
    lr=3e-3,
    log_every=10,
    save_every=100,
)

# --claim: v1 beside the baseline; v2, also with a GELU behind O, and without its skip connection.
CLAIM = {
    "parallel": dict(variant="parallel"),
    "recurrent": dict(variant="recurrent"),
    "recurrent, GELU": dict(variant="recurrent-gelu"),
    "recurrent, no skip": dict(variant="recurrent-no-skip"),
}


@dataclass
class Shape:
    """Widths of the student. It takes its teacher's, so that it can start from its weights."""

    conv_channels: int = 512  # WavLM Base, as all defaults here
    width: int = 768
    attention_heads: int = 12
    feed_forward: int = 3072
    position_kernel: int = 128
    position_groups: int = 16
    position_buckets: int = 320  # rows of WavLM's table of distances; 0: no table (HuBERT)
    max_distance: int = 800  # frames; all larger distances share a row


# ------------------------------------------------------------------------------------------------
# Student
# ------------------------------------------------------------------------------------------------

Maybe = Tensor | None


class ScaleGradient(torch.autograd.Function):
    """Identity forward; the gradient is multiplied by ``factor`` on its way back."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class ConvLayer(nn.Module):
    """Convolution, GroupNorm in the first layer only, GELU: (B, C_in, S) -> (B, C, S / stride)."""

    def __init__(self, inputs: int, channels: int, kernel: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, channels, kernel, stride, bias=False)
        # One channel per group: each channel is normalised over the whole utterance.
        self.layer_norm = nn.GroupNorm(channels, channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer_norm(self.conv(x)))


class FeatureExtractor(nn.Module):
    """Seven convolutions from 16 kHz samples to 50 frames per second: (B, S) -> (B, T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
        self.conv_layers = nn.ModuleList(
            ConvLayer(channels if i else 1, channels, kernel, stride, norm=i == 0)
            for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True))
        )

    def forward(self, waveforms: Tensor) -> Tensor:
        x = waveforms[:, None]  # B x 1 x S
        for layer in self.conv_layers:
            x = layer(x)
        return x.transpose(1, 2)  # B x T x C

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


def distance_buckets(frames: int, shape: Shape, device: torch.device) -> Tensor:
    """Row of WavLM's table that holds r(s - t) of Eq. 7, for each t and s: (T, T).

    One half of the rows is for s <= t, the other for s > t. In each, half of the rows are for the
    nearest distances, one each; the rest share rows, the more the farther.
    """
    time = torch.arange(frames, device=device)
    offset = time - time[:, None]  # s - t, T x T
    distance = offset.abs()
    half = shape.position_buckets // 2
    near = half // 2
    far = torch.log(distance.clamp(min=1).float() / near) / math.log(shape.max_distance / near)
    far = (near + (far * (half - near)).long()).clamp(max=half - 1)
    return half * (offset > 0) + torch.where(distance < near, distance, far)


class Attention(nn.Module):
    """Multi-head attention of a block to itself and to those before: (B, T, D) -> (B, T, D)."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        width, self.heads, self.dropout = shape.width, shape.attention_heads, dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        if shape.position_buckets:  # WavLM
            self.gru_rel_pos_linear = nn.Linear(width // self.heads, 8)
            self.gru_rel_pos_const = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, x: Tensor, past: list, position: Maybe, mask: Maybe) -> Tensor:
        """``past``: keys and values of the blocks before; those of ``x`` are appended.

        ``position`` (heads, T, T) is r of Eq. 7, None in layers without (HuBERT); ``mask``
        (B, 1, 1, T) is True at frames that may be attended to, None: all of them.
        """
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B x heads x T x D/heads
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        past.append((k, v))
        # Eq. 3: what comes later is not there yet, so no mask over the blocks is needed.
        k = torch.cat([keys for keys, _ in past], 2)  # B x heads x blocks T x D/heads
        v = torch.cat([values for _, values in past], 2)
        bias = mask
        if position is not None:
            bias = self.position_bias(x, position.to(q.dtype))  # B x heads x T x T
            if mask is not None:  # after the gate: a gate times -inf has a NaN gradient
                bias = bias.masked_fill(~mask, -math.inf)
        if bias is not None:
            bias = bias.repeat(1, 1, 1, len(past))  # S3: time counts, not the block
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # B x T x D

    def position_bias(self, x: Tensor, position: Tensor) -> Tensor:
        """r, scaled by the gates of each query: (heads, T, T) -> (B, heads, T, T)."""
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B x heads x T x D/heads
        gates = self.gru_rel_pos_linear(x).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        g, g_prime = gates.chunk(2, -1)  # B x heads x T x 1
        # Eq. 7
        scale = g * (g_prime * self.gru_rel_pos_const - 1) + 2
        return scale.to(position.dtype) * position


class FeedForward(nn.Module):
    """Two linear layers with GELU and dropout between them: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(width, inner)
        self.output_dense = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(self.dropout(F.gelu(self.intermediate_dense(x))))


class TransformerLayer(nn.Module):
    """Post-norm Transformer layer whose keys are also those of the blocks before."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(shape, dropout)
        self.layer_norm = nn.LayerNorm(shape.width)
        self.feed_forward = FeedForward(shape.width, shape.feed_forward, dropout)
        self.final_layer_norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, past: list, position: Maybe, mask: Maybe) -> Tensor:
        """(B, T, D) -> (B, T, D); the other arguments are those of Attention."""
        x = self.layer_norm(x + self.dropout(self.attention(x, past, position, mask)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


class Student(nn.Module):
    """Generates K layers from speech; all of it is kept, the output layer too (S8).

    Its modules are named as in Hugging Face's HubertModel and WavLMModel, without "encoder.".
    """

    def __init__(
        self, shape: Shape, variant: str, targets: int, dropout: float, conv_gradient: float
    ) -> None:
        super().__init__()
        self.shape, self.variant, self.targets = shape, variant, targets
        self.conv_gradient = conv_gradient
        self.feature_extractor = FeatureExtractor(shape.conv_channels)
        norm = nn.LayerNorm(shape.conv_channels)
        projection = nn.Linear(shape.conv_channels, shape.width)
        self.feature_projection = nn.ModuleDict({"layer_norm": norm, "projection": projection})
        self.pos_conv_embed = PositionalConv(shape)
        self.layer_norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(dropout)
        self.rel_attn_embed = None
        if shape.position_buckets:  # WavLM's table, one for all layers
            self.rel_attn_embed = nn.Embedding(shape.position_buckets, shape.attention_heads)
        depth = 1 if variant.startswith("recurrent") else 2  # S4
        self.layers = nn.ModuleList(TransformerLayer(shape, dropout) for _ in range(depth))
        if variant == "parallel":  # S4: the baseline has a head for each target layer
            self.heads = nn.ModuleList(nn.Linear(shape.width, shape.width) for _ in range(targets))
        else:
            self.output = nn.Linear(shape.width, shape.width)  # S6: one for all steps
        if variant == "2d":
            self.embedding = nn.Embedding(targets, shape.width)  # S3: v2 has none
        for module in self.modules():  # BERT's random start; what S2 copies is overwritten
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for output in self.heads if variant == "parallel" else [self.output]:
            nn.init.eye_(output.weight)  # S6: O starts as the identity
            if variant in ("recurrent", "recurrent-gelu"):
                output.weight.data /= 2  # of u + v it gives the mean, no larger than u or v
        for layer in self.feature_extractor.conv_layers:
            nn.init.kaiming_normal_(layer.conv.weight)

    def forward(
        self,
        waveforms: Tensor,
        lengths: Maybe = None,
        teacher_hidden: Maybe = None,
        given: Maybe = None,
    ) -> tuple[list[Tensor], Maybe]:
        """Hidden states [(B, T, D)] and their lengths (B,).

        ``waveforms`` (B, S) at 16 kHz, not normalised; ``lengths`` (B,) valid samples of a
        right-padded batch, None where nothing is padded. Entry 0 is the speech, a of Eq. 1; then
        come the predicted layers.

        For training, both or neither: in utterances where ``given`` (B,) is True, the history is
        the teacher's target layers ``teacher_hidden`` (K, B, T, D), not the predictions (S7).
        """
        x = self.feature_extractor(waveforms)  # B x T x C
        if self.training:  # in eval mode TorchScript can trace the student
            x = ScaleGradient.apply(x, self.conv_gradient)  # S2: the convolutions learn slowly
        x = self.feature_projection["layer_norm"](x)
        x = self.feature_projection["projection"](x)  # B x T x D
        mask = position = None
        if lengths is not None:
            lengths = self.feature_extractor.frame_count(lengths)
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # B x T
            x = x * valid[:, :, None]
            mask = valid[:, None, None, :]
        if self.rel_attn_embed is not None:
            buckets = distance_buckets(x.shape[1], self.shape, x.device)  # T x T
            position = self.rel_attn_embed(buckets).permute(2, 0, 1)  # heads x T x T
        # Eq. 1
        speech = self.layer_norm(x + self.pos_conv_embed(x))
        if self.variant == "parallel":
            predicted = self.parallel(speech, position, mask)
        elif self.variant == "2d":
            predicted = self.two_dimensional(speech, position, mask, teacher_hidden, given)
        else:
            predicted = self.recurrent(speech, position, mask, teacher_hidden, given)
        return [speech, *predicted], lengths

    def two_dimensional(
        self, speech: Tensor, position: Maybe, mask: Maybe, teacher_hidden: Maybe, given: Maybe
    ) -> list[Tensor]:
        """v1: the K layers, a block each, which attends to itself and all blocks before."""
        predicted, v = [], speech
        past = [[] for _ in self.layers]  # keys and values of the blocks before, in each layer
        for k in range(self.targets):
            x = self.dropout(v + self.embedding.weight[k])  # Eq. 2; S3: P is in the speech alone
            for layer, before in zip(self.layers, past, strict=True):
                x = layer(x, before, position, mask)  # Eq. 3
            predicted.append(self.output(x))  # Eq. 4
            v = next_history(k, predicted[k], teacher_hidden, given)
        return predicted

    def recurrent(
        self, speech: Tensor, position: Maybe, mask: Maybe, teacher_hidden: Maybe, given: Maybe
    ) -> list[Tensor]:
        """v2: the K layers, each from the one before by the same Transformer layer."""
        predicted, v = [], speech
        for k in range(self.targets):
            u = self.layers[0](self.dropout(v), [], position, mask)  # Eq. 5
            if self.variant == "recurrent-no-skip":
                p = self.output(u)
            else:
                p = self.output(u + v)  # Eq. 6; S5: the skip goes around the layer, then comes O
            if self.variant == "recurrent-gelu":
                p = F.gelu(p)  # S6: one review; GELU's minimum is -0.17, h has lower values
            predicted.append(p)
            v = next_history(k, p, teacher_hidden, given)
        return predicted

    def parallel(self, speech: Tensor, position: Maybe, mask: Maybe) -> list[Tensor]:
        """The baseline: the K layers from the same vector, by a head each, without history (S4)."""
        x = self.dropout(speech)
        for layer in self.layers:
            x = layer(x, [], position, mask)
        return [head(x) for head in self.heads]


def next_history(k: int, predicted: Tensor, teacher_hidden: Maybe, given: Maybe) -> Tensor:
    """v_(k+1): the prediction p_k, or the teacher's h_k in the utterances ``given`` (S7)."""
    if teacher_hidden is None:
        return predicted
    return torch.where(given[:, None, None], teacher_hidden[k], predicted)


def initialise_from_teacher(student: Student, weights: dict[str, Tensor]) -> None:
    """Copy the teacher's convolutions, projection, positional convolution and first layers (S2).

    ``weights``: the teacher's, under the student's names. Output layers and embeddings are not in
    the teacher; of all else that the student has, what is missing is a KeyError.
    """
    new = ("output.", "heads.", "embedding.")
    names = [name for name in student.state_dict() if not name.startswith(new)]
    student.load_state_dict({name: weights[name] for name in names}, strict=False)


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def distillation_loss(
    predicted: Tensor, teacher_hidden: Tensor, cosine_weight: float, frame_mask: Maybe = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 10, and its parts "l1" (Eq. 8) and "cos" (Eq. 9) for each target layer, (K,) each.

    ``predicted`` and ``teacher_hidden`` are (K, B, T, D), ``frame_mask`` (B, T) True at valid
    frames, None where all are. Means are taken over layers, valid frames, and in (8) over D.
    """
    exact = torch.promote_types(predicted.dtype, torch.float32)  # bf16 would round the sums
    predicted, teacher_hidden = predicted.to(exact), teacher_hidden.to(exact)
    if frame_mask is not None:  # K x frames x D
        predicted, teacher_hidden = predicted[:, frame_mask], teacher_hidden[:, frame_mask]
    # Eq. 8
    l1 = (predicted - teacher_hidden).abs().mean(-1).flatten(1).mean(1)  # K
    # Eq. 9
    cosine = F.cosine_similarity(predicted, teacher_hidden, dim=-1)  # K x B x T, or K x frames
    cos = (-F.logsigmoid(cosine)).flatten(1).mean(1)  # K
    # Eq. 10
    return l1.mean() + cosine_weight * cos.mean(), {"l1": l1.detach(), "cos": cos.detach()}


# ---- copy boundary: above this line the file needs torch only -----------------------------------


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def learning_rate(step: int, config: Config) -> float:
    """Linear from 0 to the peak, then linear to 0 at the last update; ``step`` counts from 1."""
    warmup = max(1, round(config.warmup * config.steps))
    if step <= warmup:
        return config.lr * step / warmup
    return config.lr * (config.steps - step) / (config.steps - warmup)


def teacher_share(step: int, config: Config) -> float:
    """Share of utterances whose history is the teacher's: linear from 1 to 0 (S7)."""
    return 1 - (step - 1) / config.steps


def make_student(config: Config, shape: Shape) -> Student:
    """The student of the config's variant, with random weights."""
    targets = len(config.target_layers)
    return Student(shape, config.variant, targets, config.dropout, config.conv_gradient)


def build(config: Config, teacher: common.Teacher) -> Student:
    """A new student with its teacher's widths; it follows from the seed."""
    layers = config.target_layers
    there = all(1 <= layer <= teacher.num_layers for layer in layers)
    if not layers or not there or len(set(layers)) < len(layers):
        raise InputError(
            f"--target-layers: {teacher.name} has layers 1 to {teacher.num_layers}, name each once"
        )
    bias = dict(position_buckets=teacher.position_buckets, max_distance=teacher.max_distance)
    torch.manual_seed(config.seed)
    student = make_student(config, Shape(**teacher.shape, **bias))
    if config.init_from_teacher:
        if teacher.pre_norm or teacher.num_layers < len(student.layers):
            raise InputError(
                f"the student cannot start from {teacher.name}, whose layers are not like its own "
                "(post-norm, at least as many): add --no-init-from-teacher"
            )
        initialise_from_teacher(student, teacher.weights())
    return student.to(next(teacher.parameters()).device)


def load_student(path: Path | str, device: torch.device | str = "cpu") -> Student:
    """The student of a ``student.pt``, in eval mode. Raises InputError for any other file."""

    def make(saved: dict) -> Student:
        return make_student(Config(**saved["config"]), Shape(**saved["shape"]))

    return common.load_student(path, "gendistiller", make, device)


def target_states(teacher: nn.Module, waveforms: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Hidden states of the target layers (K, B, T, D); the teacher stops after the last of them."""
    hidden_states = teacher(waveforms, last_layer=max(layers))
    return torch.stack([hidden_states[i] for i in layers])


def train(config: Config, resume: bool = False) -> tuple[Student, list[dict]]:
    """Distil into the run folder ``config.out``; returns the student and the log's lines."""
    device, out = common.pick_device(config.device), Path(config.out)
    saved = common.open_run("gendistiller", config, resume)
    with common.first_process_first():
        teacher = common.load_teacher(config.teacher, device)  # frozen, in eval mode
        student = build(config, teacher)
        utterances = common.scan(config.data, out / "scan.jsonl", config.workers)
    training, heldout = common.train_and_heldout(utterances)
    parameters = list(student.parameters())
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    settings = dict(lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer = torch.optim.AdamW([decayed, vectors], weight_decay=config.weight_decay, **settings)
    done, history = common.start_run(config, saved, state_dict=student, optimizer=optimizer)

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
        student.train()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        sums = {"loss": 0.0, "l1": 0.0, "cos": 0.0}
        for part in waveforms.chunk(config.accumulate):
            share = len(part) / len(waveforms)
            given = torch.rand(len(part)) < teacher_share(step, config)  # B; S7: whose history
            given = given.to(device, non_blocking=True)
            part = part.to(device, non_blocking=True)  # B x S
            with torch.autocast(device.type, torch.bfloat16, amp):
                teacher_hidden = target_states(teacher, part, config.target_layers)
                hidden_states, _ = forward(part, None, teacher_hidden, given)
                predicted = torch.stack(hidden_states[1:])  # both K x B x T x D
                loss, terms = distillation_loss(predicted, teacher_hidden, config.cosine_weight)
            (share * loss).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + share * value
        common.sum_gradients(parameters, len(waveforms))  # over all processes
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.found_inf = (~norm.isfinite()).float()  # where it is 1, nothing is updated
        skipped += optimizer.found_inf
        optimizer.step()

        saving = step % config.save_every == 0 or step == config.steps
        if saving or step % config.log_every == 0:
            sums = common.average(sums, len(waveforms))
            line = {"step": step, "lr": lr, "grad_norm": norm.item(), "loss": sums["loss"].item()}
            for name in ("l1", "cos"):
                for layer, value in zip(config.target_layers, sums[name], strict=True):
                    line[f"{name}_{layer}"] = value.item()
            if saving and common.rank() == 0:
                line["heldout"] = distance(config, teacher, student, heldout)
            common.write_log(config, history, line, skipped)
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        if saving or stopping:
            content = common.student_content("gendistiller", config, student)
            common.save_run(config, content, step, history, optimizer=optimizer)
    return student.eval(), history


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def score(
    student: Student, tasks: list, device: torch.device, seed: int, speed: float | None = None
) -> dict[str, float]:
    """Size, speed and probes on the learned weighted sum of speech and predicted layers (S8)."""
    return common.score(
        student, lambda waveforms: student(waveforms)[0], tasks, device, seed, speed
    )


def distance(
    config: Config, teacher: nn.Module, student: Student, heldout: list
) -> dict[str, list[float]]:
    """L1 and cosine between each predicted layer and its teacher layer on held-out audio.

    In eval mode, and with the student's own history: as in use, it has nothing but speech.
    """
    student.eval()
    return common.layer_distance(
        lambda waveforms: student(waveforms)[0][1:],
        lambda waveforms: target_states(teacher, waveforms, config.target_layers),
        common.heldout_batches(
            heldout, config.batch_seconds, config.crop_seconds, config.accumulate
        ),
        next(student.parameters()).device,
    )


def evaluate(
    config: Config, student: Student, baselines: bool = True
) -> dict[str, dict[str, float]]:
    """Rows of the table: the distilled student and, as ``baselines``, its teacher and its starts.

    Columns: parameters, MACs and speed; L1 and cosine between predictions and teacher on held-out
    audio, averaged over the target layers; probes on frozen features, which are SUPERB's learned
    weighted sum of all hidden states, of teacher and student alike.
    """
    device = next(student.parameters()).device
    utterances = common.scan(config.data, Path(config.out) / "scan.jsonl", config.workers)
    tasks, (_, heldout) = common.find_tasks(utterances), common.train_and_heldout(utterances)
    teacher = common.load_teacher(config.teacher, device)
    timed = {"teacher": teacher, "student": lambda waveforms: student(waveforms)[0]}
    speeds = common.measure_speed(timed, device)
    speed = speeds["student"] / speeds["teacher"]
    models, rows = {"distilled": student}, {}
    if baselines:
        rows["teacher"] = common.score(teacher.model, teacher, tasks, device, config.seed, 1.0)
        untrained = build(replace(config, init_from_teacher=False), teacher)
        start = {"initialised": build(config, teacher)} if config.init_from_teacher else {}
        models = {"untrained": untrained} | start | models
    for name, model in models.items():
        apart = distance(config, teacher, model, heldout)
        rows[name] = {column: fmean(values) for column, values in apart.items()}
        rows[name] |= score(model, tasks, device, config.seed, speed)
    return rows


def describe(config: Config) -> dict[str, dict[str, float]]:
    """The paper-size student part by part: parameters, MACs per second of audio in all steps."""
    student = make_student(config, Shape()).eval()
    return common.describe([student], student)


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
