"""Teachers: layer numbers, eval for ever, cluster logits, names of weights, all checkpoints."""

import argparse
import builtins
import collections
import copy
import enum
import io
import math
import os
import pickle
import re
import sys
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchaudio
from conftest import encoder_config, large, make_hubert, pretrain_config, shake
from torch import nn
from torchaudio.models import wav2vec2_model, wavlm_model

import common
from common import InputError, Teacher, load_checkpoint, load_teacher

WIDE = dict(encoder_embed_dim=128, encoder_num_heads=2, encoder_num_layers=3, channels=12)
KINDS = ["base", "large", "wavlm"]


def make_model(kind, seed=0, **changes):
    """torchaudio's model of a kind, with random weights."""
    config = (large if kind == "large" else encoder_config)(**changes) | {"aux_num_out": None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind != "wavlm":
            return shake(wav2vec2_model(**config), seed)
        return shake(wavlm_model(**config, encoder_num_buckets=32, encoder_max_distance=800), seed)


def bare(model, normalise=False):
    return Teacher(model, "test", normalise)


def with_head(hubert):
    generator = hubert.logit_generator
    embeddings = generator.label_embeddings.detach()
    return Teacher(hubert.wav2vec2, "test", False, generator.final_proj, embeddings)


def test_a_teacher_with_other_convolutions_is_refused():
    others = encoder_config()["extractor_conv_layer_config"]
    for layers in (others[:6], [*others[:6], (8, 2, 1)]):
        with pytest.raises(InputError, match="test: its convolutions are not HuBERT's"):
            bare(make_model("base", extractor_conv_layer_config=layers))


def assert_close(states, references, tolerance=2e-5):
    for state, reference in zip(states, references, strict=True):
        assert state.shape == reference.shape
        assert (state - reference).abs().max() < tolerance


def assert_equal(states, references):
    assert all(torch.equal(a, b) for a, b in zip(states, references, strict=True))


@torch.no_grad()
def own_states(model, waveforms):
    """Layers 1..L by torchaudio itself."""
    return model.extract_features(waveforms)[0]


@pytest.fixture
def waveforms(padded_batch):
    return padded_batch[0]


# ---- hidden states -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_layers_1_to_L_equal_torchaudio_and_state_0_is_what_layer_1_is_given(kind, waveforms):
    """Projection plus positional convolution; with its LayerNorm in post-norm models alone."""
    teacher, given = bare(make_model(kind)), []
    encoder = teacher.model.encoder
    encoder.transformer.layers[0].register_forward_pre_hook(lambda _, x: given.append(x[0].clone()))
    hidden = teacher(waveforms)
    assert len(hidden) == 13 == teacher.num_layers + 1 and hidden[0].shape == (2, 37, 16)
    assert_close(hidden[1:], own_states(teacher.model, waveforms))
    assert torch.equal(hidden[0], given[0])
    x = encoder.feature_projection(teacher.model.feature_extractor(waveforms, None)[0])
    x = x + encoder.transformer.pos_conv_embed(x)
    assert_close(hidden[:1], [x if kind == "large" else encoder.transformer.layer_norm(x)])


@pytest.mark.parametrize("last", [0, 1, 5, 12, None])
def test_layers_behind_the_last_needed_one_are_not_computed(last, waveforms):
    teacher = bare(make_model("base"))
    ran = []
    for i, layer in enumerate(teacher.model.encoder.transformer.layers, start=1):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    everything = teacher(waveforms)
    ran.clear()
    hidden = teacher(waveforms, last_layer=last)
    count = 12 if last is None else last
    assert ran == list(range(1, count + 1)) and len(hidden) == count + 1
    assert all(torch.equal(a, b) for a, b in zip(hidden, everything))


def test_each_utterance_is_normalised_over_its_samples(waveforms):
    model = make_model("large")
    loud = torch.stack([waveforms[0], 30 * waveforms[1] - 0.3])
    by_hand = [(w - w.mean()) / (w.var(correction=0) + 1e-5).sqrt() for w in loud.double()]
    expected = bare(model)(torch.stack(by_hand).float())
    assert_close(bare(model, normalise=True)(loud), expected, 1e-4)
    assert not torch.allclose(bare(model)(loud)[-1], expected[-1], atol=1e-2)


@pytest.mark.parametrize("kernel, groups, frames", [(128, 4, 50), (7, 2, 1), (5, 8, 12)])
def test_fourier_convolution_is_the_convolution(kernel, groups, frames):
    """In autocast, with all gradients; outside of it torch's own."""
    conv = nn.Conv1d(16, 24, kernel, padding=kernel // 2, groups=groups)
    conv = nn.utils.parametrizations.weight_norm(conv, dim=2)
    x = torch.randn(3, 16, frames, requires_grad=True)
    leaves, exact = [x, *conv.parameters()], copy.deepcopy(conv).double()
    expected = exact(x.double())
    up = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [x, *exact.parameters()], up)
    with torch.autocast("cpu", torch.bfloat16):
        y = common.fourier_convolution(conv, x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(y, leaves, up.float()), gradients, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(common.fourier_convolution(conv, x), conv(x))
    config = SimpleNamespace(amp=True, compile=True)
    common.speed_up(config, torch.device("cpu"), nn.Sequential(conv))
    assert conv.forward.func._torchdynamo_disable  # the compiler leaves it as it is


# ---- frozen ------------------------------------------------------------------------------------


def test_the_teacher_stays_in_eval_and_frozen_whatever_is_called(waveforms):
    hubert = make_hubert(encoder_config())
    teacher = with_head(hubert.train())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    parent = nn.ModuleDict({"teacher": teacher, "student": nn.Linear(2, 2)})
    for call in (teacher.train, parent.train, lambda: parent.train(True), teacher.eval):
        call()
        assert not any(module.training for module in teacher.modules())
        assert parent["student"].training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())

    waveforms.requires_grad_(True)
    first = teacher(waveforms)
    assert_equal(first, teacher(waveforms))
    assert not any(state.requires_grad for state in first)
    assert not teacher.logits(first[-1]).requires_grad
    after = teacher.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())

    nn.Module.train(teacher.model)  # the dropout that the guard keeps out
    assert not torch.equal(teacher(waveforms)[-1], teacher(waveforms)[-1])


# ---- logits ------------------------------------------------------------------------------------


def logits_by_torchaudio(hubert, waveforms):
    """(B, T, K) through HuBERTPretrainModel.forward with nothing masked.

    Its output has the label's logit in column 0 and -inf in the label's own column.
    """
    hubert.mask_generator.forward = lambda x, _: (x, torch.zeros(x.shape[:2], dtype=torch.bool))
    frames = common.frame_count(waveforms.shape[1])
    labels = torch.randint(10, (len(waveforms), frames), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, unmasked, _ = hubert.eval()(waveforms, labels)
    logits = unmasked[:, 1:].clone()
    assert torch.isinf(logits).sum() == len(logits)
    logits[torch.arange(len(logits)), labels.flatten()] = unmasked[:, 0]
    return logits.view(len(waveforms), frames, -1)


@pytest.mark.parametrize("config", [encoder_config(), large()], ids=["base", "large"])
def test_logits_equal_torchaudio_and_a_cosine_by_hand(config, waveforms):
    hubert = make_hubert(config)
    generator, teacher = hubert.logit_generator, with_head(hubert)
    hidden = teacher(waveforms)
    logits = teacher.logits(hidden[-1])
    assert logits.shape == (2, 37, 10)
    assert (logits - logits_by_torchaudio(hubert, waveforms)).abs().max() < 1e-4

    with torch.no_grad():
        last = hubert.wav2vec2(waveforms)[0].double()  # final LayerNorm included where there is one
    weight, bias = (p.detach().double() for p in generator.final_proj.parameters())
    for t in (0, 17, 36):
        projected = (weight @ last[1, t] + bias).tolist()
        for k in (0, 9):
            embedding = generator.label_embeddings[k].tolist()
            dot = sum(a * b for a, b in zip(projected, embedding))
            norms = math.sqrt(sum(a * a for a in projected)) * math.sqrt(
                sum(b * b for b in embedding)
            )
            assert logits[1, t, k].item() == pytest.approx(dot / norms / 0.1, abs=1e-4)


def test_logits_without_a_head_are_an_input_error(waveforms):
    teacher = bare(make_model("base"))
    with pytest.raises(InputError, match="no cluster head"):
        teacher.logits(teacher(waveforms)[-1])


# ---- files -------------------------------------------------------------------------------------


def fairseq_state(hubert):
    """The weights of a torchaudio HuBERT under the names that fairseq gives them."""
    rules = [
        (r"^wav2vec2\.", ""),
        (r"^mask_generator\.mask_embedding$", "mask_emb"),
        (r"^logit_generator\.final_proj\.", "final_proj."),
        (r"^encoder\.feature_projection\.projection\.", "post_extract_proj."),
        (r"^encoder\.feature_projection\.layer_norm\.", "layer_norm."),
        (r"(conv_layers\.\d+)\.conv\.", r"\1.0."),
        (r"(conv_layers\.\d+)\.layer_norm\.", r"\1.2.1." if deep_norm(hubert) else r"\1.2."),
        (r"^encoder\.transformer\.pos_conv_embed\.conv\.", "encoder.pos_conv.0."),
        (r"parametrizations\.weight\.original0$", "weight_g"),
        (r"parametrizations\.weight\.original1$", "weight_v"),
        (r"^encoder\.transformer\.", "encoder."),
        (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
        (r"(layers\.\d+)\.attention\.", r"\1.self_attn."),
        (r"feed_forward\.intermediate_dense\.", "fc1."),
        (r"feed_forward\.output_dense\.", "fc2."),
    ]
    state = {}
    for key, value in hubert.state_dict().items():
        if key == "logit_generator.label_embeddings":
            special = torch.full((4, value.shape[1]), 7.0)
            state["label_embs_concat"] = torch.cat([special, value])
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        state[key] = value
    return state


def deep_norm(hubert):
    return hubert.wav2vec2.feature_extractor.conv_layers[1].layer_norm is not None


class Choice(enum.Enum):
    STATIC = "static"


class HubertConfig:
    """What an omegaconf object is for us: a class that torch's safe loader refuses."""

    def __init__(self):
        self.label_rate, self.mask = 50, Choice.STATIC
        self.nested = collections.defaultdict(list, a=[np.float64(1.0)])

    def __eq__(self, other):
        raise AssertionError("must not be called")

    __hash__ = object.__hash__


def fairseq_checkpoint(hubert):
    return {
        "args": argparse.Namespace(arch="hubert", layers=3),
        "cfg": HubertConfig(),
        "model": fairseq_state(hubert),
        "optimizer_history": [{"name": "HubertCriterion", "step": np.int64(3)}, np.arange(2)],
        "extra_state": {"train_iterator": {"epoch": 1}, "when": collections.Counter("aab")},
        "last_optimizer_state": None,
    }


def s3prl_checkpoint(hubert):
    return {
        "task_cfg": {"label_rate": 50, "normalize": deep_norm(hubert)},
        "model_cfg": {"extractor_mode": "default", "layers": 3},
        "model_weight": fairseq_state(hubert),
        "dictionaries_symbols": [["<s>", "<pad>", "</s>", "<unk>", *map(str, range(10))]],
    }


def assert_loaded(teacher):
    """All parameters are there, in float32, and can be trained by who wants to."""
    for value in (*teacher.parameters(), *teacher.buffers()):
        assert value.device.type == "cpu" and value.dtype == torch.float32 and value.is_leaf
        assert not value.requires_grad
    assert all(isinstance(parameter, nn.Parameter) for parameter in teacher.parameters())


def prefixed(prefix, state):
    """Beside a weight of a fine-tuned model, which has another prefix."""
    head = {"w2v_encoder.proj.weight": torch.ones(3, 128)}
    return {prefix + name: value for name, value in state.items()} | head


class Node:
    """A value in an omegaconf object, and the object itself."""

    def __init__(self, value):
        self._parent, self._val, self._content = self, value, value


FORMS = {  # of a HuBERT with a head: model, config -> checkpoint
    "own": lambda h, config: {"config": pretrain_config(config), "state_dict": h.state_dict()},
    "torchaudio": lambda h, _: h.state_dict(),
    "fairseq": lambda h, _: fairseq_checkpoint(h),
    "s3prl": lambda h, _: s3prl_checkpoint(h),
    "prefix of data parallel": lambda h, _: {"model": prefixed("module.", fairseq_state(h))},
    "prefix of fine-tuning": lambda h, _: {
        "args": None,
        "model": prefixed("w2v_encoder.w2v_model.", fairseq_state(h)),
    },
    "prefix of lightning": lambda h, _: {"state_dict": prefixed("net.teacher.", h.state_dict())},
    "other normalisation": lambda h, _: {
        "cfg": {"task": {"normalize": not deep_norm(h)}},
        "model": fairseq_state(h),
    },
    # four heads of 32, where published models have 64: nothing in the weights says so
    "heads in a namespace": lambda h, _: {
        "args": argparse.Namespace(encoder_attention_heads=4),
        "model": fairseq_state(h),
    },
    "heads in a dict": lambda h, _: {
        "cfg": {"model": {"encoder_attention_heads": 4}},
        "model": fairseq_state(h),
    },
    "heads in omegaconf": lambda h, _: {
        "cfg": Node({"encoder_attention_heads": Node(4)}),
        "model": fairseq_state(h),
    },
}


@pytest.mark.parametrize("kind", ["base", "large"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_a_head_gives_weights_states_and_logits_of_the_original(
    form, kind, tmp_path, waveforms
):
    """The checkpoints of the larger kind are in torch's legacy format, without a zip."""
    shape = WIDE | (dict(encoder_num_heads=4) if "heads" in form else {})
    config = encoder_config(**shape) if kind == "base" else large(**shape)
    hubert, path = make_hubert(config), tmp_path / "teacher.pt"
    checkpoint = FORMS[form](hubert, config)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=kind == "base")
    if form == "fairseq":
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
    random_state = torch.get_rng_state()
    teacher = load_teacher(str(path))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert teacher.num_layers == 3 and teacher.name == path.name
    assert_loaded(teacher)

    original = with_head(hubert)
    original.normalise = (kind == "large") != (form == "other normalisation")
    assert teacher.normalise == original.normalise
    weights, expected = teacher.weights(), original.weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    rebuilt = wav2vec2_model(**teacher.arguments)
    rebuilt.load_state_dict(teacher.model.state_dict())
    rates = [m.p for m in teacher.model.modules() if isinstance(m, nn.Dropout)]
    assert set(rates) == ({0.1} if form == "own" else {0.0}) and str(rebuilt) == str(teacher.model)
    hidden, states = teacher(waveforms), original(waveforms)
    assert_equal(hidden, states)
    assert torch.equal(teacher.logits(hidden[-1]), original.logits(states[-1]))


@pytest.mark.parametrize("form", ["bare", "state_dict", "model", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_state_dict_loads_without_a_head(kind, form, tmp_path, waveforms):
    model = make_model(kind, **WIDE)
    path, state = tmp_path / "model.pt", model.state_dict()
    wrapped = {"bare": state, "prefix": {"state_dict": prefixed("model.", state)}}
    torch.save(wrapped.get(form, {form: state}), path)
    teacher = load_teacher(str(path))
    assert_loaded(teacher)
    assert_equal(teacher(waveforms), bare(model, normalise=kind == "large")(waveforms))
    assert teacher.final_proj is None and bool(teacher.position_buckets) == (kind == "wavlm")


def test_half_precision_parameters_and_views_become_weights_of_their_own(tmp_path):
    """Two names of one tensor, rows of a larger one, a transposed one: each is a copy."""
    state = make_model("base", **WIDE).state_dict()
    state = {name: nn.Parameter(value.half()) for name, value in state.items()}
    layer = "encoder.transformer.layers.0.attention."
    state[layer + "k_proj.weight"] = state[layer + "q_proj.weight"]
    both = torch.randn(256, 128)
    state[layer + "v_proj.weight"], state[layer + "out_proj.weight"] = both[:128], both[128:].T
    torch.save(state, tmp_path / "half.pt")
    teacher = load_teacher(str(tmp_path / "half.pt"))
    assert_loaded(teacher)
    found = dict(teacher.model.named_parameters())
    assert len({p.untyped_storage().data_ptr() for p in found.values()}) == len(found)
    assert all(p.is_contiguous() for p in found.values())
    assert all(torch.equal(value, state[name].float()) for name, value in found.items())


@pytest.mark.parametrize("name", list(common.BUNDLES))
def test_the_shape_of_every_published_model_is_read_off_its_weights(name):
    """Number of heads too, which no weight tells: a wrong one loads, and gives nonsense."""
    bundle = common.BUNDLES[name]
    params = {**bundle._params, "encoder_num_layers": 2}
    build = wavlm_model if bundle._model_type == "WavLM" else wav2vec2_model
    with torch.device("meta"):
        state = build(**params).state_dict()
    inferred = common.infer_arguments(state)
    assert set(inferred) == set(params)
    for key, value in params.items():
        if key == "extractor_conv_layer_config" and value is None:
            value = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
        if "drop" not in key:
            assert inferred[key] == value, key
    assert (inferred["extractor_mode"] == "layer_norm") == bundle._normalize_waveform


def test_the_shape_that_a_student_needs_is_read_off_the_teacher():
    config = large(encoder_pos_conv_kernel=6, encoder_pos_conv_groups=4)
    teacher = bare(shake(wav2vec2_model(**config, aux_num_out=None)))
    sizes = dict(conv_channels=8, width=16, attention_heads=2, feed_forward=32)
    assert teacher.shape == sizes | dict(position_kernel=6, position_groups=4)
    assert teacher.pre_norm and not bare(make_model("base")).pre_norm
    wavlm = bare(make_model("wavlm"))
    assert wavlm.shape["attention_heads"] == 2 and not wavlm.pre_norm and wavlm.position_buckets
    assert (wavlm.position_buckets, wavlm.max_distance) == (32, 800)
    assert (teacher.position_buckets, teacher.max_distance) == (0, 0)


def test_released_weights_in_torchaudio_names_lose_fairseqs_special_rows_too(tmp_path):
    """torchaudio's own converter keeps all 504 rows, and cluster k is row k + 4."""
    config = pretrain_config(encoder_config(**WIDE), num_classes=504)
    hubert = torchaudio.models.hubert_pretrain_model(**config)
    torch.save(hubert.state_dict(), tmp_path / "converted.pt")
    embeddings = load_teacher(str(tmp_path / "converted.pt")).label_embeddings
    assert torch.equal(embeddings, hubert.logit_generator.label_embeddings[4:])


# ---- broken and hostile files ------------------------------------------------------------------


def one_layer(**changes):
    return pretrain_config(encoder_config(encoder_num_layers=1) | changes)


def own_form(**changes):
    weights = make_hubert(encoder_config(encoder_num_layers=1)).state_dict()
    return {"config": one_layer(), "state_dict": weights} | changes


def without(state, word):
    return {key: value for key, value in state.items() if word not in key}


def without_weight(word):
    return own_form(state_dict=without(own_form()["state_dict"], word))


def changed(weight):
    """A model whose first convolution is ``weight``."""
    name = "feature_extractor.conv_layers.0.conv.weight"
    return saved(make_model("base", **WIDE).state_dict() | {name: weight})


BROKEN = {
    "text": lambda: b"not a checkpoint at all\n" * 10,
    "empty file": lambda: b"",
    "truncated zip": lambda: saved({"a": torch.zeros(10_000)})[:20_000],
    "truncated pickle": lambda: pickle.dumps({"a": list(range(1_000))})[:500],
    "a list": lambda: saved([torch.zeros(3)]),
    "a tensor": lambda: saved(torch.zeros(3)),
    "an object": lambda: saved(HubertConfig()),
    "an empty dictionary": lambda: saved({}),
    "other keys": lambda: saved({"weight": torch.zeros(3), "bias": torch.zeros(3)}),
    "numbers as keys": lambda: saved({1: torch.zeros(3)}),
    "a list of weights": lambda: saved({"state_dict": [torch.zeros(3)]}),
    "an object for weights": lambda: saved({"model": HubertConfig()}),
    "a missing layer norm": lambda: saved(without_weight("layers.0.layer_norm")),
    "no head bias": lambda: saved(without_weight("final_proj.bias")),
    "another width": lambda: saved(own_form(config=one_layer(encoder_ff_interm_features=33))),
    "a billion layers": lambda: saved(own_form(config=one_layer(encoder_num_layers=10**9))),
    "a config without a field": lambda: saved(own_form(config=without(one_layer(), "mode"))),
    "a config that is a list": lambda: saved(own_form(config=[1, 2])),
    "too narrow to tell the heads": lambda: saved(make_model("base").state_dict()),
    "a flat convolution": lambda: changed(torch.zeros(12)),
    "a small view, huge": lambda: changed(torch.zeros(1).expand(10**6, 10**6, 10)),
    "no values at all": lambda: changed(torch.zeros(12, 1, 10, device="meta")),
    "a sparse weight": lambda: changed(torch.ones(12, 1, 10).to_sparse()),
    "an unknown fairseq key": lambda: saved(
        fairseq_state(make_hubert(encoder_config(**WIDE))) | {"decoder.bias": torch.ones(1)}
    ),
    "a student": lambda: saved({"method": "distilhubert", "config": {}, "student": {}}),
}


def saved(checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_sentence(what, tmp_path):
    path = tmp_path / "broken.pt"
    path.write_bytes(BROKEN[what]())
    with pytest.raises(InputError, match="broken.pt") as caught:
        load_teacher(str(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    words = {
        "a student": "is a student of this project",
        "other keys": "it has no feature_extractor.conv_layers.0",
        "a small view, huge": "asks for more values than it holds",
        "no values at all": "asks for more values than it holds",
        "a billion layers": "another number of Transformer layers",
    }
    assert words.get(what, "broken.pt") in message


def test_an_unknown_name_and_a_folder_are_input_errors(tmp_path):
    words = "unknown teacher hubert_bose.*toy.*hubert_base.*wavlm_large"
    with pytest.raises(InputError, match=words):
        load_teacher("hubert_bose")
    with pytest.raises(InputError, match="cannot load .* through transformers"):
        load_teacher(str(tmp_path))
    with pytest.raises(InputError, match="give the path of a checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


# ---- teachers that people have -----------------------------------------------------------------


def write_huggingface(folder, kind, form="safetensors"):
    """A folder as transformers writes it, in a published form; returns the model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    settings = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7)
    settings |= dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    if kind == "large":
        settings |= dict(conv_bias=True, feat_extract_norm="layer", do_stable_layer_norm=True)
    if kind == "wavlm":
        config = transformers.WavLMConfig(**settings, num_buckets=32, max_bucket_distance=800)
        model = transformers.WavLMModel(config)
    else:
        model = transformers.HubertModel(transformers.HubertConfig(**settings))
    shake(model).save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "5GB")
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=kind == "large" or form == "bin")
    extractor.save_pretrained(folder)
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model, extractor


@pytest.mark.parametrize(
    ("kind", "form"),
    [("base", "safetensors"), ("base", "bin"), ("wavlm", "sharded"), ("large", "safetensors")],
)
def test_a_hugging_face_folder_gives_the_states_and_weights_of_transformers(
    kind, form, tmp_path, waveforms
):
    model, extractor = write_huggingface(tmp_path, kind, form)
    assert form != "sharded" or len([*tmp_path.glob("*.safetensors")]) > 1
    teacher = load_teacher(tmp_path)
    assert_loaded(teacher)
    waveforms = 10 * waveforms  # loud: the two normalisations add 1e-5 and 1e-7 to the variance
    waves = extractor([*waveforms.numpy()], sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        expected = model(waves, output_hidden_states=True).hidden_states
    hidden = teacher(waveforms)
    if form != "sharded":  # a file stands for its folder
        name = "pytorch_model.bin" if form == "bin" else "model.safetensors"
        assert_equal(hidden, load_teacher(tmp_path / name)(waveforms))
    if kind == "large":  # the last one there has passed the final LayerNorm
        hidden, expected = hidden[:-1], expected[:-1]
    assert_close(hidden, expected, 1e-4)

    weights, state = teacher.weights(), model.state_dict()
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    state.pop("masked_spec_embed", None)
    if kind == "wavlm":  # there the table stands in the first layer
        state["rel_attn_embed.weight"] = state.pop("layers.0.attention.rel_attn_embed.weight")
    assert weights.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in weights.items())
    assert not any(value.requires_grad for value in weights.values())


def test_a_name_on_the_hub_is_read_from_its_cache(tmp_path, waveforms, monkeypatch):
    """Without a network: a cache folder as the hub's client leaves it."""
    hub = pytest.importorskip("huggingface_hub", reason="transformers is not installed")
    repository = tmp_path / "models--someone--mini"
    snapshot = repository / "snapshots" / ("0" * 40)
    model, _ = write_huggingface(snapshot, "base")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with torch.no_grad():
        expected = model(waveforms, output_hidden_states=True).hidden_states
    assert_close(load_teacher("someone/mini")(waveforms), expected, 1e-4)
    with pytest.raises(InputError, match="cannot load someone/other through transformers"):
        load_teacher("someone/other")


def test_a_hugging_face_folder_of_another_kind_is_one_sentence(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="a bert is no hubert, wavlm or wav2vec2"):
        load_teacher(tmp_path / "bert")
    model, _ = write_huggingface(tmp_path / "cut", "base", "bin")
    state = model.state_dict()
    del state["encoder.layers.1.layer_norm.weight"]
    torch.save(state, tmp_path / "cut" / "pytorch_model.bin")
    with pytest.raises(InputError, match="it has no encoder.layers.1.layer_norm.weight"):
        load_teacher(tmp_path / "cut")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        load_teacher(tmp_path / "bert")


def test_wavlm_as_microsoft_publishes_it_is_its_twin_in_torchaudios_names(tmp_path, waveforms):
    model = make_model("wavlm", **WIDE)
    names = {"rel_attn_embed": "relative_attention_bias", "gru_rel_pos_linear": "grep_linear"}
    names |= {"gru_rel_pos_const": "grep_a"}
    state = {}
    for name, value in fairseq_state(
        SimpleNamespace(state_dict=model.state_dict, wav2vec2=model)
    ).items():
        for theirs, microsoft in names.items():
            name = name.replace(theirs, microsoft)
        name = name.replace("self_attn.attention.out_proj", "self_attn.out_proj")
        for part, piece in zip("qkv", value.chunk(3) if "in_proj_" in name else (), strict=False):
            state[name.replace("attention.in_proj_", f"{part}_proj.")] = piece
        if "in_proj_" not in name:
            state[name] = value
    assert "encoder.layers.0.self_attn.relative_attention_bias.weight" in state
    torch.save({"cfg": {"normalize": False}, "model": state}, tmp_path / "WavLM-Base.pt")
    teacher = load_teacher(str(tmp_path / "WavLM-Base.pt"))
    assert teacher.position_buckets == 32
    assert_close(teacher(waveforms), bare(model)(waveforms), 1e-9)


def test_two_names_for_one_weight_and_several_label_sets_are_refused(tmp_path, waveforms):
    """As torch.nn.utils.prune leaves them; label sets only where logits are needed."""
    state, path = fairseq_state(make_hubert(encoder_config(**WIDE))), str(tmp_path / "teacher.pt")
    names = ("final_proj.weight", "final_proj.bias", "label_embs_concat")
    several = {name: torch.cat([state[name], state[name]]) for name in names}
    torch.save({"model": state | several}, path)
    teacher = load_teacher(path)
    with pytest.raises(InputError, match="several sets of clusters"):
        teacher.logits(teacher(waveforms)[-1])
    weight = state.pop("encoder.layers.0.fc1.weight")
    two = {f"encoder.layers.0.fc1.weight_{end}": weight for end in ("orig", "mask")}
    torch.save({"model": state | two}, path)
    with pytest.raises(InputError, match="weight_mask and another weight have the same place"):
        load_teacher(path)


def test_students_of_others_are_named(tmp_path):
    torch.save({"Distiller": {}, "Config": {}, "Step": 1}, tmp_path / "states-1.ckpt")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for name, words in (("states-1.ckpt", "by s3prl: give"), ("model.safetensors", "the folder")):
        with pytest.raises(InputError, match=words):
            common.load_student(tmp_path / name, "distilhubert", nn.Module)


class Hostile:
    """Pickles as the call ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(target):
    command = f"touch {target}"
    python = f"open({str(target)!r}, 'w').close()"
    inner = io.BytesIO()
    torch.save(Hostile(os.system, command), inner)
    return {
        "os.system": Hostile(os.system, command),
        "exec": Hostile(builtins.exec, python),
        "eval": Hostile(builtins.eval, python),
        "getattr": Hostile(getattr, Hostile(__import__, "os"), "system"),
        "open": Hostile(builtins.open, str(target), "w"),
        "makedirs": Hostile(os.makedirs, str(target)),
        # harmless by its name, but torch loads these bytes with the real pickle
        "nested": Hostile(torch.storage._load_from_bytes, inner.getvalue()),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", list(attacks("x")))
def test_a_hostile_checkpoint_runs_nothing(attack, zipped, tmp_path):
    """It is refused, or its tensors are there and nothing is where the call was."""
    target, path = tmp_path / "owned", tmp_path / "hostile.pt"
    weights = torch.arange(6.0).view(2, 3)
    checkpoint = {"cfg": attacks(target)[attack], "model": {"weights": weights}}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    if attack in ("os.system", "makedirs"):  # torch blocks the modules sys, os, posix and nt
        with pytest.raises(InputError, match="hostile.pt is not a readable"):
            load_checkpoint(path)
    else:
        loaded = load_checkpoint(path)
        assert loaded["cfg"] == {} and torch.equal(loaded["model"]["weights"], weights)
    with pytest.raises(InputError):
        load_teacher(str(path))
    assert not target.exists()


@pytest.mark.parametrize("attack", ["os.system", "nested"])
def test_a_bare_hostile_pickle_runs_nothing(attack, tmp_path):
    path = tmp_path / "hostile.pt"
    path.write_bytes(pickle.dumps(attacks(tmp_path / "owned")[attack], protocol=2))
    with pytest.raises(InputError):
        load_checkpoint(path)
    torch.save(attacks(tmp_path / "owned")[attack], path)
    with pytest.raises(InputError):
        load_teacher(str(path))
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(attacks(tmp_path / "owned")["os.system"]))  # the attack is real
    assert (tmp_path / "owned").exists()


def test_a_file_that_names_ever_more_classes_is_given_up(tmp_path):
    names = "".join(f"cmodule\nname{i}\n" for i in range(1_000))
    (tmp_path / "long.pt").write_bytes(b"\x80\x02" + names.encode() + b"}.")
    with pytest.raises(InputError, match="long.pt is not a readable"):
        load_checkpoint(tmp_path / "long.pt")


# ---- bundles -----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch cache, and no network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def shrink(bundle, config, hub, monkeypatch):
    """Give a bundle a tiny shape, and put weights for it where the download would be."""
    monkeypatch.setattr(bundle, "_params", config | {"aux_num_out": None})
    model = shake(wav2vec2_model(**config, aux_num_out=None))
    torch.save(model.state_dict(), hub / bundle._path)
    return model


def test_a_bundle_is_loaded_from_torchs_cache(hub, monkeypatch, waveforms):
    model = shrink(torchaudio.pipelines.HUBERT_BASE, encoder_config(), hub, monkeypatch)
    teacher = load_teacher("hubert_base")
    assert teacher.name == "hubert_base" and not teacher.normalise
    assert_loaded(teacher)
    assert_equal(teacher(waveforms), bare(model)(waveforms))
    rebuilt = wav2vec2_model(**teacher.arguments)  # with the published rates of dropout
    assert str(rebuilt) == str(teacher.model)


def test_a_normalising_bundle_normalises_each_utterance(hub, monkeypatch, waveforms):
    """torchaudio normalises the whole batch: there a loud neighbour changes a quiet utterance."""
    bundle = torchaudio.pipelines.HUBERT_LARGE
    shrink(bundle, large(), hub, monkeypatch)
    teacher, own = load_teacher("hubert_large"), bundle.get_model()
    waveforms = waveforms * torch.tensor([[1.0], [30.0]])
    together = teacher(waveforms)
    for i in range(2):
        alone = own_states(own, waveforms[i : i + 1])
        assert_close([state[i : i + 1] for state in together[1:]], alone, 1e-4)
    assert not torch.allclose(together[-1], own_states(own, waveforms)[-1], atol=1e-2)


@pytest.mark.parametrize("attack", ["os.system", "open"])
def test_a_hostile_download_runs_nothing(attack, hub, tmp_path):
    path = hub / torchaudio.pipelines.HUBERT_BASE._path
    torch.save({"weights": attacks(tmp_path / "owned")[attack]}, path)
    with pytest.raises(InputError, match="delete that file"):
        load_teacher("hubert_base")
    assert not (tmp_path / "owned").exists()


def test_a_broken_download_is_named(hub, monkeypatch):
    bundle = torchaudio.pipelines.HUBERT_BASE
    monkeypatch.setattr(bundle, "_params", encoder_config() | {"aux_num_out": None})
    other = make_model("base", encoder_num_layers=2).state_dict()
    for content in (b"<html>404</html>", b"", saved(other)[:5_000], saved(other)):
        (hub / bundle._path).write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(hub / bundle._path))) as caught:
            load_teacher("hubert_base")
        assert "\n" not in str(caught.value)


def test_no_network_and_no_file_says_where_to_put_it(hub, monkeypatch):
    bundle = torchaudio.pipelines.WAVLM_BASE_PLUS
    bias = dict(encoder_num_buckets=32, encoder_max_distance=800)
    monkeypatch.setattr(bundle, "_params", encoder_config() | bias | {"aux_num_out": None})
    with pytest.raises(InputError, match="Name or service not known.*no network") as caught:
        load_teacher("wavlm_base_plus")
    assert str(hub / bundle._path) in str(caught.value)
    assert os.listdir(hub) == []
