"""Teachers: layer numbers, padding, eval for ever, cluster logits, every kind of checkpoint."""

import argparse
import builtins
import collections
import enum
import io
import math
import os
import pickle
import re
import urllib.error

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


def make_encoder(config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return shake(wav2vec2_model(**config, aux_num_out=None), seed)


def make_wavlm(seed=0, **config):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bias = dict(encoder_num_buckets=32, encoder_max_distance=800)
        return shake(wavlm_model(**config, **bias, aux_num_out=None), seed)


def bare(model, normalise=False):
    return Teacher(model, "test", normalise)


def assert_close(states, references, tolerance=2e-5):
    assert len(states) == len(references)
    for state, reference in zip(states, references):
        assert state.shape == reference.shape
        assert (state - reference).abs().max() < tolerance


@torch.no_grad()
def own_states(model, waveforms):
    """Layers 1..L by torchaudio itself."""
    return model.extract_features(waveforms)[0]


# ---- hidden states -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [encoder_config(), large()], ids=["base", "large"])
def test_layers_1_to_L_equal_torchaudio_with_and_without_lengths(config, padded_batch):
    waveforms, lengths = padded_batch
    model = make_encoder(config)
    teacher = bare(model)
    hidden, frames = teacher(waveforms)
    assert frames is None and len(hidden) == 13 == teacher.num_layers + 1
    assert_close(hidden[1:], own_states(model, waveforms))

    hidden, frames = teacher(waveforms, lengths)
    with torch.no_grad():
        references, reference_frames = model.extract_features(waveforms, lengths)
    assert frames.tolist() == reference_frames.tolist() == [37, 21]
    for state, reference in zip(hidden[1:], references, strict=True):
        for i, count in enumerate(frames):
            assert torch.allclose(state[i, :count], reference[i, :count], atol=2e-5)


@pytest.mark.parametrize("config", [encoder_config(), large()], ids=["base", "large"])
def test_state_0_is_what_the_first_layer_is_given(config, padded_batch):
    """Projection plus positional convolution; with its LayerNorm in post-norm models alone."""
    waveforms, lengths = padded_batch
    teacher = bare(make_encoder(config))
    given = []
    first = teacher.model.encoder.transformer.layers[0]
    hook = first.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].clone()))
    hidden, _ = teacher(waveforms)
    padded, _ = teacher(waveforms, lengths)
    hook.remove()
    assert torch.equal(hidden[0], given[0]) and torch.equal(padded[0], given[1])

    encoder = teacher.model.encoder
    with torch.no_grad():
        x = encoder.feature_projection(teacher.model.feature_extractor(waveforms, None)[0])
        x = x + encoder.transformer.pos_conv_embed(x)
        if not config["encoder_layer_norm_first"]:
            x = encoder.transformer.layer_norm(x)
    assert_close([hidden[0]], [x])


@pytest.mark.parametrize("last", [0, 1, 5, 12, None])
def test_layers_behind_the_last_needed_one_are_not_computed(last, padded_batch):
    teacher = bare(make_encoder(encoder_config()))
    ran = []
    for i, layer in enumerate(teacher.model.encoder.transformer.layers, start=1):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    everything, _ = teacher(padded_batch[0])
    ran.clear()
    hidden, _ = teacher(padded_batch[0], last_layer=last)
    count = 12 if last is None else last
    assert ran == list(range(1, count + 1))
    assert len(hidden) == count + 1
    assert all(torch.equal(a, b) for a, b in zip(hidden, everything))


@pytest.mark.parametrize("kind", ["hubert", "hubert normalised", "wavlm", "wavlm normalised"])
def test_a_padded_utterance_equals_itself_alone(kind, padded_batch):
    """With LayerNorm in all convolutions no padding leaks; with GroupNorm (Base) it does."""
    waveforms, lengths = padded_batch
    model = make_encoder(large()) if "hubert" in kind else make_wavlm(**large())
    teacher = bare(model, normalise="normalised" in kind)
    waveforms = waveforms.clone()
    waveforms[1, 7_000:] = 9.0  # whatever stands in the padding
    hidden, frames = teacher(waveforms, lengths)
    for i, samples in enumerate(lengths):
        alone, _ = teacher(waveforms[i : i + 1, :samples])
        assert alone[0].shape[1] == frames[i]
        assert_close([state[i : i + 1, : frames[i]] for state in hidden], alone)


def test_wavlm_layers_equal_torchaudio(padded_batch):
    for config in (encoder_config(), large()):
        model = make_wavlm(**config)
        hidden, _ = bare(model)(padded_batch[0])
        assert_close(hidden[1:], own_states(model, padded_batch[0]))


def test_normalisation_is_by_utterance_over_its_valid_samples(padded_batch):
    waveforms, lengths = padded_batch
    normal = common.normalise_waveforms(waveforms, lengths)
    assert torch.all(normal[1, 7_000:] == 0)
    for i, samples in enumerate(lengths.tolist()):
        values = waveforms[i, :samples].double().numpy()
        expected = (values - values.mean()) / math.sqrt(values.var() + 1e-5)
        assert np.abs(normal[i, :samples].numpy() - expected).max() < 1e-5
    both = torch.stack([waveforms[0], 5 * waveforms[0] - 0.3])
    first, second = common.normalise_waveforms(both)
    assert torch.allclose(first, second, atol=1e-3)


# ---- frozen ------------------------------------------------------------------------------------


def test_the_teacher_stays_in_eval_and_frozen_whatever_is_called(padded_batch):
    waveforms, lengths = padded_batch
    hubert = make_hubert(encoder_config())
    hubert.train()
    generator = hubert.logit_generator
    teacher = Teacher(
        hubert.wav2vec2, "test", False, generator.final_proj, generator.label_embeddings.detach()
    )
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    parent = nn.ModuleDict({"teacher": teacher, "student": nn.Linear(2, 2)})
    for call in (teacher.train, parent.train, lambda: parent.train(True), teacher.eval):
        call()
        assert not any(module.training for module in teacher.modules())
        assert parent["student"].training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())

    waveforms.requires_grad_(True)
    first, _ = teacher(waveforms, lengths)
    second, _ = teacher(waveforms, lengths)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(state.requires_grad for state in first)
    assert not teacher.logits(first[-1]).requires_grad
    after = teacher.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())

    nn.Module.train(teacher.model)  # the dropout that the guard keeps out
    assert not torch.equal(teacher(waveforms)[0][-1], teacher(waveforms)[0][-1])


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
def test_logits_equal_torchaudio_and_a_cosine_by_hand(config, padded_batch):
    waveforms, _ = padded_batch
    hubert = make_hubert(config)
    generator = hubert.logit_generator
    teacher = Teacher(
        hubert.wav2vec2, "test", False, generator.final_proj, generator.label_embeddings.detach()
    )
    hidden, _ = teacher(waveforms)
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


def test_logits_without_a_head_are_an_input_error(padded_batch):
    teacher = bare(make_encoder(encoder_config()))
    with pytest.raises(InputError, match="no cluster head"):
        teacher.logits(teacher(padded_batch[0])[0][-1])


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
        "optimizer_history": [{"criterion_name": "HubertCriterion", "step": np.int64(3)}],
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


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ["base", "large"])
@pytest.mark.parametrize("form", ["own", "torchaudio", "fairseq", "s3prl"])
def test_every_form_with_a_head_gives_the_states_and_logits_of_the_original(
    form, kind, zipped, tmp_path, padded_batch
):
    config = encoder_config(**WIDE) if kind == "base" else large(**WIDE)
    hubert = make_hubert(config)
    checkpoint = {
        "own": lambda: {"config": pretrain_config(config), "state_dict": hubert.state_dict()},
        "torchaudio": hubert.state_dict,
        "fairseq": lambda: fairseq_checkpoint(hubert),
        "s3prl": lambda: s3prl_checkpoint(hubert),
    }[form]()
    path = tmp_path / f"{form}.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    if form == "fairseq":
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
    teacher = load_teacher(str(path))

    assert teacher.num_layers == 3 and teacher.name == path.name
    waveforms = padded_batch[0]
    heard = waveforms
    if kind == "large":  # trained on normalised audio
        heard = torch.stack(
            [(wave - wave.mean()) / (wave.var(correction=0) + 1e-5).sqrt() for wave in waveforms]
        )
    hidden, _ = teacher(waveforms)
    assert_close(hidden[1:], own_states(hubert.wav2vec2, heard), 1e-4)
    assert (teacher.logits(hidden[-1]) - logits_by_torchaudio(hubert, heard)).abs().max() < 1e-3


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"])
@pytest.mark.parametrize("kind", ["base", "large", "wavlm"])
def test_an_encoder_state_dict_loads_without_a_head(kind, wrapped, tmp_path, padded_batch):
    if kind == "wavlm":
        model = make_wavlm(**encoder_config(**WIDE))
    else:
        model = make_encoder((large if kind == "large" else encoder_config)(**WIDE))
    path, state = tmp_path / "model.pt", model.state_dict()
    torch.save({wrapped: state} if wrapped else state, path)
    teacher = load_teacher(str(path))
    wave = padded_batch[0][:1]
    heard = torch.nn.functional.layer_norm(wave, wave.shape) if kind == "large" else wave
    hidden, _ = teacher(wave)
    assert_close(hidden[1:], own_states(model, heard), 1e-4)
    assert teacher.final_proj is None


def test_the_tiny_teacher_of_these_tests_loads(tiny_teacher, padded_batch):
    teacher = load_teacher(str(tiny_teacher))
    hidden, _ = teacher(padded_batch[0])
    assert len(hidden) == 13 and teacher.logits(hidden[-1]).shape == (2, 37, 10)


@pytest.mark.parametrize("name", list(common.BUNDLES))
def test_the_shape_of_every_published_model_is_read_off_its_weights(name):
    """Number of heads too, which no weight tells: a wrong one loads, and gives nonsense."""
    bundle = common.BUNDLES[name]
    params = {**bundle._params, "encoder_num_layers": 2}
    build = wavlm_model if bundle._model_type == "WavLM" else wav2vec2_model
    with torch.device("meta"):
        state = build(**params).state_dict()
    inferred = common._infer_config(state)
    assert set(inferred) == set(params)
    for key, value in params.items():
        if key == "extractor_conv_layer_config" and value is None:
            value = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
        if "drop" not in key:
            assert inferred[key] == value, key
    assert (inferred["extractor_mode"] == "layer_norm") == bundle._normalize_waveform


def test_the_shape_that_a_student_needs_is_read_off_the_teacher():
    config = large(encoder_pos_conv_kernel=6, encoder_pos_conv_groups=4)
    teacher = bare(make_encoder(config))
    assert teacher.shape == {
        "conv_channels": 8,
        "width": 16,
        "attention_heads": 2,
        "feed_forward": 32,
        "position_kernel": 6,
        "position_groups": 4,
    }
    assert teacher.pre_norm and not bare(make_encoder(encoder_config())).pre_norm
    wavlm = bare(make_wavlm(**encoder_config()))
    assert wavlm.shape["attention_heads"] == 2 and not wavlm.pre_norm


# ---- broken and hostile files ------------------------------------------------------------------


def own_form(**changes):
    config = encoder_config(encoder_num_layers=1)
    return {
        "config": pretrain_config(config),
        "state_dict": make_hubert(config).state_dict(),
    } | changes


def without(state, word):
    return {key: value for key, value in state.items() if word not in key}


def without_weight(word):
    return own_form(state_dict=without(own_form()["state_dict"], word))


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
    "another width": lambda: saved(
        own_form(config=pretrain_config(encoder_config(encoder_ff_interm_features=33)))
    ),
    "a config without a field": lambda: saved(
        own_form(config=without(own_form()["config"], "mode"))
    ),
    "a config that is a list": lambda: saved(own_form(config=[1, 2])),
    "too narrow to tell the heads": lambda: saved(make_encoder(encoder_config()).state_dict()),
    "a flat convolution": lambda: saved(
        make_encoder(encoder_config(**WIDE)).state_dict()
        | {"feature_extractor.conv_layers.0.conv.weight": torch.zeros(12)}
    ),
    "an unknown fairseq key": lambda: saved(
        {
            "model": fairseq_state(make_hubert(encoder_config(**WIDE)))
            | {"decoder.bias": torch.ones(1)}
        }
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
    if what == "a student":
        assert "student" in message and "distilhubert" in message


def test_a_student_file_is_told_from_others(tmp_path):
    torch.save({"method": "pad", "student": {}}, tmp_path / "student.pt")
    torch.save(own_form(), tmp_path / "teacher.pt")
    assert common.load_student_file(tmp_path / "student.pt", "pad")["method"] == "pad"
    with pytest.raises(InputError, match="written by pad.py, not distilhubert.py"):
        common.load_student_file(tmp_path / "student.pt", "distilhubert")
    with pytest.raises(InputError, match="no student"):
        common.load_student_file(tmp_path / "teacher.pt", "pad")


def test_an_unknown_name_and_a_folder_are_input_errors(tmp_path):
    with pytest.raises(
        InputError, match="unknown teacher hubert_bose.*toy.*hubert_base.*wavlm_large"
    ):
        load_teacher("hubert_bose")
    with pytest.raises(InputError, match="checkpoint file"):
        load_teacher(str(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")


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
def test_a_hostile_checkpoint_runs_nothing_and_still_gives_its_tensors(attack, zipped, tmp_path):
    target, path = tmp_path / "owned", tmp_path / "hostile.pt"
    weights = torch.arange(6.0).view(2, 3)
    checkpoint = {"cfg": attacks(target)[attack], "model": {"weights": weights}}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_checkpoint(path)["model"]["weights"], weights)
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
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(attacks(tmp_path / "owned")["os.system"]))  # the attack is real
    assert (tmp_path / "owned").exists()


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
    model = make_encoder(config)
    torch.save(model.state_dict(), hub / bundle._path)
    return model


def test_a_bundle_is_loaded_from_torchs_cache(hub, monkeypatch, padded_batch):
    model = shrink(torchaudio.pipelines.HUBERT_BASE, encoder_config(), hub, monkeypatch)
    teacher = load_teacher("hubert_base")
    assert teacher.name == "hubert_base" and not teacher.normalise
    assert_close(teacher(padded_batch[0])[0][1:], own_states(model, padded_batch[0]))


def test_a_normalising_bundle_normalises_each_utterance(hub, monkeypatch, padded_batch):
    """torchaudio normalises the whole batch: there a loud neighbour changes a quiet utterance."""
    bundle = torchaudio.pipelines.HUBERT_LARGE
    shrink(bundle, large(), hub, monkeypatch)
    teacher, own = load_teacher("hubert_large"), bundle.get_model()
    waveforms = padded_batch[0] * torch.tensor([[1.0], [30.0]])
    together, _ = teacher(waveforms)
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


def test_files_of_this_project_are_read_strictly(tmp_path):
    path = tmp_path / "student.pt"
    torch.save({"method": "pad", "config": argparse.Namespace(a=1)}, path)
    assert load_checkpoint(path)["method"] == "pad"
    with pytest.raises(InputError, match="not a readable checkpoint"):
        common.load_student_file(path, "pad")


def test_a_broken_download_is_named(hub, monkeypatch):
    bundle = torchaudio.pipelines.HUBERT_BASE
    monkeypatch.setattr(bundle, "_params", encoder_config() | {"aux_num_out": None})
    other = make_encoder(encoder_config(encoder_num_layers=2)).state_dict()
    for content in (b"<html>404</html>", b"", saved(other)[:5_000], saved(other)):
        (hub / bundle._path).write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(hub / bundle._path))) as caught:
            load_teacher("hubert_base")
        assert "\n" not in str(caught.value)


def test_no_network_and_no_file_says_where_to_put_it(hub, monkeypatch):
    bundle = torchaudio.pipelines.WAVLM_BASE_PLUS
    small = encoder_config() | dict(
        encoder_num_buckets=32, encoder_max_distance=800, aux_num_out=None
    )
    monkeypatch.setattr(bundle, "_params", small)
    with pytest.raises(InputError, match="Name or service not known.*no network") as caught:
        load_teacher("wavlm_base_plus")
    assert str(hub / bundle._path) in str(caught.value)
    assert os.listdir(hub) == []


def test_released_weights_in_torchaudio_names_lose_fairseqs_special_rows_too(tmp_path):
    """torchaudio's own converter keeps all 504 rows, and cluster k is row k + 4."""
    config = pretrain_config(encoder_config(**WIDE), num_classes=504)
    hubert = torchaudio.models.hubert_pretrain_model(**config)
    torch.save(hubert.state_dict(), tmp_path / "converted.pt")
    embeddings = load_teacher(str(tmp_path / "converted.pt")).label_embeddings
    assert torch.equal(embeddings, hubert.logit_generator.label_embeddings[4:])
