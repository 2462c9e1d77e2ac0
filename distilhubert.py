# SPDX-License-Identifier: MIT
"""DistilHuBERT: a two-layer student predicts three layers of its HuBERT teacher at once.

Paper
-----
H.-J. Chang, S.-w. Yang, H.-y. Lee, "DistilHuBERT: Speech Representation Learning by Layer-wise
Distillation of Hidden-unit BERT", ICASSP 2022, arXiv 2110.01900. Authors' code: s3prl, "distiller".

Idea
----
The lower layers of HuBERT carry more speaker information, the upper ones more content. A student
that copies the top layer alone loses speaker information. So one shallow student feeds several
prediction heads, and each head predicts another teacher layer from the *same* vector, which must
hold the information of all of them. The heads are dropped after training. The student starts from
the teacher's own convolutions and first two layers.

    waveform -> 7 convolutions -> projection -> + positional conv -> 2 Transformer layers -> feature
                                                                                               |
    teacher (frozen), 12 layers: layers 4, 8, 12  <- loss ->  one head each  <-----------------+

Equations
---------
Numbered by us, after the authors' code. n: head, b: utterance, t: frame, d: feature;
p: prediction of a head (``predicted``), h: hidden state of the teacher (``teacher_hidden``).

    (1)  L_L1  = mean over n, b, t, d of  | p[n,b,t,d] - h[n,b,t,d] |
    (2)  L_cos = mean over n, b, t of     - log sigmoid( cos( p[n,b,t], h[n,b,t] ) )
    (3)  L     = L_L1 + lambda L_cos,     lambda = 1

The cosine enters the sigmoid without a scale: (2) is 0.313 (same direction) to 1.313 (opposite).

Paper vs this code
------------------
Only title, abstract and the start of the introduction could be read; tables are known second hand.
"Code" means the authors' code. Given the same weights, both students give identical hidden states.
D: done otherwise here. S: known from the code alone, and done as there. What all five methods do
alike (teacher in eval mode, no padding, bf16, held-out audio, probes) stands in the README.

id  topic          authors' code                       here                     why
D1  weight decay   config says 1e-6; code applies      0.01, but not on norm    as its exception
                   0.01 to all but biases              weights either           LayerNorm intends
D2  target layers  config: 4, 12; release: 4, 8, 12    4, 8, 12                 paper, introduction
D3  batch          24 utterances of similar length,    290 s of audio (the      bounded memory, few
                   cut to 15.6 s if longer             same on average), all    distinct shapes
                                                       cut to 15.6 s x 0.8^k
S1  heads          Linear, GELU, Linear for each target layer; nothing shared
S2  projection     no LayerNorm before it, unlike the teacher
S3  conv gradient  times 0.1
S4  start          convolutions, projection, positional conv, layers 1 and 2; not the LayerNorm
                   before layer 1

Run
---
    python distilhubert.py --toy                 # offline, minutes on a CPU
    python distilhubert.py --data LibriSpeech    # the paper's recipe, HuBERT Base is downloaded
    python distilhubert.py --toy --claim         # three heads against one, three seeds

Result
------
Phone accuracy of a linear probe, toy world, 200 updates of 16 s of audio, minutes on a CPU, three
seeds: distilled 0.853 (sd 0.003), teacher 0.878, untrained (random weights) 0.331, initialised (S4,
no update) 0.773. The paper's 200,000 updates: not yet run.

Copy
----
What stands above the copy boundary needs torch alone: leave the imports of tqdm and common out.

    student, heads = Student(Shape(), layers=2, dropout=0.1, conv_gradient=0.1), Heads(768, count=3)
    waveforms, teacher_hidden = torch.randn(2, 16000), torch.randn(3, 2, 49, 768)
    hidden_states, _ = student(waveforms)  # three of 2 x 49 x 768
    loss, terms = distillation_loss(heads(hidden_states[-1]), teacher_hidden, cosine_weight=1.0)
    loss.backward()
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import InputError

# B batch, S samples, T frames, D width, C conv channels, N heads

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""  # folder of audio, or a manifest.tsv (code: LibriSpeech, 960 h)
    teacher: str = "hubert_base"  # torchaudio bundle, "toy", or a checkpoint file
    out: str = "runs/distilhubert"  # run folder
    seed: int = 0  # of weights, dropout, crops and order
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 4  # processes that load audio
    target_layers: tuple[int, ...] = (4, 8, 12)  # teacher layers, one head each (D2)
    student_layers: int = 2  # Transformer layers of the student (code)
    init_from_teacher: bool = True  # start from the teacher's first layers (S4)
    cosine_weight: float = 1.0  # lambda of Eq. 3 (code)
    dropout: float = 0.1  # input, attention weights, attention, in and after feed-forward (code)
    conv_gradient: float = 0.1  # factor on the gradient into the convolutions (code, S3)
    steps: int = 200_000  # updates (paper, second hand; code)
    batch_seconds: float = 290.0  # audio per update: 24 utterances on average (D3)
    crop_seconds: float = 15.625  # longest crop, 250,000 samples (code)
    accumulate: int = 1  # gradient accumulation: parts of a batch (ours)
    lr: float = 2e-4  # peak learning rate (code)
    warmup: float = 0.07  # share of updates before the peak; linear up, linear down (code)
    betas: tuple[float, ...] = (0.9, 0.98)  # of AdamW (code)
    eps: float = 1e-6  # of AdamW (code)
    weight_decay: float = 0.01  # not on biases and norms (D1)
    clip: float = 5.0  # largest norm of the gradient (code)
    amp: bool | None = None  # bf16 autocast; None: on GPUs that have bf16 (ours)
    compile: bool = False  # torch.compile: slow at first, then faster (ours)
    log_every: int = 50  # updates between log lines (code)
    save_every: int = 1_000  # updates between checkpoints and held-out distances (ours)


# --toy: the same method on the toy world, for minutes on two CPU cores instead of days on a GPU.
TOY = dict(
    teacher="toy",
    out="runs/distilhubert-toy",
    workers=0,
    steps=200,
    batch_seconds=16.0,
    crop_seconds=3.0,
    lr=3e-3,
    log_every=10,
    save_every=100,
)

# --claim: after the paper's Table 4 (second hand), one head in place of three.
CLAIM = {f"layer {layer}": dict(target_layers=(layer,)) for layer in (4, 8, 12)}


@dataclass
class Shape:
    """Sizes of the student: those of its teacher, so that the teacher's weights fit."""

    conv_channels: int = 512  # HuBERT Base, as all defaults here
    width: int = 768
    attention_heads: int = 12
    feed_forward: int = 3072
    position_kernel: int = 128
    position_groups: int = 16


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


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` (B, 1, 1, T) is True at frames that may be attended to; None: all of them."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B x heads x T x D/heads
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # B x T x D


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
    """Post-norm Transformer layer: (B, T, D) -> (B, T, D)."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(shape.width, shape.attention_heads, dropout)
        self.layer_norm = nn.LayerNorm(shape.width)
        self.feed_forward = FeedForward(shape.width, shape.feed_forward, dropout)
        self.final_layer_norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.layer_norm(x + self.dropout(self.attention(x, mask)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


class Student(nn.Module):
    """The part that is kept: convolutions, projection, positional convolution, Transformer layers.

    Its modules are named as in Hugging Face's HubertModel, without the prefix "encoder.".
    """

    def __init__(self, shape: Shape, layers: int, dropout: float, conv_gradient: float) -> None:
        super().__init__()
        self.shape, self.conv_gradient = shape, conv_gradient
        self.feature_extractor = FeatureExtractor(shape.conv_channels)
        projection = nn.Linear(shape.conv_channels, shape.width)  # S2: no LayerNorm before it
        self.feature_projection = nn.ModuleDict({"projection": projection})  # for the name
        self.pos_conv_embed = PositionalConv(shape)
        self.layer_norm = nn.LayerNorm(shape.width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(TransformerLayer(shape, dropout) for _ in range(layers))
        for module in self.modules():  # BERT's random start; what S4 copies is overwritten
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for layer in self.feature_extractor.conv_layers:
            nn.init.kaiming_normal_(layer.conv.weight)

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states, ``layers`` + 1 of (B, T, D), and their numbers of valid frames (B,).

        ``waveforms`` (B, S) at 16 kHz, not normalised; ``lengths`` (B,) valid samples of a
        right-padded batch, None where nothing is padded. Entry 0 is the input of layer 1, entry i
        the output of layer i; the last one is the paper's feature.
        """
        x = self.feature_extractor(waveforms)  # B x T x C
        if self.training:  # only there: TorchScript cannot trace an autograd.Function
            x = ScaleGradient.apply(x, self.conv_gradient)  # S3: a smaller gradient, as the code
        x = self.feature_projection["projection"](x)  # B x T x D
        attention_mask = None
        if lengths is not None:
            lengths = self.feature_extractor.frame_count(lengths)
            frame_mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # B x T
            x = x * frame_mask[:, :, None]
            attention_mask = frame_mask[:, None, None, :]
        x = self.dropout(self.layer_norm(x + self.pos_conv_embed(x)))
        hidden_states = [x]
        for layer in self.layers:
            hidden_states.append(layer(hidden_states[-1], attention_mask))
        return hidden_states, lengths


class Heads(nn.Module):
    """One predictor per target layer (S1): (B, T, D) -> (N, B, T, D). Dropped after training."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(count)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack([head(hidden) for head in self.heads])


def initialise_from_teacher(student: Student, weights: dict[str, Tensor]) -> None:
    """Copy the teacher's convolutions, projection, positional convolution and first layers (S4).

    ``weights``: the teacher's, under the student's names. The LayerNorm before layer 1 is not
    copied; all other weights must be there, else a KeyError.
    """
    names = [name for name in student.state_dict() if not name.startswith("layer_norm.")]
    student.load_state_dict({name: weights[name] for name in names}, strict=False)


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def l1_term(predicted: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Eq. 1 before the mean over frames: (N, B, T, D) twice -> (N, B, T), averaged over D."""
    return (predicted - teacher_hidden).abs().mean(-1)


def cosine_term(predicted: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Eq. 2 before the mean over frames: (N, B, T, D) twice -> (N, B, T)."""
    return -F.logsigmoid(F.cosine_similarity(predicted, teacher_hidden, dim=-1))


def distillation_loss(
    predicted: Tensor,
    teacher_hidden: Tensor,
    cosine_weight: float,
    frame_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 3, and its parts "l1" and "cos" for each target layer, (N,) each.

    ``predicted`` and ``teacher_hidden`` are (N, B, T, D), ``frame_mask`` (B, T) True at valid
    frames, None where all are. Means are taken over heads, valid frames, and in (1) over D. (The
    authors' code counts padded frames, too.)
    """
    loss_dtype = torch.promote_types(predicted.dtype, torch.float32)  # bf16 would round the sums
    predicted, teacher_hidden = predicted.to(loss_dtype), teacher_hidden.to(loss_dtype)
    if frame_mask is not None:  # N x frames x D
        predicted, teacher_hidden = predicted[:, frame_mask], teacher_hidden[:, frame_mask]
    l1 = l1_term(predicted, teacher_hidden).flatten(1).mean(1)  # N
    cos = cosine_term(predicted, teacher_hidden).flatten(1).mean(1)  # N
    # Eq. 3: L = L_L1 + lambda L_cos
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


def build(config: Config, teacher: common.Teacher) -> tuple[Student, Heads]:
    """A new student with its teacher's widths, and its heads; both follow from the seed."""
    layers = config.target_layers
    if config.student_layers < 1:
        raise InputError("--student-layers: at least one is needed")
    there = all(1 <= layer <= teacher.num_layers for layer in layers)
    if not layers or not there or len(set(layers)) < len(layers):
        raise InputError(
            f"--target-layers: {teacher.name} has layers 1 to {teacher.num_layers}, name each once"
        )
    shape = Shape(**teacher.shape)
    torch.manual_seed(config.seed)
    student = Student(shape, config.student_layers, config.dropout, config.conv_gradient)
    heads = Heads(shape.width, len(layers))
    if config.init_from_teacher:
        too_few = teacher.num_layers < config.student_layers
        if teacher.pre_norm or teacher.position_buckets or too_few:
            raise InputError(
                f"the student cannot start from {teacher.name}: that needs post-norm layers "
                f"without position bias, at least {config.student_layers} of them: add "
                "--no-init-from-teacher"
            )
        initialise_from_teacher(student, teacher.weights())
    device = next(teacher.parameters()).device
    return student.to(device), heads.to(device)


def load_student(path: Path | str, device: torch.device | str = "cpu") -> Student:
    """The student of a ``student.pt``, or of a folder as Hugging Face has them, in eval mode.

    Raises InputError for any other file.
    """
    if Path(path).is_dir():
        return load_huggingface(path).to(device).eval()

    def make(saved: dict) -> Student:
        config, shape = Config(**saved["config"]), Shape(**saved["shape"])
        if config.student_layers > len(saved["state_dict"]):
            raise ValueError("it has more layers than weights")
        return Student(shape, config.student_layers, config.dropout, config.conv_gradient)

    return common.load_student(path, "distilhubert", make, device)


def target_states(teacher: nn.Module, waveforms: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Hidden states of the target layers (N, B, T, D), counted from 1 (D2)."""
    hidden_states = teacher(waveforms, last_layer=max(layers))
    return torch.stack([hidden_states[i] for i in layers])


def train(config: Config, resume: bool = False) -> tuple[Student, Heads, list[dict]]:
    """Distil into the run folder ``config.out``; returns student, heads and the log's lines."""
    device, out = common.pick_device(config.device), Path(config.out)
    saved = common.open_run("distilhubert", config, resume)
    with common.first_process_first():
        teacher = common.load_teacher(config.teacher, device)  # frozen, in eval mode
        student, heads = build(config, teacher)
        utterances = common.scan(config.data, out / "scan.jsonl", config.workers)
    training, heldout = common.train_and_heldout(utterances)
    parameters = [*student.parameters(), *heads.parameters()]
    # D1: no weight decay on vectors: biases and norm weights.
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    settings = dict(lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer = torch.optim.AdamW([decayed, vectors], weight_decay=config.weight_decay, **settings)
    checkpointed = dict(heads=heads, optimizer=optimizer)
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
        student.train()  # the held-out distance has left eval mode
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        means = {"loss": 0.0, "l1": 0.0, "cos": 0.0}
        for part in waveforms.chunk(config.accumulate):
            share = len(part) / len(waveforms)
            part = part.to(device, non_blocking=True)  # B x S
            with torch.autocast(device.type, torch.bfloat16, amp):
                teacher_hidden = target_states(teacher, part, config.target_layers)
                predicted = heads(forward(part)[0][-1])  # both N x B x T x D
                loss, terms = distillation_loss(predicted, teacher_hidden, config.cosine_weight)
            (share * loss).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                means[name] = means[name] + share * value
        common.sum_gradients(parameters, len(waveforms))  # over all processes, by utterances
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.found_inf = (~norm.isfinite()).float()  # 1: fused AdamW leaves all as it is
        skipped += optimizer.found_inf
        optimizer.step()

        saving = step % config.save_every == 0 or step == config.steps
        if saving or step % config.log_every == 0:
            means = common.average(means, len(waveforms))  # over all processes
            line = {"step": step, "lr": lr, "grad_norm": norm.item(), "loss": means["loss"].item()}
            for name in ("l1", "cos"):
                for layer, value in zip(config.target_layers, means[name], strict=True):
                    line[f"{name}_{layer}"] = value.item()
            if saving and common.rank() == 0:
                line["heldout"] = distance(config, teacher, student, heads, heldout)
            common.write_log(config, history, line, skipped)  # raises where two were skipped
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        if saving or stopping:
            content = common.student_content("distilhubert", config, student)
            common.save_run(config, content, step, history, **checkpointed)
    return student.eval(), heads, history


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def score(
    student: Student, tasks: list, device: torch.device, seed: int, speed: float | None = None
) -> dict[str, float]:
    """Size, speed and probes on the student's feature: its last layer (the paper's choice)."""

    def feature(waveforms: Tensor) -> list[Tensor]:
        return student(waveforms)[0][-1:]

    return common.score(student, feature, tasks, device, seed, speed)


def distance(
    config: Config, teacher: nn.Module, student: Student, heads: Heads, heldout: list
) -> dict[str, list[float]]:
    """L1 and cosine between each head and its teacher layer on held-out audio, in eval mode."""
    student.eval()
    return common.layer_distance(
        lambda waveforms: heads(student(waveforms)[0][-1]),
        lambda waveforms: target_states(teacher, waveforms, config.target_layers),
        common.heldout_batches(
            heldout, config.batch_seconds, config.crop_seconds, config.accumulate
        ),
        next(student.parameters()).device,
    )


def evaluate(
    config: Config, student: Student, heads: Heads, baselines: bool = True
) -> dict[str, dict[str, float]]:
    """Rows of the table: the distilled student and, as ``baselines``, its teacher and its starts.

    Columns: parameters, MACs and speed; L1 and cosine between heads and teacher on held-out audio,
    averaged over the target layers; probes on frozen features. As in the paper the student's
    feature is its last layer; the teacher gets SUPERB's learned weighted sum of all.
    """
    device = next(student.parameters()).device
    utterances = common.scan(config.data, Path(config.out) / "scan.jsonl", config.workers)
    tasks, (_, heldout) = common.find_tasks(utterances), common.train_and_heldout(utterances)
    teacher = common.load_teacher(config.teacher, device)
    student.eval()
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
        distances = distance(config, teacher, model, its_heads, heldout)
        rows[name] = {column: fmean(values) for column, values in distances.items()}
        rows[name] |= score(model, tasks, device, config.seed, speed)
    return rows


def describe(config: Config) -> dict[str, dict[str, float]]:
    """The paper-size student and its heads, part by part: parameters, MACs per second of audio."""
    shape = Shape()
    student = Student(shape, config.student_layers, config.dropout, config.conv_gradient).eval()
    heads = Heads(shape.width, len(config.target_layers))
    rows = common.describe([student, heads], lambda waveforms: heads(student(waveforms)[0][-1]))
    kept, dropped = rows["Student"], rows["Heads"]
    return rows | {"Student and Heads": {name: kept[name] + dropped[name] for name in kept}}


# ------------------------------------------------------------------------------------------------
# Hugging Face: the same weights as a HubertModel
# ------------------------------------------------------------------------------------------------

REQUIRED_SETTINGS = dict(  # what a HubertModel must be to compute what the student does
    conv_kernel=[10, 3, 3, 3, 3, 2, 2],
    conv_stride=[5, 2, 2, 2, 2, 2, 2],
    conv_bias=False,
    feat_extract_norm="group",
    feat_extract_activation="gelu",
    feat_proj_layer_norm=False,
    do_stable_layer_norm=False,
    hidden_act="gelu",
    layer_norm_eps=1e-5,
)
HUBERT_SIZES = dict(  # fields of Shape, and their names in a HubertConfig
    width="hidden_size",
    attention_heads="num_attention_heads",
    feed_forward="intermediate_size",
    position_kernel="num_conv_pos_embeddings",
    position_groups="num_conv_pos_embedding_groups",
)


def import_transformers() -> Any:
    """The package transformers. Raises InputError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise InputError("this needs the package transformers: pip install transformers") from error
    return transformers


def hubert_name(name: str) -> str:
    """The name of a student's weight in a HubertModel."""
    return name if name.startswith("feature_") else f"encoder.{name}"


def export_huggingface(student: Student, folder: Path | str) -> Path:
    """Write the folder that transformers.AutoModel.from_pretrained loads as a HubertModel."""
    transformers, folder = import_transformers(), Path(folder)
    if folder.exists():
        raise InputError(f"{folder} is there already: remove it, then export again")
    settings = transformers.HubertConfig(
        **REQUIRED_SETTINGS,
        **{theirs: getattr(student.shape, ours) for ours, theirs in HUBERT_SIZES.items()},
        conv_dim=[student.shape.conv_channels] * 7,
        num_hidden_layers=len(student.layers),
        layerdrop=0.0,
        mask_time_prob=0.0,  # else HubertModel adds a weight, masked_spec_embed
    )
    model = transformers.HubertModel(settings)
    weights = student.state_dict()
    model.load_state_dict({hubert_name(name): value for name, value in weights.items()})
    temporary = folder.with_name(f".{folder.name}.tmp")
    model.save_pretrained(temporary)
    audio = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    audio.save_pretrained(temporary)
    return temporary.rename(folder)


def load_huggingface(folder: Path | str) -> Student:
    """The student of a published folder, a HubertModel like ntu-spml/distilhubert."""
    load = import_transformers().AutoModel.from_pretrained
    with common.reading(folder):
        model, report = load(str(folder), local_files_only=True, output_loading_info=True)
        settings, weights, config = model.config, model.state_dict(), Config()
        for name, value in (REQUIRED_SETTINGS | {"model_type": "hubert"}).items():
            if getattr(settings, name, None) != value:
                raise ValueError(f"{name} must be {value}, as in ntu-spml/distilhubert")
        if report["missing_keys"]:
            raise ValueError(f"it has no {min(report['missing_keys'])}")
        sizes = {ours: getattr(settings, theirs) for ours, theirs in HUBERT_SIZES.items()}
        shape = Shape(conv_channels=settings.conv_dim[0], **sizes)
        layers = settings.num_hidden_layers
        student = Student(shape, layers, config.dropout, config.conv_gradient)
        student.load_state_dict({name: weights[hubert_name(name)] for name in student.state_dict()})
    return student


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the flags and do what they say; results go to stdout, progress to stderr."""
    config, args = common.parse_flags(Config, TOY, __doc__, ("huggingface",))
    if args.describe:
        print(common.format_table(describe(config)))
    elif args.export:
        student = load_student(Path(config.out) / "student.pt")
        print(export_huggingface(student, Path(config.out) / "huggingface"))
    elif args.evaluate:
        print(common.score_file(load_student, score, config, args))
    else:
        print(common.make_table(train, evaluate, config, args, CLAIM))


if __name__ == "__main__":
    main()
