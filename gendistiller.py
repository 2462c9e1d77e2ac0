# SPDX-License-Identifier: MIT
"""GenDistiller: the student generates its teacher's layers one after another.

Paper
-----
Two papers share the name. v1 (``--variant 2d``, the default): Y. Gao, S. Zhang, Z. Cui et al.,
"GenDistiller: Distilling Pre-trained Language Models based on Generative Models", arXiv 2310.13418.
v2 (``--variant recurrent``): Y. Gao, S. Zhang, C. Deng, J. Feng, "GenDistiller: Distilling
Pre-trained Language Models based on an Autoregressive Generative Model", arXiv 2406.09444.

Idea
----
DistilHuBERT predicts layers 4, 8 and 12 side by side, as if none knew of the others. But a layer is
made from the one before, so it is easier to predict once that one is known. GenDistiller therefore
predicts layer 4 from speech, layer 8 from speech and layer 4, layer 12 from speech, 4 and 8 (which
layers is our choice, S1). Its own predictions are the history, so it needs nothing but speech.
v1 puts speech and history in a row of blocks, one a layer, all frames of each. Attention sees the
past along layers and everything along time, hence "two-dimensional":

    block 0: speech   -> layers -> W -> layer 4     sees block 0
    block 1: layer 4  -> layers -> W -> layer 8     sees blocks 0, 1
    block 2: layer 8  -> layers -> W -> layer 12    sees blocks 0, 1, 2

v2 keeps the layer before alone, and one Transformer layer for all steps: a third fewer parameters.

    speech -> layer -> W -> layer 4 -> (+ speech) layer -> W -> layer 8 -> (+ speech) layer ...

Equations
---------
Numbered by us. z: projected convolutions, P: positional convolution, K: number of target layers,
h_k: teacher layer (``teacher_hidden``), p_k: its prediction (``predicted``), v_k: history, which is
h_k or p_k, e: learned embedding, Layers: Transformer layers, W, b: output projection.

    (1)  a = LN( z + P(z) )                         speech
    (2)  x_0 = a + e_0,   x_k = v_k + e_k           v1: block k = 1 .. K-1 of the row
    (3)  y_k = Layers( queries x_k, keys x_j )      v1: blocks j <= k, all valid frames of each
    (4)  p_(k+1) = W y_k + b                        v1
    (5)  u_1 = a + e_0,   u_k = v_(k-1) + e_(k-1) + a       v2 with skip "input"
    (6)  p_k = W Layer( u_k ) + b                   v2; skip "residual": + v_(k-1), where v_0 = a
    (7)  score(t, s) += (g (g' c - 1) + 2) r(s - t)         WavLM's gated bias, in each head
         g, g': sigmoids of two sums of a Linear of the head's slice of frame t; c: learned, one
         a head; r: learned table of distances in time, blind to blocks
    (8)  L_L1  = 1 / (B K T D)  sum_{b,k,t,d} | p[k,b,t,d] - h[k,b,t,d] |
    (9)  L_cos = 1 / (B K T)    sum_{b,k,t}   - log sigmoid( cos( p[k,b,t], h[k,b,t] ) )
    (10)  L    = L_L1 + lambda L_cos,   lambda = 1

Paper vs this code
------------------
Of both papers only the abstracts could be read, of v2 also a summary; there is no public code. So
this is no reproduction. Known: v1 attends causally over layers and both ways over time; v2's
history is the layer before, it has a skip connection and an output projection, 82 % fewer
parameters than WavLM and 33 % fewer than a baseline without generation. "DH": DistilHuBERT's
released code, whose recipe fills the gaps. D: done otherwise here. S: not found, our choice.

id  topic              papers, or DH                   here                     why
D1  evaluation         v2: SUPERB                      probes of common.py      minutes, not days
D2  padding            DH: padded frames count         crops of one length      no frame is noise
D3  weight decay       DH: 0.01, norms included        not on biases and norms  as usual
D4  batch              DH: 24 utterances               290 s of audio           bounded memory
D5  teacher mode       DH: dropout stays active        eval mode, always        clean targets
D6  precision          DH: fp16 student, fp32 teacher  bf16 both, fp32 loss     speed; not compared
D7  held out           DH: nothing                     10 min of dev or of 1 %  to watch the loss
S1  target layers      three, by v2's cost; which      4, 8, 12                 as DH
                       ones was not found
S2  teacher            v2: WavLM; Base or Base+ not    Base                     same size
                       found. v1: not found
S3  conv gradient      not found; DH: times 0.1        as DH
S4  block position     not found                       P in block 0 only,       history has its
                                                       where z is; r on time    position already
                                                       alone
S5  depth              v1: not found; v2: one layer,   2 for v1 and parallel,   the baseline's;
                       by its parameter counts         1 for v2                 exact counts
S6  skip connection    v2: helps; place not found      "input": a at each step  else step 3 hears
                                                       after the first          through two guesses
S7  embedding          not found                       e, learned               tells steps apart
S8  history            not found                       "mixed": teacher's       v2: best L1 in the
                                                       share falls from 1 to 0  toy world; v1: a tie
S9  start              not found; DH: teacher's first  as DH, LayerNorms too,   p_1 starts near the
                       layers                          W the identity           teacher's layer 2
S10  loss              not found; DH: (8-10)           as DH
S11  features          v2: SUPERB's weighted sum       of a and all p_k
S12  baseline          v2's has 2 layers, 3 Linear     --variant parallel, for  33 % need them
                       heads, by its counts            v1 too
S13  two dimensions    v1: causal over layers, full    one row of blocks, one   no weights beyond
                       over time; layout not found     attention over both      the baseline's
S14  projection        v2: there, one by its counts;   W, one for all steps     as v2
                       v1: not found

Run
---
    python gendistiller.py --toy                         # offline, minutes on a CPU
    python gendistiller.py --toy --variant recurrent     # the second paper
    python gendistiller.py --data LibriSpeech            # paper size, WavLM Base is downloaded
    python gendistiller.py --toy --claim                 # generation against its ablations

--describe prints the student as a table, --resume goes on with a stopped run, --evaluate probes a
student.pt; --help lists all flags. In Python: ``student = load_student("RUN/student.pt")``.

Result
------
L1 to teacher layers 4, 8, 12, free running, and frames whose phone a probe tells, toy world, 200
updates of 16 s, three seeds: 2d .123 and .864, parallel .129 and .867, recurrent .169 and .861
(without its skip connection .151 and .861); teacher .878, initialised .852, untrained .348. After
800 updates 2d .081 and .871, parallel .103 and .871, recurrent .119 and .870 (.109 and .868); 2d
takes 0.063 GMAC/s, parallel 0.023. Real recordings: see the README. Paper size: not yet run.

Copy
----
Everything from Config down to the copy boundary needs torch alone: leave the imports of common out.
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

# B batch, S samples, T frames, D width, C conv channels, K target layers, N blocks

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""  # folder of audio, or a manifest.tsv (paper of DH: LibriSpeech, 960 h)
    teacher: str = "wavlm_base"  # torchaudio bundle, "toy", or a checkpoint file (S2)
    out: str = "runs/gendistiller"  # run folder
    seed: int = 0  # of weights, dropout, history, crops and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 4  # processes that load audio
    variant: Literal["2d", "recurrent", "parallel"] = "2d"  # v1, v2, or both papers' baseline (S12)
    target_layers: tuple[int, ...] = (4, 8, 12)  # teacher layers in order of generation (S1)
    student_layers: int = 2  # Transformer layers of 2d and parallel; recurrent has one (S5)
    history: Literal["teacher", "student", "mixed"] = "mixed"  # whose layers go before (S8)
    layer_mask: bool = True  # 2d: no block sees a later one (v1); without: all see all
    skip: Literal["input", "residual", "none"] = "input"  # recurrent: what is added where (S6)
    step_embedding: bool = True  # a learned vector for each block or step (S7)
    init_from_teacher: bool = True  # start from the teacher's first layers (S9)
    cosine_weight: float = 1.0  # lambda of Eq. 10 (DH, S10)
    dropout: float = 0.1  # on the input, after attention, in and after feed-forward (DH)
    conv_gradient: float = 0.1  # factor on the gradient into the convolutions (DH, S3)
    steps: int = 200_000  # updates (DH)
    batch_seconds: float = 290.0  # audio per update: 24 utterances on average (D4)
    crop_seconds: float = 15.625  # longest crop, 250,000 samples (DH)
    accumulate: int = 1  # parts a batch is cut into to save memory (ours)
    lr: float = 2e-4  # peak learning rate (DH)
    warmup: float = 0.07  # share of updates before the peak; linear up, linear down (DH)
    betas: tuple[float, ...] = (0.9, 0.98)  # of AdamW (DH)
    eps: float = 1e-6  # of AdamW (DH)
    weight_decay: float = 0.01  # not on biases and norms (D3)
    clip: float = 5.0  # largest norm of the gradient (DH)
    amp: bool | None = None  # bf16 autocast; None: on GPUs that have bf16 (D6)
    compile: bool = False  # torch.compile: slow at first, then faster (ours)
    log_every: int = 50  # updates between two lines of the log (DH)
    save_every: int = 1_000  # updates between checkpoints with held-out distance (D7)


# --toy: the same method on the toy world, for minutes on two CPU cores instead of days on a GPU.
TOY = dict(
    teacher="toy",
    out="runs/gendistiller-toy",
    workers=0,
    steps=200,
    batch_seconds=16.0,
    crop_seconds=3.0,
    dropout=0.0,  # 200 updates learn nothing by heart: L1 is .122, with 0.1 .154 (seed 0)
    lr=3e-3,
    log_every=10,
    save_every=100,
)

# --claim: generated layers against the same layers side by side; v2 beside v1, and its skip
# connection; and the layer mask, which counts where the teacher's history is there all at once.
CLAIM = {
    "parallel": dict(variant="parallel"),
    "recurrent": dict(variant="recurrent"),
    "recurrent, no skip": dict(variant="recurrent", skip="none"),
    "teacher's history": dict(history="teacher"),
    "teacher's history, no mask": dict(history="teacher", layer_mask=False),
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
    position_buckets: int = 320  # distances that WavLM's bias tells apart; 0: no bias (HuBERT)
    max_distance: int = 800  # frames; those farther away share a bucket


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


class ConvFeatureExtractor(nn.Module):
    """Seven convolutions from 16 kHz samples to 50 frames per second: (B, S) -> (B, T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
        self.convs = nn.ModuleList(
            nn.Conv1d(1 if i == 0 else channels, channels, kernel, stride, bias=False)
            for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True))
        )
        self.group_norm = nn.GroupNorm(channels, channels)  # each channel over the whole utterance

    def forward(self, waveforms: Tensor) -> Tensor:
        x = self.convs[0](waveforms[:, None])  # B x C x S/5
        x = F.gelu(self.group_norm(x))
        for conv in self.convs[1:]:
            x = F.gelu(conv(x))
        return x.transpose(1, 2)  # B x T x C

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


class RelativePosition(nn.Module):
    """r of Eq. 7, WavLM's attention bias by distance in time: T -> (heads, T, T)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.max_distance = shape.max_distance
        self.table = nn.Embedding(shape.position_buckets, shape.attention_heads)

    def forward(self, frames: int) -> Tensor:
        time = torch.arange(frames, device=self.table.weight.device)
        offset = time - time[:, None]  # s - t, T x T
        half = self.table.num_embeddings // 2  # for each direction; near ones have their own,
        near, distance = half // 2, offset.abs()  # far ones share a bucket with more and more
        far = torch.log(distance.clamp(min=1).float() / near) / math.log(self.max_distance / near)
        far = (near + (far * (half - near)).long()).clamp(max=half - 1)
        bucket = half * (offset > 0) + torch.where(distance < near, distance, far)
        return self.table(bucket).permute(2, 0, 1)  # heads x T x T


class BlockLayer(nn.Module):
    """Post-norm Transformer layer over a row of blocks, each of all frames of one layer.

    (B, N, T, D) -> (B, N, T, D). A block's queries see its own keys and those of earlier blocks.
    """

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        width, self.heads, self.dropout = shape.width, shape.attention_heads, dropout
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        if shape.position_buckets:  # WavLM
            self.gate = nn.Linear(width // self.heads, 8)
            self.gate_scale = nn.Parameter(torch.ones(self.heads))
        self.attention_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, shape.feed_forward)
        self.down = nn.Linear(shape.feed_forward, width)
        self.final_norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        valid: Maybe = None,
        bias: Maybe = None,
        cache: tuple[Tensor, Tensor] | None = None,
        mask: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Output (B, N, T, D), and keys and values so far, the next call's ``cache``.

        ``valid`` (B, T) is True at frames that may be attended to, None: all may. ``bias``
        (heads, T, T) is r of Eq. 7. ``cache``: keys and values of blocks before those of ``x``.
        Without ``mask`` a block sees later ones too.
        """
        rate = self.dropout if self.training else 0.0
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # B x heads x N x T x D/heads
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        # As precise as q: its product with the gates is B x heads x T x T.
        bias = None if bias is None else bias.to(q.dtype)
        earlier, attended = k.shape[2] - q.shape[2], []
        # Eq. 3: one call for each block of queries with the keys it sees. So no mask of (KT)^2
        # numbers is built, and HuBERT's kind of layer takes none at all. WavLM's needs its bias:
        # peak memory of a training step is 2.5 GiB, with such a mask 4.3 (B 4, K 3, T 781, D 768).
        for i in range(x.shape[1]):
            seen = earlier + i + 1 if mask else k.shape[2]
            y = F.scaled_dot_product_attention(
                q[:, :, i],
                k[:, :, :seen].flatten(2, 3),  # B x heads x seen T x D/heads
                v[:, :, :seen].flatten(2, 3),
                attn_mask=self.score_bias(x[:, i], valid, bias, seen),
                dropout_p=rate,
            )
            attended.append(y.transpose(1, 2).flatten(2))  # B x T x D
        y = self.out_proj(torch.stack(attended, 1))  # B x N x T x D
        x = self.attention_norm(x + F.dropout(y, rate))
        y = self.down(F.dropout(F.gelu(self.up(x)), rate))
        return self.final_norm(x + F.dropout(y, rate)), (k, v)

    def score_bias(self, x: Tensor, valid: Maybe, bias: Maybe, blocks: int) -> Maybe:
        """Mask or bias of one block of queries ``x`` (B, T, D) for the keys of so many blocks.

        The same for each block of keys: r knows times, not blocks (S4).
        """
        mask = None if valid is None else valid[:, None, None, :]  # B x 1 x 1 x T
        if bias is not None:
            x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B x heads x T x D/heads
            g, g_prime = self.gate(x).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, -1)
            # Eq. 7. The mask comes after the gate: a gate times minus infinity has a NaN gradient.
            gate = g * (g_prime * self.gate_scale[:, None, None] - 1) + 2
            bias = gate.to(bias.dtype) * bias
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        if mask is None or blocks == 1:
            return mask
        return mask.repeat(1, 1, 1, blocks)  # B x heads x T x blocks T


class Student(nn.Module):
    """What the three variants share. In ``predict``, a -> [p_1, ..., p_K], they differ.

    All of it is kept, the output projection too: the generated layers are the features (S11).
    """

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        self.shape, self.config, width = shape, config, shape.width
        targets, parallel = len(config.target_layers), config.variant == "parallel"
        self.feature_extractor = ConvFeatureExtractor(shape.conv_channels)
        self.projection_norm = nn.LayerNorm(shape.conv_channels)
        self.projection = nn.Linear(shape.conv_channels, width)
        self.positional_conv = PositionalConv(shape)
        self.norm = nn.LayerNorm(width)
        self.relative_position = RelativePosition(shape) if shape.position_buckets else None
        layers = 1 if config.variant == "recurrent" else config.student_layers  # S5
        self.layers = nn.ModuleList(BlockLayer(shape, config.dropout) for _ in range(layers))
        # W and b: one for all steps (S14); without generation one for each target layer (S12).
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(targets if parallel else 1))
        steps = config.step_embedding and not parallel
        self.embedding = nn.Embedding(targets, width) if steps else None  # e (S7)
        for module in self.modules():  # BERT's random start; what S9 copies is overwritten
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for out in self.out:
            nn.init.eye_(out.weight)  # S9
        for conv in self.feature_extractor.convs:
            nn.init.kaiming_normal_(conv.weight)

    def forward(
        self, waveforms: Tensor, lengths: Maybe = None, history: Maybe = None, given: Maybe = None
    ) -> tuple[list[Tensor], Maybe]:
        """Hidden states [(B, T, D)] and their lengths (B,).

        ``waveforms`` (B, S) at 16 kHz, not normalised; ``lengths`` (B,) valid samples of a
        right-padded batch, None where nothing is padded. Entry 0 is the speech, a of Eq. 1, entry
        k the prediction of the k-th target layer.

        ``history`` (K, B, T, D), for training: the teacher's target layers, which take the place of
        the student's own as history; with ``given`` (B,) only in utterances where that is True.
        """
        x = self.feature_extractor(waveforms)  # B x T x C
        x = ScaleGradient.apply(x, self.config.conv_gradient)  # S3
        x = self.projection(self.projection_norm(x))  # B x T x D
        valid = None
        if lengths is not None:
            lengths = self.feature_extractor.frames(lengths)
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # B x T
            x = x * valid[:, :, None]
        a = self.norm(x + self.positional_conv(x))  # Eq. 1
        bias = None if self.relative_position is None else self.relative_position(x.shape[1])
        return [a, *self.predict(a, valid, bias, history, given)], lengths

    def embedded(self, x: Tensor, k: int) -> Tensor:
        """Input of the layers: (B, T, D) of block or step k with its embedding, and dropout."""
        if self.embedding is not None:
            x = x + self.embedding.weight[k]
        return F.dropout(x, self.config.dropout, self.training)


def next_history(predicted: Tensor, history: Maybe, given: Maybe, k: int) -> Tensor:
    """What follows layer k as history: the prediction, or the teacher's layer where it is given."""
    if history is None:
        return predicted
    return history[k] if given is None else torch.where(given[:, None, None], history[k], predicted)


class TwoDimensional(Student):
    """v1: blocks of layers in a row, attention causal over blocks and full over frames (S13)."""

    def predict(self, a: Tensor, valid: Maybe, bias: Maybe, history: Maybe, given: Maybe) -> list:
        """The K layers. Teacher forcing takes one pass over all blocks, generation one for each."""
        steps, mask = len(self.config.target_layers), self.config.layer_mask
        if history is not None and given is None:
            row = [self.embedded(v, k) for k, v in enumerate([a, *history[:-1]])]  # Eq. 2
            x = torch.stack(row, 1)  # B x K x T x D
            for layer in self.layers:
                x, _ = layer(x, valid, bias, mask=mask)
            return list(self.out[0](x).unbind(1))  # Eq. 4
        predicted, x = [], self.embedded(a, 0)[:, None]  # B x 1 x T x D
        caches = [None] * len(self.layers)
        for k in range(steps):
            y = x
            for i, layer in enumerate(self.layers):
                y, cache = layer(y, valid, bias, caches[i], mask)
                caches[i] = cache if mask else None  # else old blocks see the new one
            predicted.append(self.out[0](y[:, -1]))  # Eq. 4
            if k + 1 < steps:
                v = next_history(predicted[-1], history, given, k)
                block = self.embedded(v, k + 1)[:, None]  # Eq. 2; no P: S4
                x = block if mask else torch.cat([x, block], 1)
        return predicted


class Recurrent(Student):
    """v2: one Transformer layer, applied K times to the layer before."""

    def predict(self, a: Tensor, valid: Maybe, bias: Maybe, history: Maybe, given: Maybe) -> list:
        """The K layers, one a step. The positional convolution is in ``a`` and in no other step."""
        predicted, before = [], a
        for k in range(len(self.config.target_layers)):
            # Eq. 5
            u = before + a if k and self.config.skip == "input" else before  # S6
            y, _ = self.layers[0](self.embedded(u, k)[:, None], valid, bias)  # B x 1 x T x D
            # Eq. 6
            y = self.out[0](y[:, 0])
            predicted.append(y + before if self.config.skip == "residual" else y)
            before = next_history(predicted[-1], history, given, k)
        return predicted


class Parallel(Student):
    """The baseline: one pass, a Linear for each target layer, no history (S12)."""

    def predict(self, a: Tensor, valid: Maybe, bias: Maybe, history: Maybe, given: Maybe) -> list:
        """The K layers, all from the same vector."""
        x = self.embedded(a, 0)[:, None]  # B x 1 x T x D
        for layer in self.layers:
            x, _ = layer(x, valid, bias)
        return [out(x[:, 0]) for out in self.out]


def make_student(shape: Shape, config: Config) -> Student:
    """A student of the variant that the config names, with random weights."""
    variants = {"2d": TwoDimensional, "recurrent": Recurrent, "parallel": Parallel}
    return variants[config.variant](shape, config)


@torch.no_grad()
def initialise_from_teacher(student: Student, teacher: nn.Module) -> None:
    """Copy the convolutions, projection, positional convolution, norms and first layers (S9).

    ``teacher`` is a torchaudio Wav2Vec2Model like WavLM Base or HuBERT Base: GroupNorm, post-norm
    layers. The output projection stays the identity, the embeddings random.
    """
    ours, theirs = student.feature_extractor, teacher.feature_extractor.conv_layers
    projection, transformer = teacher.encoder.feature_projection, teacher.encoder.transformer
    pairs = [
        *zip(ours.convs, (block.conv for block in theirs), strict=True),
        (ours.group_norm, theirs[0].layer_norm),
        (student.projection_norm, projection.layer_norm),
        (student.projection, projection.projection),
        (student.positional_conv, transformer.pos_conv_embed),
        (student.norm, transformer.layer_norm),
    ]
    if student.relative_position is not None:  # WavLM keeps the table in its first layer
        table = transformer.layers[0].attention.rel_attn_embed
        pairs.append((student.relative_position.table, table))
    for layer, source in zip(student.layers, transformer.layers, strict=False):
        attention, projections = source.attention, (layer.q_proj, layer.k_proj, layer.v_proj)
        if student.relative_position is not None:
            pairs.append((layer.gate, attention.gru_rel_pos_linear))
            layer.gate_scale.copy_(attention.gru_rel_pos_const.flatten())
            attention = attention.attention  # here the three projections are one matrix
            weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
            for project, weight, bias in zip(projections, weights, biases, strict=True):
                project.load_state_dict({"weight": weight, "bias": bias})
        else:
            theirs = (attention.q_proj, attention.k_proj, attention.v_proj)
            pairs += zip(projections, theirs, strict=True)
        pairs += [
            (layer.out_proj, attention.out_proj),
            (layer.attention_norm, source.layer_norm),
            (layer.up, source.feed_forward.intermediate_dense),
            (layer.down, source.feed_forward.output_dense),
            (layer.final_norm, source.final_layer_norm),
        ]
    for module, its_source in pairs:
        module.load_state_dict(its_source.state_dict())


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def l1_term(predicted: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Eq. 8 before the mean over frames: (K, B, T, D) twice -> (K, B, T), averaged over D."""
    return (predicted - teacher_hidden).abs().mean(-1)


def cosine_term(predicted: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Eq. 9 before the mean over frames: (K, B, T, D) twice -> (K, B, T)."""
    return -F.logsigmoid(F.cosine_similarity(predicted, teacher_hidden, dim=-1))


def distillation_loss(
    predicted: Tensor, teacher_hidden: Tensor, cosine_weight: float, frame_mask: Maybe = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 10, and its parts "l1" and "cos" for each target layer, (K,) each.

    ``predicted`` and ``teacher_hidden`` are (K, B, T, D), ``frame_mask`` (B, T) True at valid
    frames, None where all are. Everything is averaged (S10): over layers, frames, and in (8) over
    D; padded frames do not count (D2).
    """
    exact = torch.promote_types(predicted.dtype, torch.float32)  # bf16 would round the sums
    predicted, teacher_hidden = predicted.to(exact), teacher_hidden.to(exact)
    if frame_mask is not None:  # K x frames x D
        predicted, teacher_hidden = predicted[:, frame_mask], teacher_hidden[:, frame_mask]
    l1 = l1_term(predicted, teacher_hidden).flatten(1).mean(1)  # K
    cos = cosine_term(predicted, teacher_hidden).flatten(1).mean(1)  # K
    # L = L_L1 + lambda L_cos
    return l1.mean() + cosine_weight * cos.mean(), {"l1": l1.detach(), "cos": cos.detach()}


# ---- copy boundary: above this line the file needs torch only -----------------------------------


def learning_rate(step: int, config: Config) -> float:
    """Linear from 0 to the peak, then linear to 0 at the last update; ``step`` counts from 1."""
    warmup = max(1, round(config.warmup * config.steps))
    if step <= warmup:
        return config.lr * step / warmup
    return config.lr * (config.steps - step) / (config.steps - warmup)


def teacher_share(step: int, config: Config) -> float:
    """Share of utterances whose history is the teacher's; "mixed": linear from 1 to 0 (S8)."""
    return {"teacher": 1.0, "student": 0.0, "mixed": 1 - (step - 1) / config.steps}[config.history]


def check(config: Config) -> None:
    """Refuse a flag that the variant has no use for; --claim's ablations ignore such ones."""
    if config.student_layers < 1:
        raise InputError("--student-layers: at least one is needed")
    idle = {"2d": ("skip",), "recurrent": ("layer_mask", "student_layers")}
    idle["parallel"] = ("skip", "layer_mask", "history", "step_embedding")
    for name in idle[config.variant]:
        if getattr(config, name) != getattr(Config, name):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} means nothing with --variant {config.variant}: leave it out")


def build(config: Config, teacher: common.Teacher) -> Student:
    """A new student with its teacher's widths; it follows from the seed."""
    layers = config.target_layers
    if not all(1 <= i <= teacher.num_layers for i in layers) or len(set(layers)) < len(layers):
        raise InputError(
            f"--target-layers: {teacher.name} has layers 1 to {teacher.num_layers}, name each once"
        )
    bias = dict(position_buckets=teacher.position_buckets, max_distance=teacher.max_distance)
    torch.manual_seed(config.seed)
    student = make_student(Shape(**teacher.shape, **bias), config)
    if config.init_from_teacher:
        if teacher.pre_norm or teacher.num_layers < len(student.layers):
            raise InputError(
                f"the student cannot start from {teacher.name}, whose layers are not like its own "
                "(post-norm, at least as many): add --no-init-from-teacher"
            )
        initialise_from_teacher(student, teacher.model)
    return student.to(next(teacher.model.parameters()).device)


def load_student(path: Path | str, device: torch.device | str = "cpu") -> Student:
    """The student of a ``student.pt``, in eval mode. Raises InputError for any other file."""

    def make(saved: dict) -> Student:
        config = Config(**saved["config"])
        if config.student_layers > len(saved["state_dict"]):
            raise ValueError("it has more layers than weights")
        return make_student(Shape(**saved["shape"]), config)

    return common.load_student(path, "gendistiller", make, device)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def target_states(teacher: nn.Module, waveforms: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Hidden states of the target layers (K, B, T, D); the teacher stops after the last of them."""
    hidden_states = teacher(waveforms, last_layer=max(layers))
    return torch.stack([hidden_states[i] for i in layers])


def predict_layers(
    student: Student, waveforms: Tensor, history: Maybe = None, given: Maybe = None
) -> Tensor:
    """The layers that the student generates (K, B, T, D); history as in ``Student.forward``."""
    return torch.stack(student(waveforms, None, history, given)[0][1:])


def train(config: Config, resume: bool = False) -> tuple[Student, list[dict]]:
    """Distil into the run folder ``config.out``; returns the student and the log's lines."""
    device, out = common.pick_device(config.device), Path(config.out)
    saved = common.open_run("gendistiller", config, resume)
    with common.first_process_first():
        utterances = common.scan(config.data, out / "scan.jsonl", config.workers)
        teacher = common.load_teacher(config.teacher, device)  # frozen, and always in eval mode: D5
    training, heldout = common.train_and_heldout(utterances)
    student = build(config, teacher)
    parameters = list(student.parameters())
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    spared = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}  # D3
    settings = dict(lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer = torch.optim.AdamW([decayed, spared], weight_decay=config.weight_decay, **settings)
    done, lines = common.restore(saved, state_dict=student, optimizer=optimizer)
    common.start_run(config, lines)

    batches = common.load_batches(
        training,
        config.batch_seconds,
        config.crop_seconds,
        seed=config.seed,
        first=done,
        last=config.steps,
        workers=config.workers,
    )
    forward = torch.compile(student) if config.compile else student  # of the same weights
    if config.compile:  # most of what the teacher moves to and from memory
        teacher.model.feature_extractor.compile()
    amp = common.bf16_pays(device) if config.amp is None else config.amp
    skipped = torch.zeros((), device=device)  # updates whose gradient was not finite
    bar = tqdm(None, "distil", config.steps, initial=done, disable=common.rank() > 0)
    for step, waveforms, stopping in common.updates(batches, done, bar):
        saving = step % config.save_every == 0 or step == config.steps
        logging = saving or step % config.log_every == 0
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        sums = {"loss": 0.0, "free_running": 0.0, "l1": 0.0, "cos": 0.0}
        for part in waveforms.chunk(config.accumulate):
            share = len(part) / len(waveforms)
            drawn = torch.rand(len(part)) < teacher_share(step, config)  # B; S8
            given = drawn.to(device, non_blocking=True) if config.history == "mixed" else None
            part = part.to(device, non_blocking=True)  # B x S
            with torch.autocast(device.type, torch.bfloat16, amp):
                teacher_hidden = target_states(teacher, part, config.target_layers)  # K x B x T x D
                history = None if config.history == "student" else teacher_hidden
                parts = {}
                if logging:  # what the student does on its own, whatever history it learns with
                    with torch.no_grad():
                        predicted = predict_layers(student.eval(), part)
                    parts["free_running"], _ = distillation_loss(
                        predicted, teacher_hidden, config.cosine_weight
                    )
                student.train()
                predicted = predict_layers(forward, part, history, given)
                loss, terms = distillation_loss(predicted, teacher_hidden, config.cosine_weight)
            (share * loss).backward()
            for name, value in {**parts, "loss": loss.detach(), **terms}.items():
                sums[name] = sums[name] + share * value
        common.sum_gradients(parameters, len(waveforms))  # over all processes
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.found_inf = (~norm.isfinite()).float()  # where it is 1, nothing is updated
        skipped += optimizer.found_inf
        optimizer.step()

        if logging:
            sums = common.average(sums, len(waveforms))
            line = {"step": step, "lr": lr, "grad_norm": norm.item()}
            line |= {name: sums[name].item() for name in ("loss", "free_running")}
            for name in ("l1", "cos"):
                for layer, value in zip(config.target_layers, sums[name], strict=True):
                    line[f"{name}_{layer}"] = value.item()
            if saving and common.rank() == 0:
                line["heldout"] = distance(config, teacher, student, heldout)
            common.write_log(config, lines, line, skipped)
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        if saving or stopping:
            content = common.student_content("gendistiller", config, student)
            common.save_run(config, content, step, lines, optimizer=optimizer)
    return student.eval(), lines


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def score(
    student: Student, tasks: list, device: torch.device, seed: int, speed: float | None = None
) -> dict[str, float]:
    """Size, speed, and probes on the learned weighted sum of speech and generated layers (S11)."""
    return common.score(
        student, lambda waveforms: student(waveforms)[0], tasks, device, seed, speed
    )


def distance(
    config: Config, teacher: nn.Module, student: Student, heldout: list
) -> dict[str, list[float]]:
    """L1 and cosine between each generated layer and its teacher's on held-out audio.

    In eval mode and free running: the student has nothing but speech, as it will have in use.
    """
    student.eval()
    return common.layer_distance(
        lambda waveforms: predict_layers(student, waveforms),
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

    Columns: parameters, MACs and speed; L1 and cosine between generated and teacher layers on
    held-out audio, averaged over the target layers; probes on frozen features (D1), whose input is
    the learned weighted sum of all hidden states, of teacher and student alike.
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
    """The student with WavLM Base's widths, part by part: parameters, MACs per second of audio.

    What runs at every step is counted every time.
    """
    student = make_student(Shape(), config).eval()
    return common.describe([student], student)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the flags and do what they say; results go to stdout, progress to stderr."""
    config, args = common.parse_flags(Config, TOY, __doc__)
    check(config)
    if args.describe:
        print(common.format_table(describe(config)))
    elif args.evaluate:
        print(common.score_file(load_student, score, config, args))
    else:
        print(common.make_table(train, evaluate, config, args, CLAIM))


if __name__ == "__main__":
    main()
