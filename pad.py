# SPDX-License-Identifier: MIT
"""PAD: a text model teaches a speech model what words mean, over pairs of speech and transcript.

Paper
-----
J. Ni et al., "Adaptive Knowledge Distillation between Text and Speech Pre-trained Models" (PAD:
Prior-informed Adaptive knowledge Distillation), ICASSP 2023, arXiv 2303.03600. No code was found.

Idea
----
A speech model hears words, a text model knows which of them mean the same. Both describe an
utterance by vectors, and distillation pulls those of the speech model towards those of the text
model; nothing is added to the speech model. But silence means nothing, and one word is many
frames. So units count by their significance, the attention that the others pay them, and a word
meets spans of several lengths around significant frames instead of single frames.

    speech -> wav2vec 2.0 (learns) -> frames s_i -> spans around anchors ~s_q --+
                  attention -> P(S): weights, anchors                           |- best span
    text   -> BERT (frozen) -> word pieces t_j ---------------------------------+  for each t_j
                  attention -> P(T): weights

Equations
---------
(1), the distances of (2) and (3), and spans around anchors are the paper's, second hand; how P
weighs (2, 3, 6), K, and the equation numbers are ours. H: a sequence of n units, S the m frames,
T the word pieces; A_l: attention map of layer l, averaged over its heads; r_li: attention that unit
i receives in it; phi: cosine similarity; xi: the middle one of the widths w; [a, b): frames a to
b - 1.

    (1)  P_i(H)    = 1/L sum_l  r_li / sum_i' r_li',   r_li = sum_k A_l[k, i]
    (2)  L_Glob    = || sum_i P_i(S) s_i - sum_j P_j(T) t_j ||_1
    (3)  L_TLocal  = - sum_j P_j(T) max_i phi(s_i, t_j)
    (4)  anchors   = the K frames of largest P(S),   K = max(1, round(m / xi))
    (5)  ~s_[a,b)  = 1 / (b - a) sum_{a <= i < b} s_i,
         [a, b) = [c - w/2, c + w/2) within [0, m), for each anchor c and each width w
    (6)  L_SLocal  = - sum_j P_j(T) max_q phi(~s_q, t_j),   q: all spans of (5)

One loss is trained by itself: PAD-Glob, PAD-TLocal or PAD-SLocal. With P = 1/n, (2) and (3) are
the naive alignments that PAD refines: mean + L1, and max cosine.

Paper vs this code
------------------
Of the paper only title, abstract and the start of the introduction could be read; "paper" below
and in Config is one summary of it by others. D: done otherwise here. S: unknown, chosen by us.

id  topic            paper                     here                        why
D1  evaluation       SUPERB: intents, emo-     probes of common.py: all,   a text teacher should
                     tions, slots; all labels  10 %, 1 % of the labels     show most with few
S1  aligned layers   one sequence per tower    the last of both            (2, 3, 6) name one
S2  student          from its checkpoint       all but the convolutions    convolutions hear
                                               learns; no layer drop       sounds, not words
S3  padded frames    unknown                   count nowhere; convolutions GroupNorm would mix
                                               hear each wave by itself    padding into all frames
S4  gradient of P    unknown                   none; P(S) of the student   attention would drift
                                               as it stands, its maps      to easy frames
                                               without dropout
S5  heads            unknown                   averaged before (1)
S6  special pieces   unknown                   rows and columns of [CLS],  they take most of BERT's
                                               [SEP] dropped before (1)    attention
S7  prior in (3, 6)  multiplies similarities   P(T), one weight per piece  one similarity per piece
S8  anchors          high P(S); rest unknown   K as in (4), none barred    as many as even ones
S9  spans            xi/2, xi, 2 xi, ...       8, 16, 32 frames; means     2.7 words a second:
                                                                           16 frames a piece
S10  reduction       unknown                   (2) summed over D; means    at width 768 (2) is in
                                               over utterances; joint:     the hundreds, (6) in
                                               (2) / D + (6)               -1 .. 1
S11  which 10 h      LibriSpeech               whole speakers in random
                                               order until they are full
S12  utterances      unknown                   whole, to 16 s; none with-  a transcript cannot be
                                               out words                   cropped
S13  optimizer       unknown                   AdamW, 20 epochs of 400 s   little data, small rate
                                               batches, linear up, down
S14  which update    unknown                   the last; loss on dev, or   one rule for all rows
                                               1 % of the files, is logged
S15  text            unknown                   BERT frozen; lower case,    512 positions
                                               at most 512 word pieces
S16  toy text model  none                      masked words of paragraphs  on and off stand in the
                                               of one intent               same sentences

Run
---
    python pad.py --toy                              # offline, minutes on a CPU
    python pad.py --data TREE --teacher DIR          # DIR: bert-base-uncased as published
    python pad.py --toy --claim --steps 400          # all alignments, and ablations; three seeds

--data is a LibriSpeech tree without its test sets, as train-clean-360, or a manifest.tsv with a
column "text". --student names another speech model. --describe prints both models as a table,
--resume goes on with a stopped run, --evaluate probes a student.pt; --help lists all flags.
In Python: ``student = load_student(PATH)``; or without this file, ``saved = torch.load(PATH)``,
then ``torchaudio.models.wav2vec2_model(**saved["arguments"])`` takes ``saved["state_dict"]``.

Result
------
Toy world, --toy --claim --steps 400, 9 minutes a seed on one CPU core, three seeds: intents with
all, 10 % and 1 % of the labels .54, .26, .17 before, .61, .41, .27 with PAD-SLocal, .50, .30, .22
with PAD-TLocal, .72, .56, .38 with PAD-Glob (text teacher .99, .85, .65). Priors change nothing
there, for the toy model's attention is nearly even. BERT and wav2vec 2.0 Base: not yet run.

Copy
----
Config, attention_received, Student, Units and the losses need torch alone. The attention maps of
the text come from common.TextTeacher here; transformers gives them with ``output_attentions=True``,
a tuple of (B, heads, N, N), to be averaged over the heads and stacked.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import InputError

# B batch, S samples, T frames, N units (frames or word pieces), Q spans, D width, L layers, H heads

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""  # LibriSpeech tree, or a manifest.tsv with text (paper: 10 h of LibriSpeech)
    hours: float = 10.0  # of training audio, whole speakers in random order (paper; S11)
    teacher: str = "bert-base-uncased"  # folder of the text model, or "toy" (paper)
    student: str = "wav2vec2_base"  # speech model: torchaudio bundle, "toy", or a file (paper)
    out: str = "runs/pad"  # run folder
    seed: int = 0  # of dropout, order and the choice of speakers
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 4  # processes that load audio
    alignment: Literal["global", "token", "span", "joint"] = "span"  # Eq. 2, 3, 6, or 2 with 6
    prior: Literal["attention", "uniform"] = "attention"  # Eq. 1 (S7), or 1/n
    anchors: Literal["significant", "even"] = "significant"  # Eq. 4 (S8), or an even grid
    widths: tuple[int, ...] = (8, 16, 32)  # frames of spans, the middle one is xi (S9)
    steps: int = 1_800  # updates: 20 epochs of 10 h (S13)
    batch_seconds: float = 400.0  # audio per update, padding included: 32 utterances (S13)
    longest_seconds: float = 16.0  # longer utterances are left out (S12)
    accumulate: int = 1  # parts a batch is cut into to save memory (ours)
    lr: float = 5e-5  # peak learning rate (S13)
    warmup: float = 0.1  # share of updates before the peak; linear up, linear down (S13)
    betas: tuple[float, ...] = (0.9, 0.98)  # of AdamW (S13)
    eps: float = 1e-6  # of AdamW (S13)
    weight_decay: float = 0.01  # not on biases and norms (S13)
    clip: float = 1.0  # largest norm of the gradient (S13)
    amp: bool | None = None  # bf16 autocast, fp32 loss; None: on GPUs that have bf16 (ours)
    compile: bool = False  # torch.compile: slow at first, then faster (ours)
    label_shares: tuple[float, ...] = (0.1, 0.01)  # of training labels, besides all (D1)
    log_every: int = 50  # updates between two lines of the log (ours)
    save_every: int = 200  # updates between checkpoints with held-out loss (ours)


# --toy: the same method on the toy world, for minutes on two CPU cores instead of hours on a GPU.
TOY = dict(
    teacher="toy",
    student="toy",
    out="runs/pad-toy",
    workers=0,
    steps=60,
    batch_seconds=16.0,
    lr=2e-3,
    log_every=10,
    save_every=100,
)

# --claim: beside PAD-SLocal, the default, the naive alignments, the other two PADs, ablations.
CLAIM = {
    "mean + L1": dict(alignment="global", prior="uniform"),
    "max cosine": dict(alignment="token", prior="uniform"),
    "PAD-Glob": dict(alignment="global"),
    "PAD-TLocal": dict(alignment="token"),
    "one width": dict(widths=(16,)),
    "even anchors": dict(anchors="even"),
    "no prior": dict(prior="uniform", anchors="even"),
    "joint": dict(alignment="joint"),
}


# ------------------------------------------------------------------------------------------------
# Student
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_received(query: Tensor, key: Tensor, valid: Tensor) -> Tensor:
    """Attention that each unit receives from all units of its sequence: (B, N), in float32.

    ``query`` and ``key`` (B, H, N, d), not scaled; ``valid`` (B, N) True where there is no padding.
    The map of the layer is averaged over heads and summed over its rows; padding receives 0.
    """
    with torch.autocast(query.device.type, enabled=False):
        exact = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(exact) / math.sqrt(query.shape[-1]) @ key.to(exact).mT  # B x H x N x N
        maps = scores.masked_fill_(~valid[:, None, None, :], -math.inf).softmax(-1)
        rows = valid[:, None, None, :].to(exact)  # B x 1 x 1 x N
        return (rows @ maps).mean((1, 2)) * valid  # B x N, averaged over heads: S5


class Student(nn.Module):
    """The speech model as it is: no module is added, its weights keep their names and shapes.

    ``model`` is a torchaudio Wav2Vec2Model with post-norm layers, as wav2vec 2.0 Base and HuBERT
    Base are; ``arguments`` are those of torchaudio.models.wav2vec2_model that build it. Its
    convolutions stay as they are, everything behind them learns (S2).
    """

    def __init__(self, model: nn.Module, arguments: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model, self.arguments = model.requires_grad_(True), arguments
        self.model.feature_extractor.requires_grad_(False)

    @torch.no_grad()
    def convolve(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, S) -> (B, T, C) and frames (B,), each utterance by itself (S3)."""
        if lengths is None:
            return self.model.feature_extractor(waveforms, None)
        rows = [
            self.model.feature_extractor(wave[None, :length], None)[0][0]  # T x C of its own
            for wave, length in zip(waveforms, lengths.tolist(), strict=True)
        ]
        frames = torch.tensor([len(row) for row in rows])
        frames = frames.to(waveforms.device, non_blocking=True)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), frames

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states [(B, T, D)] and their lengths (B,).

        ``waveforms`` (B, S) at 16 kHz, not normalised; ``lengths`` (B,) valid samples of a
        right-padded batch, None where nothing is padded. Entry 0 is the input of layer 1, entry i
        the output of layer i; the last one is aligned with the text (S1).
        """
        x, frames = self.convolve(waveforms, lengths)
        x = self.model.encoder.feature_projection(x)  # B x T x D
        mask = None
        if frames is not None:
            valid = frame_mask(frames, x.shape[1])
            x = x * valid[:, :, None]
            mask = valid[:, None, None, :].expand(-1, 1, x.shape[1], -1)  # B x 1 x T x T
        transformer = self.model.encoder.transformer
        x = transformer._preprocess(x)  # positional convolution, LayerNorm, dropout
        hidden_states = [x]
        for layer in transformer.layers:  # all of them: no layer drop (S2)
            x, _ = layer(x, mask)
            hidden_states.append(x)
        return hidden_states, frames

    @torch.no_grad()
    def received(self, hidden_states: list[Tensor], frames: Tensor) -> Tensor:
        """Attention that each frame receives in each layer, from forward's output: (L, B, T).

        Layer i attends on entry i - 1 as it stands, since its norms come behind it.
        """
        valid, received = frame_mask(frames, hidden_states[0].shape[1]), []
        for layer, x in zip(self.model.encoder.transformer.layers, hidden_states, strict=False):
            attention = layer.attention
            query, key = (
                project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # B x H x T x d
                for project in (attention.q_proj, attention.k_proj)
            )
            received.append(attention_received(query, key, valid))
        return torch.stack(received)  # L x B x T


def frame_mask(frames: Tensor, longest: int) -> Tensor:
    """(B,) valid frames -> (B, T) True at them."""
    return torch.arange(longest, device=frames.device) < frames[:, None]


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


class Units(NamedTuple):
    """The frames of a batch, or its word pieces."""

    hidden: Tensor  # (B, N, D)
    prior: Tensor  # (B, N): weights that sum to 1, exactly 0 where not valid
    valid: Tensor  # (B, N): False at padding, [CLS] and [SEP]


def significance(received: Tensor, valid: Tensor) -> Tensor:
    """Eq. 1: attention received (L, B, N), ``valid`` (B, N) -> P (B, N), mean over layers."""
    received = received * valid
    # P_i = 1/L sum_l r_li / sum_i' r_li'
    return (received / received.sum(-1, keepdim=True)).mean(0)


def word_pieces(valid: Tensor) -> Tensor:
    """(B, N) True at valid ids -> (B, N) True at pieces of words: not at [CLS], [SEP], padding."""
    return F.pad(valid[:, 2:], (1, 1))  # [CLS] is the first, [SEP] the last valid one


def text_received(maps: Tensor, pieces: Tensor) -> Tensor:
    """Attention that word pieces receive from word pieces in each layer: (L, B, N).

    ``maps`` (L, B, N, N): attention averaged over heads (S5), a row for each query; ``pieces``
    (B, N) True at pieces of words. What [CLS] and [SEP] pay and receive does not count (S6).
    """
    rows = pieces[:, None, :].to(maps.dtype)  # B x 1 x N
    return (rows @ maps)[:, :, 0] * pieces


def uniform(valid: Tensor) -> Tensor:
    """P = 1/n: (B, N) -> (B, N)."""
    return valid / valid.sum(1, keepdim=True)


def global_loss(speech: Units, text: Units) -> Tensor:
    """Eq. 2 of each utterance: (B,), summed over D."""
    s = torch.einsum("bn,bnd->bd", speech.prior, speech.hidden)
    t = torch.einsum("bn,bnd->bd", text.prior, text.hidden)
    return (s - t).abs().sum(-1)


def similarity(hidden: Tensor, text: Units) -> Tensor:
    """phi of Eq. 3 and 6, cosine of every pair: (B, Q, D), text units -> (B, Q, N)."""
    return F.normalize(hidden, dim=-1) @ F.normalize(text.hidden, dim=-1).mT


def local_loss(hidden: Tensor, usable: Tensor, text: Units) -> Tensor:
    """Eq. 3 of each utterance: (B,); Eq. 6 where ``hidden`` (B, Q, D) are spans, not frames.

    ``usable`` (B, Q) is False at what no piece may choose.
    """
    phi = similarity(hidden, text).masked_fill(~usable[:, :, None], -math.inf)
    # L = - sum_j P_j(T) max_i phi(s_i, t_j)
    return -(text.prior * phi.amax(1)).sum(1)


def choose_anchors(speech: Units, xi: int, even: bool) -> tuple[Tensor, Tensor]:
    """Eq. 4: frames (B, K), and which of them are anchors (B, K): longer utterances have more.

    ``even``: the same number, in the middle of as many equal pieces.
    """
    frames = speech.valid.sum(1, keepdim=True)  # B x 1
    count = (frames / xi).round().clamp(min=1)  # K = max(1, round(m / xi))
    most = max(1, round(speech.valid.shape[1] / xi))
    rank = torch.arange(most, device=frames.device)
    chosen = rank < count  # B x K
    if even:
        positions = ((rank + 0.5) * frames / count).long()
    else:
        positions = speech.prior.masked_fill(~speech.valid, -1.0).topk(most).indices
    return positions.masked_fill(~chosen, 0), chosen


def span_means(speech: Units, positions: Tensor, widths: Sequence[int]) -> Tensor:
    """Eq. 5: means of spans (B, Q, D), Q = K x widths, around ``positions`` (B, K).

    Spans end where the utterance does, not its padding.
    """
    width = torch.tensor(widths).to(positions.device, non_blocking=True)
    begin = positions[:, :, None] - width // 2  # B x K x widths
    end = torch.minimum(begin + width, speech.valid.sum(1)[:, None, None]).flatten(1)  # B x Q
    begin = begin.clamp(min=0).flatten(1)  # B x Q
    total = F.pad(speech.hidden.cumsum(1), (0, 0, 1, 0))  # B x (T + 1) x D
    shape = (-1, -1, total.shape[-1])
    upper, lower = (total.gather(1, i[:, :, None].expand(shape)) for i in (end, begin))
    return (upper - lower) / (end - begin)[:, :, None]


def alignment_loss(
    speech: Units, text: Units, alignment: str, widths: Sequence[int], even_anchors: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that ``alignment`` names, averaged over utterances, and its parts (S10).

    ``widths`` and ``even_anchors`` are those of the spans. Computed in float32 at least, inside
    autocast too: bf16 would round sums and cosines to three digits.
    """
    exact = torch.promote_types(speech.hidden.dtype, torch.float32)
    speech = speech._replace(hidden=speech.hidden.to(exact))
    text = text._replace(hidden=text.hidden.to(exact))
    parts = {}
    with torch.autocast(speech.hidden.device.type, enabled=False):
        if alignment in ("global", "joint"):
            parts["global"] = global_loss(speech, text).mean()
        if alignment == "token":
            parts["local"] = local_loss(speech.hidden, speech.valid, text).mean()
        if alignment in ("span", "joint"):
            xi = sorted(widths)[len(widths) // 2]
            positions, chosen = choose_anchors(speech, xi, even_anchors)
            spans = span_means(speech, positions, widths)
            usable = chosen.repeat_interleave(len(widths), 1)  # B x Q
            parts["local"] = local_loss(spans, usable, text).mean()  # Eq. 6
    loss = sum(parts.values())
    if alignment == "joint":
        loss = parts["global"] / speech.hidden.shape[-1] + parts["local"]
    return loss, {name: value.detach() for name, value in parts.items()}


@torch.no_grad()
def alignment_health(speech: Units, text: Units) -> dict[str, Tensor]:
    """What a falling loss does not tell, of the best frame of each piece; means over utterances.

    "distinct": how many frames are chosen, per piece (near 0: one frame answers to all). "order":
    rank correlation of the frames' order with the text's (Kendall, ties count 0; 1: as read).
    """
    phi = similarity(speech.hidden.float(), text._replace(hidden=text.hidden.float()))
    best = phi.masked_fill(~speech.valid[:, :, None], -math.inf).argmax(1)  # B x N
    distinct, order = [], []
    for row, valid in zip(best, text.valid, strict=True):
        places = row[valid]
        distinct.append(places.unique().numel() / places.numel())
        if places.numel() > 1:
            later = (places[None, :] - places[:, None]).sign().triu(1).float()  # pieces x pieces
            order.append(2 * later.sum() / (places.numel() * (places.numel() - 1)))
    mean = phi.new_tensor(distinct).mean()
    return {"distinct": mean, "order": torch.stack(order).mean() if order else mean.new_zeros(())}


# ---- copy boundary: above this line the file needs torch only -----------------------------------


def learning_rate(step: int, config: Config) -> float:
    """Linear from 0 to the peak, then linear to 0 at the last update; ``step`` counts from 1."""
    warmup = max(1, round(config.warmup * config.steps))
    if step <= warmup:
        return config.lr * step / warmup
    return config.lr * (config.steps - step) / (config.steps - warmup)


def build(config: Config) -> Student:
    """The speech model of ``config.student`` as published, on the CPU."""
    speech = common.load_teacher(config.student)
    if speech.pre_norm or speech.position_buckets or speech.normalise:
        raise InputError(
            f"--student {speech.name}: a model with post-norm layers and no position bias is "
            "needed, as wav2vec2_base or hubert_base"
        )
    return Student(speech.model, speech.arguments).eval()


def build_text(config: Config, student: Student) -> tuple[common.TextTeacher, common.Tokenizer]:
    """The frozen text model of ``config.teacher``, as wide as the student."""
    bert, tokenizer = common.load_text_teacher(config.teacher)  # "toy": S16
    width = student.model.encoder.feature_projection.projection.out_features
    if bert.width != width:
        raise InputError(
            f"--teacher {config.teacher} has width {bert.width} and --student "
            f"{config.student} {width}: they must agree, as nothing stands between the two"
        )
    return bert, tokenizer


def student_file(config: Config, student: Student) -> dict[str, Any]:
    """Content of ``student.pt``, whose weights have torchaudio's own names."""
    weights = {name: value.cpu() for name, value in student.model.state_dict().items()}
    about = {"method": "pad", "config": asdict(config), "arguments": student.arguments}
    return about | {"state_dict": weights}


def load_student(path: Path | str, device: torch.device | str = "cpu") -> Student:
    """The student of a ``student.pt``, in eval mode. Raises InputError for any other file."""
    arguments = {}

    def make(saved: dict) -> nn.Module:
        arguments.update(saved["arguments"])
        if arguments["encoder_num_layers"] > len(saved["state_dict"]):
            raise ValueError("it has more layers than weights")
        return torchaudio.models.wav2vec2_model(**arguments)

    model = common.load_student(path, "pad", make, device)
    return Student(model, arguments).eval()


def choose_hours(utterances: Sequence[Any], hours: float, seed: int) -> list:
    """Whole speakers in an order that follows from the seed, until the hours are full (S11).

    An utterance without a speaker counts as a speaker of its own.
    """
    by_speaker: dict[str, list] = {}
    for utterance in utterances:
        by_speaker.setdefault(utterance.get("speaker") or utterance.path, []).append(utterance)
    speakers, chosen, samples = sorted(by_speaker), [], 0
    for i in np.random.default_rng(seed).permutation(len(speakers)):
        if samples < hours * 3600 * common.SAMPLE_RATE:
            chosen += by_speaker[speakers[i]]
            samples += sum(utterance.samples for utterance in by_speaker[speakers[i]])
    return chosen


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def make_pairs(
    utterances: list, tokenizer: common.Tokenizer, longest_seconds: float
) -> tuple[list, dict[str, Tensor]]:
    """Utterances with words that are short enough, and path -> ids (N,); says what is not."""
    short = [u for u in utterances if u.samples <= longest_seconds * common.SAMPLE_RATE]
    ids = [tokenizer(utterance.get("text")) for utterance in short]
    kept = [(u, torch.tensor(row)) for u, row in zip(short, ids, strict=True) if len(row) > 2]
    full = sum(len(row) == tokenizer.positions for row in ids)  # what is more was cut off: S15
    counts = f"{len(short) - len(kept)} without words, {len(utterances) - len(short)} longer than "
    counts += f"{longest_seconds:g} s"
    if not kept:
        hint = "*.trans.txt beside the audio or a column text in manifest.tsv"
        hint = f"transcripts are needed, {hint}" if short else "raise --longest-seconds"
        raise InputError(f"no utterance can be used ({counts}): {hint}")
    line = f"{len(kept)} pairs of speech and text; left out {counts}"
    if full:
        line += f"; {full} cut at {tokenizer.positions} word pieces"
    common.say(line)
    return [u for u, _ in kept], {u.path: row for u, row in kept}


def listen(config: Config, student: Student, waveforms: Tensor, lengths: Tensor) -> Units:
    """The student's last layer, and P(S): no gradient passes through it (S4)."""
    hidden_states, frames = student(waveforms, lengths)
    valid = frame_mask(frames, hidden_states[-1].shape[1])
    if config.prior == "uniform" or config.alignment == "token":  # there is no P(S) in Eq. 3
        return Units(hidden_states[-1], uniform(valid), valid)
    prior = significance(student.received(hidden_states, frames), valid)
    return Units(hidden_states[-1], prior, valid)


@torch.no_grad()
def read(config: Config, bert: common.TextTeacher, rows: Sequence[Tensor]) -> Units:
    """The text model's last layer, and P(T), of the ids of a batch; word pieces alone are units."""
    device = next(bert.parameters()).device
    sizes = torch.tensor([len(row) for row in rows]).to(device, non_blocking=True)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device, non_blocking=True)  # B x N
    valid = frame_mask(sizes, ids.shape[1])
    hidden_states, maps = bert(ids, valid)
    pieces = word_pieces(valid)  # S6
    prior = uniform(pieces)
    if config.prior == "attention":
        prior = significance(text_received(maps, pieces), pieces)
    return Units(hidden_states[-1], prior, pieces)


def shuffle(text: Units) -> Units:
    """Each utterance gets the transcript of the one before it; one alone keeps its own."""
    return Units(*(column.roll(1, 0) for column in text))


@torch.no_grad()
def heldout_loss(
    config: Config,
    student: Student,
    bert: common.TextTeacher,
    utterances: list,
    ids: dict[str, Tensor],
) -> dict[str, float]:
    """The loss on held-out pairs in eval mode, and with the transcripts of others."""
    student.eval()
    device, sums, count = next(student.parameters()).device, [0.0, 0.0], 0
    batches = common.load_batches(utterances, config.batch_seconds, None, 0, 0, None, 0)
    for numbers, waveforms, lengths in batches:
        speech = listen(config, student, waveforms.to(device), lengths)
        text = read(config, bert, [ids[utterances[i].path] for i in numbers.tolist()])
        spans = config.alignment, config.widths, config.anchors == "even"
        for i, each in enumerate((text, shuffle(text))):
            sums[i] += len(numbers) * alignment_loss(speech, each, *spans)[0].item()
        count += len(numbers)
    return {"heldout": sums[0] / count, "heldout_shuffled": sums[1] / count}


def check(config: Config) -> None:
    """Refuse settings that no run can have, by the names of their flags."""
    if config.hours <= 0 or config.longest_seconds <= 0:
        raise InputError("--hours and --longest-seconds: the numbers must be above zero")
    if config.prior == "uniform" and config.anchors == "significant":
        if config.alignment in ("span", "joint"):
            raise InputError("--prior uniform knows no significant anchors: add --anchors even")
    if not config.widths or min(config.widths) < 1:
        raise InputError("--widths: at least one width is needed, each of one frame or more")
    if not all(0 < share <= 1 for share in config.label_shares):
        raise InputError("--label-shares: shares above 0 and up to 1 are needed, as in 0.1,0.01")


def train(config: Config, resume: bool = False) -> tuple[Student, list[dict]]:
    """Distil into the run folder ``config.out``; returns the student and the log's lines."""
    device, out = common.pick_device(config.device), Path(config.out)
    check(config)
    saved = common.open_run("pad", config, resume)
    torch.manual_seed(config.seed)  # of the dropout: no weight is drawn
    with common.first_process_first():
        utterances = common.scan(config.data, out / "scan.jsonl", config.workers)
        student = build(config).to(device)
        bert, tokenizer = build_text(config, student)
    bert = bert.to(device)
    pairs, ids = make_pairs(utterances, tokenizer, config.longest_seconds)
    training, heldout = common.train_and_heldout(pairs)
    training = choose_hours(training, config.hours, config.seed)
    parameters = [p for p in student.parameters() if p.requires_grad]
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    spared = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    settings = dict(lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer = torch.optim.AdamW([decayed, spared], weight_decay=config.weight_decay, **settings)
    done, history = common.restore(saved, state_dict=student.model, optimizer=optimizer)
    common.start_run(config, history)

    batches = common.load_batches(
        training,
        config.batch_seconds,
        crop_seconds=None,
        seed=config.seed,
        first=done,
        last=config.steps,
        workers=config.workers,
    )
    spans = config.alignment, config.widths, config.anchors == "even"
    if config.compile:  # each batch has other lengths, for which it would be compiled anew
        student.convolve = torch.compiler.disable(student.convolve)
    forward = torch.compile(student) if config.compile else student  # of the same weights
    amp = common.bf16_pays(device) if config.amp is None else config.amp
    skipped = torch.zeros((), device=device)  # updates whose gradient was not finite
    bar = tqdm(None, "distil", config.steps, initial=done, disable=common.rank() > 0)
    for step, batch, stopping in common.updates(batches, done, bar):
        student.train()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        saving = step % config.save_every == 0 or step == config.steps
        logging = saving or step % config.log_every == 0
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor | float] = {}
        for part in zip(*(column.chunk(config.accumulate) for column in batch), strict=True):
            numbers, waveforms, lengths = part
            share = len(numbers) / len(batch[0])
            with torch.autocast(device.type, torch.bfloat16, amp):
                text = read(config, bert, [ids[training[i].path] for i in numbers.tolist()])
                waveforms = waveforms.to(device, non_blocking=True)  # B x S
                speech = listen(config, forward, waveforms, lengths)
                loss, terms = alignment_loss(speech, text, *spans)
            (share * loss).backward()
            terms = {"loss": loss.detach(), **terms}
            if logging:
                with torch.no_grad():
                    terms["shuffled"] = alignment_loss(speech, shuffle(text), *spans)[0]
                terms |= alignment_health(speech, text)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + share * value
        common.sum_gradients(parameters, len(batch[0]))  # over all processes
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.found_inf = (~norm.isfinite()).float()  # where it is 1, nothing is updated
        skipped += optimizer.found_inf
        optimizer.step()

        if logging:
            sums = common.average(sums, len(batch[0]))
            line = {"step": step, "lr": lr, "grad_norm": norm.item()}
            line |= {name: value.item() for name, value in sums.items()}
            if saving and common.rank() == 0:
                line |= heldout_loss(config, student, bert, heldout, ids)
            common.write_log(config, history, line, skipped)
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        if saving or stopping:  # the last one counts, whatever the held-out loss: S14
            content = student_file(config, student)
            common.save_run(config, content, step, history, optimizer=optimizer)
    return student.eval(), history


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


LABEL_DRAWS = 5  # of a share of the labels; their scores are averaged
FEW_UPDATES = 50  # of a probe on few labels: more updates change nothing


def is_about_content(task: common.Task) -> bool:
    """Whether the task has a label for an utterance, but not its speaker."""
    return task.kind == "utterance" and not task.name.startswith("speaker ")


def few_labels(task: common.Task, share: float, seed: int) -> common.Task:
    """The task with a random ``share`` of its training labels, at least one of each class.

    A draw follows from the seed. dev and test stay whole.
    """
    rows = task.parts["train"]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    first = {rows[i][1]: i for i in reversed(order)}  # the first of each class in this order
    chosen = list(first.values())
    rest = [i for i in order if i not in set(chosen)]
    chosen += rest[: max(0, round(share * len(rows)) - len(chosen))]
    parts = task.parts | {"train": [rows[i] for i in sorted(chosen)]}
    return replace(task, name=f"{task.name} {100 * share:g} %", parts=parts)


def score_shares(
    config: Config, table: dict, tasks: Sequence[common.Task], device: torch.device
) -> dict[str, float]:
    """Probes on the features of ``table``; tasks about content also with shares of the labels (D1).

    With one seed, every table gets the same draws of labels.
    """
    few = [
        few_labels(task, share, LABEL_DRAWS * config.seed + i)
        for task in filter(is_about_content, tasks)
        for share in config.label_shares
        for i in range(LABEL_DRAWS)  # scores of one name are averaged
    ]
    scores = common.score_probes(table, tasks, config.seed, device=device)
    return scores | common.score_probes(table, few, config.seed, FEW_UPDATES)


def score(config: Config, student: Student, tasks: list, device: torch.device) -> dict[str, float]:
    """Size, and probes on the learned weighted sum of all hidden states, as in SUPERB."""
    table = common.extract_features(lambda waveforms: student(waveforms)[0], tasks, device)
    scores = score_shares(config, table, tasks, device)
    return {"parameters": common.count_parameters(student)} | scores


def score_text(
    config: Config,
    bert: common.TextTeacher,
    tokenizer: common.Tokenizer,
    tasks: list,
    device: torch.device,
) -> dict[str, float]:
    """The same probes on the text model's word pieces, averaged: what the student could reach."""
    bert, table, able = bert.to(device), {}, []
    for task in filter(is_about_content, tasks):
        texts = [(u.path, u.get("text")) for rows in task.parts.values() for u, _ in rows]
        ids = {path: torch.tensor(tokenizer(text)) for path, text in texts}
        if min(map(len, ids.values())) <= 2:
            common.say(f"text teacher: no {task.name}, an utterance has no words")
            continue
        able.append(task)
        for path, row in ids.items():
            row = row[None].to(device)  # 1 x N
            with torch.no_grad():
                hidden_states, _ = bert(row, torch.ones_like(row, dtype=torch.bool))
            layers = torch.cat(hidden_states)[:, 1:-1]  # L x N x D, without [CLS] and [SEP]
            table[path] = layers.mean(1).cpu(), None
    scores = score_shares(config, table, able, device)
    return {"parameters": common.count_parameters(bert)} | scores


def evaluate(
    config: Config, student: Student, baselines: bool = True
) -> dict[str, dict[str, float]]:
    """Rows of the table: the distilled student and, as ``baselines``, the two it comes from.

    Columns: parameters, and probes on frozen features; labels of utterances, as intents, with all
    and with few of the training labels. Where there are such labels, rows without ``baselines``
    get only those: phones and speakers take longer than all the rest.
    """
    device = next(student.parameters()).device
    utterances = common.scan(config.data, Path(config.out) / "scan.jsonl", config.workers)
    tasks, rows = common.find_tasks(utterances), {}
    if not baselines:
        tasks = list(filter(is_about_content, tasks)) or tasks
    if baselines:
        rows["text teacher"] = score_text(config, *build_text(config, student), tasks, device)
        rows["speech model"] = score(config, build(config).to(device), tasks, device)
    return rows | {"distilled": score(config, student.eval(), tasks, device)}


def describe() -> dict[str, dict[str, float]]:
    """The paper's two models part by part: parameters, MACs per second of audio."""
    student = Student(torchaudio.models.wav2vec2_base()).eval()
    bert = common.TextTeacher().eval()
    ids = torch.zeros(1, 30, dtype=torch.long)  # of 10 s: 2.7 words a second, [CLS], [SEP]
    return common.describe(
        [student, bert], lambda waveforms: (student(waveforms), bert(ids, ids == 0))
    )


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the flags and do what they say; results go to stdout, progress to stderr."""
    config, args = common.parse_flags(Config, TOY, __doc__)
    check(config)
    if args.describe:
        print(common.format_table(describe()))
    elif args.evaluate:
        print(common.score_file(load_student, lambda *a: score(config, *a[:3]), config, args))
    else:
        print(common.make_table(train, evaluate, config, args, CLAIM))


if __name__ == "__main__":
    main()
