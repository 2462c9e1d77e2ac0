"""What the tests share: tiny models with random weights, folders of audio, a padded batch."""

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # import common from anywhere

torch.set_num_threads(1)

METHODS = ("distilhubert", "gendistiller", "lstm_dkd", "skill", "pad")
CONV_SHAPES = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]  # kernel, stride of HuBERT


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "network: downloads something")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests run in two processes where pytest-xdist is installed, with -n N in N."""
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    asked = option.numprocesses is not None or option.tx or option.dist != "no"
    some = option.keyword or option.markexpr or not all(Path(path).is_dir() for path in config.args)
    if not (asked or some or option.usepdb or option.trace or option.capture == "no"):
        option.numprocesses, option.dist = 2, "loadfile"


def encoder_config(dropout=0.1, **changes):
    """Arguments of torchaudio.models.wav2vec2_model: 12 layers of width 16, dropout everywhere."""
    channels = changes.pop("channels", 8)
    config = dict(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(channels, kernel, stride) for kernel, stride in CONV_SHAPES],
        extractor_conv_bias=False,
        encoder_embed_dim=16,
        encoder_projection_dropout=dropout,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=2,
        encoder_num_layers=12,
        encoder_num_heads=2,
        encoder_attention_dropout=dropout,
        encoder_ff_interm_features=32,
        encoder_ff_interm_dropout=dropout,
        encoder_dropout=dropout,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.1,
    )
    return config | changes


def large(**changes):
    """The pre-norm kind: LayerNorm and bias in all convolutions (HuBERT LARGE)."""
    kind = dict(
        extractor_mode="layer_norm", extractor_conv_bias=True, encoder_layer_norm_first=True
    )
    return encoder_config(**kind | changes)


def pretrain_config(encoder, num_classes=10):
    """Arguments of torchaudio.models.hubert_pretrain_model around those of an encoder."""
    masking = {}
    for mask, overlap, share in (
        ("mask", "no_mask", 0.8),
        ("mask_channel", "no_mask_channel", 0.0),
    ):
        masking |= {f"{mask}_prob": share, f"{mask}_selection": "static", f"{mask}_other": 0.0}
        masking |= {f"{mask}_length": 10, f"{mask}_min_space": 1, f"{overlap}_overlap": False}
    head = dict(skip_masked=False, skip_nomask=False, num_classes=num_classes, final_dim=12)
    return encoder | masking | head | dict(feature_grad_mult=0.1)


def shake(module, seed=0):
    """Move all parameters off their initial values: a bias of 0 or a gain of 1 hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def make_hubert(encoder, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shake(torchaudio.models.hubert_pretrain_model(**pretrain_config(encoder)), seed)


def write_teacher(path, encoder):
    """A teacher with random weights, the same for all rates of dropout, in this project's form."""
    form = {"config": pretrain_config(encoder), "state_dict": make_hubert(encoder).state_dict()}
    torch.save(form, path)
    return path


BERT_SETTINGS = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
BERT_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "light", "##s", "on", "don", "'", "t"]
BERT_PIECES += ["\u2028x"]  # a line of its own for a reader that splits at "\n" only


def published_weights(settings=BERT_SETTINGS, seed=0):
    """Random weights under the names of bert-base-uncased: name -> tensor, without a prefix."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (settings["vocab_size"], width),
        "embeddings.position_embeddings.weight": (settings["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for i in range(settings["num_hidden_layers"]):
        for name, rows, columns in (
            ("attention.self.query", width, width),
            ("attention.self.key", width, width),
            ("attention.self.value", width, width),
            ("attention.output.dense", width, width),
            ("attention.output.LayerNorm", width, 0),
            ("intermediate.dense", inner, width),
            ("output.dense", width, inner),
            ("output.LayerNorm", width, 0),
        ):
            shape = (rows, columns) if columns else (rows,)
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = (rows,)
    return {k: 0.5 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def write_bert(folder, weights=None, settings=BERT_SETTINGS, vocabulary=BERT_PIECES, kind="bin"):
    folder.mkdir(parents=True, exist_ok=True)
    weights = published_weights(settings) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        safetensors = pytest.importorskip("safetensors.torch", reason="not installed")
        safetensors.save_file(weights, folder / "model.safetensors")
    return folder


WORDS = ["turn", "on", "the", "light", "##s", "stop", "music", "please"]
KNOWN = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SAID = [
    "TURN ON THE LIGHTS",
    "STOP THE MUSIC PLEASE",
    "STOP",
    "PLEASE TURN THE MUSIC ON",
    "LIGHTS ON",
    "THE LIGHT THE LIGHT THE LIGHTS",
]


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """Path of a 12-layer teacher of width 16 in this project's own file form.

    Beside it stands a folder ``bert``, a text model of the same width as it is published.
    """
    path = write_teacher(tmp_path_factory.mktemp("teacher") / "tiny.pt", encoder_config())
    settings = BERT_SETTINGS | {"vocab_size": len(KNOWN), "hidden_size": 16}
    settings |= {"max_position_embeddings": 24}
    write_bert(path.with_name("bert"), published_weights(settings), settings, KNOWN)
    return path


def wavlm_config(**changes):
    """Arguments of torchaudio.models.wavlm_model: 12 layers of width 16."""
    config = encoder_config(encoder_num_buckets=12, encoder_max_distance=20, aux_num_out=None)
    return config | changes


@pytest.fixture(scope="session")
def tiny_wavlm():
    """torchaudio's WavLM with random weights, all of them off their first values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake(torchaudio.models.wavlm_model(**wavlm_config()))


@pytest.fixture(scope="session")
def tiny_wavlm_file(tiny_wavlm, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "wavlm.pt"
    torch.save(tiny_wavlm.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def bert_folder(tiny_teacher):
    return tiny_teacher.with_name("bert")


@pytest.fixture(scope="session")
def audio_folder(tmp_path_factory):
    """Twelve 16 kHz wav files of 0.5 to 1.5 s: tones with bursts of noise, always the same."""
    folder, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    for number in range(12):
        samples = int(rng.integers(8_000, 24_000))
        wave = 0.2 * np.sin(2 * np.pi * rng.uniform(100, 3_000) * np.arange(samples) / 16_000)
        start = int(rng.integers(samples // 2))
        wave[start : start + 4_000] += 0.1 * rng.standard_normal(len(wave[start : start + 4_000]))
        soundfile.write(folder / f"{number:02d}.wav", wave.astype(np.float32), 16_000)
    return folder


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """A LibriSpeech tree: two readers, six files each of 0.4 to 1.2 s, and their transcripts."""
    root, rng = tmp_path_factory.mktemp("spoken"), np.random.default_rng(0)
    for reader in ("17", "23"):
        folder = root / "train" / reader / "5"
        folder.mkdir(parents=True)
        lines = []
        for number, text in enumerate(SAID):
            name, samples = f"{reader}-5-{number:04d}", int(rng.integers(6_400, 19_200))
            wave = 0.2 * rng.standard_normal(samples) * np.sin(np.arange(samples) / 700)
            soundfile.write(folder / f"{name}.flac", wave.astype(np.float32), 16_000)
            lines.append(f"{name} {text}")
        (folder / f"{reader}-5.trans.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A manifest of two speakers of one pitch each, and a colour that is the pitch as well."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    lines = ["path\tspeaker\tspeaker_split\tlabel_colour\tlabel_colour_split\tdataset\tseconds"]
    for i in range(24):
        wave = 0.3 * np.sin(2 * np.pi * (200, 900)[i % 2] * np.arange(8_000) / 16_000)
        soundfile.write(folder / f"{i}.wav", wave + 0.01 * rng.normal(size=8_000), 16_000)
        part = ("train", "train", "dev", "test")[i // 2 % 4]
        lines.append(f"{i}.wav\ts{i % 2}\t{part}\tred{i % 2}\t{part}\ttones\t{i}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.tsv"


def run_script(script, *flags):
    """What the process ``python SCRIPT.py FLAGS`` gives, without a process."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        patch.setattr(sys, "excepthook", None)  # parse_flags installs its own
        try:
            importlib.import_module(script).main()
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:  # as the interpreter does
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
            sys.excepthook(type(error), error, error.__traceback__)
    return subprocess.CompletedProcess(flags, code, stdout.getvalue(), stderr.getvalue())


def tiny_run(name, files, out, **changes):
    """A run of seconds without dropout; a pass over the data is several updates."""
    small = dict(
        data=str(files["audio"]), teacher=str(files["teacher"]), out=str(out), device="cpu"
    )
    small |= dict(workers=0, steps=8, batch_seconds=4.0, accumulate=1, lr=1e-3)
    small |= dict(log_every=2, save_every=4)
    own = {
        "distilhubert": dict(dropout=0.0),
        "gendistiller": dict(dropout=0.0),
        "lstm_dkd": dict(dropout=0.0, hidden=8),
        "skill": dict(dropout=0.0, gate_lr=0.1, calibration_utterances=4),
        "pad": dict(data=str(files["spoken"]), teacher=str(files["bert"]), widths=(2, 4, 8)),
    }[name]
    if name == "pad":
        own |= dict(student=str(files["teacher"]), longest_seconds=2.0, alignment="joint")
    else:
        own |= dict(crop_seconds=1.0)
    return small | own | changes


def same(a, b):
    """Whether two checkpoints agree bit for bit; the run folder may differ."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k == "out" or same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="session")
def tiny_files(audio_folder, spoken, bert_folder, tmp_path_factory):
    """What tiny_run reads. PAD's speech model has no dropout, as the others are told by a flag."""
    path = tmp_path_factory.mktemp("teacher") / "no_dropout.pt"
    teacher = write_teacher(path, encoder_config(dropout=0.0))
    return dict(audio=audio_folder, spoken=spoken, bert=bert_folder, teacher=teacher)


@pytest.fixture
def padded_batch():
    """Utterances of 12,000 and 7,000 samples, zero-padded: waveforms (2, S), lengths (2,)."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([12_000, 7_000])
    waveforms = 0.3 * torch.randn(2, 12_000, generator=generator) + 0.05
    waveforms[1, 7_000:] = 0.0
    return waveforms, lengths
