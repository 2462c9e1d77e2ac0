"""The students against the code of the papers' authors, with the same weights.

A test needs a checkout of their repository, whose path it takes from the environment.
"""

import contextlib
import importlib
import io
import os
import re
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch._dynamo  # noqa: F401, optimizers import it, and it would look at the stand-ins below
from conftest import CONV_SHAPES, encoder_config, shake
from torch import nn

import distilhubert
import skill

NOT_NEEDED = ("torchaudio", "pandas", "easydict", "tensorboardX", "pytorch_lightning", "filelock")
NOT_NEEDED += ("requests", "omegaconf", "yaml")  # what their modules import but a student does not


def peer(variable, repository):
    """The folder that an environment variable names."""
    if not os.environ.get(variable):
        pytest.skip(f"set {variable} to a checkout of {repository}")
    return Path(os.environ[variable]).resolve()


@contextlib.contextmanager
def checkout(*paths):
    """Gives import_module, which finds modules below ``paths`` first.

    Packages that are NOT_NEEDED are replaced by stand-ins, and all that was imported is forgotten
    by its name afterwards.
    """
    before, search_path = dict(sys.modules), list(sys.path)
    for name in before:
        if name.split(".")[0] in NOT_NEEDED:
            del sys.modules[name]
    sys.modules.update({name: MagicMock() for name in NOT_NEEDED})
    sys.path[:0] = map(str, paths)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # their models print while they are built
            yield importlib.import_module
    finally:
        sys.path[:] = search_path
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            theirs = isinstance(file, str) and file.startswith(tuple(map(str, paths)))
            if theirs or name in NOT_NEEDED:
                del sys.modules[name]
        sys.modules.update(before)


WEIGHT_NORM = {  # torch's older names of the positional convolution's weights, and those of today
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


# ---- skill.py and DPHuBERT ----------------------------------------------------------------------


def name_in_skill(name):
    """The name that a weight of DPHuBERT's model has in our student."""
    if name == "feature_extractor.dummy_weight":
        return "feature_extractor.scale"
    if name.endswith("rel_attn_embed.weight"):
        return "rel_attn_embed.weight"
    name = name.removeprefix("encoder.").removeprefix("transformer.")
    module, kind = name.rsplit(".", 1)
    return f"{module}.{WEIGHT_NORM.get(kind, kind)}"


def dphubert(model, shape, channels, heads, units, blocks, gated):
    """DPHuBERT's model of so many channels, heads and units; ``blocks``: which layers have them.

    ``heads`` are numbers for WavLM and counts for HuBERT.
    """
    attention, feed_forward = blocks
    settings = encoder_config(
        extractor_conv_layer_config=[(n, *rest) for n, rest in zip(channels, CONV_SHAPES)],
        extractor_prune_conv_channels=gated,
        encoder_embed_dim=shape.width,
        encoder_pos_conv_kernel=shape.position_kernel,
        encoder_pos_conv_groups=shape.position_groups,
        encoder_num_layers=len(units),
        encoder_use_attention=attention,
        encoder_use_feed_forward=feed_forward,
        encoder_prune_attention_heads=gated,
        encoder_ff_interm_features=units,
        encoder_prune_feed_forward_intermediate=gated,
        encoder_layer_drop=0.0,
        aux_num_out=None,
        normalize_waveform=False,
    )
    del settings["encoder_num_heads"]
    if shape.position_buckets:
        return model.wavlm_model(
            **settings,
            encoder_num_buckets=shape.position_buckets,
            encoder_max_distance=shape.max_distance,
            encoder_total_num_heads=[shape.attention_heads] * len(units),
            encoder_remaining_heads=heads,
        )
    head_width = shape.width // shape.attention_heads
    return model.wav2vec2_model_original(
        **settings, encoder_num_heads=heads, encoder_head_dim=head_width
    )


def assert_same_states(theirs, hidden_states):
    for a, b in zip(theirs, hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("buckets", [0, 16], ids=["hubert", "wavlm"])
@torch.no_grad()
def test_skill_equals_dphubert(buckets):
    """Hidden states with gates and after pruning, expected size, and what is left of each layer.

    In float64: in float32 the states agree to 2e-6.
    """
    root = peer("DPHUBERT_CHECKOUT", "pyf98/DPHuBERT")
    shape = skill.Shape(
        conv_channels=(32,) * 7,
        width=48,
        attention_heads=4,
        kept_heads=(tuple(range(4)),) * 4,
        feed_forward=(96,) * 4,
        position_kernel=16,
        position_groups=4,
        position_buckets=buckets,
        max_distance=40,
    )
    torch.manual_seed(1)
    student = shake(skill.Student(shape, 0.1)).double()
    hard_concrete = skill.HardConcrete(shape).double()
    hard_concrete.log_alpha.copy_(2.0 * torch.randn_like(hard_concrete.log_alpha) + 0.3)
    waveforms = 0.2 * torch.randn(2, 8000).double()
    with checkout(root) as load:
        model = load("wav2vec2.model")
    heads = [[0, 1, 2, 3]] * 4 if buckets else [4] * 4
    blocks = [True] * 4, [True] * 4
    theirs = dphubert(model, shape, shape.conv_channels, heads, [96] * 4, blocks, gated=True)
    theirs.double().eval()
    weights = student.state_dict()
    log_alphas = hard_concrete.split(hard_concrete.log_alpha)
    vectors = {
        "feature_extractor": iter(log_alphas.channels),
        "attention": iter(log_alphas.heads),
        "feed_forward": iter(log_alphas.units),
    }
    state = {}
    for name in theirs.state_dict():
        if name.endswith("log_alpha"):
            (kind,) = (kind for kind in vectors if kind in name)
            state[name] = next(vectors[kind])
        else:
            state[name] = weights.pop(name_in_skill(name))
    theirs.load_state_dict(state)
    assert not weights  # all of ours are there

    gated, _ = student(waveforms, gates=hard_concrete.fixed())
    assert_same_states(theirs.extract_features(waveforms)[0], gated)
    assert float(theirs.get_num_params()) == float(hard_concrete.expected_size(shape))

    pruned = skill.prune(student, hard_concrete).eval()
    convs, attention, feed_forward, counts, numbers, units = theirs.prune()
    channels, left = [channels for channels, _, _ in convs], pruned.shape
    assert channels == [*left.conv_channels] and list(units) == [*left.feed_forward]
    kept = [list(heads) for heads in left.kept_heads]
    heads = numbers if buckets else counts
    assert list(heads) == (kept if buckets else list(map(len, kept)))
    blocks = attention, feed_forward
    cut = dphubert(model, shape, channels, heads, units, blocks, gated=False)
    cut.double().eval().load_state_dict(theirs.state_dict())
    assert_same_states(cut.extract_features(waveforms)[0], pruned(waveforms)[0])


# ---- distilhubert.py and s3prl's distiller ------------------------------------------------------

DISTILLER_MODULES = {  # where the name of a module differs: theirs, ours
    "feature_extractor.conv_layers.0.2": "feature_extractor.conv_layers.0.layer_norm",
    "post_extract_proj": "feature_projection.projection",
    "encoder.pos_conv.0": "pos_conv_embed.conv",
    "encoder.layer_norm": "layer_norm",
}
DISTILLER_LAYER = {
    "self_attn": "attention",
    "self_attn_layer_norm": "layer_norm",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
}


def name_in_distilhubert(name):
    """The name that a weight of s3prl's distiller has in our student."""
    module, kind = name.rsplit(".", 1)
    kind = WEIGHT_NORM.get(kind, kind)
    if module in DISTILLER_MODULES:
        return f"{DISTILLER_MODULES[module]}.{kind}"
    if found := re.fullmatch(r"(feature_extractor\.conv_layers\.\d)\.0", module):
        return f"{found[1]}.conv.{kind}"
    layer, part, *rest = re.fullmatch(r"encoder\.(layers\.\d+)\.(\w+)(\..*)?", module).groups("")
    return f"{layer}.{DISTILLER_LAYER.get(part, part)}{rest[0]}.{kind}"


def test_distilhubert_equals_s3prl():
    """Hidden states, heads and loss of the authors' student, with its random weights in ours."""
    root = peer("S3PRL_CHECKOUT", "s3prl/s3prl")
    with checkout(root, root / "s3prl") as load:
        model = load("s3prl.upstream.distiller.model")
        expert = load("pretrain.distiller.pretrain_expert").DistillerForPretrain
        settings = dict(encoder_layers=2, n_tasks=3, pred_layer_id=[4, 8, 12], cosine_loss=1.0)
        torch.manual_seed(0)
        theirs = model.DistillerModel(model.DistillerConfig(settings)).eval()
    weights = theirs.state_dict()
    (first, first_bias), (second, second_bias) = (
        (weights.pop(f"output_layer.{i}.weight"), weights.pop(f"output_layer.{i}.bias"))
        for i in (0, 2)
    )
    student = distilhubert.Student(distilhubert.Shape(), 2, 0.1, 0.1)
    heads = distilhubert.Heads(768, 3)
    student.load_state_dict({name_in_distilhubert(name): value for name, value in weights.items()})
    with torch.no_grad():
        for n, head in enumerate(heads.heads):  # one Linear for all of them, then a matrix for each
            head[0].weight.copy_(first.chunk(3)[n]), head[0].bias.copy_(first_bias.chunk(3)[n])
            head[2].weight.copy_(second[n].T), head[2].bias.copy_(second_bias.flatten().chunk(3)[n])
    student.eval(), heads.eval()

    waves, lengths = 0.1 * torch.randn(3, 24_000), torch.tensor([24_000, 20_000, 11_111])
    padding = (torch.arange(24_000) < lengths[:, None]).float()
    for x, valid, mask in (
        (waves, None, torch.ones_like(waves)),
        (waves * padding, lengths, padding),
    ):
        with torch.no_grad():
            features, _, their_heads, frames, their_layers = theirs(x, mask, get_hidden=True)
            hidden_states, counts = student(x, valid)
            predicted = heads(hidden_states[-1])  # N x B x T x D
        valid_frames = frames.bool()  # B x T
        assert counts is None or counts.tolist() == frames.sum(1).tolist()
        for layer, hidden in zip(their_layers, hidden_states[1:], strict=True):
            assert torch.equal(layer[valid_frames], hidden[valid_frames])
        their_heads = their_heads.transpose(0, 1)  # B x N x T x D, there
        apart = (their_heads - predicted)[:, valid_frames].abs().max().item()
        print(f"heads: {apart:.1e}")
        assert apart < 1e-6
    target = torch.randn_like(predicted)
    config = types.SimpleNamespace(feat_pen_loss=0.0)
    loss_of = types.SimpleNamespace(
        loss_func=nn.L1Loss(reduction="none"), cosine_loss=1.0, config=config
    )
    pair = (predicted.transpose(0, 1), target.transpose(0, 1))
    their_loss, *_ = expert.compute_loss(loss_of, features, *pair)
    loss, _ = distilhubert.distillation_loss(predicted, target, 1.0)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
