"""The toy world: synthetic speech with exact labels, a small HuBERT and a small BERT.

The scripts need speech, labels and pre-trained teachers. This file makes a small version of each,
so that ``--toy`` runs offline in minutes:

    world(folder)                     audio and manifest.tsv: 60 speakers, about 20 minutes
    teacher()                         a HuBERT trained on other speakers of this world
    text_teacher(build, tokenizer)    a BERT trained on the sentences of this world

It stands in tests/ because the tests use it too and no method needs it. common.py loads it by its
path, in one function; nothing of this project is imported here. All results follow from SEED.

Letters: B batch, S samples, T teacher frames (20 ms), F synthesis steps (8 ms), K units (targets of
HuBERT's pre-training), N word pieces, D width.
"""

import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor, nn
from torchaudio.models import HuBERTPretrainModel
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz
HOP = 320  # samples from one teacher frame to the next
FIELD = 400  # samples that one teacher frame is computed from

SEED = 0
STEP = 128  # samples from one synthesis step to the next: 8 ms
SECONDS = (1.3, 3.0)  # shortest and longest utterance
SPEAKERS = {"train": range(0, 44), "dev": range(44, 50), "test": range(50, 60)}
RECORDINGS = {"train": 8, "dev": 7, "test": 20}  # per speaker: about 12, 1.5 and 7 minutes

# ------------------------------------------------------------------------------------------------
# Language: phones, words, sentences
# ------------------------------------------------------------------------------------------------

# A phone is a mean duration and one or two targets: two for a phone that changes (a diphthong
# glides, a stop closes and then bursts). A target is
#   f1 f2 f3          formant frequencies of an average speaker in Hz
#   voicing breath    amplitudes of glottal pulses and breath noise, which pass the formants
#   frication peak    amplitude of frication noise, and the frequency of its peak in Hz
# 0 Hz: the phone has no target here, the neighbours decide (coarticulation).
PHONES = {  # phone: (milliseconds, target, ...)
    "SIL": (200, (0, 0, 0, 0, 0, 0, 4000)),
    "IY": (105, (280, 2250, 2950, 1.4, 0, 0, 0)),
    "IH": (80, (400, 1950, 2550, 1.2, 0, 0, 0)),
    "EH": (95, (550, 1800, 2500, 1.0, 0, 0, 0)),
    "AE": (125, (690, 1680, 2450, 1.0, 0, 0, 0)),
    "AA": (125, (740, 1120, 2450, 1.0, 0, 0, 0)),
    "AO": (125, (570, 860, 2450, 1.0, 0, 0, 0)),
    "AH": (75, (600, 1230, 2400, 0.9, 0, 0, 0)),
    "UW": (105, (310, 930, 2250, 1.4, 0, 0, 0)),
    "ER": (115, (480, 1340, 1690, 1.2, 0, 0, 0)),
    "EY": (135, (500, 1850, 2500, 1.0, 0, 0, 0), (320, 2200, 2800, 0.8, 0, 0, 0)),
    "AY": (150, (740, 1180, 2450, 1.0, 0, 0, 0), (380, 2050, 2600, 0.8, 0, 0, 0)),
    "OW": (135, (540, 1000, 2400, 1.0, 0, 0, 0), (350, 780, 2300, 0.8, 0, 0, 0)),
    "AW": (150, (740, 1300, 2450, 1.0, 0, 0, 0), (400, 850, 2350, 0.8, 0, 0, 0)),
    "M": (75, (250, 1000, 2200, 0.6, 0, 0, 0)),
    "N": (70, (250, 1600, 2600, 0.6, 0, 0, 0)),
    "NG": (80, (250, 2150, 2600, 0.6, 0, 0, 0)),
    "L": (70, (350, 1050, 2750, 0.5, 0, 0, 0)),
    "R": (75, (340, 1150, 1560, 0.5, 0, 0, 0)),
    "W": (70, (300, 680, 2250, 0.5, 0, 0, 0)),
    "Y": (65, (270, 2300, 3050, 0.5, 0, 0, 0)),
    "HH": (70, (0, 0, 0, 0.05, 0.25, 0, 0)),
    "F": (100, (350, 1050, 2300, 0, 0, 0.12, 5500)),
    "V": (65, (350, 1050, 2300, 0.3, 0, 0.06, 5500)),
    "DH": (55, (350, 1450, 2550, 0.35, 0, 0.05, 6500)),
    "S": (110, (350, 1750, 2600, 0, 0, 0.7, 6200)),
    "Z": (80, (350, 1750, 2600, 0.25, 0, 0.4, 6200)),
    "SH": (110, (350, 1900, 2500, 0, 0.05, 0.8, 3100)),
    "P": (95, (320, 900, 2200, 0, 0, 0, 1200), (350, 950, 2250, 0, 0.12, 0.15, 1200)),
    "T": (95, (320, 1800, 2650, 0, 0, 0, 4500), (350, 1800, 2650, 0, 0.12, 0.4, 4500)),
    "K": (100, (320, 1900, 2350, 0, 0, 0, 2100), (350, 1900, 2350, 0, 0.12, 0.4, 2100)),
    "B": (75, (250, 900, 2200, 0.12, 0, 0, 1000), (320, 950, 2250, 0.4, 0, 0.1, 1000)),
    "D": (70, (250, 1750, 2650, 0.12, 0, 0, 0), (320, 1750, 2650, 0.4, 0, 0.2, 4000)),
    "G": (75, (250, 1950, 2350, 0.12, 0, 0, 1900), (320, 1950, 2350, 0.4, 0, 0.2, 1900)),
    "CH": (120, (320, 1800, 2600, 0, 0, 0, 3300), (350, 1900, 2500, 0, 0.05, 0.7, 3300)),
}

# Pronunciations. No number words: spoken digits in real recordings are unseen words.
PRONUNCIATIONS = """
A: AH, ACTIVATE: AE K T IH V EY T, ALL: AO L, BEDROOM: B EH D R UW M, CHILL: CH IH L,
CLOSE: K L OW Z, COMPUTER: K AH M P Y UW T ER, COOL: K UW L, DARK: D AA R K, DOOR: D AO R,
DOWN: D AW N, DROP: D R AA P, END: EH N D, FRONT: F R AH N T, GATE: G EY T, GIVE: G IH V,
HALL: HH AO L, HALT: HH AO L T, HEAT: HH IY T, HEATING: HH IY T IH NG, HEY: HH EY,
HOUSE: HH AW S, IN: IH N, IT: IH T, KILL: K IH L, KITCHEN: K IH CH AH N, LAMP: L AE M P,
LIGHT: L AY T, LIGHTS: L AY T S, LOCK: L AA K, LOWER: L OW ER, MAKE: M EY K, ME: M IY,
MUSIC: M Y UW Z IH K, MY: M AY, NOW: N AW, OFF: AO F, OKAY: OW K EY, ON: AA N,
OPEN: OW P AH N, PAUSE: P AO Z, PLAY: P L EY, PLEASE: P L IY Z, RADIO: R EY D IY OW,
RAISE: R EY Z, ROBOT: R OW B AA T, ROOM: R UW M, SHUT: SH AH T, SOME: S AH M, SONG: S AO NG,
START: S T AA R T, STOP: S T AA P, SWITCH: S W IH CH, THE: DH AH, THIS: DH IH S,
TUNE: T UW N, TURN: T ER N, UNLOCK: AH N L AA K, UP: AH P, VERY: V EH R IY, WARM: W AO R M,
YOU: Y UW
"""
LEXICON = dict(re.findall(r"(\w+): ([A-Z ]+)", PRONUNCIATIONS))  # word: phones, separated by spaces

# Commands. A pattern is a sequence of slots, a slot is a choice of words ("_" joins words, "-" is
# nothing). Different words can mean the same (KILL, TURN_OFF): the sound does not tell, texts do.
PLACE = "-|-|-|-|-|-|IN_THE_KITCHEN|IN_MY_ROOM|IN_THE_HALL|IN_THE_BEDROOM"
INTENTS = {
    "light_on": [f"TURN_ON|SWITCH_ON|ACTIVATE|START THE|MY|ALL_THE LIGHT|LIGHTS|LAMP {PLACE}"],
    "light_off": [
        f"TURN_OFF|SWITCH_OFF|KILL|SHUT_OFF THE|MY|ALL_THE LIGHT|LIGHTS|LAMP {PLACE}",
        f"MAKE IT|THE_ROOM -|ALL|VERY DARK {PLACE}",
    ],
    "music_on": [f"PLAY|START|GIVE_ME|SWITCH_ON SOME|THE|A|MY MUSIC|SONG|TUNE|RADIO {PLACE}"],
    "music_off": [f"STOP|PAUSE|HALT|END|SWITCH_OFF THE|THIS MUSIC|SONG|TUNE|RADIO {PLACE}"],
    "heat_up": [
        "HEAT_UP|WARM_UP|WARM THE|MY ROOM|KITCHEN|BEDROOM|HOUSE|HALL",
        f"TURN_UP|RAISE THE HEAT|HEATING {PLACE}",
        f"MAKE IT -|VERY WARM {PLACE}",
    ],
    "heat_down": [
        "COOL_DOWN|COOL|CHILL THE|MY ROOM|KITCHEN|BEDROOM|HOUSE|HALL",
        f"TURN_DOWN|LOWER|DROP THE HEAT|HEATING {PLACE}",
        f"MAKE IT -|VERY COOL {PLACE}",
    ],
    "door_open": ["OPEN|OPEN_UP|UNLOCK THE|MY|THIS -|KITCHEN|BEDROOM|FRONT DOOR|GATE"],
    "door_close": ["CLOSE|SHUT|LOCK|LOCK_UP THE|MY|THIS -|KITCHEN|BEDROOM|FRONT DOOR|GATE"],
}
BEFORE = "-|-|-|-|-|-|PLEASE|HEY_ROBOT|OKAY_COMPUTER|HEY|YOU|NOW|ROBOT|COMPUTER"
AFTER = "-|-|-|-|-|-|PLEASE|NOW|OKAY|ROBOT|COMPUTER"


def draw_sentence(rng: np.random.Generator) -> tuple[list[str], str]:
    """Draw the words of one command, and its intent."""
    intent = rng.choice(list(INTENTS))
    pattern = rng.choice(INTENTS[intent])
    slots = [BEFORE, *pattern.split(), AFTER]
    words = "_".join(rng.choice(slot.split("|")) for slot in slots)
    return [word for word in words.split("_") if word != "-"], str(intent)


# ------------------------------------------------------------------------------------------------
# Speech synthesis: source and filter, with moving formants
# ------------------------------------------------------------------------------------------------


class Utterance(NamedTuple):
    """One recording with all of its labels."""

    wave: np.ndarray  # (S,) float32 in -1..1, 16 kHz
    alignment: list[tuple[str, int]]  # (phone, its end in samples), contiguous from 0, with SIL
    words: list[str]
    phones: list[str]  # without SIL
    intent: str


def draw_voice(speaker: int) -> dict[str, float]:
    """The constants of a speaker. Even numbers have low voices, odd numbers have high ones."""
    rng = np.random.default_rng([SEED, 1, speaker])
    high = speaker % 2
    return {
        "pitch": rng.uniform(165, 245) if high else rng.uniform(85, 145),  # mean, Hz
        "melody": rng.uniform(0.05, 0.25),  # range of the pitch around its mean
        "tract": rng.uniform(1.02, 1.25) if high else rng.uniform(0.88, 1.08),  # formants: factor
        "width": rng.uniform(0.8, 1.6),  # formant bandwidths: factor
        "tilt": rng.uniform(0.55, 0.95),  # low-pass of the glottal source: higher is duller
        "breath": rng.uniform(0.0, 0.12),  # breath noise during voicing
        "hiss": rng.uniform(0.85, 1.15),  # frication peak: factor
        "tempo": rng.uniform(0.75, 1.1),  # durations: factor
    }


def draw_alignment(
    words: list[str], tempo: float, rng: np.random.Generator
) -> list[tuple[str, int]]:
    """Draw the end of each phone in samples. Silence at both ends, and between some words."""
    phones, lengths = ["SIL"], [rng.uniform(0.1, 0.35)]
    for number, word in enumerate(words):
        if number and rng.random() < 0.15:
            phones.append("SIL")
            lengths.append(rng.uniform(0.04, 0.2))
        for phone in LEXICON[word].split():
            phones.append(phone)
            lengths.append(PHONES[phone][0] / 1000 * tempo * rng.lognormal(0, 0.2))
    phones.append("SIL")
    lengths.append(rng.uniform(0.1, 0.35))
    # Whole tenths of a second: few input shapes, each of which costs time once on a CPU.
    seconds = np.clip(sum(lengths), *SECONDS).round(1)
    ends = np.cumsum(lengths) * seconds / sum(lengths)
    return [(phone, round(end * SAMPLE_RATE)) for phone, end in zip(phones, ends)]


def draw_tracks(alignment: list[tuple[str, int]], rng: np.random.Generator) -> np.ndarray:
    """Synthesis parameters at each step: (F, 7), columns as in PHONES.

    Each target is held around the middle of its interval and joined to the next by a straight line,
    so that a phone depends on its neighbours. Amplitudes change faster than frequencies.
    """
    intervals, targets, start = [], [], 0
    for phone, end in alignment:
        phone_targets = PHONES[phone][1:]
        edges = np.linspace(start, end, len(phone_targets) + 1) / STEP
        intervals += itertools.pairwise(edges)
        targets += phone_targets
        start = end
    left, right = np.array(intervals).T
    deviations = (0.04, 0.04, 0.03, 0.15, 0.2, 0.25, 0.06)  # random variation of each target
    targets = targets * np.exp(rng.normal(0, deviations, (len(intervals), 7)))
    steps = np.arange(math.ceil(start / STEP) + 1)
    tracks = np.empty((len(steps), 7))
    for column in range(7):
        amplitude = column in (3, 4, 5)
        margin = (0.12 if amplitude else 0.3) * (right - left)
        held = np.stack([left + margin, right - margin], axis=1)  # first and last step of a target
        given = targets[:, column] >= (0 if amplitude else 1)  # not 0 Hz
        tracks[:, column] = np.interp(steps, held[given].ravel(), targets[given, column].repeat(2))
    return tracks


def draw_pulses(voice: dict[str, float], samples: int, rng: np.random.Generator) -> np.ndarray:
    """Glottal source: one pulse per period of a falling, slowly varying pitch. Returns (S,)."""
    time = np.linspace(0, 1, 50)  # 0 is the start of the utterance, 1 its end
    waves = rng.normal(0, 0.5, 3) @ np.sin(np.pi * np.outer((1, 2, 3), time + rng.uniform()))
    mean = voice["pitch"] * rng.uniform(0.92, 1.08)
    pitch = mean * np.exp(voice["melody"] * (waves + 0.5 - time))
    pitch = np.interp(np.linspace(0, 1, samples), time, pitch)
    period = np.floor(np.cumsum(pitch) / SAMPLE_RATE)
    starts = np.flatnonzero(np.diff(period, prepend=0))
    pulses = np.zeros(samples, np.float32)
    pulses[starts] = np.sqrt(SAMPLE_RATE / pitch[starts]) * rng.normal(1, 0.08, len(starts))
    return pulses


def resonance_response(hz: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Frequency response of N resonances in series, gain 1 at 0 Hz: hz, width (F, N) -> (F, 257).

    A resonance is the two-pole filter 1 / (1 - 2 r cos(w) z^-1 + r^2 z^-2), as in Klatt's
    synthesiser. The denominators are multiplied first, so that one Fourier transform is enough.
    """
    radius = np.exp(-np.pi * width / SAMPLE_RATE)
    linear, square = 2 * radius * np.cos(2 * np.pi * hz / SAMPLE_RATE), radius**2
    denominators = np.zeros((len(hz), 2 * hz.shape[1] + 1))  # polynomials in z^-1
    denominators[:, 0] = 1
    for a, b in zip(linear.T[:, :, None], square.T[:, :, None]):
        before = denominators.copy()
        denominators[:, 1:] -= a * before[:, :-1]
        denominators[:, 2:] += b * before[:, :-2]
    denominators /= denominators.sum(axis=1, keepdims=True)
    return 1 / np.fft.rfft(denominators.astype(np.float32), 4 * STEP)


def synthesise(
    voice: dict[str, float], tracks: np.ndarray, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Filter pulses and noise step by step, with overlap-add: tracks (F, 7) -> (S,)."""
    steps = len(tracks)
    noise = rng.standard_normal((steps + 1) * STEP, np.float32)
    pulses = np.zeros_like(noise)
    pulses[:samples] = draw_pulses(voice, samples, rng)
    window = np.hanning(2 * STEP + 1)[:-1].astype(np.float32)  # overlapping windows add to 1

    def spectrum(source: np.ndarray) -> np.ndarray:  # (F, 257)
        pieces = np.lib.stride_tricks.sliding_window_view(source, 2 * STEP)[::STEP]
        return np.fft.rfft(pieces * window, 4 * STEP)

    f1, f2, f3, voicing, breath, frication, peak = tracks.astype(np.float32).T[:, :, None]  # F x 1
    f4_f5 = np.full((steps, 2), (3500, 4500))
    formants = np.concatenate([f1, f2, f3, f4_f5], axis=1) * voice["tract"]
    widths = np.broadcast_to(np.array([60, 90, 130, 220, 350]) * voice["width"], formants.shape)
    delay = np.exp(-1j * np.pi * np.arange(257) / 256).astype(np.complex64)  # z^-1 at each bin
    glottis = (1 - voice["tilt"]) / (1 - voice["tilt"] * delay)
    tract = resonance_response(formants, widths) * glottis
    place = resonance_response(peak * voice["hiss"], 0.25 * peak) * (1 - delay)  # of frication
    place /= np.abs(place).max(axis=1, keepdims=True)
    shaped = spectrum(pulses) * tract * voicing
    shaped += spectrum(noise) * (tract * (breath + voice["breath"] * voicing) + place * frication)
    pieces = np.fft.irfft(shaped).reshape(steps, 4, STEP)  # 512 samples, one piece every 128
    wave = np.zeros((steps + 3, STEP), np.float32)
    for part in range(4):
        wave[part : part + steps] += pieces[:, part]
    return wave.ravel()[STEP : STEP + samples]


def add_channel(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add reverberation, noise, microphone colour and level: (S,) -> (S,) float32.

    Mild on purpose: HuBERT trained on this did better on real spoken digits than with more noise
    and reverberation, and than without any. All filters are applied to the spectrum.
    """
    samples = len(wave)
    size = 4096 * math.ceil((samples + 4000) / 4096)  # fast to transform
    hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
    echo = rng.standard_normal(4000, np.float32)
    echo *= np.exp(-np.arange(4000, dtype=np.float32) / (SAMPLE_RATE * rng.uniform(0.01, 0.06)))
    echo *= rng.uniform(0, 0.35) / np.sqrt(np.sum(echo**2))
    echo[0] += 1
    clean = np.fft.rfft(wave, size) * np.fft.rfft(echo, size)
    noise = rng.standard_normal(2 * len(hz), np.float32).view(np.complex64)
    noise *= (1 + hz / 100) ** -rng.uniform(0, 1)
    snr = 10 ** (rng.uniform(18, 45) / 20)
    noisy = clean + noise * np.linalg.norm(clean) / np.linalg.norm(noise) / snr
    noisy *= (1 + hz / 500) ** rng.uniform(-0.4, 0.3)  # microphone: dull to bright
    if rng.random() < 0.25:  # telephone band
        noisy *= (1 + (hz / rng.uniform(3300, 4000)) ** 24) ** -0.5
    wave = np.fft.irfft(noisy)[:samples]
    wave *= 10 ** (rng.uniform(-32, -18) / 20) / np.sqrt(np.mean(wave**2))
    return (wave / max(1, np.abs(wave).max() / 0.98)).astype(np.float32)


def utterance(speaker: int, index: int) -> Utterance:
    """Recording ``index`` of a speaker, a pure function of (SEED, speaker, index)."""
    rng = np.random.default_rng([SEED, 2, speaker, index])
    voice = draw_voice(speaker)
    words, intent = draw_sentence(rng)
    alignment = draw_alignment(words, voice["tempo"], rng)
    tracks = draw_tracks(alignment, rng)
    wave = add_channel(synthesise(voice, tracks, alignment[-1][1], rng), rng)
    phones = [phone for phone, _ in alignment if phone != "SIL"]
    return Utterance(wave, alignment, words, phones, intent)


# ------------------------------------------------------------------------------------------------
# Files: written once, under a name that changes with the code
# ------------------------------------------------------------------------------------------------


def recipe(function: Callable, more: str = "") -> str:
    """Hash of ``more`` and of all that a function of this file depends on.

    That is its source, the functions and constants of this file that it names, and so on for them.
    A name in a comment or docstring counts too.
    """
    parts, names = {}, [function.__name__]
    while names:
        name = names.pop()
        value = globals().get(name)
        if name in parts or value is None:
            continue
        if inspect.isfunction(value) and value.__module__ == __name__:
            parts[name] = inspect.getsource(value)
            names += re.findall(r"\w+", parts[name])
        elif name.isupper():
            parts[name] = repr(value)
    return hashlib.sha1(repr((sorted(parts.items()), more)).encode()).hexdigest()[:10]


def write_atomically(path: Path, content: bytes | dict) -> None:
    """Write to a second name, then rename: an interrupted call leaves no incomplete file.

    A dict is written as torch.save does, in memory first: torch reports a full disk as a
    RuntimeError, Python as an OSError.
    """
    if isinstance(content, dict):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def world(folder: Path | str) -> Path:
    """Write audio and manifest.tsv into ``folder``; return the path of the manifest.

    A folder that holds this very world is left as it is. The manifest is written last, so that an
    interrupted call is not taken for a complete one.
    """
    folder, audio = Path(folder), f"toy_{recipe(world)}"
    manifest = folder / "manifest.tsv"
    if manifest.exists() and f"\n{audio}/" in manifest.read_text(encoding="utf-8"):
        return manifest
    (folder / audio).mkdir(parents=True, exist_ok=True)
    recordings = [
        (split, speaker, index)
        for split, speakers in SPEAKERS.items()
        for speaker in speakers
        for index in range(RECORDINGS[split])
    ]

    def record(recording: tuple[str, int, int]) -> dict[str, str]:
        split, speaker, index = recording
        spoken, path = utterance(speaker, index), f"{audio}/{speaker:02d}_{index:02d}.wav"
        soundfile.write(folder / path, spoken.wave, SAMPLE_RATE, subtype="PCM_16")
        part = ("train", "dev", "test")[(index >= 12) + (index >= 15)]  # 12, 3, 5 recordings
        return {
            "path": path,
            "dataset": "toy",
            "speaker": f"toy-{speaker:02d}",
            "split": split,
            "speaker_split": part if split == "test" else "",  # which of these speakers it is
            "label_intent": spoken.intent,
            "text": " ".join(spoken.words),
            "phones": " ".join(spoken.phones),
            "alignment": " ".join(f"{phone}:{end}" for phone, end in spoken.alignment),
        }

    with ThreadPoolExecutor(2) as pool:  # numpy's transforms release the GIL
        rows = list(tqdm(pool.map(record, recordings), "toy world", len(recordings), leave=False))
    lines = [list(rows[0]), *(row.values() for row in rows)]
    content = "".join("\t".join(line) + "\n" for line in lines)
    write_atomically(manifest, content.encode())
    return manifest


# ------------------------------------------------------------------------------------------------
# HuBERT: masked prediction of half phones
# ------------------------------------------------------------------------------------------------

HUBERT = {  # arguments of torchaudio.models.hubert_pretrain_model: HuBERT Base, narrower
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
    "extractor_conv_bias": False,
    "encoder_embed_dim": 64,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 32,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 12,
    "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 192,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
    "mask_prob": 0.35,
    "mask_selection": "static",
    "mask_other": 0.0,
    "mask_length": 5,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_channel_prob": 0.0,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "mask_channel_length": 10,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
    "skip_masked": False,
    "skip_nomask": False,
    "num_classes": 2 * len(PHONES),
    "final_dim": 64,
    "feature_grad_mult": None,
}
HUBERT_TRAINING = {
    "speakers": 700,  # numbers from 1000 on, in no split; one utterance each
    "updates": 750,
    "batch": 8,
    "frames": 64,  # 1.3 s, as long as the shortest utterance
    "lr": 5e-3,  # peak
}


def frame_units(alignment: list[tuple[str, int]], frames: int) -> np.ndarray:
    """The unit at the middle of each teacher frame: (T,) integers below 2 * len(PHONES).

    A unit is the first or the second half of a phone: finer than phones, like HuBERT's clusters.
    """
    names = list(PHONES)
    ends = np.array([end for _, end in alignment])
    starts = np.concatenate([[0], ends[:-1]])
    halves = np.stack([(starts + ends) // 2, ends], axis=1).ravel()  # end of each half
    units = np.array([2 * names.index(phone) + half for phone, _ in alignment for half in (0, 1)])
    middles = HOP * np.arange(frames) + FIELD // 2
    return units[np.searchsorted(halves, middles, side="right")]


def hubert() -> HuBERTPretrainModel:
    """The HuBERT before training.

    Twelve post-norm layers learn slowly at first. Residual branches that start smaller (DeepNet,
    Wang et al. 2022, gain (8 L)^-1/4) need fewer updates than the default start.
    """
    model = torchaudio.models.hubert_pretrain_model(**HUBERT)
    layers = model.wav2vec2.encoder.transformer.layers
    for layer in layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        for linear in (
            attention.v_proj,
            attention.out_proj,
            feed_forward.intermediate_dense,
            feed_forward.output_dense,
        ):
            nn.init.xavier_normal_(linear.weight, gain=(8 * len(layers)) ** -0.25)
    return model


def masked_logits(model: HuBERTPretrainModel, waves: Tensor) -> tuple[Tensor, Tensor]:
    """Mask some frames and score all units: waves B x S -> logits B x T x K, mask B x T (bool).

    The logits (cosine / 0.1) are those of the model's own forward. That one compares the units one
    by one, which is slow, and does not return the mask.
    """
    features, _ = model.wav2vec2.feature_extractor(waves, None)
    hidden = model.wav2vec2.encoder.feature_projection(features)
    hidden, mask = model.mask_generator(hidden, None)
    hidden = model.wav2vec2.encoder.transformer(hidden)
    projected = nn.functional.normalize(model.logit_generator.final_proj(hidden), dim=-1)
    units = nn.functional.normalize(model.logit_generator.label_embeddings, dim=-1)
    return projected @ units.T / 0.1, mask


def hubert_corpus() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Waves (S,) and units (T,) to train on, one utterance of each speaker."""
    count = HUBERT_TRAINING["speakers"]
    with ThreadPoolExecutor(2) as pool:
        spoken = pool.map(lambda number: utterance(1000 + number, 0), range(count))
        spoken = list(tqdm(spoken, "toy HuBERT, speech", count, leave=False))
    waves = [each.wave for each in spoken]
    units = [frame_units(each.alignment, (len(each.wave) - FIELD) // HOP + 1) for each in spoken]
    return waves, units


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of both teachers."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, training: dict) -> None:
    """One update; the lr rises to its peak in a tenth of the updates, then falls to 0, linearly."""
    group, updates = optimizer.param_groups[0], training["updates"]
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    warmup = 0.1 * updates
    group["lr"] = training["lr"] * min((step + 1) / warmup, (updates - step) / (updates - warmup))
    optimizer.step()


def train_hubert(waves: list[np.ndarray], units: list[np.ndarray]) -> HuBERTPretrainModel:
    """Masked prediction of the units on random crops of one length, so that nothing is padded.

    Unmasked frames count as much as masked ones. HuBERT does not use them, but with them 750
    updates are enough.
    """
    model, rng = hubert(), np.random.default_rng(SEED)
    optimizer = adamw(list(model.parameters()))
    frames = HUBERT_TRAINING["frames"]
    samples = HOP * (frames - 1) + FIELD
    progress = tqdm(range(HUBERT_TRAINING["updates"]), "toy HuBERT", leave=False)
    for step in progress:
        crops, targets = [], []
        for each in rng.integers(len(waves), size=HUBERT_TRAINING["batch"]):
            start = rng.integers(len(units[each]) - frames + 1)
            crops.append(waves[each][HOP * start : HOP * start + samples])
            targets.append(units[each][start : start + frames])
        batch, target = torch.from_numpy(np.stack(crops)), torch.from_numpy(np.stack(targets))
        logits, mask = masked_logits(model, batch)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        loss = losses[mask].mean() + losses[~mask].mean()
        update(optimizer, loss, step, HUBERT_TRAINING)
        if step % 25 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")
    return model


def teacher() -> Path:
    """Path of the toy HuBERT, trained on first use and kept beside torch's downloads.

    The file holds {"config": arguments of torchaudio.models.hubert_pretrain_model, "state_dict"}.
    The caller's random state is left alone.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"toy_hubert_{recipe(teacher)}.pt"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)  # the CPU's generator only
            model = train_hubert(*hubert_corpus())
        write_atomically(path, {"config": HUBERT, "state_dict": model.state_dict()})
    return path


# ------------------------------------------------------------------------------------------------
# BERT: masked language modelling of paragraphs of one intent
# ------------------------------------------------------------------------------------------------

# A paragraph is one to eight commands of one intent, as neighbouring sentences of a text are about
# the same thing. Single commands are not enough: "activate" and "kill" stand before the same words.
# So the model learns intents from context alone; it sees no labels.
BERT = {  # names of config.json; vocab_size is added
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 128,
}
BERT_TRAINING = {
    "sentences": 4000,
    "paragraph": 8,  # most sentences of a paragraph
    "updates": 700,
    "batch": 12,  # paragraphs
    "lr": 3e-3,  # peak
    "masked": 0.6,
}
SPLIT_WORDS = ("LIGHTS", "HEATING")  # light ##s, heat ##ing


def bert_vocabulary() -> list[str]:
    """Special tokens, letters (so that every English word can be spelled), words of LEXICON."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["'"]
    words = [word.lower() for word in LEXICON if word not in SPLIT_WORDS]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), "##ing", *words]
    return list(dict.fromkeys(pieces))


def bert_corpus(tokenizer: Callable, rng: np.random.Generator) -> list[Tensor]:
    """Paragraphs as ids (N,): [CLS] sentence [SEP] sentence [SEP] ..., all of one intent."""
    by_intent: dict[str, list[list[int]]] = {}
    for _ in range(BERT_TRAINING["sentences"]):
        words, intent = draw_sentence(rng)
        by_intent.setdefault(intent, []).append(tokenizer(" ".join(words)))
    paragraphs = []
    for sentences in by_intent.values():
        while sentences:
            count = int(rng.integers(1, BERT_TRAINING["paragraph"] + 1))
            taken, sentences = sentences[:count], sentences[count:]
            ids = taken[0] + [i for sentence in taken[1:] for i in sentence[1:]]  # one [CLS]
            paragraphs.append(torch.tensor(ids))
    return paragraphs


def mask_pieces(
    target: Tensor, special: dict[str, int], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mask pieces of words: ids B x N -> input ids B x N, masked B x N (bool).

    A masked piece is replaced by [MASK] (80 %), by any piece (10 %), or stays as it is. BERT masks
    15 % of the pieces. Here it is 60 %: what a short command then lacks has to be predicted from
    the rest of its paragraph, that is, from the intent.
    """
    share = BERT_TRAINING["masked"]
    never = torch.tensor([special[name] for name in ("[PAD]", "[CLS]", "[SEP]")])
    draw = torch.from_numpy(rng.random(target.shape))
    masked = (draw < share) & ~torch.isin(target, never)
    other = rng.integers(special["[MASK]"] + 1, len(special), size=target.shape)
    ids = torch.where(masked & (draw < 0.9 * share), torch.from_numpy(other), target)
    return ids.masked_fill(masked & (draw < 0.8 * share), special["[MASK]"]), masked


def train_bert(model: nn.Module, tokenizer: Callable) -> None:
    """Masked language modelling. The word embeddings are the output layer too, as in BERT.

    The deviation of the initial weights is .05 for width 64; BERT's .02 is for width 768.
    """
    rng, special, width = np.random.default_rng(SEED), tokenizer.ids, BERT["hidden_size"]
    ids = nn.utils.rnn.pad_sequence(bert_corpus(tokenizer, rng), batch_first=True)  # [PAD] is 0
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
    bias = nn.Parameter(torch.zeros(len(special)))
    for module in [*model.modules(), *head]:
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.05)
    optimizer = adamw([*model.parameters(), *head.parameters(), bias])
    progress = tqdm(range(BERT_TRAINING["updates"]), "toy BERT", leave=False)
    for step in progress:
        target = ids[torch.from_numpy(rng.integers(len(ids), size=BERT_TRAINING["batch"]))]
        target = target[:, : int((target != special["[PAD]"]).sum(1).max())]
        masked_ids, masked = mask_pieces(target, special, rng)
        hidden_states, _ = model(masked_ids, target != special["[PAD]"])
        embeddings = model.embeddings.word_embeddings.weight
        logits = head(hidden_states[-1][masked]) @ embeddings.T + bias
        loss = nn.functional.cross_entropy(logits, target[masked])
        update(optimizer, loss, step, BERT_TRAINING)
        if step % 25 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")


def text_teacher(build: Callable[..., nn.Module], tokenizer: Callable[..., Callable]) -> Path:
    """Folder of the toy BERT, trained on first use and kept beside torch's downloads.

    As bert-base-uncased is published: config.json, vocab.txt, pytorch_model.bin. ``build`` takes
    settings of config.json and returns a model with the published module names, which maps ids and
    valid (B, N) to hidden states [(B, N, D)] and anything else. ``tokenizer`` takes the vocabulary
    and returns a callable from text to ids with an attribute ``ids`` (piece -> id). The caller's
    random state is left alone.
    """
    name = f"toy_bert_{recipe(text_teacher, inspect.getsource(build))}"
    folder = Path(torch.hub.get_dir()) / "checkpoints" / name
    if (folder / "pytorch_model.bin").exists():
        return folder
    vocabulary = bert_vocabulary()
    settings = {"vocab_size": len(vocabulary), **BERT}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # the CPU's generator only
        model = build(**settings)
        train_bert(model, tokenizer(vocabulary))
    weights = {f"bert.{name}": tensor for name, tensor in model.state_dict().items()}
    settings |= {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    settings |= {"type_vocab_size": 2}
    write_atomically(folder / "config.json", json.dumps(settings, indent=1).encode())
    write_atomically(folder / "vocab.txt", ("\n".join(vocabulary) + "\n").encode())
    write_atomically(folder / "pytorch_model.bin", weights)  # last: its absence is noticed
    return folder
