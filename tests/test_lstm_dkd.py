"""lstm_dkd.py: equations, student, start from the teacher, targets, agreement."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import encoder_config, large, make_hubert, shake, tiny_run, write_teacher
from torch import nn
from torch.nn import functional as F

import common
import lstm_dkd as l

SMALL = l.Shape(width=16, conv_channels=8)
BASE = replace(SMALL, conv_norm="group", normalise=False)
LOSSES = ("dkd", "kd", "ce")


def small_student(shape=SMALL, dropout=0.0):
    """In float64, with biases and norms off their first values."""
    torch.manual_seed(0)
    return shake(l.Student(shape, dropout, conv_gradient=0.1)).double()


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return common.load_teacher(str(tiny_teacher))


# ---- equations ----------------------------------------------------------------------------------


@pytest.fixture
def logits():
    """Student, teacher (B, T, K) in float64, and targets that are not always the teacher's top."""
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    return s, t, torch.randint(7, (2, 5), generator=generator)


def probabilities(row):
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def loop_kd(p, q, _=None):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def loop_tckd(p, q, y):
    return loop_kd([p[y], 1 - p[y]], [q[y], 1 - q[y]])


def loop_nckd(p, q, y):
    others = [c for c in range(len(p)) if c != y]
    return loop_kd([p[c] / (1 - p[y]) for c in others], [q[c] / (1 - q[y]) for c in others])


def frames_of(s, t, y):
    """(teacher's probabilities, student's, target) of each frame."""
    rows = zip(*(x.flatten(0, 1).tolist() for x in (t, s, y)), strict=True)
    return [(probabilities(p), probabilities(q), target) for p, q, target in rows]


def mean(values):
    return math.fsum(values) / len(values)


def test_eq1_kd_matches_torch_and_a_loop_over_frames(logits):
    s, t, _ = logits
    by_torch = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(l.kl_divergence(s, t), by_torch.sum(-1), rtol=1e-12, atol=1e-12)
    expected = [loop_kd(*frame) for frame in frames_of(*logits)]
    assert l.kl_divergence(s, t).flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_eq2_tckd_matches_a_loop_over_frames(logits):
    expected = [loop_tckd(*frame) for frame in frames_of(*logits)]
    assert l.tckd(*logits).flatten().tolist() == pytest.approx(expected, rel=1e-10)


def test_eq3_nckd_matches_a_loop_over_the_other_classes(logits):
    expected = [loop_nckd(*frame) for frame in frames_of(*logits)]
    assert l.nckd(*logits).flatten().tolist() == pytest.approx(expected, rel=1e-10)


def test_eq3_does_not_see_the_target_logit_and_eq2_not_how_the_others_share(logits):
    s, t, y = logits
    moved = s.scatter_add(-1, y[..., None], 5 * torch.ones_like(y[..., None]).double())
    torch.testing.assert_close(l.nckd(moved, t, y), l.nckd(s, t, y))
    assert (l.tckd(moved, t, y) - l.tckd(s, t, y)).abs().min() > 1e-3
    order = torch.tensor([3, 1, 2, 0, 4, 5, 6])  # 0 and 3 swap their student logits
    away = (y != 0) & (y != 3)
    torch.testing.assert_close(l.tckd(s[..., order], t, y)[away], l.tckd(s, t, y)[away])
    assert (l.nckd(s[..., order], t, y) - l.nckd(s, t, y))[away].abs().min() > 1e-4


def test_eq4_kd_is_tckd_and_1_minus_p_times_nckd(logits):
    s, t, y = logits
    left = 1 - t.softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    identity = l.tckd(s, t, y) + left * l.nckd(s, t, y)
    torch.testing.assert_close(identity, l.kl_divergence(s, t), rtol=1e-10, atol=1e-12)


def test_eq5_dkd_with_beta_1_minus_p_is_kd_and_with_1_it_is_not(logits):
    unlike = 0.0
    for s, t, y in zip(*(x.flatten(0, 1)[:, None, None] for x in logits), strict=True):
        left = 1 - t.softmax(-1)[0, 0, y.item()].item()
        kd = l.distillation_loss(s, t, y, "kd", beta=1.0)[0].item()
        assert l.distillation_loss(s, t, y, "dkd", left)[0].item() == pytest.approx(kd, rel=1e-9)
        unlike = max(unlike, abs(l.distillation_loss(s, t, y, "dkd", 1.0)[0].item() - kd))
    assert unlike > 0.1


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_eq5_matches_mdistillers_formula(logits, tau):
    """Masks with -1000 and sums probabilities, as the DKD paper's code does; here in float64."""
    s, t, y = (x.flatten(0, 1) for x in logits)
    beta, hot = 8.0, F.one_hot(y, s.shape[-1]).bool()

    def two(x):
        p = (x / tau).softmax(1)
        return torch.stack([(p * hot).sum(1), (p * ~hot).sum(1)], 1)

    tckd = F.kl_div(two(s).log(), two(t), reduction="sum") * tau**2 / len(y)
    others = [x / tau - 1000.0 * hot for x in (s, t)]
    nckd = F.kl_div(others[0].log_softmax(1), others[1].softmax(1), reduction="sum")
    theirs = (tckd + beta * nckd * tau**2 / len(y)).item()
    total, parts = l.distillation_loss(logits[0] / tau, logits[1] / tau, logits[2], "dkd", beta)
    assert tau**2 * (total - parts["ce"]).item() == pytest.approx(theirs, rel=1e-9)


def test_eq6_cross_entropy_is_by_the_target(logits):
    expected = mean([-math.log(q[y]) for _, q, y in frames_of(*logits)])
    total, parts = l.distillation_loss(*logits, "ce", beta=4.0)
    assert total.item() == parts["ce"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("valid", [[True] * 10, [True] * 7 + [False] * 3])
def test_eq7_is_the_mean_over_valid_frames(logits, loss, valid):
    frames, beta = [f for f, keep in zip(frames_of(*logits), valid) if keep], 3.0
    expected = {
        "ce": mean([-math.log(q[y]) for _, q, y in frames]),
        "kd": mean([loop_kd(*frame) for frame in frames]),
        "tckd": mean([loop_tckd(*frame) for frame in frames]),
        "nckd": mean([loop_nckd(*frame) for frame in frames]),
    }
    soft = {"dkd": expected["tckd"] + beta * expected["nckd"], "kd": expected["kd"], "ce": 0.0}
    total, parts = l.distillation_loss(*logits, loss, beta, torch.tensor(valid).view(2, 5))
    assert total.dtype == torch.float64  # the sum is not silently rounded
    assert total.item() == pytest.approx(expected["ce"] + soft[loss], rel=1e-10)
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(expected, rel=1e-10)
    assert not any(part.requires_grad for part in parts.values())


def test_s7_padding_duplicates_and_order_leave_the_loss_unchanged(logits):
    def loss(s, t, y, mask=None):
        return l.distillation_loss(s, t, y, "dkd", 4.0, mask)[0].item()

    (s, t, y), base = logits, pytest.approx(loss(*logits))
    mask = torch.arange(8).expand(2, 8) < 5
    padded = [torch.cat([x, 9 * torch.randn(2, 3, 7).double()], 1) for x in (s, t)]
    padded.append(F.pad(y, (0, 3)))
    assert loss(*padded, mask) == base and loss(*padded) != base
    assert loss(*(torch.cat([x, x]) for x in logits)) == base
    assert loss(*(x.flip(0).flip(1) for x in logits)) == base
    order = torch.randperm(7)
    assert loss(s[..., order], t[..., order], order.argsort()[y]) == base
    assert loss(s + 5, t - 3, y) == base  # logits are up to a constant


def test_gradients_of_all_losses_pass_gradcheck_in_double(logits):
    s, t, y = logits[0][:1, :3, :5].clone(), logits[1][:1, :3, :5], logits[2][:1, :3].clamp(max=4)
    for loss in LOSSES:
        check = lambda s, loss=loss: l.distillation_loss(s, t, y, loss, 4.0)[0]  # noqa: E731
        assert torch.autograd.gradcheck(check, s.requires_grad_())


def test_a_student_like_its_teacher_has_a_gradient_from_the_target_alone(logits):
    _, t, y = logits
    for loss in ("dkd", "kd"):
        s = (t + 2).requires_grad_()  # a constant more is the same distribution
        total, parts = l.distillation_loss(s, t, y, loss, 4.0)
        expected = torch.autograd.grad(F.cross_entropy(s.flatten(0, 1), y.flatten()), s)[0]
        torch.testing.assert_close(torch.autograd.grad(total, s)[0], expected, atol=1e-12, rtol=0)
        assert abs(total.item() - parts["ce"].item()) < 1e-12


@pytest.mark.parametrize("left", [1e-9, 1e-14, 1e-30])
def test_a_confident_teacher_keeps_its_digits_in_fp32(left):
    """p_y = 1 - 1e-9 is 1 in fp32: 1 - p_y would be 0, its logarithm -inf."""
    others = torch.tensor([0.2, 1.0, -0.7], dtype=torch.float64)
    top = others.logsumexp(0) - math.log(left)
    t = torch.cat([top[None], others])[None, None].float()
    s = torch.tensor([[[9.0, 0.3, 0.1, -0.2]]], requires_grad=True)
    y, exact = torch.zeros(1, 1, dtype=torch.long), []
    for x in (t.double(), s.double()):
        m = (x[0, 0, 0] - x[0, 0, 1:].logsumexp(0)).item()
        exact.append((-math.log1p(math.exp(-m)), -m - math.log1p(math.exp(-m))))
    (a, n), (b, o) = exact
    expected = math.exp(a) * (a - b) + math.exp(n) * (n - o)
    assert l.tckd(s, t, y).item() == pytest.approx(expected, rel=1e-5)
    p, q = t[0, 0, 1:].double().softmax(0), s[0, 0, 1:].double().softmax(0)
    assert l.nckd(s, t, y).item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    total, _ = l.distillation_loss(s, t, y, "dkd", 4.0)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(s.grad).all() and s.grad.abs().max() > 0.1
    assert l.tckd(t, s, y).isfinite().all()  # and a student that is too confident


def test_loss_in_bf16_is_computed_in_float32(logits):
    s, t, y = logits[0].bfloat16(), logits[1].bfloat16(), logits[2]
    total, _ = l.distillation_loss(s, t, y, "dkd", 4.0)
    exact, _ = l.distillation_loss(s.double(), t.double(), y, "dkd", 4.0)
    assert total.dtype == torch.float32 and total.item() == pytest.approx(exact.item(), rel=1e-5)


# ---- student ------------------------------------------------------------------------------------


def test_s1_width_is_that_of_both_directions_and_one_unit_is_enough():
    assert l.width_of(l.Config()) == 768 and l.width_of(l.Config(hidden=1)) == 2


def test_first_weights_have_the_scales_that_are_said():
    torch.manual_seed(0)
    student = l.Student(l.Shape(width=64, conv_channels=32), 0.0, 0.1)
    projection = student.feature_projection["projection"]
    assert projection.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not projection.bias.any()
    conv = student.feature_extractor.conv_layers[3].conv.weight  # He: variance 2 / inputs
    assert conv.std().item() == pytest.approx(math.sqrt(2 / conv[0].numel()), rel=0.1)


def test_s2_layers_are_torchs_four_layer_lstm_and_nothing_else():
    student = small_student()
    theirs = nn.LSTM(16, 8, 4, batch_first=True, bidirectional=True).double()
    for i, layer in enumerate(student.layers):
        for name, value in layer.lstm.named_parameters():
            getattr(theirs, name.replace("l0", f"l{i}")).data = value.data
    hidden, lengths = student(torch.randn(2, 4000).double())
    assert len(hidden) == 5 and lengths is None
    torch.testing.assert_close(hidden[-1], theirs(hidden[0])[0], rtol=1e-10, atol=1e-10)


def test_s2_dropout_is_on_the_input_of_each_layer():
    student, seen = small_student(dropout=0.5).train(), []
    for layer in student.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hidden = student(torch.randn(1, 9000).double())[0]
    for given, before in zip(seen, hidden[:-1], strict=True):
        dropped = given == 0
        assert 0.3 < dropped.double().mean() < 0.7
        torch.testing.assert_close(given[~dropped], 2 * before[~dropped])


def test_s2_a_forget_gate_starts_open_and_the_other_biases_at_zero():
    """An input of zeros: the cell keeps sigmoid(1) of itself at each step, and adds nothing."""
    for layer in l.Student(SMALL, 0.0, 0.1).layers:
        for name, weight in layer.lstm.named_parameters():
            if "weight" in name:  # torch draws from +- 1 / sqrt(units)
                assert weight.abs().max().item() == pytest.approx(8**-0.5, rel=0.1)
                nn.init.zeros_(weight)
        cell = torch.rand(2, 1, 8)
        _, (_, after) = layer.lstm(torch.zeros(1, 3, 16), (torch.zeros_like(cell), cell))
        torch.testing.assert_close(after, cell * torch.sigmoid(torch.tensor(1.0)) ** 3)


def test_s3_each_utterance_is_normalised_over_its_valid_samples():
    waves, lengths = 3 * torch.randn(2, 4000).double() + 1, torch.tensor([4000, 2500])
    for given in (lengths, None):
        ours = l.normalise(waves, given)
        for wave, row, n in zip(waves, ours, [4000] * 2 if given is None else lengths):
            expected = (wave[:n] - wave[:n].mean()) / (wave[:n].var(correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(row[:n], expected)
            assert not row[n:].any()
    for normalise in (True, False):
        student = small_student(replace(SMALL, normalise=normalise))
        difference = student(waves)[0][-1] - student(5 * waves + 3)[0][-1]
        assert (difference.abs().max() < 1e-4) == normalise


def test_the_lstm_stays_in_float32_under_autocast():
    student = small_student().float()
    with torch.autocast("cpu", torch.bfloat16):
        first, *hidden_states = student(torch.randn(1, 3000))[0]
    assert first.dtype == torch.bfloat16
    assert {state.dtype for state in hidden_states} == {torch.float32}


# ---- teacher and targets ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [encoder_config, large])
def test_s3_what_is_copied_gives_the_teachers_features(kind, bias):
    model, normalise = make_hubert(kind(extractor_conv_bias=bias)).wav2vec2, kind is large
    teacher = common.Teacher(model, "test", normalise, label_embeddings=torch.randn(10, 12))
    student, head = l.build(l.Config(hidden=8), teacher)
    assert head.weight.shape == (10, 16)
    waves = 3 * torch.randn(2, 5000) + 1
    given = F.layer_norm(waves, (5000,)) if normalise else waves
    with torch.no_grad():
        theirs = model.encoder.feature_projection(model.feature_extractor(given, None)[0])
        ours = student(waves)[0][0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden, start", [(6, True), (8, True), (8, False)])
def test_s3_of_another_width_only_the_linear_is_new(teacher, hidden, start):
    student, _ = l.build(l.Config(hidden=hidden, init_from_teacher=start), teacher)
    weights, copied = teacher.weights(), set()
    for name, value in student.state_dict().items():
        if name in weights and torch.equal(value, weights[name]):
            copied.add(name)
    linear = {f"feature_projection.projection.{kind}" for kind in ("weight", "bias")}
    all_of_them = {name for name in weights if name.startswith("feature_")}
    assert copied == (all_of_them - (linear if hidden == 6 else set()) if start else set())


def test_a_teacher_without_a_head_names_the_files_that_have_one(tmp_path, monkeypatch):
    monkeypatch.setattr(common.BUNDLES["hubert_base"], "get_model", None)  # nothing is downloaded
    config = encoder_config(encoder_embed_dim=128, encoder_num_layers=1)  # 64 channels a head
    bare = tmp_path / "bare.pt"
    torch.save(make_hubert(config).wav2vec2.state_dict(), bare)
    for name in ("hubert_base", str(bare), l.Config.teacher, "no_such_teacher", "gone.pth"):
        with pytest.raises(common.InputError, match="does not exist, or has no cluster") as caught:
            l.load_teacher(l.Config(teacher=name), torch.device("cpu"))
        for word in (name, "hubert_large_ll60k.pt", "hubert_base_ls960.pt", "s3prl", "toy"):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture
def losses(monkeypatch):
    """Arguments of each call of distillation_loss in a run."""
    real, seen = l.distillation_loss, []
    monkeypatch.setattr(l, "distillation_loss", lambda *a: seen.append(a) or real(*a))
    return seen


@pytest.mark.parametrize("kind", [encoder_config, large])
def test_s5_s6_loss_gets_the_teachers_logits_of_unmasked_audio_and_their_top_class(
    kind, tiny_files, tmp_path, losses, monkeypatch
):
    files = tiny_files | {"teacher": write_teacher(tmp_path / "teacher.pt", kind(dropout=0.0))}
    real, waves = common.Teacher.forward, []
    monkeypatch.setattr(common.Teacher, "forward", lambda s, w: waves.append(w) or real(s, w))
    changes = dict(steps=1, loss="kd", beta=5.0)
    l.train(l.Config(**tiny_run("lstm_dkd", files, tmp_path / "run", **changes)))
    ((_, teacher_logits, target, *others),) = losses
    hubert = make_hubert(kind(dropout=0.0))
    given = F.layer_norm(waves[0], waves[0].shape[1:]) if kind is large else waves[0]
    with torch.no_grad():
        projected = hubert.logit_generator.final_proj(hubert.wav2vec2(given)[0])[:, :, None]
        theirs = 10 * F.cosine_similarity(projected, hubert.logit_generator.label_embeddings, -1)
    assert theirs.std() > 0.1  # there is something to get wrong
    torch.testing.assert_close(teacher_logits, theirs, rtol=1e-4, atol=1e-3)
    assert torch.equal(target, teacher_logits.argmax(-1)) and others == ["kd", 5.0]


def test_logits_are_float32_under_autocast(tiny_files, tmp_path, losses):
    l.train(l.Config(**tiny_run("lstm_dkd", tiny_files, tmp_path, steps=2, amp=True)))
    assert {x.dtype for given in losses for x in given[:2]} == {torch.float32}


# ---- training and evaluation --------------------------------------------------------------------


def test_d1_defaults_are_the_papers():
    """A batch is 32 of DistilHuBERT's utterances, of which 24 are 290 s."""
    assert (l.Config.loss, l.Config.beta, l.Config.steps) == ("dkd", 4.0, 200_000)
    assert (l.Config.lr, l.Config.warmup) == (2e-4, 0.07)
    assert l.Config.batch_seconds == pytest.approx(32 / 24 * 290, abs=0.5)


def test_agreement_is_top_1_and_kl_to_the_teacher_on_held_out_audio(
    teacher, audio_folder, tmp_path
):
    config = l.Config(hidden=8, batch_seconds=3.0, crop_seconds=9.0)
    utterances = common.scan(audio_folder, None, 1)[:2]
    student, head = l.build(config, teacher)
    found = l.agreement(config, teacher, student.train(), head, utterances)
    assert not student.training
    same, divergence = [], []
    for batch in common.heldout_batches(utterances, config.batch_seconds, 9.0):
        with torch.no_grad():
            s, t = head(student(batch)[0][-1]), teacher.logits(teacher(batch)[-1])
        for p, q, top in frames_of(s, t, t.argmax(-1)):
            same.append(q.index(max(q)) == top)
            divergence.append(loop_kd(p, q))
    assert found["agreement"] == pytest.approx(mean(same))
    assert found["KL"] == pytest.approx(mean(divergence), rel=1e-4)
