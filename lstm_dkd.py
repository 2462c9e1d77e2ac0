# SPDX-License-Identifier: MIT
"""LSTM + decoupled KD: a recurrent student learns which clusters its HuBERT teacher hears.

Paper
-----
D. de Oliveira, T. Gerkmann, "Distilling HuBERT with LSTMs via Decoupled Knowledge Distillation",
ICASSP 2024, arXiv 2309.09920; no code of the authors was found. The loss: B. Zhao et al.,
"Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, code: mdistiller.

Idea
----
HuBERT was trained to classify: each frame belongs to one of 500 clusters. A student that copies
its answers, and no hidden layer, may be built in any way, here of LSTM layers, whose cost grows
with the length of the audio and not with its square. Much of what a teacher knows is in how it
ranks the classes it does *not* choose, but classic distillation weighs that by 1 - p_y, so that a
sure teacher hardly passes it on. Decoupled distillation asks two questions, whether it is the
target class, and which of the others it would be, and gives each its own weight. The class head is
thrown away after training.

    wave -> 7 convs -> LayerNorm, Linear -> 4 bidirectional LSTM layers -> class head -> l^S
    teacher (frozen): 7 convs -> Transformer layers -> cosine with K codes / 0.1 -----------> l^T

Equations
---------
Numbered by us, for one frame; (2) to (4) are the DKD paper's, the tau^2 in (5) its code's, the rest
is from a summary of this paper (see below). l_c: logit of class c, K classes; y: target class;
p_c = exp(l_c / tau) / sum_k exp(l_k / tau), T of the teacher, S of the student;
q_c = p_c / (1 - p_y) for c != y, the distribution among the others.

    (1)  KD   = tau^2 KL,  KL = sum_c p^T_c log( p^T_c / p^S_c )
    (2)  TCKD = p^T_y log( p^T_y / p^S_y ) + (1 - p^T_y) log( (1 - p^T_y) / (1 - p^S_y) )
    (3)  NCKD = sum_{c != y} q^T_c log( q^T_c / q^S_c )
    (4)  KL   = TCKD + (1 - p^T_y) NCKD
    (5)  DKD  = tau^2 ( alpha TCKD + beta NCKD ),   alpha = 1, beta = 4, tau = 1
    (6)  CE   = - log p^S_y   with tau = 1
    (7)  L    = w_CE CE + w_KD DKD,  averaged over frames

DKD with alpha = beta = 1 is not KD: (4) shows that KD has beta = 1 - p^T_y.

Paper vs this code
------------------
Of the paper only title, abstract and the start of the introduction could be read; "paper" below
and in Config is one summary of it by others. D: done otherwise here. S: unknown, chosen by us.

id  topic            paper                    here                         why
D1  batch            32 (utterances?)         387 s of audio, as much as   bounded memory, few
                                              32 of LibriSpeech's          distinct shapes
D2  held out         not mentioned            10 min of dev or of 1 %      to watch agreement
D3  evaluation       SUPERB, ten tasks        probes of common.py          minutes, not days
S1  widths           384, per direction or    384 per direction; before    LSTMs as large as two
                     in all: unknown          them LayerNorm, Linear 768   Transformer layers
S2  between layers   unknown                  dropout 0.1, on the first    DistilHuBERT's rate
                                              input too; no norm, no
                                              residual
S3  start            unknown                  convs and LayerNorm of the   as DistilHuBERT; LARGE
                                              teacher, and the Linear      is wider than 768
                                              where its width agrees
S4  conv gradient    unknown                  times 0.1                    as DistilHuBERT
S5  normalised wave  unknown                  where the teacher's is, each the copied convs expect
                                              utterance by itself          it
S6  target y         cluster assignments, in  teacher's arg-max, in both   needs no other model;
                     (6); in (2, 3) unknown                                Base's are not public
S7  masking          unknown                  none in the teacher          as the student hears
S8  special rows     500 classes              fairseq's 4 left out         no clusters
S9  loss weights     unknown                  w_CE = w_KD = 1              mdistiller's CE weight
S10  reduction       unknown                  mean over valid frames; no   all frames weigh alike
                                              warm-up of DKD (mdistiller
                                              has one)
S11  optimizer       rate, warm-up, updates   AdamW, clip and crop of      its rate and schedule
                                              DistilHuBERT                 are the paper's
S12  precision       unknown                  bf16, the teacher too; LSTM, autocast would run the
                                              heads and loss in fp32       LSTM in fp16; cuDNN's
                                              (the LSTM TF32 in cuDNN)     own default
S13  feature         unknown                  learned weighted sum of      s3prl's default
                                              projection and all layers
S14  LSTM start      unknown                  forget bias 1, others 0      toy world: torch's start
                                                                           gives agreement .70 to
                                                                           .79, this .81 to .83

Run
---
    python lstm_dkd.py --toy                     # offline, minutes on a CPU
    python lstm_dkd.py --data LibriSpeech        # the paper's recipe; needs hubert_large_ll60k.pt
    python lstm_dkd.py --toy --claim             # against KD, cross-entropy, beta 1; three seeds

--teacher names another file with a cluster head. --describe, --resume, --evaluate and --help are as
in all files. In Python: ``student = load_student("RUN/student.pt")``.

Result
------
Phone accuracy, toy world, 200 updates of 16 s, CPU, three seeds: distilled .855 (sd .003), KD .844
(.012), cross-entropy .824 (.003), beta 1 .846 (.010), teacher .878, untrained .384, initialised
.794; after 800 updates .896 (.001). The paper's 200,000 updates: not yet run.

Copy
----
Config, Shape, Student, Heads, initialise_from_teacher, tckd, nckd, and distillation_loss need torch
alone.
"""

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

import common
from common import InputError

# B batch, S samples, T frames, D width, C conv channels, K clusters

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""  # folder of audio, or a manifest.tsv (paper: LibriSpeech, 960 h)
    teacher: str = "hubert_large_ll60k.pt"  # "toy", or a file with a cluster head (paper: LARGE)
    out: str = "runs/lstm_dkd"  # run folder
    seed: int = 0  # of weights, dropout, crops and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 4  # processes that load audio
    student_layers: int = 4  # LSTM layers (paper)
    hidden: int = 384  # LSTM units per direction; the width is twice that (paper; S1)
    init_from_teacher: bool = True  # start from the teacher's front end (S3)
    loss: Literal["dkd", "kd", "ce"] = "dkd"  # Eq. 5, Eq. 1, or cross-entropy alone (paper)
    tau: float = 1.0  # temperature (paper)
    alpha: float = 1.0  # weight of the target class in Eq. 5 (paper)
    beta: float = 4.0  # weight of the other classes in Eq. 5 (paper: 1 and 4)
    ce_weight: float = 1.0  # w_CE of Eq. 7 (S9)
    kd_weight: float = 1.0  # w_KD of Eq. 7 (S9)
    dropout: float = 0.1  # on the input of each layer (S2)
    conv_gradient: float = 0.1  # factor on the gradient into the convolutions (S4)
    steps: int = 200_000  # updates (paper)
    batch_seconds: float = 387.0  # audio per update: 32 utterances on average (D1)
    crop_seconds: float = 15.625  # longest crop, 250,000 samples (S11)
    accumulate: int = 1  # parts a batch is cut into to save memory (ours)
    lr: float = 2e-4  # peak learning rate (paper)
    warmup: float = 0.07  # share of updates before the peak; linear up, linear down (paper)
    betas: tuple[float, ...] = (0.9, 0.98)  # of AdamW (S11)
    eps: float = 1e-6  # of AdamW (S11)
    weight_decay: float = 0.01  # not on biases and norms (S11)
    clip: float = 5.0  # largest norm of the gradient (S11)
    amp: bool | None = None  # bf16 but in the LSTM; None: on GPUs that have bf16 (S12)
    compile: bool = False  # torch.compile: slow at first, then faster (ours)
    log_every: int = 50  # updates between two lines of the log (ours)
    save_every: int = 1_000  # updates between checkpoints with held-out agreement (ours, D2)


# --toy: the same method on the toy world, for minutes on two CPU cores instead of days on a GPU.
TOY = dict(
    teacher="toy",
    out="runs/lstm_dkd-toy",
    workers=0,
    hidden=32,
    steps=200,
    batch_seconds=16.0,
    crop_seconds=3.0,
    lr=1e-2,
    log_every=10,
    save_every=100,
)

# --claim: what the method is set beside; each row is the Config with a few fields changed.
CLAIM = {
    "KD": dict(loss="kd"),
    "cross-entropy": dict(loss="ce"),
    "beta 1": dict(loss="dkd", beta=1.0),
}


@dataclass
class Shape:
    """Sizes of the student. Its front end takes after its teacher's."""

    width: int  # twice Config.hidden
    clusters: int = 500  # HuBERT LARGE, as all defaults here
    conv_channels: int = 512
    conv_norm: str = "layer"  # after each convolution; "group": after the first alone (Base)
    conv_bias: bool = False
    normalise: bool = True  # the wave of each utterance: mean 0, variance 1


# ------------------------------------------------------------------------------------------------
# Student
# ------------------------------------------------------------------------------------------------


class ScaleGradient(torch.autograd.Function):
    """Identity forward; the gradient is multiplied by ``factor`` on its way back."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class FrontEnd(nn.Module):
    """Seven convolutions from 16 kHz samples to 50 frames per second: (B, S) -> (B, T, C).

    Two kinds, as teachers have them: "group" (Base) normalises each channel over the whole
    utterance after the first convolution; "layer" (LARGE) each frame over its channels after all
    seven.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        channels, bias = shape.conv_channels, shape.conv_bias
        kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
        self.convs = nn.ModuleList(
            nn.Conv1d(1 if i == 0 else channels, channels, kernel, stride, bias=bias)
            for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True))
        )
        if shape.conv_norm == "layer":
            self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in self.convs)
        else:
            self.norms = nn.ModuleList([nn.GroupNorm(channels, channels)])

    def forward(self, waveforms: Tensor) -> Tensor:
        x = waveforms[:, None]  # B x 1 x S
        for conv, norm in itertools.zip_longest(self.convs, self.norms):  # Base has one norm
            x = conv(x)  # B x C x T of this layer
            if isinstance(norm, nn.LayerNorm):
                x = norm(x.transpose(1, 2)).transpose(1, 2)  # over C, back to B x C x T
            elif norm is not None:
                x = norm(x)
            x = F.gelu(x)
        return x.transpose(1, 2)  # B x T x C

    def frames(self, samples: Tensor) -> Tensor:
        """Valid frames of so many valid samples."""
        for conv in self.convs:
            samples = (samples - conv.kernel_size[0]) // conv.stride[0] + 1
        return samples


class LSTMLayers(nn.Module):
    """The paper's body: (B, T, D) -> hidden states [(B, T, D)], the input first.

    Bidirectional layers with D / 2 units per direction.
    """

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout, units = dropout, width // 2
        self.layers = nn.ModuleList(
            nn.LSTM(width, units, batch_first=True, bidirectional=True) for _ in range(layers)
        )
        for name, parameter in self.named_parameters():
            if "bias" in name:  # of the gates input, forget, cell, output, one after another
                nn.init.zeros_(parameter)
            if "bias_ih" in name:  # torch has two biases that add up: S14
                nn.init.ones_(parameter.data[units : 2 * units])

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """``lengths`` (B,) in frames, None where nothing is padded."""
        frames = x.shape[1]
        if lengths is not None:
            lengths = lengths.cpu().clamp(min=1)  # packing knows no empty sequence
            if bool((lengths == frames).all()):
                lengths = None  # nothing is padded: no need to pack
        x = x.to(self.layers[0].weight_ih_l0.dtype)
        hidden_states = [x]
        with torch.autocast(x.device.type, enabled=False):  # it would choose fp16: S12
            for lstm in self.layers:
                x = F.dropout(x, self.dropout, self.training)  # S2
                if lengths is None:
                    x, _ = lstm(x)
                else:  # the backward direction starts at the last valid frame
                    packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
                    packed, _ = lstm(packed)
                    x, _ = pad_packed_sequence(packed, True, total_length=frames)  # B x T x D
                hidden_states.append(x)
        return hidden_states


class Student(nn.Module):
    """What is kept: front end, projection, LSTM layers."""

    def __init__(self, shape: Shape, layers: int, dropout: float, conv_gradient: float) -> None:
        super().__init__()
        self.shape, self.conv_gradient = shape, conv_gradient
        self.front_end, channels = FrontEnd(shape), shape.conv_channels
        self.projection = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, shape.width))
        self.body = LSTMLayers(shape.width, layers, dropout)
        for module in self.modules():  # BERT's random start; what S3 copies is overwritten
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for conv in self.front_end.convs:
            nn.init.kaiming_normal_(conv.weight)

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states [(B, T, D)] and their lengths (B,).

        ``waveforms`` (B, S) at 16 kHz, not normalised; ``lengths`` (B,) valid samples of a
        right-padded batch, None where nothing is padded. Entry 0 is the input of layer 1, entry i
        the output of layer i; the feature is a learned weighted sum of all (S13).
        """
        if self.shape.normalise:  # S5
            waveforms = normalise(waveforms, lengths)
        if lengths is not None:
            lengths = self.front_end.frames(lengths)
        x = ScaleGradient.apply(self.front_end(waveforms), self.conv_gradient)  # S4
        return self.body(self.projection(x), lengths), lengths


class Heads(nn.Linear):
    """The class head, one plain Linear: (B, T, D) -> logits (B, T, K). Training only."""


def normalise(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean 0 and variance 1 for each utterance over its valid samples; padding becomes 0 (S5)."""
    if lengths is None:
        return F.layer_norm(waveforms, waveforms.shape[-1:])
    valid = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]  # B x S
    count = lengths[:, None].clamp(min=1)
    mean = (waveforms * valid).sum(1, keepdim=True) / count
    centred = (waveforms - mean) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + 1e-5).sqrt()


@torch.no_grad()
def initialise_from_teacher(student: Student, teacher: nn.Module) -> None:
    """Copy the convolutions, their norms, and of the projection what fits (S3).

    ``teacher`` is a torchaudio Wav2Vec2Model.
    """
    blocks = teacher.feature_extractor.conv_layers
    for conv, block in zip(student.front_end.convs, blocks, strict=True):
        conv.load_state_dict(block.conv.state_dict())
    for norm, block in zip(student.front_end.norms, blocks, strict=False):
        norm.load_state_dict(block.layer_norm.state_dict())
    (norm, linear), source = student.projection, teacher.encoder.feature_projection
    norm.load_state_dict(source.layer_norm.state_dict())
    if linear.weight.shape == source.projection.weight.shape:
        linear.load_state_dict(source.projection.state_dict())


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------

# Logits are (..., K) and already divided by tau, targets (...,) integers; each result is (...,).
# log p_y and log(1 - p_y) are both log sigmoids of one number, so that neither loses its digits
# where the teacher is sure: 1 - p_y computed as a difference would be 0 in fp32 from 1 - 3e-8 on.


def other_logits(logits: Tensor, target: Tensor) -> Tensor:
    """The logits of all classes but y: (..., K) -> (..., K - 1)."""
    k = torch.arange(logits.shape[-1] - 1, device=logits.device)
    return logits.gather(-1, k + (k >= target[..., None]))


def target_margin(logits: Tensor, target: Tensor) -> Tensor:
    """m = l_y - log sum_{c != y} exp l_c, so that p_y = sigmoid(m) and 1 - p_y = sigmoid(-m)."""
    own = logits.gather(-1, target[..., None]).squeeze(-1)
    return own - other_logits(logits, target).logsumexp(-1)


def kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL of Eq. 1, summed over the classes."""
    p, q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def tckd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Eq. 2: is it the target class or not, a KL of two binary distributions."""
    m, n = target_margin(teacher_logits, target), target_margin(student_logits, target)
    is_target = m.sigmoid() * (F.logsigmoid(m) - F.logsigmoid(n))
    is_other = (-m).sigmoid() * (F.logsigmoid(-m) - F.logsigmoid(-n))
    return is_target + is_other


def nckd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Eq. 3: which of the others; in plain KD it counts 1 - p_y times (Eq. 4)."""
    return kl(other_logits(student_logits, target), other_logits(teacher_logits, target))


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    loss: str,
    tau: float,
    alpha: float,
    beta: float,
    ce_weight: float,
    kd_weight: float,
    frame_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 7, and its parts "ce", "kd", "tckd" and "nckd", of which ``loss`` decides what counts.

    Logits (B, T, K), ``target`` (B, T), ``frame_mask`` (B, T) True at valid frames, None where all
    are. Summed over classes, averaged over valid frames (S10); padded frames do not count.
    """
    exact = torch.promote_types(student_logits.dtype, torch.float32)  # bf16 would round the sums
    s, t = student_logits.to(exact), teacher_logits.to(exact)
    if frame_mask is not None:
        s, t, target = s[frame_mask], t[frame_mask], target[frame_mask]  # frames x K, frames
    ce = F.cross_entropy(s.flatten(0, -2), target.flatten())  # Eq. 6
    s, t = s / tau, t / tau
    parts = {"ce": ce, "kd": tau**2 * kl(s, t).mean()}  # Eq. 1
    parts |= {"tckd": tckd(s, t, target).mean(), "nckd": nckd(s, t, target).mean()}
    # DKD = tau^2 (alpha TCKD + beta NCKD), Eq. 5
    dkd = tau**2 * (alpha * parts["tckd"] + beta * parts["nckd"])
    # L = w_CE CE + w_KD DKD
    total = ce_weight * ce + kd_weight * {"dkd": dkd, "kd": parts["kd"], "ce": 0.0}[loss]
    return total, {name: part.detach() for name, part in parts.items()}


# ---- copy boundary: above this line the file needs torch only -----------------------------------


def learning_rate(step: int, config: Config) -> float:
    """Linear from 0 to the peak, then linear to 0 at the last update; ``step`` counts from 1."""
    warmup = max(1, round(config.warmup * config.steps))
    if step <= warmup:
        return config.lr * step / warmup
    return config.lr * (config.steps - step) / (config.steps - warmup)


def load_teacher(config: Config, device: torch.device) -> common.Teacher:
    """A teacher with a cluster head; for any other an InputError names the files that have one."""
    name, known = config.teacher, config.teacher in common.BUNDLES
    missing = name != "toy" and not known and not os.path.exists(name)
    teacher = None if known or missing else common.load_teacher(name, device)  # frozen, in eval
    if teacher is None or teacher.final_proj is None:
        raise InputError(
            f"--teacher {name} {'does not exist' if missing else 'has no cluster head'}: those with"
            " one are toy, fairseq's hubert_large_ll60k.pt and hubert_base_ls960.pt (from"
            " dl.fbaipublicfiles.com/hubert), the files of the same names in s3prl/converted_ckpts"
            " on Hugging Face, and state dicts of a torchaudio HuBERTPretrainModel"
        )
    return teacher


def check(config: Config) -> None:
    """Refuse settings that no run can have, by the names of their flags."""
    for name in ("hidden", "student_layers", "tau"):
        if getattr(config, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')}: the number must be above zero")
    if config.ce_weight == 0 and (config.kd_weight == 0 or config.loss == "ce"):
        raise InputError("--ce-weight 0 and --kd-weight 0: nothing would be learned")


def build(config: Config, teacher: common.Teacher) -> tuple[Student, Heads]:
    """A new student with its teacher's front end, and its head; both follow from the seed."""
    first, width = teacher.model.feature_extractor.conv_layers[0], 2 * config.hidden
    shape = Shape(
        width,
        clusters=len(teacher.label_embeddings),
        conv_channels=teacher.shape["conv_channels"],
        conv_norm="group" if isinstance(first.layer_norm, nn.GroupNorm) else "layer",
        conv_bias=first.conv.bias is not None,
        normalise=teacher.normalise,
    )
    torch.manual_seed(config.seed)
    student = Student(shape, config.student_layers, config.dropout, config.conv_gradient)
    heads = Heads(width, shape.clusters)
    if config.init_from_teacher:
        initialise_from_teacher(student, teacher.model)
    device = next(teacher.model.parameters()).device
    return student.to(device), heads.to(device)


def load_student(path: Path | str, device: torch.device | str = "cpu") -> Student:
    """The student of a ``student.pt``, in eval mode. Raises InputError for any other file."""

    def make(saved: dict) -> Student:
        config, shape = Config(**saved["config"]), Shape(**saved["shape"])
        if config.student_layers > len(saved["state_dict"]):
            raise ValueError("it has more layers than weights")
        return Student(shape, config.student_layers, config.dropout, config.conv_gradient)

    return common.load_student(path, "lstm_dkd", make, device)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def teacher_logits(teacher: common.Teacher, waveforms: Tensor, amp: bool = False) -> Tensor:
    """Cluster logits (B, T, K) of the whole teacher, nothing masked (S7), no special rows (S8)."""
    with torch.autocast(waveforms.device.type, torch.bfloat16, amp):
        hidden_states = teacher(waveforms)
    return teacher.logits(hidden_states[-1].float())  # outside of autocast: S12


def train(config: Config, resume: bool = False) -> tuple[Student, Heads, list[dict]]:
    """Distil into the run folder ``config.out``; returns student, heads and the log's lines."""
    device, out = common.pick_device(config.device), Path(config.out)
    check(config)
    saved = common.open_run("lstm_dkd", config, resume)
    with common.first_process_first():
        utterances = common.scan(config.data, out / "scan.jsonl", config.workers)
        teacher = load_teacher(config, device)
    training, heldout = common.train_and_heldout(utterances)
    student, heads = build(config, teacher)
    parameters = [*student.parameters(), *heads.parameters()]
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    spared = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}  # S11
    settings = dict(lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer = torch.optim.AdamW([decayed, spared], weight_decay=config.weight_decay, **settings)
    rest = dict(heads=heads, optimizer=optimizer)
    done, history = common.restore(saved, state_dict=student, **rest)
    common.start_run(config, history)

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
    weights = config.tau, config.alpha, config.beta, config.ce_weight, config.kd_weight
    skipped = torch.zeros((), device=device)  # updates whose gradient was not finite
    bar = tqdm(None, "distil", config.steps, initial=done, disable=common.rank() > 0)
    for step, waveforms, stopping in common.updates(batches, done, bar):
        student.train(), heads.train()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        sums = dict.fromkeys(("loss", "ce", "kd", "tckd", "nckd"), 0.0)
        for part in waveforms.chunk(config.accumulate):
            share = len(part) / len(waveforms)
            part = part.to(device, non_blocking=True)  # B x S
            soft = teacher_logits(teacher, part, amp)  # B x T x K
            target = soft.argmax(-1)  # B x T: S6
            with torch.autocast(device.type, torch.bfloat16, amp):
                hidden = forward(part)[0][-1]
            predicted = heads(hidden.float())  # B x T x K, outside of autocast: S12
            loss, terms = distillation_loss(predicted, soft, target, config.loss, *weights)
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
            line = {"step": step, "lr": lr, "grad_norm": norm.item()}
            line |= {name: value.item() for name, value in sums.items()}
            if saving and common.rank() == 0:
                line["heldout"] = agreement(config, teacher, student, heads, heldout)
            common.write_log(config, history, line, skipped)
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        if saving or stopping:
            content = common.student_content("lstm_dkd", config, student)
            common.save_run(config, content, step, history, **rest)
    return student.eval(), heads.eval(), history


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def score(
    student: Student, tasks: list, device: torch.device, seed: int, speed: float | None = None
) -> dict[str, float]:
    """Size, speed and probes on the student's feature: the weighted sum of all layers (S13)."""
    return common.score(
        student, lambda waveforms: student(waveforms)[0], tasks, device, seed, speed
    )


@torch.no_grad()
def agreement(
    config: Config, teacher: common.Teacher, student: Student, heads: Heads, heldout: list
) -> dict[str, float]:
    """How far the class head follows the teacher on held-out audio, in eval mode.

    "agreement": share of frames with the same top class; "KL": of Eq. 1 with tau = 1, in nats.
    """
    device, sums, frames = next(student.parameters()).device, torch.zeros(2), 0
    student.eval(), heads.eval()
    batches = common.heldout_batches(
        heldout, config.batch_seconds, config.crop_seconds, config.accumulate
    )
    for waveforms in batches:
        waveforms = waveforms.to(device)
        soft, predicted = teacher_logits(teacher, waveforms), heads(student(waveforms)[0][-1])
        same = soft.argmax(-1) == predicted.argmax(-1)
        sums += torch.stack([same.sum(), kl(predicted, soft).sum()]).cpu()
        frames += same.numel()
    same, distance = (sums / frames).tolist()
    return {"agreement": same, "KL": distance}


def evaluate(
    config: Config, student: Student, heads: Heads, baselines: bool = True
) -> dict[str, dict[str, float]]:
    """Rows of the table: the distilled student and, as ``baselines``, its teacher and its starts.

    Columns: parameters, MACs and speed; agreement and KL between class head and teacher on
    held-out audio; probes on frozen features (D3). Student and teacher both get SUPERB's learned
    weighted sum of all layers.
    """
    device = next(student.parameters()).device
    utterances = common.scan(config.data, Path(config.out) / "scan.jsonl", config.workers)
    tasks, (_, heldout) = common.find_tasks(utterances), common.train_and_heldout(utterances)
    teacher = load_teacher(config, device)
    timed = {"teacher": teacher, "student": lambda waveforms: student(waveforms)[0]}
    speeds = common.measure_speed(timed, device)
    speed = speeds["student"] / speeds["teacher"]
    models, rows = {"distilled": (student, heads)}, {}
    if baselines:
        rows["teacher"] = common.score(teacher.model, teacher, tasks, device, config.seed, 1.0)
        untrained = build(replace(config, init_from_teacher=False), teacher)
        start = {"initialised": build(config, teacher)} if config.init_from_teacher else {}
        models = {"untrained": untrained} | start | models
    for name, (model, its_heads) in models.items():
        rows[name] = agreement(config, teacher, model, its_heads, heldout)
        rows[name] |= score(model, tasks, device, config.seed, speed)
    return rows


def describe(config: Config) -> dict[str, dict[str, float]]:
    """The paper-size student and its head, part by part: parameters, MACs per second of audio."""
    settings = config.student_layers, config.dropout, config.conv_gradient
    shape = Shape(2 * config.hidden)
    student, heads = Student(shape, *settings).eval(), Heads(shape.width, shape.clusters)
    rows = common.describe([student, heads], lambda waveforms: heads(student(waveforms)[0][-1]))
    kept, dropped = rows["Student"], rows["Heads"]
    rows["Student and Heads"] = {name: kept[name] + dropped[name] for name in kept}
    base = Student(replace(shape, conv_norm="group"), *settings)
    rows["Student of a Base teacher"] = {"parameters": common.count_parameters(base)}
    return rows


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
