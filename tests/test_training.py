"""What is the same in all five methods: student, training, student.pt, evaluation.

A method gets these tests by its name in conftest.METHODS and its line in conftest.tiny_run, those
of the untrained student by its row in STUDENTS.
"""

import contextlib
import copy
import importlib
import inspect
import io
import json
import math
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import (
    METHODS,
    SAID,
    encoder_config,
    large,
    same,
    shake,
    tiny_run,
    wavlm_config,
    write_teacher,
)
from torch import nn
from torch.nn.functional import cosine_similarity

import common

WAVES = 0.3 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(5))
FROZEN = {"pad": "model.feature_extractor.", "skill": "feature_extractor.scale"}  # never learned


@pytest.fixture(scope="module", params=METHODS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def files(spoken, bert_folder, tmp_path_factory):
    """What the runs read: labelled, of each reader four files to train on, one of dev and test."""
    folder = tmp_path_factory.mktemp("files")
    lines = ["path\tsplit\ttext\tspeaker\tspeaker_split\tlabel_intent"]
    for reader, intent in (("17", "light"), ("23", "music")):
        for number, text in enumerate(SAID):
            path = spoken / "train" / reader / "5" / f"{reader}-5-{number:04d}.flac"
            split = ("train", "train", "train", "train", "dev", "test")[number]
            lines.append("\t".join((str(path), split, text, reader, split, intent)))
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    for rate in (0.0, 0.1):  # of dropout: PAD's student has its speech model's
        write_teacher(folder / f"{rate}.pt", encoder_config(rate, encoder_num_layers=4))
    kinds = {
        "large": large(dropout=0.0, encoder_num_layers=4),
        "pre-norm": encoder_config(encoder_layer_norm_first=True, encoder_num_layers=4),
        "layer norm": encoder_config(extractor_mode="layer_norm", encoder_num_layers=4),
        "biased": encoder_config(extractor_conv_bias=True, encoder_num_layers=4),
        "one layer": encoder_config(encoder_num_layers=1),
    }
    teachers = {kind: write_teacher(folder / f"{kind}.pt", kinds[kind]) for kind in kinds}
    wavlm = torchaudio.models.wavlm_model(**wavlm_config(encoder_num_layers=4))
    torch.save(shake(wavlm).state_dict(), folder / "wavlm.pt")
    teachers |= dict(teacher=folder / "0.0.pt", noisy=folder / "0.1.pt", wavlm=folder / "wavlm.pt")
    audio = dict.fromkeys(("audio", "spoken"), folder / "manifest.tsv")
    return teachers | audio | dict(bert=bert_folder)


def settings(name, files, out, **changes):
    """Of a run without dropout, with a teacher of four layers."""
    own = {
        "distilhubert": dict(target_layers=(1, 3)),
        "gendistiller": dict(target_layers=(2, 4)),
        "skill": dict(clusters=2),
    }.get(name, {})
    return tiny_run(name, files, out, **own | dict(batch_seconds=2.0) | changes)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def watched(method):
    """Of a training: teachers and optimizers, and of each update rates, clip, gradients, modes."""
    seen = SimpleNamespace(teachers=[], optimizers=[], rates=[], clips=set(), learned=set())
    seen.student_modes, seen.teacher_modes = Counter(), set()
    loader = "load_text_teacher" if method.__name__ == "pad" else "load_teacher"
    load, clip = getattr(common, loader), nn.utils.clip_grad_norm_

    def load_spy(*arguments):
        found = load(*arguments)
        teacher = found[0] if isinstance(found, tuple) else found
        seen.teachers.append((teacher, copy.deepcopy(teacher.state_dict())))
        return found

    class AdamW(torch.optim.AdamW):
        def __init__(self, *groups, **more):
            super().__init__(*groups, **more)
            seen.optimizers.append(self)

        def step(self, *arguments):
            seen.rates.append([group["lr"] for group in self.param_groups])
            used = [p for p in parameters_of(self) if p.grad is not None]
            seen.learned |= {id(p) for p in used if p.grad.any()}
            seen.teacher_modes |= {m.training for t, _ in seen.teachers for m in t.modules()}
            return super().step(*arguments)

    def clip_spy(parameters, norm):
        seen.clips.add(norm)
        return clip(parameters, norm)

    def look(module, _):
        if isinstance(module, method.Student):
            for mode in {m.training for m in module.modules()}:
                seen.student_modes[torch.is_grad_enabled(), mode] += 1

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    with hook, pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, loader, load_spy)
        patch.setattr(torch.optim, "AdamW", AdamW)
        patch.setattr(nn.utils, "clip_grad_norm_", clip_spy)
        yield seen


def run(name, settings):
    """A finished training, and all that was seen of it."""
    method = importlib.import_module(name)
    config = method.Config(**settings)
    with watched(method) as seen:
        *trained, history = method.train(config)
    student, *heads = trained
    run = dict(name=name, method=method, config=config, out=Path(config.out), history=history)
    return SimpleNamespace(**run, trained=trained, student=student, heads=heads, seen=seen)


@pytest.fixture(scope="module")
def finished(name, files, tmp_path_factory):
    """A run with dropout, in which each flag of the optimizer is off its default."""
    changes = {
        "skill": dict(steps=12, dropout=0.2),
        "pad": dict(weight_decay=0.03, student=str(files["noisy"])),
    }.get(name, dict(weight_decay=0.03, dropout=0.2))
    changes |= dict(betas=(0.8, 0.95), clip=0.7, warmup=0.5)
    changes |= {} if name == "skill" else dict(eps=1e-5)
    return run(name, settings(name, files, tmp_path_factory.mktemp(name) / "run", **changes))


# ---- student ------------------------------------------------------------------------------------

HISTORIES = ("2d", "recurrent", "recurrent-gelu", "recurrent-no-skip", "parallel")
STUDENTS = [  # method, its teacher, settings
    ("distilhubert", "teacher", {}),
    *(("gendistiller", "teacher", dict(variant=variant)) for variant in HISTORIES),
    *(("gendistiller", "wavlm", dict(variant=variant)) for variant in HISTORIES[:2]),
    *(("lstm_dkd", kind, {}) for kind in ("teacher", "large")),
    *(("skill", kind, {}) for kind in ("teacher", "wavlm")),
    ("pad", "teacher", {}),
]


def new_student(name, kind, files, **changes):
    """As it stands before the first update."""
    method = importlib.import_module(name)
    config = method.Config(**settings(name, files | dict(teacher=files[kind]), "none", **changes))
    if name == "pad":
        return method.build(config)
    teacher = common.load_teacher(config.teacher)
    if name == "skill":
        method.check(config, teacher)
    built = method.build(config, teacher)
    return built[0] if isinstance(built, tuple) else built


@pytest.fixture(params=STUDENTS, ids=lambda row: "-".join((*row[:2], *row[2].values())))
def student(request, files):
    """In float64 and eval mode, all its weights off their first values."""
    name, kind, changes = request.param
    return shake(new_student(name, kind, files, **changes)).double()


def test_padding_reaches_no_valid_frame_and_rows_shorter_than_a_frame_have_none(student):
    """But through a GroupNorm over time, which is taken out; PAD's student handles its own."""
    if hasattr(student, "feature_extractor"):
        first = student.feature_extractor.conv_layers[0]
        if isinstance(first.layer_norm, nn.GroupNorm):
            first.layer_norm = nn.Identity()
    lengths = torch.tensor([6000, 3003, 400, 5999, 399, 0])
    waves = torch.randn(6, 6000, dtype=torch.float64)
    for wave, samples in zip(waves, lengths):
        wave[samples:] = 7.0  # whatever stands in the padding
    batched, frames = student(waves, lengths)
    assert frames.tolist() == [18, 9, 1, 18, 0, 0]
    assert all(states.isfinite().all() for states in batched)
    for row, (samples, count) in enumerate(zip(lengths[:4], frames)):
        alone, no_lengths = student(waves[row : row + 1, :samples])
        assert no_lengths is None
        for a, b in zip(batched, alone, strict=True):
            torch.testing.assert_close(a[row, :count], b[0], rtol=1e-7, atol=1e-7)
    sum(states[:4].square().sum() for states in batched).backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_traces_the_student_for_any_batch_and_length(student):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = student

        def forward(self, waves):
            return self.student(waves)[0][-1]

    waves = torch.randn(3, 6543, dtype=torch.float64)
    traced = torch.jit.trace(Last(), WAVES[:1].double(), check_trace=False)
    torch.testing.assert_close(traced(waves), student(waves)[0][-1])
    torch.jit.save(traced, io.BytesIO())  # a Python function inside could not be saved


def test_autocast_to_bf16_stays_near_float32(student):
    history = ()
    if hasattr(student, "variant"):  # GenDistiller's: the first of two utterances is given one
        history = (torch.randn(2, 2, 12, 16), torch.tensor([True, False]))
    for lengths in (None, torch.tensor([4000, 2500])):
        exact, _ = student.float()(WAVES, lengths, *history)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = student(WAVES, lengths, *history)
        for a, b in zip(exact, rounded, strict=True):
            assert cosine_similarity(a.flatten(1), b.float().flatten(1)).min() > 0.99


@pytest.mark.parametrize("name", ["distilhubert", "gendistiller", "lstm_dkd"])
def test_s2_s3_s4_gradient_into_the_convolutions_is_scaled_and_nothing_else(name, files):
    grads = {}
    for factor in (1.0, 0.1):
        student = new_student(name, "teacher", files, conv_gradient=factor).double().train()
        student(WAVES.double())[0][-1].square().sum().backward()
        grads[factor] = {name: p.grad for name, p in student.named_parameters()}
    for name, full in grads[1.0].items():
        expected = 0.1 * full if name.startswith("feature_extractor") else full
        torch.testing.assert_close(grads[0.1][name], expected)


@pytest.mark.parametrize("name", ["distilhubert", "gendistiller", "skill"])
def test_positional_convolutions_begin_with_the_scale_of_fairseq(name):
    """Standard deviation sqrt(4 / (kernel size x width)), here sqrt(4 / (128 x 768))."""
    method = importlib.import_module(name)
    conv = method.PositionalConv(method.Shape()).conv
    assert conv.weight.std().item() == pytest.approx(0.0063789, rel=0.01)
    assert not conv.bias.any()


@pytest.mark.parametrize("name, kind, changes", STUDENTS[:-1])
def test_each_weight_that_is_copied_must_be_in_the_teacher(name, kind, changes, files):
    method, student = importlib.import_module(name), new_student(name, kind, files, **changes)
    weights = common.load_teacher(str(files[kind])).weights()
    own = student.state_dict()
    copied = {key for key in own.keys() & weights if torch.equal(own[key], weights[key])}
    assert len(copied) > 10
    for key in copied:
        with pytest.raises((KeyError, RuntimeError), match=re.escape(key)):
            method.initialise_from_teacher(student, {k: v for k, v in weights.items() if k != key})


OTHER_TEACHERS = [
    *(("distilhubert", kind) for kind in ("pre-norm", "wavlm", "one layer")),
    *(("gendistiller", kind) for kind in ("pre-norm", "one layer")),
    *(("skill", kind) for kind in ("large", "biased")),
    *(("pad", kind) for kind in ("pre-norm", "layer norm", "wavlm")),
]


@pytest.mark.parametrize("name, kind", OTHER_TEACHERS)
def test_a_teacher_whose_layers_compute_otherwise_is_refused_by_name(name, kind, files):
    """Its weights may have the same names all the same."""
    words = {"skill": "cannot be pruned.*wavlm_base_plus", "pad": "a model with post-norm"}
    changes = dict(target_layers=(1,)) if "distil" in name else {}
    match = f"{files[kind].name}.*" + words.get(name, "--no-init-from-teacher")
    with pytest.raises(common.InputError, match=match):
        new_student(name, kind, files, **changes)
    if name == "gendistiller":
        new_student(name, "one layer", files, variant="recurrent", **changes)  # which has only one
    if "distil" in name:
        new_student(name, kind, files, init_from_teacher=False, **changes)


@pytest.mark.parametrize("name", ["distilhubert", "gendistiller"])
def test_s1_d2_target_layers_are_counted_from_one_and_must_be_there(name, tiny_teacher):
    method, teacher = importlib.import_module(name), common.load_teacher(str(tiny_teacher))
    theirs, _ = teacher.model.extract_features(WAVES)
    targets = method.target_states(teacher, WAVES, (4, 8, 12))
    for target, index in zip(targets, (3, 7, 11), strict=True):
        torch.testing.assert_close(target, theirs[index])
    for layers in ((), (0, 4), (4, 13), (4, 4, 8)):
        with pytest.raises(common.InputError, match="--target-layers"):
            method.build(method.Config(target_layers=layers), teacher)
    method.build(method.Config(target_layers=(12, 8, 4)), teacher)


@pytest.mark.parametrize("name", ["distilhubert", "gendistiller", "skill"])
def test_padding_duplicates_and_order_leave_the_loss_unchanged(name):
    weight = [] if name == "skill" else [1.0]

    def loss(predicted, target, mask=None):
        return importlib.import_module(name).distillation_loss(predicted, target, *weight, mask)

    generator = torch.Generator().manual_seed(0)
    p, h = torch.randn(2, 3, 2, 5, 4, generator=generator, dtype=torch.float64)  # N x B x T x D
    base = loss(p, h)
    mask = torch.arange(7).expand(2, 7) < 5
    padded = [torch.cat([x, 100 * y[:, :, :2]], 2) for x, y in ((p, p), (h, -h))]
    torch.testing.assert_close(loss(*padded, mask), base)
    torch.testing.assert_close(loss(*(torch.cat([x, x], 1) for x in (p, h))), base)
    torch.testing.assert_close(loss(*(x.flip(1) for x in (p, h))), base)
    mask = torch.arange(7) < torch.tensor([5, 1])[:, None]
    (first, _), (second, _) = loss(p[:, :1], h[:, :1]), loss(p[:, 1:, :1], h[:, 1:, :1])
    torch.testing.assert_close(loss(*padded, mask)[0], (5 * first + second) / 6)
    assert loss(p.bfloat16(), h.bfloat16())[0].dtype == torch.float32


# ---- seeds, resuming, accumulation --------------------------------------------------------------


def stop_at_first_save(method, config):
    """The checkpoint that a run left which ended right behind it, after update 4."""
    real = common.save_run

    def save_and_stop(*arguments, **parts):
        real(*arguments, **parts)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(common, "save_run", save_and_stop)
        method.train(config)
    return common.load_checkpoint(Path(config.out) / "last.pt")


@pytest.fixture(scope="module")
def half(finished, tmp_path_factory):
    """The finished run once more, but stopped: its settings, and the checkpoint that it left."""
    config = replace(finished.config, out=str(tmp_path_factory.mktemp("half") / "run"))
    torch.manual_seed(9)  # whatever was drawn before
    return config, stop_at_first_save(finished.method, config)


def test_same_seed_same_log_and_another_seed_another(finished, half, tmp_path):
    again = half[1]
    config = replace(finished.config, seed=1, out=str(tmp_path / "run"))
    other = stop_at_first_save(finished.method, config)
    assert again["log"] == finished.history[:2]
    assert again["log"][0]["loss"] != other["log"][0]["loss"]
    assert not same(again["state_dict"], other["state_dict"])


def test_n_updates_resumed_for_n_more_give_the_bits_of_2n(finished, half):
    """With dropout and GenDistiller's drawn history. SKILL stops in act 3; see test_skill.py."""
    config, checkpoint = half
    assert checkpoint["step"] == 4
    with open(Path(config.out) / "log.jsonl", "a") as log:  # of an update that was not saved
        log.write('{"step": 6, "lo')
    finished.method.train(config, resume=True)
    logs = [(Path(each.out) / "log.jsonl").read_text() for each in (finished, config)]
    last = [common.load_checkpoint(Path(each.out) / "last.pt") for each in (finished, config)]
    assert logs[0] == logs[1] and same(*last)


def test_resume_takes_paths_and_what_changes_nothing_that_is_learned(name, files, tmp_path):
    """Path objects, the same data spelt otherwise, other steps between log lines."""
    method = importlib.import_module(name)
    config = method.Config(**settings(name, files, tmp_path / "run", steps=2))
    first = method.train(config)
    data = Path(config.data)
    same_data = data.parent / ".." / data.parent.name / data.name
    other = replace(config, data=same_data, out=tmp_path / "run", log_every=1, save_every=1)
    assert method.train(other, resume=True)[-1] == first[-1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(same_data)
    with pytest.raises(common.InputError, match="--seed"):
        method.train(replace(other, seed=7), resume=True)


def test_mistakes_are_told_before_the_scan(name, files, tmp_path, monkeypatch):
    method = importlib.import_module(name)
    monkeypatch.setattr(common, "scan", lambda *_: pytest.fail("scanned"))
    config = method.Config(**settings(name, files, tmp_path / "run"))
    with pytest.raises(common.InputError, match="HUBERT_BASE"):
        method.train(replace(config, teacher="HUBERT_BASE"))
    if name == "skill":
        with pytest.raises(common.InputError, match="--groups"):
            method.train(replace(config, groups="0/4/13"))
    with pytest.raises(common.InputError, match="data '' does not exist: give a folder"):
        method.train(replace(config, data=""))
    assert not (tmp_path / "run").exists()


def test_first_weights_follow_from_the_seed_alone(finished):
    method, built, random = finished.method, [], {}
    if hasattr(finished.config, "init_from_teacher"):
        random = dict(init_from_teacher=False)
    teacher = [] if finished.name == "pad" else [finished.seen.teachers[0][0]]
    for state, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(state)
        modules = method.build(replace(finished.config, seed=seed, **random), *teacher)
        modules = modules if isinstance(modules, tuple) else (modules,)
        built.append([module.state_dict() for module in modules])
    assert same(built[0], built[1])
    assert same(built[0], built[2]) == (finished.name == "pad")  # which draws none


def test_accumulation_in_two_parts_gives_the_update_of_one(name, files, tmp_path, monkeypatch):
    """Numbers of the log within 1e-4. Without dropout, and SKILL without noise of its gates."""
    if name == "skill":
        distributions = importlib.import_module(name).HardConcrete
        alike = lambda self: self.split(self.log_alpha.sigmoid())  # noqa: E731
        monkeypatch.setattr(distributions, "sample", alike)
    runs = []
    for parts in (1, 2):
        changes = dict(steps=2, log_every=1, accumulate=parts)
        runs.append(run(name, settings(name, files, tmp_path / str(parts), **changes)))
    one, two = (each.seen.student_modes[True, True] for each in runs)
    assert two > one == 2
    for a, b in zip(runs[0].history, runs[1].history, strict=True):
        for key in set(a) - {"heldout"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
    for key, value in runs[0].student.state_dict().items():
        torch.testing.assert_close(runs[1].student.state_dict()[key], value, rtol=1e-3, atol=1e-5)


# ---- optimizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_autocast_convolves_by_fourier_transforms(name, files, tmp_path, monkeypatch):
    """The positional convolutions of student and teacher in each update, and nothing else."""
    rfft, transforms = torch.fft.rfft, []

    def spy(x, size):
        transforms.append(x.dtype)
        return rfft(x, size)

    monkeypatch.setattr(torch.fft, "rfft", spy)
    method, few = importlib.import_module(name), dict(log_every=8, save_every=8, batch_seconds=1.0)
    method.train(method.Config(**settings(name, files, tmp_path / "exact", steps=1, **few)))
    assert not transforms
    method.train(method.Config(**settings(name, files, tmp_path / "run", amp=True, **few)))
    convolutions = 1 if name == "lstm_dkd" else 2  # PAD's student computes twice
    assert len(transforms) == 8 * convolutions * 2 and set(transforms) == {torch.float32}


def test_flags_of_the_optimizer_and_the_learning_rate_reach_it(finished):
    seen, decay = finished.seen, [0.03, 0.0]
    shares = [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]  # of the peak: warmup 0.5 of 8 updates
    rates = [[1e-3 * share] * 2 for share in shares]
    if finished.name == "skill":  # weights, gates and multipliers in act 3; weights in act 4
        peaks, decay = (1e-3, 0.1, finished.config.multiplier_lr), [0.0] * 3
        rates = [[share * peak for peak in peaks] for share in shares]
        rates += [[share * 5e-4] for share in (1.0, 2 / 3, 1 / 3, 0.0)]
    assert [x for rate in seen.rates for x in rate] == pytest.approx([x for r in rates for x in r])
    assert [line["lr"] for line in finished.history] == [rate[0] for rate in seen.rates[1::2]]
    assert seen.clips == {0.7}
    assert [group["weight_decay"] for group in seen.optimizers[0].param_groups] == decay
    for group in (group for optimizer in seen.optimizers for group in optimizer.param_groups):
        eps = 1e-8 if finished.name == "skill" else 1e-5
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), eps)


def test_weight_decay_spares_biases_and_norms_alone(finished):
    groups = finished.seen.optimizers[-1].param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for module in (m for whole in (finished.student, *finished.heads) for m in whole.modules()):
        for key, parameter in module.named_parameters(recurse=False):
            spared = isinstance(module, nn.LayerNorm | nn.GroupNorm) or key.startswith("bias")
            spared |= finished.name == "skill" or not parameter.requires_grad
            assert (id(parameter) in decayed) != spared, (module, key)


def test_all_that_should_learn_gets_a_gradient_and_nothing_else_is_updated(finished):
    seen, learns = finished.seen, set()
    for module in (finished.student, *finished.heads):
        for key, parameter in module.named_parameters():
            if key.startswith(FROZEN.get(finished.name, "none")):
                assert parameter.grad is None and not parameter.requires_grad, key
            else:
                assert id(parameter) in seen.learned, key
                learns.add(id(parameter))
    assert {id(p) for p in parameters_of(seen.optimizers[-1])} == learns
    assert {id(p) for p in parameters_of(seen.optimizers[0])} <= seen.learned  # SKILL's act 3


# ---- modes --------------------------------------------------------------------------------------


def test_teacher_gets_no_gradient_and_stays_in_eval_mode_and_bit_identical(finished):
    assert finished.seen.teachers and finished.seen.teacher_modes == {False}
    for teacher, before in finished.seen.teachers:
        assert same(teacher.state_dict(), before)
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_dropout_is_on_in_each_update_and_off_outside(finished):
    """Behind held-out audio, which is measured in eval mode, the next update has dropout again."""
    modes = finished.seen.student_modes  # (gradient, train mode) -> passes
    assert set(modes) == {(True, True), (False, False)}
    assert modes[True, True] == finished.config.steps
    student = finished.method.load_student(finished.out / "student.pt")
    assert same(student(WAVES)[0], student(WAVES)[0])
    student.train()
    assert not torch.equal(student(WAVES)[0][-1], student(WAVES)[0][-1])


# ---- updates that are skipped -------------------------------------------------------------------


@contextlib.contextmanager
def spoilt(values):
    """One number of the gradient becomes ``values[n]`` in the run's n-th update.

    Yields a list that gets, for each update, whether a weight or a moment was changed by it.
    """
    clip, step, changed = nn.utils.clip_grad_norm_, torch.optim.AdamW.step, []

    def state(optimizer):
        return copy.deepcopy([parameters_of(optimizer), optimizer.state_dict()["state"]])

    def spoil(parameters, norm):
        number = len(changed) + 1
        if number in values:
            parameters[-1].grad.flatten()[0] = values[number]
        return clip(parameters, norm)

    def step_spy(self, *arguments):
        before = state(self)
        step(self, *arguments)
        changed.append(not same(before, state(self)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", spoil)
        patch.setattr(torch.optim.AdamW, "step", step_spy)
        yield changed


def test_gradient_that_is_not_finite_is_skipped_and_a_second_one_stops(name, files, tmp_path):
    """A line of the log is two updates here: the second and the fifth are too far apart."""
    method = importlib.import_module(name)
    config = method.Config(**settings(name, files, tmp_path / "run", steps=12, save_every=6))
    with spoilt({2: math.nan, 5: math.inf, 7: math.nan}) as changed:
        with pytest.raises(common.InputError, match="not finite at update 8.*lower --lr"):
            method.train(config)
    assert [n for n, change in enumerate(changed, 1) if not change] == [2, 5, 7]
    text = (tmp_path / "run" / "log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line.get("skipped") for line in lines] == [1, None, 1]
    assert lines[0]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    saved = common.load_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["step"] == 6 and all(v.isfinite().all() for v in saved["state_dict"].values())


# ---- what a run learns and leaves ---------------------------------------------------------------


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory):
    """Two utterances to train on, as long as their crops, and one that is held out."""
    folder, rng = tmp_path_factory.mktemp("batch"), np.random.default_rng(0)
    lines = ["path\tsplit\ttext"]
    for i, split in enumerate(("train", "train", "dev")):
        wave = 0.3 * rng.standard_normal(10 * 320 + 80)
        soundfile.write(folder / f"{i}.wav", wave.astype(np.float32), 16_000)
        lines.append(f"{i}.wav\t{split}\t{SAID[i]}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


RANDOM = dict(init_from_teacher=False, lr=1e-2)
LEARNED = {  # column of the log, share of its first value that it falls below, settings
    "distilhubert": ("l1", 0.6, RANDOM),
    "gendistiller": ("l1", 0.4, RANDOM),
    "lstm_dkd": ("kd", 0.5, RANDOM),
    "skill": ("l1", 0.6, dict(lr=5e-3, sparsity=0.1)),
    "pad": ("loss", 0.2, dict(lr=1e-2, alignment="global")),
}


def test_one_batch_can_be_learned(name, files, one_batch, tmp_path):
    """30 updates bring the distance to the teacher below a stated share of what it was."""
    column, share, changes = LEARNED[name]
    changes = changes | dict(data=str(one_batch), steps=30, log_every=1, save_every=100)
    history = run(name, settings(name, files, tmp_path / "run", **changes)).history
    first, last = (
        np.mean([value for key, value in line.items() if key.startswith(column)])
        for line in (history[0], history[-1])
    )
    assert last < share * first


def test_log_is_strict_json_and_equals_the_history(finished):
    lines = (finished.out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == finished.history
    assert [line["step"] for line in finished.history] == [*range(2, finished.config.steps + 1, 2)]
    assert all(("heldout" in line) == (line["step"] % 4 == 0) for line in finished.history)


def test_student_file_gives_the_same_output_on_the_cpu_in_float32_and_eval_mode(finished, tmp_path):
    path = finished.out / "student.pt"
    loaded, saved = finished.method.load_student(path), torch.load(path, weights_only=True)
    assert same(loaded(WAVES)[0], finished.student(WAVES)[0])
    halves = {k: v.half() if v.is_floating_point() else v for k, v in saved["state_dict"].items()}
    torch.save(saved | {"state_dict": halves}, tmp_path / "half.pt")
    half = finished.method.load_student(tmp_path / "half.pt")
    assert not any(module.training for module in half.modules())
    for tensor in (*half.parameters(), *half.buffers()):
        assert tensor.device.type == "cpu"
        assert tensor.dtype == torch.float32 or not tensor.is_floating_point()
    for parameter in loaded.parameters():
        parameter.data = parameter.data.half().float()
    assert same(half(WAVES)[0], loaded(WAVES)[0])


def test_student_file_does_not_load_in_another_script(finished):
    for other in set(METHODS) - {finished.name}:
        sentence = f"no student of {other}.py, but was written by {finished.name}"
        with pytest.raises(common.InputError, match=sentence):
            importlib.import_module(other).load_student(finished.out / "student.pt")


def test_each_field_of_config_is_read(name):
    method = importlib.import_module(name)
    read = inspect.getsource(method) + inspect.getsource(common.speed_up)
    found = set(re.findall(r"\bconfig\.(\w+)", read))
    assert {field.name for field in fields(method.Config)} <= found


# ---- evaluation ---------------------------------------------------------------------------------

ROWS = {"skill": ["teacher", "untrained", "pruned"], "pad": ["text teacher", "speech model"]}
FIRST = {"lstm_dkd": ["agreement", "KL"], "pad": []}  # columns, before those of all
FEW = {"pad": ["intent accuracy 10 %", "intent accuracy 1 %"]}  # and behind them


def test_evaluate_gives_a_row_of_finite_numbers_for_each_model(finished, monkeypatch):
    """The student is in eval mode afterwards, whatever it was before."""
    name, speeds = finished.name, {"teacher": 2.0, "student": 6.0}
    monkeypatch.setattr(common, "linear_probe", lambda *_: 0.5)
    monkeypatch.setattr(common, "measure_speed", lambda *_: speeds)
    finished.student.train()
    rows = finished.method.evaluate(finished.config, *finished.trained)
    assert not any(module.training for module in finished.student.modules())
    assert list(rows) == [*ROWS.get(name, ["teacher", "untrained", "initialised"]), "distilled"]
    columns = [*FIRST.get(name, ["L1", "cosine"]), "parameters"]
    columns += ["GMAC/s", "speed"] if name != "pad" else []
    columns += ["intent accuracy", "speaker accuracy", *FEW.get(name, [])]
    row = rows["distilled"]
    assert list(row) == columns and row.get("speed", 3.0) == 3.0
    assert row["parameters"] == common.count_parameters(finished.student)
    for numbers in rows.values():
        assert set(numbers) <= set(columns) and all(map(math.isfinite, numbers.values()))
    monkeypatch.setattr(common, "find_tasks", lambda *_: [])
    alone = finished.method.evaluate(finished.config, *finished.trained, baselines=False)
    assert list(alone) == ["distilled"]


def test_probes_get_the_last_layer_of_distilhubert_and_all_states_of_the_others(
    finished, monkeypatch
):
    features, student = [], finished.student.eval()
    monkeypatch.setattr(common, "extract_features", lambda of, *_: features.append(of) or {})
    finished.method.score(student, [], torch.device("cpu"), 0)
    states = student(WAVES)[0]
    assert same(list(features[0](WAVES)), states[-1:] if finished.name == METHODS[0] else states)
