# SPDX-License-Identifier: MIT
"""PAD: a text model teaches a speech model what words mean, from pairs of speech and transcript.

Paper
-----
J. Ni et al., "Adaptive Knowledge Distillation between Text and Speech Pre-trained Models" (PAD:
Prior-informed Adaptive knowledge Distillation), ICASSP 2023, arXiv 2303.03600. No code was found.

Idea
----
A text model knows which words mean the same. Here the speech model learns to output hidden states
close to those of a text model; no module is added. Units differ in importance: each is weighted by
its significance, the attention that it receives (the paper's ASP). Units differ in length: each
word piece is aligned with the best of many spans of frames, not with a single frame (AASA).

    speech -> wav2vec 2.0 (learns) -> frames s_i -> spans around anchors ~s_q --+
                  attention -> P(S): weights, anchors                           |- best span
    text   -> BERT (frozen) -> word pieces t_j ---------------------------------+  for each t_j
                  attention -> P(T): weights

Equations
---------
S: the m frames s_i; T: the word pieces t_j; H: S or T, with units i, k; A_l: attention map of
layer l, row k is what unit k pays; r: attention received; phi: cosine similarity; c: an anchor;
w: a width; xi: the middle width; q: a span, one c with one w. i, j, k, c and q count from 0.

    (1)  P_i(H)   = mean over l of  r_li / sum_k r_lk,    r_li = sum_k A_l[k, i]
    (2)  L_Glob   = || sum_i P_i(S) s_i - sum_j P_j(T) t_j ||_1
    (3)  L_TLocal = - sum_j P_j(T) max_i phi(s_i, t_j)
    (4)  anchors c: the K frames of largest P(S),    K = max(1, round(m / xi))
    (5)  ~s_q     = mean of frames c - floor(w/2) to c - floor(w/2) + w - 1, cut to 0 .. m - 1
    (6)  L_SLocal = - sum_j P_j(T) max_q phi(~s_q, t_j)

Paper vs this code
------------------
Only title, abstract and the start of the introduction could be read. Review: a summary by
others; it gives models, data, (1), distances in (2, 3, 6), anchors of largest P(S), widths from xi,
ablations. D: done otherwise here. S: not found, our choice.

D1  probes          SUPERB: all labels; here 10 % and 1 %, too: text should help most with few
S1  aligned layers  the last one of both models
S2  what learns     all of the student but its convolutions; no layer drop
S3  padding         counts nowhere; each waveform goes through the convolutions (GroupNorm) alone
S4  P(S)            computed anew at each update, in a pass without dropout or gradient
S5  attention maps  mean of heads; without rows and columns of [CLS], [SEP], which receive the most
S6  P in (2, 3, 6)  weights; in (3, 6) P(T) alone: there is one similarity for each word piece
S7  anchors, spans  an anchor for each xi frames, neighbours allowed; means; xi: 16 frames, .32 s
S8  reduction       sum over dimensions in (2), mean over utterances; joint: (2) / width + (6)
S9  data            10 h: whole speakers; whole utterances to 16 s and 512 word pieces, with words

Run
---
    python pad.py --toy                        # offline, minutes on a CPU
    python pad.py --data TREE --teacher DIR    # LibriSpeech tree; bert-base-uncased as published
    python pad.py --toy --claim --steps 400    # all alignments and ablations, three seeds

Result
------
Toy world, --claim --steps 400, three seeds: intents with all, 10 %, 1 % of the labels .54, .26, .17
before; PAD-SLocal .61, .41, .32; PAD-TLocal .52, .28, .21; PAD-Glob .72, .53, .33. This order is
reproduced; that priors, three widths or anchors of large P(S) help is not. Paper size: not run.

Copy
----
The text's tensors: transformers' BertModel, attn_implementation="eager", output_attentions=True.

    import torchaudio
    student = Student(torchaudio.models.wav2vec2_base())
    waveforms, lengths = torch.randn(2, 16000), torch.tensor([16000, 9000])
    prior, frame_mask = student.prior(waveforms, lengths)
    speech = Units(student(waveforms, lengths)[0][-1], prior, frame_mask)
    last_hidden_state, attentions = torch.randn(2, 6, 768), torch.rand(12, 2, 12, 6, 6).softmax(-1)
    pieces = word_mask(torch.tensor([6, 4]), 6)  # without [CLS], [SEP], padding
    text = Units(last_hidden_state, significance(attentions, pieces), pieces)
    loss, terms = alignment_loss(speech, text, "span", widths=(8, 16, 32))
    loss.backward()
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import InputError

# B batch, U units (M frames or N word pieces), K anchors, Q spans, D width, C conv channels

# ------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = ""  # LibriSpeech tree, or a manifest.tsv with text (review: LibriSpeech)
    hours: float = 10.0  # of training audio, whole speakers in random order (review; S9)
    teacher: str = "bert-base-uncased"  # folder of the text model, or "toy" (review)
    student: str = "wav2vec2_base"  # speech model: torchaudio bundle, "toy", or a file (review)
    out: str = "runs/pad"  # run folder
    seed: int = 0  # of dropout, order and the choice of speakers
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 4  # processes that load audio
    alignment: Literal["global", "token", "span", "joint"] = "span"  # Eq. 2, 3, 6, or 2 with 6
    prior: Literal["attention", "even", "uniform"] = "attention"  # Eq. 1; even anchors; also 1/n
    widths: tuple[int, ...] = (8, 16, 32)  # frames of spans, xi is the middle one (review; xi: S7)
    steps: int = 1_800  # updates: 20 epochs of 10 h (ours)
    batch_seconds: float = 400.0  # audio per update, padding included: 32 utterances (ours)
    longest_seconds: float = 16.0  # longer utterances are left out (S9)
    accumulate: int = 1  # parts a batch is cut into to save memory (ours)
    lr: float = 5e-5  # peak learning rate (ours)
    warmup: float = 0.1  # share of updates before the peak; linear up, linear down (ours)
    betas: tuple[float, ...] = (0.9, 0.98)  # of AdamW (ours)
    eps: float = 1e-6  # of AdamW (ours)
    weight_decay: float = 0.01  # not on biases and norms (ours)
    clip: float = 1.0  # largest norm of the gradient (ours)
    amp: bool | None = None  # bf16 autocast; None: on GPUs that have bf16 (ours)
    compile: bool = False  # torch.compile: slow at first, then faster (ours)
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

# --claim: beside PAD-SLocal, the default: naive alignments, the other two PADs, ablations.
CLAIM = {
    "mean + L1": dict(alignment="global", prior="uniform"),
    "max cosine": dict(alignment="token", prior="uniform"),
    "PAD-Glob": dict(alignment="global"),
    "PAD-TLocal": dict(alignment="token"),
    "one width": dict(widths=(16,)),
    "even anchors": dict(prior="even"),
    "no prior": dict(prior="uniform"),
    "joint": dict(alignment="joint"),
}


# ------------------------------------------------------------------------------------------------
# Student
# ------------------------------------------------------------------------------------------------


def length_mask(lengths: Tensor, longest: int) -> Tensor:
    """(B,) lengths -> (B, longest), True before the end and False at padding."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


@torch.no_grad()
def significance(maps: Iterable[Tensor], mask: Tensor) -> Tensor:
    """Eq. 1: P (B, U) of the attention maps (B, heads, U, U) of all layers, a row for each query.

    ``mask`` (B, U) is True at the units that count. What the others pay is left out, and they get
    exactly 0. No gradient passes through P (S4).
    """
    layers = []
    for attention in maps:
        with torch.autocast(mask.device.type, enabled=False):  # bf16 would round the sums
            rows = mask[:, None, None, :].to(attention.dtype)  # B x 1 x 1 x U
            # r_i = sum_k A[k, i], with A averaged over heads: S5
            received = (rows @ attention).mean((1, 2)) * mask  # B x U
        # P_i = mean over l of r_li / sum_k r_lk
        layers.append(received / received.sum(-1, keepdim=True))
    return torch.stack(layers).mean(0)


class Student(nn.Module):
    """The speech model as it is: no module is added, its weights keep torchaudio's names.

    ``model`` is a torchaudio Wav2Vec2Model with post-norm layers, as wav2vec 2.0 Base and HuBERT
    Base are; ``arguments`` are those of torchaudio.models.wav2vec2_model that build it. S2: its
    convolutions stay as they are, everything behind them learns.
    """

    def __init__(self, model: nn.Module, arguments: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model, self.arguments = model.requires_grad_(True), arguments
        self.model.feature_extractor.requires_grad_(False)

    def frame_count(self, samples: Tensor) -> Tensor:
        """Number of frames computed from so many samples, at least 0."""
        for layer in self.model.feature_extractor.conv_layers:
            samples = (samples - layer.kernel_size) // layer.stride + 1
        return samples.clamp(min=0)

    @torch.no_grad()
    def convolve(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, samples) -> (B, M, C). S3: each waveform by itself, without its padding."""
        extract, rows = self.model.feature_extractor, []
        if lengths is None:
            return extract(waveforms, None)[0]
        for waveform, length in zip(waveforms, lengths.tolist(), strict=True):
            x, _ = extract(waveform[None, : max(length, 400)], None)  # 400 samples are one frame
            rows.append(x[0] if length >= 400 else x[0, :0])  # M x C of its own
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states [(B, M, D)] and their lengths (B,).

        ``waveforms`` (B, samples) at 16 kHz, not normalised; ``lengths`` (B,) valid samples of a
        right-padded batch, None where nothing is padded. Entry 0 is the input of layer 1, entry i
        the output of layer i; the last one is aligned with the text (S1).
        """
        x = self.convolve(waveforms, lengths)
        x = self.model.encoder.feature_projection(x)  # B x M x D
        mask = None
        if lengths is not None:
            lengths = self.frame_count(lengths).to(x.device, non_blocking=True)
            valid = length_mask(lengths, x.shape[1])  # B x M
            x = x * valid[:, :, None]
            mask = valid[:, None, None, :].expand(-1, 1, x.shape[1], -1)  # B x 1 x M x M
        transformer = self.model.encoder.transformer
        x = transformer._preprocess(x)  # positional convolution, LayerNorm, dropout
        hidden_states = [x]
        for layer in transformer.layers:  # all of them: no layer drop
            x, _ = layer(x, mask)
            hidden_states.append(x)
        return hidden_states, lengths

    def attention_maps(self, hidden_states: list[Tensor], frame_mask: Tensor) -> Iterable[Tensor]:
        """Of each layer, one after the other, the attention map (B, heads, M, M) in float32.

        torchaudio's layers do not return it. They are post-norm: layer i computes query and key
        from entry i - 1 of ``hidden_states``, without a norm before them.
        """
        for layer, x in zip(self.model.encoder.transformer.layers, hidden_states, strict=False):
            attention = layer.attention
            query, key = (
                project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj)
            )  # B x heads x M x D/heads
            with torch.autocast(x.device.type, enabled=False):  # bf16 would round the maps
                exact = torch.promote_types(query.dtype, torch.float32)
                scores = query.to(exact) / math.sqrt(query.shape[-1]) @ key.to(exact).mT
                scores = scores.masked_fill_(~frame_mask[:, None, None, :], -math.inf)
                maps = scores.softmax(-1)
            yield maps

    @torch.no_grad()
    def prior(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """P(S) of Eq. 1 (B, M), and the mask (B, M) of the frames that are not padding.

        S4: from a pass of its own in eval mode. With dropout 0.1 in the hidden states, half of the
        anchors would change from one pass to the next (toy model).
        """
        training = self.training
        hidden_states, lengths = self.eval()(waveforms, lengths)
        self.train(training)
        frame_mask = length_mask(lengths, hidden_states[0].shape[1])
        return significance(self.attention_maps(hidden_states, frame_mask), frame_mask), frame_mask


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


class Units(NamedTuple):
    """The frames of a batch, or its word pieces."""

    hidden: Tensor  # (B, U, D)
    prior: Tensor  # (B, U): weights that sum to 1, exactly 0 where the mask is False
    mask: Tensor  # (B, U): False at padding, [CLS] and [SEP]


def word_mask(lengths: Tensor, longest: int) -> Tensor:
    """(B,) lengths -> (B, longest), True at word pieces: not at [CLS], [SEP] and padding (S5)."""
    place = torch.arange(longest, device=lengths.device)
    return (place > 0) & (place < lengths[:, None] - 1)  # [CLS] is the first, [SEP] the last


def uniform(mask: Tensor) -> Tensor:
    """P = 1/n: (B, U) -> (B, U)."""
    return mask / mask.sum(1, keepdim=True)


def global_loss(speech: Units, text: Units) -> Tensor:
    """Eq. 2 of each utterance: (B,), summed over D."""
    s = torch.einsum("bu,bud->bd", speech.prior, speech.hidden)
    t = torch.einsum("bu,bud->bd", text.prior, text.hidden)
    return (s - t).abs().sum(-1)


def local_loss(hidden: Tensor, mask: Tensor, text: Units) -> Tensor:
    """Eq. 3 of each utterance: (B,); Eq. 6 where ``hidden`` are spans (B, Q, D), not frames.

    ``mask`` (B, Q) is False at what no word piece may choose.
    """
    phi = F.normalize(hidden, dim=-1) @ F.normalize(text.hidden, dim=-1).mT  # B x Q x N
    phi = phi.masked_fill(~mask[:, :, None], -math.inf)
    # L = - sum_j P_j(T) max_i phi(s_i, t_j): S6
    return -(text.prior * phi.amax(1)).sum(1)


def choose_anchors(speech: Units, xi: int, even: bool) -> tuple[Tensor, Tensor]:
    """Eq. 4: frame numbers of the anchors (B, K), and their mask (B, K).

    K is that of the longest utterance; shorter ones have fewer anchors, and False behind them.
    ``even``: the same number, in the middle of as many equal parts of the utterance.
    """
    frames = speech.mask.sum(1, keepdim=True)  # m of each utterance, B x 1
    count = (frames / xi).round().clamp(min=1)  # K = max(1, round(m / xi)), B x 1
    number = torch.arange(max(1, round(speech.mask.shape[1] / xi)), device=frames.device)
    mask = number < count  # B x K
    if even:
        anchors = ((number + 0.5) * frames / count).long()
    else:  # S7: also where they are neighbours
        anchors = speech.prior.masked_fill(~speech.mask, -1.0).topk(len(number)).indices
    return anchors.masked_fill(~mask, 0), mask


def span_means(speech: Units, anchors: Tensor, widths: Sequence[int]) -> Tensor:
    """Eq. 5: means of the spans of all ``widths`` around ``anchors`` (B, K) -> (B, Q, D).

    Spans end where the utterance does, not its padding. Spans of one anchor follow each other.
    """
    width = torch.tensor(widths).to(anchors.device, non_blocking=True)
    frames = speech.mask.sum(1)[:, None]  # B x 1
    begin = (anchors[:, :, None] - width // 2).flatten(1)  # B x Q
    end = torch.minimum(begin + width.repeat(anchors.shape[1]), frames)  # the frame behind it
    begin = begin.clamp(min=0)
    total = F.pad(speech.hidden.cumsum(1), (0, 0, 1, 0))  # B x (M + 1) x D
    upper, lower = (
        total.gather(1, place[:, :, None].expand(-1, -1, total.shape[-1])) for place in (end, begin)
    )
    return (upper - lower) / (end - begin)[:, :, None]


def alignment_loss(
    speech: Units, text: Units, alignment: str, widths: Sequence[int], even_anchors: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that ``alignment`` names, averaged over utterances, and its parts (S8).

    ``widths`` and ``even_anchors`` are those of the spans. Computed in float32 at least, inside
    autocast too: bf16 would round sums and cosines to three digits.
    """
    exact = torch.promote_types(speech.hidden.dtype, torch.float32)
    speech = speech._replace(hidden=speech.hidden.to(exact))
    text = text._replace(hidden=text.hidden.to(exact))
    terms = {}
    with torch.autocast(speech.hidden.device.type, enabled=False):
        if alignment in ("global", "joint"):
            terms["global"] = global_loss(speech, text).mean()
        if alignment == "token":
            terms["local"] = local_loss(speech.hidden, speech.mask, text).mean()
        if alignment in ("span", "joint"):
            xi = sorted(widths)[len(widths) // 2]
            anchors, anchor_mask = choose_anchors(speech, xi, even_anchors)
            spans = span_means(speech, anchors, widths)
            span_mask = anchor_mask.repeat_interleave(len(widths), 1)  # B x Q
            terms["local"] = local_loss(spans, span_mask, text).mean()  # Eq. 6
    loss = sum(terms.values())
    if alignment == "joint":  # the first is in the hundreds at width 768, the second in -1 .. 1
        loss = terms["global"] / speech.hidden.shape[-1] + terms["local"]
    return loss, {name: value.detach() for name, value in terms.items()}


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


def check(config: Config) -> None:
    """Refuse settings that no run can have, by the names of their flags."""
    if config.hours <= 0:
        raise InputError("--hours: a number above zero is needed")
    if len(config.widths) % 2 == 0 or min(config.widths) < 1:
        raise InputError("--widths: an odd number of widths is needed, of 1 or more frames")


def build(config: Config) -> Student:
    """The speech model of ``config.student`` as published, on the CPU; no weight is drawn."""
    speech = common.load_teacher(config.student)  # which loads any published speech model
    if speech.pre_norm or speech.position_buckets or speech.normalise:
        raise InputError(
            f"--student {speech.name}: a model with post-norm layers and no position bias is "
            "needed, as wav2vec2_base or hubert_base"
        )
    return Student(speech.model, speech.arguments).eval()


def build_text(config: Config, student: Student) -> tuple[common.TextTeacher, common.Tokenizer]:
    """The frozen text model of ``config.teacher``, as wide as the student, and its tokenizer."""
    bert, tokenizer = common.load_text_teacher(config.teacher)
    width = student.model.encoder.feature_projection.projection.out_features
    if bert.width != width:
        raise InputError(
            f"--teacher {config.teacher} has width {bert.width} and --student "
            f"{config.student} {width}: they must agree, as no layer stands between the two"
        )
    return bert, tokenizer


def student_content(config: Config, student: Student) -> dict[str, Any]:
    """Content of ``student.pt``: ``torchaudio.models.wav2vec2_model(**arguments)`` takes it."""
    weights = {name: value.cpu() for name, value in student.model.state_dict().items()}
    about = {"method": "pad", "config": asdict(config), "arguments": student.arguments}
    return about | {"state_dict": weights}


def load_student(path: Path | str, device: torch.device | str = "cpu") -> Student:
    """The student of a ``student.pt``, in eval mode. Raises InputError for any other file."""
    import torchaudio

    arguments = {}

    def make(saved: dict) -> nn.Module:
        arguments.update(saved["arguments"])
        if arguments["encoder_num_layers"] > len(saved["state_dict"]):
            raise ValueError("it has more layers than weights")
        return torchaudio.models.wav2vec2_model(**arguments)

    model = common.load_student(path, "pad", make, device)
    return Student(model, arguments).eval()


def make_pairs(
    utterances: list, tokenizer: common.Tokenizer, longest_seconds: float
) -> tuple[list, dict[str, Tensor]]:
    """Utterances with words that are short enough, and path -> ids (N,) of their word pieces."""
    short = [u for u in utterances if u.samples <= longest_seconds * common.SAMPLE_RATE]
    ids = {u.path: torch.tensor(tokenizer(u.get("text"))) for u in short}  # 512 at most: S9
    pairs = [u for u in short if len(ids[u.path]) > 2]  # more than [CLS] and [SEP]
    if not short:
        raise InputError("all utterances are longer: raise --longest-seconds")
    if not pairs:
        raise InputError("transcripts are needed, *.trans.txt beside the audio or a column text")
    wordless, long = len(short) - len(pairs), len(utterances) - len(short)
    common.say(
        f"{len(pairs)} pairs of speech and text; left out: {wordless} without words, {long} longer "
        f"than {longest_seconds:g} s"
    )
    return pairs, ids


def choose_hours(utterances: Sequence[Any], hours: float, seed: int) -> list:
    """Whole speakers in an order that follows from the seed, until the hours are full (S9).

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


def speech_prior(
    config: Config, student: Student, waveforms: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """P(S), and the mask of frames: both (B, M); uniform where the losses do not use P(S)."""
    weighted = config.alignment in ("global", "joint") and config.prior != "uniform"  # Eq. 2
    anchored = config.alignment in ("span", "joint") and config.prior == "attention"  # Eq. 4
    if weighted or anchored:
        return student.prior(waveforms, lengths)
    frames = student.frame_count(lengths)
    frame_mask = length_mask(frames, int(frames.max())).to(waveforms.device, non_blocking=True)
    return uniform(frame_mask), frame_mask


@torch.no_grad()
def text_units(config: Config, bert: nn.Module, rows: Sequence[Tensor]) -> Units:
    """The text model's last layer, P(T) and mask of word pieces, of the ids (N,) of a batch."""
    device = next(bert.parameters()).device
    lengths = torch.tensor([len(row) for row in rows]).to(device, non_blocking=True)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device, non_blocking=True)  # B x N
    hidden_states, maps = bert(ids, length_mask(lengths, ids.shape[1]))
    mask = word_mask(lengths, ids.shape[1])
    if config.prior == "uniform":
        return Units(hidden_states[-1], uniform(mask), mask)
    maps = maps[:, :, None]  # L x B x 1 x N x N: averaged over heads
    return Units(hidden_states[-1], significance(maps, mask), mask)


def train(config: Config, resume: bool = False) -> tuple[Student, list[dict]]:
    """Distil into the run folder ``config.out``; returns the student and the log's lines."""
    device, out = common.pick_device(config.device), Path(config.out)
    check(config)
    saved = common.open_run("pad", config, resume)
    with common.first_process_first():
        student = build(config).to(device)
        bert, tokenizer = build_text(config, student)  # frozen, in eval mode
        utterances = common.scan(config.data, out / "scan.jsonl", config.workers)
    bert = bert.to(device)
    pairs, ids = make_pairs(utterances, tokenizer, config.longest_seconds)
    training, heldout = common.train_and_heldout(pairs, whole=True)
    training = choose_hours(training, config.hours, config.seed)
    torch.manual_seed(config.seed)  # of dropout
    parameters = [p for p in student.parameters() if p.requires_grad]
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    settings = dict(lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    optimizer = torch.optim.AdamW([decayed, vectors], weight_decay=config.weight_decay, **settings)
    done, history = common.start_run(config, saved, state_dict=student.model, optimizer=optimizer)

    batches = common.load_batches(
        training,
        config.batch_seconds,
        crop_seconds=None,
        seed=config.seed,
        first=done,
        last=config.steps,
        workers=config.workers,
    )
    if config.compile:  # each waveform has another length, for which it would be compiled anew
        student.convolve = torch.compiler.disable(student.convolve)
    forward, amp = common.speed_up(config, device, student)
    skipped = torch.zeros((), device=device)  # updates whose gradient was not finite
    bar = tqdm(desc="distil", total=config.steps, initial=done, disable=common.rank() > 0)
    for step, batch, stopping in common.updates(batches, done, bar):
        student.train()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor | float] = {}
        parts = (column.chunk(config.accumulate) for column in batch)
        for numbers, waveforms, lengths in zip(*parts, strict=True):
            share = len(numbers) / len(batch[0])
            waveforms = waveforms.to(device, non_blocking=True)  # B x samples
            with torch.autocast(device.type, torch.bfloat16, amp):
                text = text_units(config, bert, [ids[training[i].path] for i in numbers.tolist()])
                prior, frame_mask = speech_prior(config, student, waveforms, lengths)
            # A block of its own: torch 2.8 keeps casts of weights to the end of a block, those of
            # the pass above without gradient, and the weights would get none here.
            with torch.autocast(device.type, torch.bfloat16, amp):
                hidden_states, _ = forward(waveforms, lengths)
                speech = Units(hidden_states[-1], prior, frame_mask)
                even = config.prior != "attention"
                loss, terms = alignment_loss(speech, text, config.alignment, config.widths, even)
            (share * loss).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + share * value
        common.sum_gradients(parameters, len(batch[0]))  # over all processes
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.found_inf = (~norm.isfinite()).float()  # where it is 1, nothing is updated
        skipped += optimizer.found_inf
        optimizer.step()

        saving = step % config.save_every == 0 or step == config.steps
        if saving or step % config.log_every == 0:
            sums = common.average(sums, len(batch[0]))
            line = {"step": step, "lr": lr, "grad_norm": norm.item()}
            line |= {name: value.item() for name, value in sums.items()}
            if saving and common.rank() == 0:
                line["heldout"] = heldout_loss(config, student, bert, heldout, ids)
            common.write_log(config, history, line, skipped)
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        if saving or stopping:
            content = student_content(config, student)
            common.save_run(config, content, step, history, optimizer=optimizer)
    return student.eval(), history


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------

LABEL_SHARES = (0.1, 0.01)  # of the training labels, besides all of them (D1)
LABEL_DRAWS = 5  # of each share; their scores are averaged
FEW_UPDATES = 50  # of a probe on few labels: more updates change nothing


@torch.no_grad()
def heldout_loss(
    config: Config, student: Student, bert: nn.Module, utterances: list, ids: dict[str, Tensor]
) -> float:
    """The loss on held-out pairs, averaged over utterances, in eval mode."""
    student.eval()
    device, total = next(student.parameters()).device, 0.0
    batches = common.load_batches(utterances, config.batch_seconds, crop_seconds=None)
    for numbers, waveforms, lengths in batches:
        waveforms = waveforms.to(device)
        text = text_units(config, bert, [ids[utterances[i].path] for i in numbers.tolist()])
        prior, frame_mask = speech_prior(config, student, waveforms, lengths)
        speech = Units(student(waveforms, lengths)[0][-1], prior, frame_mask)
        even = config.prior != "attention"
        loss, _ = alignment_loss(speech, text, config.alignment, config.widths, even)
        total += len(numbers) * loss.item()
    return total / len(utterances)


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
    others = [i for i in order if i not in set(chosen)]
    chosen += others[: max(0, round(share * len(rows)) - len(chosen))]
    parts = task.parts | {"train": [rows[i] for i in sorted(chosen)]}
    return replace(task, name=f"{task.name} {100 * share:g} %", parts=parts)


def score_shares(table: dict, tasks: list, device: torch.device, seed: int) -> dict[str, float]:
    """Probes on the features of ``table``; tasks about content also with few labels (D1).

    With one seed, every table gets the same draws of labels.
    """
    few = [
        few_labels(task, share, LABEL_DRAWS * seed + draw)
        for task in filter(is_about_content, tasks)
        for share in LABEL_SHARES
        for draw in range(LABEL_DRAWS)
    ]
    scores = common.score_probes(table, tasks, seed, device=device)
    return scores | common.score_probes(table, few, seed, FEW_UPDATES)


def score(student: Student, tasks: list, device: torch.device, seed: int) -> dict[str, float]:
    """Size, and probes on the learned weighted sum of all hidden states, as in SUPERB."""
    table = common.extract_features(lambda waveforms: student(waveforms)[0], tasks, device)
    scores = score_shares(table, tasks, device, seed)
    return {"parameters": common.count_parameters(student)} | scores


def score_text(
    bert: nn.Module, tokenizer: common.Tokenizer, tasks: list, device: torch.device, seed: int
) -> dict[str, float]:
    """The same probes on the mean of the text model's word pieces: what the student could reach."""
    table, scored = {}, []
    for task in filter(is_about_content, tasks):
        utterances = [utterance for rows in task.parts.values() for utterance, _ in rows]
        ids = {u.path: torch.tensor([tokenizer(u.get("text"))]) for u in utterances}  # 1 x N
        if min(row.shape[1] for row in ids.values()) <= 2:  # [CLS] and [SEP]
            common.say(f"text teacher: no {task.name}, an utterance has no words")
            continue
        scored.append(task)
        for path, row in ids.items():
            row = row.to(device)
            with torch.no_grad():
                hidden_states, _ = bert(row, torch.ones_like(row, dtype=torch.bool))
            layers = torch.cat(hidden_states)[:, 1:-1]  # L x N x D, without [CLS] and [SEP]
            table[path] = layers.mean(1).cpu(), None
    scores = score_shares(table, scored, device, seed)
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
    tasks, rows, seed = common.find_tasks(utterances), {}, config.seed
    if baselines:
        bert, tokenizer = build_text(config, student)
        rows["text teacher"] = score_text(bert.to(device), tokenizer, tasks, device, seed)
        rows["speech model"] = score(build(config).to(device), tasks, device, seed)
    else:
        tasks = list(filter(is_about_content, tasks)) or tasks
    return rows | {"distilled": score(student.eval(), tasks, device, seed)}


def describe() -> dict[str, dict[str, float]]:
    """The paper's two models part by part: parameters, MACs per second of audio."""
    import torchaudio

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
    if args.describe:
        print(common.format_table(describe()))
    elif args.evaluate:
        print(common.score_file(load_student, score, config, args))
    else:
        print(common.make_table(train, evaluate, config, args, CLAIM))


if __name__ == "__main__":
    main()
