# SPDX-License-Identifier: MIT
"""LSTM + decoupled KD: a recurrent student learns the cluster logits of its HuBERT teacher.

Paper
-----
D. de Oliveira, T. Gerkmann, "Distilling HuBERT with LSTMs via Decoupled Knowledge Distillation",
ICASSP 2024, arXiv 2309.09920. No code was found, and only title, abstract and the first lines could
be read: all else that is called "paper" in this file is from one summary by others. The loss: B.
Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, code: mdistiller.

Idea
----
HuBERT is pre-trained as a classifier: each frame is in one of K = 500 clusters. A student that
learns its class probabilities, and no hidden layer, can have any architecture; here it is an LSTM,
whose cost is linear in the length of the audio. Much of what the teacher knows is in how it ranks
the classes that are *not* the target. But plain distillation (KD) weighs this by 1 - p^T_y, small
where the teacher is confident. Decoupled distillation (DKD) splits KD into two terms (target class
or not; which of the others), each with its own weight. The class head is then dropped.

    waveform -> 7 convolutions -> LayerNorm, Linear -> 4 bidirectional LSTM layers -> head -> l^S
    teacher (frozen): 7 convolutions -> Transformer -> Linear -> cosine with K vectors / 0.1 -> l^T

Equations
---------
Numbered by us, for one frame; (2) to (5) are the DKD paper's. c: class, one of K; l_c: its logit;
y: target class; superscripts T: teacher, S: student; p = softmax(l); q_c = p_c / (1 - p_y), the
distribution over the classes c != y. The temperature, in this paper 1, is left out.

    (1)  KD   = sum_c p^T_c log( p^T_c / p^S_c )
    (2)  TCKD = p^T_y log( p^T_y / p^S_y ) + (1 - p^T_y) log( (1 - p^T_y) / (1 - p^S_y) )
    (3)  NCKD = sum_{c != y} q^T_c log( q^T_c / q^S_c )
    (4)  KD   = TCKD + (1 - p^T_y) NCKD        so KD is not DKD with alpha = beta = 1
    (5)  DKD  = alpha TCKD + beta NCKD,    alpha = 1, beta = 4
    (6)  CE   = - log p^S_y
    (7)  L    = CE + DKD,  averaged over valid frames      S7: both weigh 1

Paper vs this code
------------------
D: done otherwise here. S: unknown, our choice.

D1  batch        32 (utterances?); here 387 s of audio, the same on average, for bounded memory
S1  widths       384 may be per direction or in all; here per direction, after LayerNorm, Linear
S2  LSTM layers  dropout 0.1 on each input; no norm or skip between them; bias of forget gates 1,
                 others 0: the toy student agrees with its teacher in more frames (chosen there)
S3  start        the teacher's convolutions, LayerNorm, waveform normalisation; its Linear where it
                 is as wide (toy: 64; LARGE: 1024, so random for the student's 768)
S4  recipe       of DistilHuBERT's code, for learning rate, warm-up and updates are the same: AdamW,
                 clipping, gradient into the convolutions times 0.1. Ours: norms do not decay
S5  target y     the teacher's arg-max. Paper: cluster assignments; k-means or arg-max is unknown
S6  l^T          nothing is masked; without the 4 special symbols of fairseq's dictionary
S7  loss         CE and DKD weigh 1; all valid frames alike; no warm-up of DKD (mdistiller's)
S8  feature      learned weighted sum of the LSTM's input and all layers (s3prl's default)

Run
---
    python lstm_dkd.py --toy                     # offline, minutes on a CPU
    python lstm_dkd.py --data LibriSpeech        # the paper's recipe; needs hubert_large_ll60k.pt
    python lstm_dkd.py --toy --claim             # against KD, cross-entropy, beta 1; three seeds

Result
------
Phone accuracy of a linear probe, toy world, 200 updates of 16 s, three seeds: DKD .855 (sd .003),
KD .844 (.012), cross-entropy .824 (.003), beta 1 .846 (.010), teacher .878, untrained .384,
initialised .794. Reproduced: better than cross-entropy; not: than KD, beta 1. Paper size: not run.

Copy
----
What stands above the copy boundary needs torch alone: leave the imports of tqdm and common out.

    student, head = Student(Shape(width=768), dropout=0.1, conv_gradient=0.1), Head(768, 500)
    waveforms, lengths = torch.randn(2, 16000), torch.tensor([16000, 9000])
    hidden_states, lengths = student(waveforms, lengths)
    student_logits, teacher_logits = head(hidden_states[-1]), torch.randn(2, 49, 500)
    target, frame_mask = teacher_logits.argmax(-1), torch.arange(49) < lengths[:, None]
    loss, terms = distillation_loss(student_logits, teacher_logits, target, "dkd", 4.0, frame_mask)
    loss.backward()
"""

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
    hidden: int = 384  # LSTM units per direction; the width is twice that (paper; S1)
    init_from_teacher: bool = True  # start from the teacher's convolutions and projection (S3)
    loss: Literal["dkd", "kd", "ce"] = "dkd"  # CE + Eq. 5, CE + Eq. 1 (paper); CE (ours)
    beta: float = 4.0  # weight of the classes that are not the target, Eq. 5 (paper: 1 and 4)
    dropout: float = 0.1  # on the input of each LSTM layer (S2)
    conv_gradient: float = 0.1  # factor on the gradient into the convolutions (S4)
    steps: int = 200_000  # updates (paper)
    batch_seconds: float = 387.0  # audio per update: 32 utterances on average (D1)
    crop_seconds: float = 15.625  # longest crop, 250,000 samples (S4)
    accumulate: int = 1  # parts a batch is cut into to save memory (ours)
    lr: float = 2e-4  # peak learning rate (paper)
    warmup: float = 0.07  # share of updates before the peak; linear up, linear down (paper)
    betas: tuple[float, ...] = (0.9, 0.98)  # of AdamW (S4)
    eps: float = 1e-6  # of AdamW (S4)
    weight_decay: float = 0.01  # not on vectors: biases and the gains of norms (S4)
    clip: float = 5.0  # largest norm of the gradient (S4)
    amp: bool | None = None  # bf16 autocast; None: on GPUs that have bf16 (ours)
    compile: bool = False  # torch.compile: slow at first, then faster (ours)
    log_every: int = 50  # updates between two lines of the log (ours)
    save_every: int = 1_000  # updates between checkpoints with held-out agreement (ours)


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

# --claim: the paper compares with KD and with beta 1; cross-entropy alone is ours.
CLAIM = {
    "KD": dict(loss="kd"),
    "cross-entropy": dict(loss="ce"),
    "beta 1": dict(loss="dkd", beta=1.0),
}


@dataclass
class Shape:
    """Sizes of the student. It takes its teacher's convolutions, to start from their weights."""

    width: int  # even: twice Config.hidden
    layers: int = 4  # LSTM layers (paper)
    conv_channels: int = 512  # HuBERT LARGE, as all defaults below
    conv_norm: Literal["layer", "group"] = "layer"  # see ConvBlock; Base: "group"
    conv_bias: bool = False
    normalise: bool = True  # the waveform (S3)


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


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of each frame over its channels: (B, C, T) -> (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvBlock(nn.Module):
    """Convolution, norm, GELU: (B, C_in, S) -> (B, C, S / stride).

    Two kinds, as teachers have them. "layer" (LARGE): a LayerNorm over channels in every block.
    "group" (Base): a GroupNorm in the first block alone, over time in each channel.
    """

    def __init__(self, inputs: int, kernel: int, stride: int, shape: Shape) -> None:
        super().__init__()
        channels = shape.conv_channels
        self.conv = nn.Conv1d(inputs, channels, kernel, stride, bias=shape.conv_bias)
        if shape.conv_norm == "layer":
            self.layer_norm = ChannelNorm(channels)
        else:
            self.layer_norm = nn.GroupNorm(channels, channels) if inputs == 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer_norm(self.conv(x)))


class ConvBlocks(nn.Module):
    """Seven convolutions from 16 kHz samples to 50 frames per second: (B, S) -> (B, T, C)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
        self.conv_layers = nn.ModuleList(
            ConvBlock(shape.conv_channels if i else 1, kernel, stride, shape)
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


class LSTMLayer(nn.Module):
    """Bidirectional LSTM of D / 2 units per direction (S1): (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        units = width // 2
        self.lstm = nn.LSTM(width, units, batch_first=True, bidirectional=True)
        for name, parameter in self.lstm.named_parameters():
            if "bias" in name:  # of the gates input, forget, cell, output, one after another
                nn.init.zeros_(parameter)
            if "bias_ih" in name:  # S2: the forget gate's is 1; torch adds bias_ih and bias_hh
                nn.init.ones_(parameter.data[units : 2 * units])

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``lengths`` (B,) valid frames of a right-padded batch, None where nothing is padded."""
        with torch.autocast(x.device.type, enabled=False):  # CUDA's runs an LSTM in fp16
            x = x.to(self.lstm.weight_ih_l0.dtype)
            if lengths is None:
                return self.lstm(x)[0]
            # Packed, the backward direction starts at the last valid frame, not in the padding.
            lengths = lengths.cpu().clamp(min=1)  # torch cannot pack an empty row
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            packed, _ = self.lstm(packed)
            return pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]


class Student(nn.Module):
    """The student without its class head: convolutions, projection, LSTM layers.

    Outside of the LSTM its modules are named as in Hugging Face's HubertModel.
    """

    def __init__(self, shape: Shape, dropout: float, conv_gradient: float) -> None:
        super().__init__()
        self.shape, self.conv_gradient = shape, conv_gradient
        self.feature_extractor, channels = ConvBlocks(shape), shape.conv_channels
        norm, projection = nn.LayerNorm(channels), nn.Linear(channels, shape.width)
        self.feature_projection = nn.ModuleDict({"layer_norm": norm, "projection": projection})
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(LSTMLayer(shape.width) for _ in range(shape.layers))
        nn.init.normal_(projection.weight, std=0.02)  # BERT's; what S3 copies is overwritten
        nn.init.zeros_(projection.bias)
        for layer in self.feature_extractor.conv_layers:
            nn.init.kaiming_normal_(layer.conv.weight)

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states [(B, T, D)] and their lengths (B,).

        ``waveforms`` (B, S) at 16 kHz, not normalised; ``lengths`` (B,) valid samples of a
        right-padded batch, None where nothing is padded. Entry 0 is the input of layer 1, entry i
        the output of layer i; the feature is a learned weighted sum of all (S8).
        """
        if self.shape.normalise:
            waveforms = normalise(waveforms, lengths)
        if lengths is not None:
            lengths = self.feature_extractor.frame_count(lengths)
        x = self.feature_extractor(waveforms)  # B x T x C
        if self.training:  # in eval mode TorchScript can trace the student
            x = ScaleGradient.apply(x, self.conv_gradient)  # S4: the convolutions learn slowly
        x = self.feature_projection["layer_norm"](x)
        hidden_states = [self.feature_projection["projection"](x)]  # B x T x D
        for layer in self.layers:
            x = self.dropout(hidden_states[-1])  # S2: and no norm or skip
            hidden_states.append(layer(x, lengths))
        return hidden_states, lengths


def normalise(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """S3: mean 0, variance 1 over the valid samples of each utterance; padding becomes 0."""
    if lengths is None:
        return F.layer_norm(waveforms, waveforms.shape[-1:])
    valid = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]  # B x S
    count = lengths[:, None].clamp(min=1)
    mean = (waveforms * valid).sum(1, keepdim=True) / count
    centred = (waveforms - mean) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + 1e-5).sqrt()


class Head(nn.Linear):
    """The class head: (B, T, D) -> logits (B, T, K). Dropped after training."""


def initialise_from_teacher(student: Student, weights: dict[str, Tensor]) -> None:
    """Copy the teacher's convolutions, LayerNorm, and projection where it is as wide (S3).

    ``weights``: the teacher's, under the student's names. The LSTM layers are not copied. Raises
    KeyError where any other weight is missing.
    """
    skipped = ["layers."]
    if len(weights["feature_projection.projection.weight"]) != student.shape.width:  # LARGE: 1024
        skipped.append("feature_projection.projection.")
    names = [name for name in student.state_dict() if not name.startswith(tuple(skipped))]
    student.load_state_dict({name: weights[name] for name in names}, strict=False)


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------

# Logits are (..., K), the target (class numbers) and the results (...). With a temperature tau, in
# Eq. 1 to 3 but not in CE, divide the logits by tau and multiply the results by tau^2 (mdistiller).


def other_logits(logits: Tensor, target: Tensor) -> Tensor:
    """Logits of all classes but the target: (..., K) -> (..., K - 1). Their softmax is q."""
    classes = torch.arange(logits.shape[-1] - 1, device=logits.device)
    return logits.gather(-1, classes + (classes >= target[..., None]))


def target_margin(logits: Tensor, target: Tensor) -> Tensor:
    """Log odds of the target, log( p_y / (1 - p_y) ) = l_y - log sum_{c != y} exp l_c.

    So p_y is its sigmoid and 1 - p_y the sigmoid of its negative. Computed as a difference in fp32,
    1 - p_y would be 0 for a confident student (p_y from 1 - 3e-8 on), and its logarithm infinite.
    """
    own = logits.gather(-1, target[..., None]).squeeze(-1)
    return own - other_logits(logits, target).logsumexp(-1)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Eq. 1, KL divergence between teacher and student, summed over classes."""
    student_log, teacher_log = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)


def tckd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Eq. 2, target class KD: KL divergence of two binary distributions, target class or not."""
    student, teacher = (target_margin(x, target) for x in (student_logits, teacher_logits))
    is_target = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    is_other = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return is_target + is_other


def nckd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Eq. 3, non-target class KD: which of the others. Plain KD has (1 - p_y) times it (Eq. 4)."""
    return kl_divergence(other_logits(student_logits, target), other_logits(teacher_logits, target))


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    loss: str,
    beta: float,
    frame_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 7, and all its parts "ce", "kd", "tckd" and "nckd", which the log compares.

    ``loss`` "dkd": CE + DKD; "kd": CE + KD; "ce": CE alone. Logits (B, T, K), ``target`` (B, T),
    ``frame_mask`` (B, T) True at valid frames, at least one; None where all are. Summed over
    classes, averaged over valid frames (S7).
    """
    exact = torch.promote_types(student_logits.dtype, torch.float32)  # bf16 would round the sums
    student_logits, teacher_logits = student_logits.to(exact), teacher_logits.to(exact)
    if frame_mask is not None:  # frames x K, frames
        student_logits, teacher_logits = student_logits[frame_mask], teacher_logits[frame_mask]
        target = target[frame_mask]
    parts = {
        "ce": F.cross_entropy(student_logits.flatten(0, -2), target.flatten()),  # Eq. 6
        "kd": kl_divergence(student_logits, teacher_logits).mean(),
        "tckd": tckd(student_logits, teacher_logits, target).mean(),
        "nckd": nckd(student_logits, teacher_logits, target).mean(),
    }
    dkd = parts["tckd"] + beta * parts["nckd"]  # Eq. 5, alpha = 1
    # L = CE + DKD (S7: both weigh 1), or what stands in the place of DKD
    total = parts["ce"] + {"dkd": dkd, "kd": parts["kd"], "ce": 0.0}[loss]
    return total, {name: part.detach() for name, part in parts.items()}


# ---- copy boundary: above this line the file needs torch only -----------------------------------


def learning_rate(step: int, config: Config) -> float:
    """Linear from 0 to the peak, then linear to 0 at the last update; ``step`` counts from 1."""
    warmup = max(1, round(config.warmup * config.steps))
    if step <= warmup:
        return config.lr * step / warmup
    return config.lr * (config.steps - step) / (config.steps - warmup)


def load_teacher(config: Config, device: torch.device) -> common.Teacher:
    """The teacher with its cluster head. Raises InputError for others, and downloads none."""
    name, teacher = config.teacher, None
    if name == "toy" or (name not in common.BUNDLES and Path(name).exists()):
        teacher = common.load_teacher(name, device)  # frozen, in eval mode
    if teacher is None or teacher.final_proj is None:
        raise InputError(
            f"--teacher {name} does not exist, or has no cluster head: these have one: toy; "
            "hubert_large_ll60k.pt and hubert_base_ls960.pt, from dl.fbaipublicfiles.com/hubert "
            "or s3prl/converted_ckpts on Hugging Face; a torchaudio HuBERTPretrainModel's weights"
        )
    teacher.logits(torch.zeros(1, 1, teacher.shape["width"], device=device))  # refuses odd heads
    return teacher


def width_of(config: Config) -> int:
    """Units of both directions. Raises InputError where there are none."""
    if config.hidden < 1:
        raise InputError("--hidden: at least one unit is needed")
    return 2 * config.hidden


def build(config: Config, teacher: common.Teacher) -> tuple[Student, Head]:
    """A new student with its teacher's convolutions, and its head; both follow from the seed."""
    first = teacher.model.feature_extractor.conv_layers[0]
    shape = Shape(
        width=width_of(config),
        conv_channels=teacher.shape["conv_channels"],
        conv_norm="group" if isinstance(first.layer_norm, nn.GroupNorm) else "layer",
        conv_bias=first.conv.bias is not None,
        normalise=teacher.normalise,
    )
    torch.manual_seed(config.seed)
    student = Student(shape, config.dropout, config.conv_gradient)
    head = Head(shape.width, len(teacher.label_embeddings))
    if config.init_from_teacher:
        initialise_from_teacher(student, teacher.weights())
    device = next(teacher.parameters()).device
    return student.to(device), head.to(device)


def load_student(path: Path | str, device: torch.device | str = "cpu") -> Student:
    """The student of a ``student.pt``, in eval mode. Raises InputError for any other file."""

    def make(saved: dict) -> Student:
        config, shape = Config(**saved["config"]), Shape(**saved["shape"])
        if shape.layers > len(saved["state_dict"]):
            raise ValueError("it has more layers than weights")
        return Student(shape, config.dropout, config.conv_gradient)

    return common.load_student(path, "lstm_dkd", make, device)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def train(config: Config, resume: bool = False) -> tuple[Student, Head, list[dict]]:
    """Distil into the run folder ``config.out``; returns student, head and the log's lines."""
    device, out = common.pick_device(config.device), Path(config.out)
    saved = common.open_run("lstm_dkd", config, resume)
    with common.first_process_first():
        teacher = load_teacher(config, device)
        student, head = build(config, teacher)
        utterances = common.scan(config.data, out / "scan.jsonl", config.workers)
    training, heldout = common.train_and_heldout(utterances)
    parameters = [*student.parameters(), *head.parameters()]
    # S4: AdamW, which does not decay biases and the gains of norms, all vectors.
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    settings = dict(lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer = torch.optim.AdamW([decayed, vectors], weight_decay=config.weight_decay, **settings)
    checkpointed = dict(head=head, optimizer=optimizer)
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
        student.train()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        sums = dict.fromkeys(("loss", "ce", "kd", "tckd", "nckd"), 0.0)
        for part in waveforms.chunk(config.accumulate):
            share = len(part) / len(waveforms)
            part = part.to(device, non_blocking=True)  # B x S
            with torch.autocast(device.type, torch.bfloat16, amp):
                teacher_hidden = teacher(part)[-1]  # S6: nothing is masked
                student_hidden = forward(part)[0][-1]
            teacher_logits = teacher.logits(teacher_hidden.float())  # B x T x K
            student_logits = head(student_hidden.float())  # outside of autocast: float32
            target = teacher_logits.argmax(-1)  # S5: the teacher's most likely class, B x T
            loss, terms = distillation_loss(
                student_logits, teacher_logits, target, config.loss, config.beta
            )
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
                line["heldout"] = agreement(config, teacher, student, head, heldout)
            common.write_log(config, history, line, skipped)
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        if saving or stopping:
            content = common.student_content("lstm_dkd", config, student)
            common.save_run(config, content, step, history, **checkpointed)
    return student.eval(), head, history


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def score(
    student: Student, tasks: list, device: torch.device, seed: int, speed: float | None = None
) -> dict[str, float]:
    """Size, speed and probes on the student's feature: a weighted sum of all layers (S8)."""

    def feature(waveforms: Tensor) -> list[Tensor]:
        return student(waveforms)[0]

    return common.score(student, feature, tasks, device, seed, speed)


@torch.no_grad()
def agreement(
    config: Config, teacher: common.Teacher, student: Student, head: Head, heldout: list
) -> dict[str, float]:
    """How well the student's class head follows the teacher on held-out audio, in eval mode.

    "agreement": share of frames with the same most likely class; "KL": Eq. 1, mean over frames.
    """
    device, sums, frames = next(student.parameters()).device, torch.zeros(2), 0
    student.eval()
    batches = common.heldout_batches(
        heldout, config.batch_seconds, config.crop_seconds, config.accumulate
    )
    for waveforms in batches:
        waveforms = waveforms.to(device)
        teacher_logits = teacher.logits(teacher(waveforms)[-1])
        student_logits = head(student(waveforms)[0][-1])
        same = student_logits.argmax(-1) == teacher_logits.argmax(-1)
        divergence = kl_divergence(student_logits, teacher_logits)
        sums += torch.stack([same.sum(), divergence.sum()]).cpu()
        frames += same.numel()
    return dict(zip(("agreement", "KL"), (sums / frames).tolist(), strict=True))


def evaluate(
    config: Config, student: Student, head: Head, baselines: bool = True
) -> dict[str, dict[str, float]]:
    """Rows of the table: the distilled student and, as ``baselines``, its teacher and its starts.

    Columns: parameters, MACs and speed; agreement and KL between class head and teacher on
    held-out audio; probes on frozen features. Student and teacher both get SUPERB's learned
    weighted sum of all layers.
    """
    device = next(student.parameters()).device
    utterances = common.scan(config.data, Path(config.out) / "scan.jsonl", config.workers)
    tasks, (_, heldout) = common.find_tasks(utterances), common.train_and_heldout(utterances)
    teacher = load_teacher(config, device)
    timed = {"teacher": teacher, "student": lambda waveforms: student(waveforms)[0]}
    speeds = common.measure_speed(timed, device)
    speed = speeds["student"] / speeds["teacher"]
    models, rows = {"distilled": (student, head)}, {}
    if baselines:
        rows["teacher"] = common.score(teacher.model, teacher, tasks, device, config.seed, 1.0)
        untrained = build(replace(config, init_from_teacher=False), teacher)
        start = {"initialised": build(config, teacher)} if config.init_from_teacher else {}
        models = {"untrained": untrained} | start | models
    for name, (model, its_head) in models.items():
        rows[name] = agreement(config, teacher, model, its_head, heldout)
        rows[name] |= score(model, tasks, device, config.seed, speed)
    return rows


def describe(config: Config) -> dict[str, dict[str, float]]:
    """The paper-size student and its head, part by part: parameters, MACs per second of audio."""
    shape = Shape(width=width_of(config))
    student = Student(shape, config.dropout, config.conv_gradient).eval()
    head = Head(shape.width, 500)  # HuBERT's clusters
    rows = common.describe([student, head], lambda waveforms: head(student(waveforms)[0][-1]))
    kept, dropped = rows["Student"], rows["Head"]
    rows["Student and Head"] = {name: kept[name] + dropped[name] for name in kept}
    base = Student(replace(shape, conv_norm="group"), config.dropout, config.conv_gradient)
    rows["Student of a Base teacher"] = {"parameters": common.count_parameters(base)}
    return rows


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
