"""What the tests share: a tiny teacher with random weights, a folder of noises, a padded batch."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # import common from anywhere

torch.set_num_threads(1)

CONV_SHAPES = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]  # kernel, stride of HuBERT


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "network: downloads something")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def encoder_config(**changes):
    """Arguments of torchaudio.models.wav2vec2_model: 12 layers of width 16, dropout everywhere."""
    channels = changes.pop("channels", 8)
    config = dict(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(channels, kernel, stride) for kernel, stride in CONV_SHAPES],
        extractor_conv_bias=False,
        encoder_embed_dim=16,
        encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=2,
        encoder_num_layers=12,
        encoder_num_heads=2,
        encoder_attention_dropout=0.1,
        encoder_ff_interm_features=32,
        encoder_ff_interm_dropout=0.1,
        encoder_dropout=0.1,
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
    masking = dict(
        mask_prob=0.8,
        mask_selection="static",
        mask_other=0.0,
        mask_length=10,
        no_mask_overlap=False,
        mask_min_space=1,
        mask_channel_prob=0.0,
        mask_channel_selection="static",
        mask_channel_other=0.0,
        mask_channel_length=10,
        no_mask_channel_overlap=False,
        mask_channel_min_space=1,
    )
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


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """Path of a 12-layer teacher of width 16 in this project's own file form."""
    path = tmp_path_factory.mktemp("teacher") / "tiny.pt"
    model = make_hubert(encoder_config())
    form = {"config": pretrain_config(encoder_config()), "state_dict": model.state_dict()}
    torch.save(form, path)
    return path


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


@pytest.fixture
def padded_batch():
    """Utterances of 12,000 and 7,000 samples, zero-padded: waveforms (2, S), lengths (2,)."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([12_000, 7_000])
    waveforms = 0.3 * torch.randn(2, 12_000, generator=generator) + 0.05
    waveforms[1, 7_000:] = 0.0
    return waveforms, lengths
