"""lstm_dkd.py: equations, student, packing, streaming, teachers with heads, labels, training."""

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import encoder_config, large, make_hubert, pretrain_config
from test_common_teachers import (
    WIDE,
    attacks,
    fairseq_checkpoint,
    logits_by_torchaudio,
    make_encoder,
    s3prl_checkpoint,
)
from torch import nn

import common
import distilhubert
import lstm_dkd as l

SMALL = l.Shape(
    width=16,
    clusters=10,
    conv_channels=8,
    attention_heads=2,
    feed_forward=32,
    position_kernel=8,
    position_groups=2,
)
BASE = replace(SMALL, conv_norm="group", normalise=False)
CAUSAL = replace(SMALL, causal=True, normalise=False)


def make_student(shape=SMALL, layers=4, dropout=0.0, seed=0):
    """A small student in float64 whose biases and norms are off their first values."""
    torch.manual_seed(seed)
    student = l.Student(shape, layers, dropout, l.Config.conv_gradient).double().eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for norm in student.front_end.norms:
            if isinstance(norm, nn.BatchNorm1d):
                norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
    return student


def small_config(tiny_teacher, audio_folder, out, **changes):
    settings = dict(
        data=str(audio_folder),
        teacher=str(tiny_teacher),
        out=str(out),
        workers=0,
        device="cpu",
        hidden=8,
        steps=8,
        batch_seconds=3.0,
        crop_seconds=1.0,
        lr=1e-3,
        log_every=2,
        save_every=4,
    )
    return l.Config(**(settings | changes))


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


def probabilities(row, tau=1.0):
    powers = [math.exp(value / tau) for value in row]
    return [power / sum(powers) for power in powers]


def loop_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def loop_tckd(p, q, y):
    return loop_kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])


def loop_nckd(p, q, y):
    rest = [c for c in range(len(p)) if c != y]
    return sum(
        p[c] / (1 - p[y]) * math.log((p[c] / (1 - p[y])) / (q[c] / (1 - q[y]))) for c in rest
    )


def rows_of(s, t, y, tau=1.0):
    """(teacher's probabilities, student's, target) frame by frame."""
    for b, f in itertools.product(range(s.shape[0]), range(s.shape[1])):
        p, q = probabilities(t[b, f].tolist(), tau), probabilities(s[b, f].tolist(), tau)
        yield p, q, int(y[b, f])


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def loss_of(s, t, y, loss="dkd", tau=1.0, alpha=1.0, beta=4.0, ce=1.0, kd=1.0, mask=None):
    return l.distillation_loss(s, t, y, loss, tau, alpha, beta, ce, kd, mask)


def test_eq1_kl_matches_torch_and_a_loop_with_the_temperature_squared(logits):
    s, t, y = logits
    expected = nn.functional.kl_div(
        s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True
    )
    torch.testing.assert_close(l.kl(s, t), expected.sum(-1), rtol=1e-12, atol=1e-12)
    total, parts = loss_of(s, t, y, "kd", tau=2.5, ce=0.0)
    loop = 2.5**2 * mean(loop_kl(p, q) for p, q, _ in rows_of(s, t, y, 2.5))
    assert total.item() == pytest.approx(loop, rel=1e-12)
    assert parts["kd"].item() == pytest.approx(loop, rel=1e-12)


def test_eq2_tckd_matches_a_loop_over_frames(logits):
    s, t, y = logits
    expected = [loop_tckd(*row) for row in rows_of(s, t, y)]
    assert l.tckd(s, t, y).flatten().tolist() == pytest.approx(expected, rel=1e-10)


def test_eq3_nckd_matches_a_loop_over_the_other_classes(logits):
    s, t, y = logits
    expected = [loop_nckd(*row) for row in rows_of(s, t, y)]
    assert l.nckd(s, t, y).flatten().tolist() == pytest.approx(expected, rel=1e-10)


def test_eq3_does_not_see_the_target_logit_and_eq2_not_how_the_others_share(logits):
    s, t, y = logits
    moved = s.scatter_add(-1, y[..., None], 5 * torch.ones_like(y[..., None]).double())
    torch.testing.assert_close(l.nckd(moved, t, y), l.nckd(s, t, y))
    assert (l.tckd(moved, t, y) - l.tckd(s, t, y)).abs().min() > 1e-3
    order = torch.tensor([3, 1, 2, 0, 4, 5, 6])  # 0 and 3 swap their student logits
    away = (y != 0) & (y != 3)
    torch.testing.assert_close(l.tckd(s[..., order], t, y)[away], l.tckd(s, t, y)[away])
    assert (l.nckd(s[..., order], t, y) - l.nckd(s, t, y))[away].abs().min() > 1e-4


def test_eq4_kl_is_tckd_plus_what_is_left_times_nckd(logits):
    s, t, y = logits
    left = 1 - t.softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    identity = l.tckd(s, t, y) + left * l.nckd(s, t, y)
    torch.testing.assert_close(identity, l.kl(s, t), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_eq5_dkd_with_weights_1_and_1_minus_p_is_kd(logits, tau):
    unlike = 0.0
    for s, t, y in zip(*(x.flatten(0, 1) for x in logits), strict=True):
        s, t, y = s[None, None], t[None, None], y[None, None]  # one frame
        left = 1 - (t / tau).softmax(-1)[0, 0, y.item()].item()
        dkd = loss_of(s, t, y, "dkd", tau, 1.0, left, ce=0.0)[0].item()
        kd = loss_of(s, t, y, "kd", tau, ce=0.0)[0].item()
        assert dkd == pytest.approx(kd, rel=1e-9)
        unlike = max(unlike, abs(loss_of(s, t, y, "dkd", tau, 1.0, 1.0, ce=0.0)[0].item() - kd))
    assert unlike > 0.1  # alpha = beta = 1 is not KD


def test_eq5_matches_mdistillers_formula(logits):
    """Masks with -1000 and sums probabilities, as the DKD paper's code does; here in float64."""
    s, t, y = (x.flatten(0, 1) for x in logits)
    tau, alpha, beta = 2.0, 1.0, 8.0
    hot = nn.functional.one_hot(y, s.shape[-1]).bool()

    def two(x):
        p = (x / tau).softmax(1)
        return torch.stack([(p * hot).sum(1), (p * ~hot).sum(1)], 1)

    tckd = nn.functional.kl_div(two(s).log(), two(t), reduction="sum") * tau**2 / len(y)
    others = [x / tau - 1000.0 * hot for x in (s, t)]
    nckd = nn.functional.kl_div(others[0].log_softmax(1), others[1].softmax(1), reduction="sum") * (
        tau**2 / len(y)
    )
    ours, _ = loss_of(*logits, "dkd", tau, alpha, beta, ce=0.0)
    assert ours.item() == pytest.approx((alpha * tckd + beta * nckd).item(), rel=1e-9)


def test_eq5_value_worked_by_hand():
    """Teacher (1/2, 1/4, 1/4), student (1/4, 1/2, 1/4), target the first of three classes."""
    t, s = torch.tensor([[[0.5, 0.25, 0.25]]]).log(), torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    y = torch.zeros(1, 1, dtype=torch.long)
    tckd = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    nckd = 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))
    assert l.tckd(s, t, y).item() == pytest.approx(tckd, rel=1e-5)
    assert l.nckd(s, t, y).item() == pytest.approx(nckd, rel=1e-5)
    total = loss_of(s, t, y, alpha=1.0, beta=4.0, ce=0.0)[0].item()
    assert total == pytest.approx(tckd + 4 * nckd, rel=1e-5)


def test_eq6_cross_entropy_is_by_the_target_and_without_temperature(logits):
    s, t, y = logits
    expected = mean(-math.log(q[k]) for _, q, k in rows_of(s, t, y))
    for tau in (1.0, 3.0):
        total, parts = loss_of(s, t, y, "ce", tau)
        assert total.item() == pytest.approx(expected, rel=1e-12)
        assert parts["ce"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", ["dkd", "kd", "ce"])
@pytest.mark.parametrize("masked", [False, True])
def test_eq7_is_the_weighted_mean_over_valid_frames(logits, loss, masked):
    s, t, y = logits
    valid = torch.ones(2, 5, dtype=torch.bool)
    if masked:
        valid[1, 2:] = False
    tau, alpha, beta, ce, kd = 2.0, 0.7, 3.0, 0.3, 1.7
    expected = []
    for row, plain, keep in zip(
        rows_of(s, t, y, tau), rows_of(s, t, y), valid.flatten().tolist(), strict=True
    ):
        if keep:
            soft = {
                "dkd": tau**2 * (alpha * loop_tckd(*row) + beta * loop_nckd(*row)),
                "kd": tau**2 * loop_kl(*row[:2]),
                "ce": 0.0,
            }[loss]
            expected.append(-ce * math.log(plain[1][plain[2]]) + kd * soft)
    total, parts = loss_of(s, t, y, loss, tau, alpha, beta, ce, kd, valid if masked else None)
    assert total.dtype == torch.float64  # the sum is not silently rounded
    assert total.item() == pytest.approx(mean(expected), rel=1e-10)
    assert set(parts) == {"ce", "kd", "tckd", "nckd"}
    assert not any(part.requires_grad for part in parts.values())


def test_s10_padding_duplicates_and_order_leave_the_loss_unchanged(logits):
    s, t, y = logits
    base = loss_of(s, t, y)[0].item()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 5:] = False
    s9, t9 = (torch.cat([x, 9 * torch.randn(2, 3, 7).double()], 1) for x in (s, t))
    y9 = torch.cat([y, torch.zeros(2, 3, dtype=torch.long)], 1)
    assert loss_of(s9, t9, y9, mask=mask)[0].item() == pytest.approx(base)
    assert loss_of(s9, t9, y9)[0].item() != pytest.approx(base)
    double = [torch.cat([x, x]) for x in logits]
    assert loss_of(*double)[0].item() == pytest.approx(base)
    assert loss_of(*(x.flip(0).flip(1) for x in logits))[0].item() == pytest.approx(base)
    order = torch.randperm(7)
    renamed = s[..., order], t[..., order], order.argsort()[y]
    assert loss_of(*renamed)[0].item() == pytest.approx(base)
    assert loss_of(s + 5, t - 3, y)[0].item() == pytest.approx(base)  # logits are up to a constant


def test_gradients_of_all_terms_pass_gradcheck_in_double(logits):
    s, t, y = (x[:1, :3, :5].clone() for x in (logits[0], logits[1], logits[2][..., None]))
    y = y.squeeze(-1).clamp(max=4)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: l.kl(s, t), s)
    assert torch.autograd.gradcheck(lambda s: l.tckd(s, t, y), s)
    assert torch.autograd.gradcheck(lambda s: l.nckd(s, t, y), s)
    for loss in ("dkd", "kd", "ce"):
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss_of(s, t, y, loss, 2.0, 0.5)[0], s)


def test_a_student_that_says_the_same_has_no_gradient_from_the_teacher_and_one_from_the_labels(
    logits,
):
    _, t, y = logits
    for loss, ce, zero in (("dkd", 0.0, True), ("kd", 0.0, True), ("dkd", 1.0, False)):
        s = (t + 2).requires_grad_()  # a constant more is the same distribution
        total, _ = loss_of(s, t, y, loss, ce=ce)
        total.backward()
        assert (s.grad.abs().max() < 1e-12) == zero
        assert ce or abs(total.item()) < 1e-12


@pytest.mark.parametrize("left", [1e-9, 1e-14, 1e-30])
def test_a_sure_teacher_keeps_its_digits_in_fp32(left):
    """p_y = 1 - 1e-9 is 1 in fp32: 1 - p_y would be 0, its logarithm -inf."""
    others = torch.tensor([0.2, 1.0, -0.7], dtype=torch.float64)
    top = others.logsumexp(0) - math.log(left)
    t = torch.cat([top[None], others])[None, None].float()
    s = torch.tensor([[[9.0, 0.3, 0.1, -0.2]]])
    y = torch.zeros(1, 1, dtype=torch.long)
    t64, s64 = t.double(), s.double()
    exact = []
    for x in (t64, s64):
        m = (x[0, 0, 0] - x[0, 0, 1:].logsumexp(0)).item()
        exact.append((-math.log1p(math.exp(-m)), -m - math.log1p(math.exp(-m))))
    (a, n), (b, o) = exact
    expected = math.exp(a) * (a - b) + math.exp(n) * (n - o)
    assert l.tckd(s, t, y).item() == pytest.approx(expected, rel=1e-5)
    p, q = t64[0, 0, 1:].softmax(0), s64[0, 0, 1:].softmax(0)
    assert l.nckd(s, t, y).item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    s.requires_grad_()
    total, _ = loss_of(s, t, y)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(s.grad).all() and s.grad.abs().max() > 0.1
    assert l.tckd(t, s.detach(), y).isfinite().all()  # and a student that is too sure


def test_loss_in_bf16_is_computed_in_float32(logits):
    s, t, y = logits
    total, _ = loss_of(s.bfloat16(), t.bfloat16(), y)
    assert total.dtype == torch.float32
    exact, _ = loss_of(s.bfloat16().double(), t.bfloat16().double(), y)
    assert total.item() == pytest.approx(exact.item(), rel=1e-5)


# ---- student ------------------------------------------------------------------------------------


def paper_student(**changes):
    c = l.Config(**changes)
    shape = l.Shape(2 * c.hidden, c.student, c.unidirectional)
    return l.Student(shape, c.student_layers, c.dropout, c.conv_gradient), shape


def test_paper_size_student_has_the_papers_parameter_counts():
    student, shape = paper_student()
    assert common.count_parameters(student) == 18_781_952  # with the front end of LARGE
    assert common.count_parameters(student.front_end) == 4_206_592
    assert common.count_parameters(student.projection) == 395_008
    assert common.count_parameters(student.body) == 14_180_352
    assert common.count_parameters(l.Heads(shape.width, shape.clusters)) == 384_500
    base = l.Student(replace(shape, conv_norm="group"), 4, 0.1, 0.1)
    assert common.count_parameters(base.front_end) == 4_200_448
    assert common.count_parameters(base) == 18_775_808


def test_s14_the_control_has_two_of_distilhuberts_layers():
    student, _ = paper_student(student="transformer", student_layers=2)
    assert common.count_parameters(student.body.layers) == 14_175_744
    assert common.count_parameters(student.body.positional_conv) == 4_719_488


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["base", "large"])
def test_s3_front_end_and_projection_of_the_teacher_give_its_features(kind, bias):
    config = {"base": encoder_config, "large": large}[kind](extractor_conv_bias=bias)
    teacher = common.Teacher(make_encoder(config), "test", kind == "large")
    teacher.label_embeddings = torch.randn(10, 12)
    student, heads = l.build(l.Config(hidden=8), teacher)
    assert heads.weight.shape == (10, 16)
    waves = torch.randn(2, 5000)
    ours = student(waves)[0][0]
    heard = common.normalise_waveforms(waves) if kind == "large" else waves
    with torch.no_grad():
        theirs = teacher.model.feature_extractor(heard, None)[0]
        theirs = teacher.model.encoder.feature_projection(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert student.shape.normalise == (kind == "large")  # S5


def test_s3_of_another_width_only_the_linear_is_new(teacher):
    source = teacher.model.encoder.feature_projection
    for hidden in (6, 8):
        student, _ = l.build(l.Config(hidden=hidden), teacher)
        norm, linear = student.projection
        assert torch.equal(norm.weight, source.layer_norm.weight)
        assert linear.weight.shape == (2 * hidden, 8)
        if hidden == 8:
            assert torch.equal(linear.weight, source.projection.weight)
    fresh, _ = l.build(l.Config(hidden=8, init_from_teacher=False), teacher)
    assert not torch.equal(fresh.projection[1].weight, source.projection.weight)
    assert not torch.equal(fresh.front_end.convs[0].weight, student.front_end.convs[0].weight)


def test_frames_are_those_of_hubert():
    samples = torch.tensor([400, 719, 720, 16_000, 250_000])
    assert make_student().front_end.frames(samples).tolist() == [1, 1, 2, 49, 781]
    assert make_student()(torch.randn(1, 719).double())[0][0].shape[1] == 1


def test_s2_body_is_torchs_four_layer_lstm_and_nothing_else():
    student = make_student()
    theirs = nn.LSTM(16, 8, 4, batch_first=True, bidirectional=True).double()
    for i, layer in enumerate(student.body.layers):
        for name, value in layer.named_parameters():
            parameter = dict(theirs.named_parameters())[name.replace("l0", f"l{i}")]
            parameter.data = value.data
    waves = torch.randn(2, 4000).double()
    hidden, lengths = student(waves)
    assert len(hidden) == 5 and lengths is None
    torch.testing.assert_close(hidden[-1], theirs(hidden[0])[0], rtol=1e-10, atol=1e-10)


def test_s2_dropout_is_on_the_input_of_each_layer():
    student = make_student(dropout=0.5).train()
    seen = []
    for layer in student.body.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hidden = student(torch.randn(1, 9000).double())[0]
    for given, before in zip(seen, hidden[:-1], strict=True):
        dropped = given == 0
        assert 0.3 < dropped.double().mean() < 0.7
        torch.testing.assert_close(given[~dropped], 2 * before[~dropped])


@pytest.mark.parametrize("causal", [False, True])
def test_s15_a_forget_gate_starts_open_and_the_other_biases_at_zero(causal):
    """A long input of zeros: the cell keeps sigmoid(1) of itself at each step, and adds nothing."""
    units = 16 if causal else 8
    for lstm in l.Student(replace(SMALL, causal=causal), 4, 0.0, 0.1).body.layers:
        for name, weight in lstm.named_parameters():
            if "weight" in name:  # torch draws from +- 1 / sqrt(units)
                scale = weight.abs().max().item() * units**0.5
                assert scale == pytest.approx(3 if causal and "ih" in name else 1, rel=0.1)
                nn.init.zeros_(weight)
        directions = 1 if causal else 2
        cell = torch.rand(directions, 1, units)
        _, (_, after) = lstm(torch.zeros(1, 3, 16), (torch.zeros_like(cell), cell))
        torch.testing.assert_close(after, cell * torch.sigmoid(torch.tensor(1.0)) ** 3)


def padded(students_shape):
    student = make_student(students_shape)
    waves, lengths = torch.randn(4, 6000).double(), torch.tensor([6000, 3003, 400, 5999])
    for i, n in enumerate(lengths):
        waves[i, n:] = 7.0  # whatever stands in the padding
    return student, waves, lengths


@pytest.mark.parametrize("kind", ["layer", "causal", "transformer"])
def test_padded_batch_equals_single_utterances_for_every_valid_frame(kind):
    shape = {"layer": SMALL, "causal": CAUSAL, "transformer": replace(SMALL, student=kind)}[kind]
    student, waves, lengths = padded(shape)
    batched, frames = student(waves, lengths)
    assert frames.tolist() == [18, 9, 1, 18]
    for i, n in enumerate(lengths):
        alone, _ = student(waves[i : i + 1, :n])
        for a, b in zip(batched, alone, strict=True):
            torch.testing.assert_close(a[i, : frames[i]], b[0], rtol=1e-9, atol=1e-10)
    if kind == "layer":  # without packing the backward direction starts in the padding
        wrong = student.body(batched[0])[0][-1]
        assert (wrong[1, : frames[1]] - batched[-1][1, : frames[1]]).abs().max() > 1e-3


def test_padded_batch_of_a_base_front_end_differs_by_its_group_norm_alone():
    student, waves, lengths = padded(BASE)
    i, n = 1, lengths[1]
    for exact in (False, True):
        if exact:
            student.front_end.norms[0] = nn.Identity()
        (*_, batched), frames = student(waves, lengths)
        (*_, alone), _ = student(waves[i : i + 1, :n])
        difference = (batched[i, : frames[i]] - alone[0]).abs().max()
        assert (difference < 1e-10) == exact


def test_equal_lengths_are_not_packed_and_an_utterance_without_a_frame_is_no_crash(monkeypatch):
    student = make_student()
    waves = torch.randn(2, 4000).double()
    hidden, frames = student(waves, torch.tensor([4000, 100]))
    assert frames.tolist() == [12, 0]
    (*_, alone), _ = student(waves[:1])
    torch.testing.assert_close(hidden[-1][:1], alone)

    def refuse(*_, **__):
        raise AssertionError("packed")

    monkeypatch.setattr(l, "pack_padded_sequence", refuse)
    (*_, same), _ = student(waves, torch.tensor([4000, 4000]))
    torch.testing.assert_close(same[:1], alone)
    with pytest.raises(AssertionError, match="packed"):
        student(waves, torch.tensor([4000, 3000]))


def test_s5_each_utterance_is_normalised_over_its_valid_samples():
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(2, 4000, generator=generator)
    lengths = torch.tensor([4000, 2500])
    for n in (None, lengths):
        torch.testing.assert_close(l.normalise(waves, n), common.normalise_waveforms(waves, n))
    student = make_student()
    loud = 5 * waves.double() + 3
    for a, b in zip(student(waves.double(), lengths)[0], student(loud, lengths)[0], strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    quiet = make_student(replace(SMALL, normalise=False))
    assert (quiet(waves.double())[0][-1] - quiet(loud)[0][-1]).abs().max() > 1e-3


def test_s4_gradient_into_the_convolutions_is_scaled_and_nothing_else():
    waves, grads = torch.randn(1, 2000).double(), {}
    for factor in (1.0, 0.1):
        student = make_student()
        student.conv_gradient = factor
        student(waves)[0][-1].square().sum().backward()
        grads[factor] = [p.grad for p in student.parameters()]
    names = [name for name, _ in student.named_parameters()]
    for name, full, scaled in zip(names, grads[1.0], grads[0.1], strict=True):
        expected = 0.1 * full if name.startswith("front_end") else full
        torch.testing.assert_close(scaled, expected)


def test_s12_the_lstm_stays_in_float32_under_autocast():
    student = make_student().float()
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = student(torch.randn(1, 3000))
        assert student.projection[1](torch.randn(2, 8)).dtype == torch.bfloat16
    assert all(state.dtype == torch.float32 for state in hidden)


def test_s14_the_controls_body_is_distilhuberts():
    shape = replace(SMALL, student="transformer")
    ours = make_student(shape, layers=2)
    names = ("conv_channels", "width", "attention_heads", "feed_forward", "position_kernel")
    sizes = {name: getattr(shape, name) for name in (*names, "position_groups")}
    theirs = distilhubert.Student(distilhubert.Shape(**sizes), 2, 0.0, 0.1).double().eval()
    state = theirs.state_dict() | ours.body.state_dict()
    assert set(state) == set(theirs.state_dict())
    theirs.load_state_dict(state)
    theirs.feature_extractor.forward = ours.front_end.forward
    theirs.projection = ours.projection
    waves, lengths = torch.randn(2, 5000).double(), torch.tensor([5000, 3000])
    heard = l.normalise(waves, lengths)
    for a, b in zip(ours(waves, lengths)[0], theirs(heard, lengths)[0], strict=True):
        torch.testing.assert_close(a, b)


# ---- streaming ----------------------------------------------------------------------------------


def cut(samples, generator, largest):
    """Random sizes from 0 to ``largest`` that add up to ``samples``."""
    sizes = []
    while sum(sizes) < samples:
        size = int(torch.randint(largest + 1, (), generator=generator))
        sizes.append(min(size, samples - sum(sizes)))
    return sizes


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("largest", [37, 500, 3000, 20_000])
def test_d2_stream_in_random_chunks_equals_the_whole_utterance(norm, largest):
    student = make_student(replace(CAUSAL, conv_norm=norm))
    waves = torch.randn(2, 7777).double()
    whole, _ = student(waves)
    state, heard, pieces = None, 0, []
    for size in cut(7777, torch.Generator().manual_seed(largest), largest):
        hidden, state = student.stream(waves[:, heard : heard + size], state)
        heard += size
        pieces.append(hidden)
        done = sum(piece[0].shape[1] for piece in pieces)
        assert done == max(0, common.frame_count(heard))  # no frame comes later than it could
        assert state[0].shape[1] < 400 + 320  # and what is kept does not grow
    assert len(pieces) > 1 or largest == 20_000
    for i, state in enumerate(whole):
        together = torch.cat([piece[i] for piece in pieces], 1)
        torch.testing.assert_close(together, state, rtol=1e-9, atol=1e-10)


def test_d2_stream_in_float32_and_two_streams_do_not_mix():
    student = make_student(CAUSAL).float()
    waves = torch.randn(2, 1, 8000)
    states, outputs = [None, None], [[], []]
    for start in range(0, 8000, 1000):
        for k in (0, 1):
            hidden, states[k] = student.stream(waves[k, :, start : start + 1000], states[k])
            assert not hidden[-1].requires_grad
            outputs[k].append(hidden[-1])
    for k in (0, 1):
        whole = student(waves[k])[0][-1]
        torch.testing.assert_close(torch.cat(outputs[k], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_d3_no_frame_of_the_causal_student_hears_the_future(norm):
    waves = torch.randn(1, 5000).double()
    later = waves.clone()
    later[:, 320 * 7 + 400 :] += 1.0  # frames 0 to 7 end here
    for causal in (True, False):
        student = make_student(replace(CAUSAL, conv_norm=norm, causal=causal))
        for a, b in zip(student(waves)[0][1:], student(later)[0][1:], strict=True):
            assert torch.equal(a[:, :8], b[:, :8]) == causal
            assert not torch.equal(a[:, 8:], b[:, 8:])


def test_d3_a_causal_base_student_starts_from_the_group_norm_and_hears_no_normalised_wave(teacher):
    config = l.Config(hidden=8, unidirectional=True)
    student, _ = l.build(config, teacher)
    block = teacher.model.feature_extractor.conv_layers[0]
    assert torch.equal(student.front_end.convs[0].weight, block.conv.weight)
    (norm,) = student.front_end.norms
    assert torch.equal(norm.weight, block.layer_norm.weight)
    waves = torch.randn(1, 4000)  # in training it normalises by the batch: one utterance is it
    with torch.no_grad():
        ours = student.train().front_end(waves)
    torch.testing.assert_close(ours, teacher.model.feature_extractor(waves, None)[0])
    assert student.body.layers[0].hidden_size == 16  # D2: the width stays
    normalising = common.Teacher(make_encoder(large()), "test", True)
    normalising.label_embeddings = torch.randn(10, 12)
    student, _ = l.build(config, normalising)
    assert len(student.front_end.norms) == 7 and not student.shape.normalise
    theirs = normalising.model.feature_extractor.conv_layers[0].layer_norm
    assert torch.equal(student.front_end.norms[0].weight, theirs.weight)


def test_a_bidirectional_student_does_not_stream():
    for shape in (SMALL, replace(SMALL, student="transformer")):
        with pytest.raises(ValueError, match="--unidirectional"):
            make_student(shape).stream(torch.randn(1, 1000).double())


# ---- teachers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["base", "large"])
@pytest.mark.parametrize("form", ["own", "torchaudio", "fairseq", "s3prl"])
def test_s7_logits_are_those_of_hubert_pretrain_model_on_unmasked_frames(form, kind, tmp_path):
    """LARGE-shaped: pre-norm with a LayerNorm before the head, and audio normalised each."""
    config = encoder_config(**WIDE) if kind == "base" else large(**WIDE)
    hubert = make_hubert(config)
    checkpoint = {
        "own": lambda: {"config": pretrain_config(config), "state_dict": hubert.state_dict()},
        "torchaudio": hubert.state_dict,
        "fairseq": lambda: fairseq_checkpoint(hubert),
        "s3prl": lambda: s3prl_checkpoint(hubert),
    }[form]()
    torch.save(checkpoint, tmp_path / "hubert.pt")
    teacher = l.load_teacher(l.Config(teacher=str(tmp_path / "hubert.pt")), torch.device("cpu"))
    waves = torch.randn(2, 5000) * torch.tensor([[1.0], [20.0]])
    heard = nn.functional.layer_norm(waves, waves.shape[1:]) if kind == "large" else waves
    ours, theirs = l.teacher_logits(teacher, waves), logits_by_torchaudio(hubert, heard)
    assert ours.shape == (2, 15, 10) and not ours.requires_grad
    assert (ours - theirs).abs().max() < 1e-3
    assert theirs.std() > 0.1  # there is something to get wrong
    student, heads = l.build(l.Config(hidden=64), teacher)
    assert student.shape.normalise == (kind == "large") and heads.out_features == 10


@pytest.mark.parametrize("checkpoint", [fairseq_checkpoint, s3prl_checkpoint])
def test_s8_cluster_k_is_row_k_plus_4_of_fairseq(checkpoint, tmp_path):
    """The rows of special symbols would win everywhere here, if they were not left out."""
    saved = checkpoint(make_hubert(encoder_config(**WIDE)))
    state = saved.get("model", saved.get("model_weight"))
    rows = state["label_embs_concat"]
    assert len(rows) == 14
    state["final_proj.weight"] = torch.zeros_like(state["final_proj.weight"])
    state["final_proj.bias"] = rows[0].clone()  # every frame is projected on a special row
    rows[4 + 6] = rows[0] + 0.1 * torch.randn_like(rows[0])  # nearest cluster: 6
    torch.save(saved, tmp_path / "hubert.pt")
    teacher = l.load_teacher(l.Config(teacher=str(tmp_path / "hubert.pt")), torch.device("cpu"))
    logits = l.teacher_logits(teacher, torch.randn(1, 2000))
    assert logits.shape[-1] == 10 and (logits.argmax(-1) == 6).all()
    expected = 10 * nn.functional.cosine_similarity(rows[0], rows[4:], dim=-1)
    torch.testing.assert_close(logits[0, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", ["os.system", "exec", "getattr", "nested"])
def test_a_hostile_teacher_runs_nothing_and_still_teaches(attack, zipped, tmp_path):
    hubert, target = make_hubert(encoder_config(**WIDE)), tmp_path / "owned"
    saved = fairseq_checkpoint(hubert) | {"cfg": attacks(target)[attack]}
    torch.save(saved, tmp_path / "hubert.pt", _use_new_zipfile_serialization=zipped)
    teacher = l.load_teacher(l.Config(teacher=str(tmp_path / "hubert.pt")), torch.device("cpu"))
    waves = torch.randn(1, 3000)
    ours, theirs = l.teacher_logits(teacher, waves), logits_by_torchaudio(hubert, waves)
    assert (ours - theirs).abs().max() < 1e-3
    assert not target.exists()


def test_a_teacher_without_a_head_names_the_files_that_have_one(tmp_path, monkeypatch):
    monkeypatch.setattr(common.BUNDLES["hubert_base"], "get_model", None)  # nothing is downloaded
    torch.save(make_encoder(encoder_config(**WIDE)).state_dict(), tmp_path / "bare.pt")
    cases = {"hubert_base": "no cluster head", str(tmp_path / "bare.pt"): "no cluster head"}
    for name, problem in (cases | {l.Config.teacher: "does not exist"}).items():
        with pytest.raises(common.InputError, match=problem) as caught:
            l.load_teacher(l.Config(teacher=name), torch.device("cpu"))
        for word in (name, "hubert_large_ll60k.pt", "hubert_base_ls960.pt", "s3prl", "toy"):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)


def test_logits_are_float32_where_the_teacher_runs_in_bf16(teacher):
    waves = torch.randn(1, 4000)
    exact, rounded = (l.teacher_logits(teacher, waves, amp) for amp in (False, True))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 1.0


# ---- labels -------------------------------------------------------------------------------------


def write_labels(folder, utterances, labels):
    """A fairseq .km and its .tsv, in another order than the utterances."""
    order = list(range(len(utterances)))[::-1]
    root = Path(utterances[0].path).parent
    names = [f"{Path(utterances[i].path).name}\t{utterances[i].samples}" for i in order]
    (folder / "train.tsv").write_text("\n".join([str(root), *names]) + "\n")
    lines = [" ".join(map(str, labels[i])) for i in order]
    (folder / "train.km").write_text("\n".join(lines) + "\n")
    return folder / "train.km"


@pytest.fixture
def utterances(audio_folder, tmp_path):
    return common.scan(audio_folder, tmp_path / "scan.jsonl", 1)


@pytest.fixture
def km(utterances, tmp_path):
    labels = [
        [(i + t) % 10 for t in range(common.frame_count(u.samples))]
        for i, u in enumerate(utterances)
    ]
    return write_labels(tmp_path, utterances, labels), labels


def test_s6_labels_are_found_by_the_name_in_the_manifest(utterances, km):
    path, labels = km
    for chosen in (utterances, utterances[3:5]):
        found = common.read_labels(str(path), chosen, 10)
        assert [x.tolist() for x in found] == [labels[utterances.index(u)] for u in chosen]
        assert all(x.dtype == torch.int64 for x in found)


def spoil(name, replacement):
    def change(path):
        file = path.with_suffix(name)
        file.unlink() if replacement is None else file.write_text(replacement(file.read_text()))

    return change


LABEL_MISTAKES = {
    "no km": (spoil(".km", None), "train.km does not exist"),
    "no tsv": (spoil(".tsv", None), "train.tsv does not exist"),
    "a line less": (spoil(".km", lambda x: x.split("\n", 1)[1]), "11 lines, but .*names 12"),
    "empty tsv": (spoil(".tsv", lambda _: ""), "12 lines, but .*names 0"),
    "other files": (spoil(".tsv", lambda x: x.replace(".wav", ".mp3")), "does not name .*00.wav"),
    "a label less": (spoil(".km", lambda x: x[2:]), r"line 1: \d+ labels, but .*11.wav has \d+ fr"),
    "label too large": (spoil(".km", lambda x: "10 " + x[2:]), "line 1: label 10, .* 0 to 9"),
    "negative label": (spoil(".km", lambda x: "-1 " + x[2:]), "line 1: label -1"),
    "no number": (spoil(".km", lambda x: "x " + x[2:]), "line 1: label x"),
}


@pytest.mark.parametrize("mistake", LABEL_MISTAKES)
def test_a_mistake_in_the_labels_is_one_sentence(mistake, utterances, km):
    change, words = LABEL_MISTAKES[mistake]
    change(km[0])
    with pytest.raises(common.InputError, match=words) as caught:
        common.read_labels(str(km[0]), utterances, 10)
    assert "\n" not in str(caught.value)


def test_targets_are_compared_with_the_unmasked_teacher_before_training(
    teacher, tiny_teacher, audio_folder, utterances, tmp_path, capsys
):
    one = utterances[0]
    frames = common.frame_count(one.samples)
    samples = 320 * frames + 80  # no more than its frames hear, so that it is cropped to itself
    wave = common.load_audio(one.path, 0, samples)
    logits = l.teacher_logits(teacher, wave[None])[0]
    best, cut = logits.argmax(-1).tolist(), (frames + 1) // 3
    labels = best[:cut] + [(k + 1) % 10 for k in best[cut:]]
    path = write_labels(tmp_path, [one], [labels])
    config = small_config(
        tiny_teacher, audio_folder, tmp_path / "a", crop_seconds=samples / 16_000, labels=str(path)
    )
    line = l.look_at_targets(config, teacher, [one])
    top = logits.softmax(-1).max(-1)[0].mean().item()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert f"agrees in {cut / frames:.1%} of frames" in line
    assert f"is {top:.2f}" in line and f"{entropy:.2f} of {math.log(10):.2f} nats" in line
    config = replace(config, labels="")
    assert "by construction" in l.look_at_targets(config, teacher, [one])
    l.train(replace(config, steps=1))
    assert "by construction" in capsys.readouterr().err


def test_s6_given_labels_are_learned_and_not_the_teachers(
    tiny_teacher, audio_folder, utterances, tmp_path
):
    path = write_labels(
        tmp_path, utterances, [[3] * common.frame_count(u.samples) for u in utterances]
    )
    config = small_config(
        tiny_teacher, audio_folder, tmp_path / "run", labels=str(path), loss="ce", lr=0.1, steps=12
    )
    student, heads, history = l.train(config)
    assert (heads(student(torch.randn(1, 8000))[0][-1]).argmax(-1) == 3).all()
    assert history[-1]["ce"] < 0.1 * history[0]["ce"]


def test_s6_without_labels_the_target_is_the_teachers_top_class(
    tiny_teacher, audio_folder, tmp_path, monkeypatch
):
    real, seen = l.distillation_loss, []

    def spy(student_logits, teacher_logits, target, loss, *weights):
        seen.append((teacher_logits, target, loss, weights))
        return real(student_logits, teacher_logits, target, loss, *weights)

    monkeypatch.setattr(l, "distillation_loss", spy)
    numbers = dict(tau=2.0, alpha=3.0, beta=5.0, ce_weight=7.0, kd_weight=11.0)
    l.train(small_config(tiny_teacher, audio_folder, tmp_path / "run", steps=1, **numbers))
    soft, target, loss, weights = seen[0]
    assert torch.equal(target, soft.argmax(-1)) and loss == "dkd"
    assert weights == (2.0, 3.0, 5.0, 7.0, 11.0)


# ---- training -----------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    config = l.Config()
    assert (config.tau, config.alpha, config.beta) == (1.0, 1.0, 4.0)
    assert (config.steps, config.lr, config.hidden, config.student_layers) == (
        200_000,
        2e-4,
        384,
        4,
    )
    assert config.ce_weight == config.kd_weight == 1.0  # S9
    assert round(config.warmup * config.steps) == 14_000
    # D1: 32 of DistilHuBERT's average utterances, of which 24 are 290 s
    assert config.batch_seconds == pytest.approx(32 / 24 * 290, abs=0.5)


def test_learning_rate_has_the_papers_corners():
    config = l.Config()
    assert l.learning_rate(1, config) == pytest.approx(2e-4 / 14_000)
    assert l.learning_rate(14_000, config) == pytest.approx(2e-4)
    assert l.learning_rate(107_000, config) == pytest.approx(1e-4)
    assert l.learning_rate(200_000, config) == 0.0


@pytest.mark.parametrize("changes", [{}, {"unidirectional": True}, l.CLAIM["Transformer"]])
def test_gradients_reach_all_of_the_student_and_nothing_of_the_teacher(tiny_teacher, changes):
    teacher = common.load_teacher(str(tiny_teacher))
    before = copy.deepcopy(teacher.state_dict())
    student, heads = l.build(l.Config(hidden=8, **changes), teacher)
    student.train(), heads.train(), teacher.train()
    assert not any(module.training for module in teacher.modules())
    waves = torch.randn(2, 4000)
    soft = l.teacher_logits(teacher, waves)
    predicted = heads(student(waves)[0][-1])
    loss_of(predicted, soft, soft.argmax(-1))[0].backward()
    for name, parameter in [*student.named_parameters(), *heads.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_first_weights_follow_from_the_seed_alone(teacher):
    weights = []
    for state, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(state)
        config = l.Config(hidden=8, seed=seed, init_from_teacher=False)
        student, heads = l.build(config, teacher)
        weights.append([*student.parameters(), *heads.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights[:2], strict=True))
    assert not torch.equal(weights[0][-2], weights[2][-2])


def test_streaming_transformers_are_refused_by_name(teacher):
    config = l.Config(hidden=8, student="transformer", unidirectional=True)
    with pytest.raises(common.InputError, match="--unidirectional"):
        l.build(config, teacher)


def test_s14_a_transformer_has_the_teachers_proportions_or_a_sentence(teacher):
    for hidden, heads, feed_forward in ((8, 2, 32), (16, 4, 64), (4, 1, 16)):
        student, _ = l.build(l.Config(hidden=hidden, student="transformer"), teacher)
        assert student.body.layers[0].heads == heads
        assert student.body.layers[0].up.out_features == feed_forward
        assert student.shape.position_kernel == 8
    with pytest.raises(common.InputError, match="--hidden 13: .* multiple of 6"):
        l.build(l.Config(hidden=13, student="transformer"), teacher)
    l.build(l.Config(hidden=13), teacher)  # an LSTM may have any width


def test_one_batch_can_be_learned(teacher):
    """300 updates on one batch: the head's top class becomes the teacher's, KL almost nothing."""
    student, heads = l.build(l.Config(hidden=16, dropout=0.0), teacher)
    waves = torch.randn(2, 4000)
    sharp = 3 * l.teacher_logits(teacher, waves)  # the random teacher is unsure
    target = sharp.argmax(-1)
    optimizer = torch.optim.AdamW([*student.parameters(), *heads.parameters()], lr=1e-2)
    losses = []
    for _ in range(300):
        predicted = heads(student(waves)[0][-1])
        loss, parts = loss_of(predicted, sharp, target)
        losses.append(parts["kd"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert (predicted.argmax(-1) == target).float().mean() > 0.9


def log_of(out):
    return (Path(out) / "log.jsonl").read_text()


def test_same_seed_same_run_and_another_seed_another(tiny_teacher, audio_folder, tmp_path):
    logs, weights = {}, {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = small_config(tiny_teacher, audio_folder, tmp_path / name, seed=seed, steps=4)
        student, _, history = l.train(config)
        logs[name], weights[name] = log_of(tmp_path / name), student.state_dict()
        assert [line["step"] for line in history] == [2, 4]
        assert set(history[-1]["heldout"]) == {"agreement", "KL"}
    assert logs["a"] == logs["b"] != logs["c"]
    assert all(torch.equal(v, weights["b"][k]) for k, v in weights["a"].items())


def test_resume_after_n_of_2n_updates_gives_the_same_bits(
    tiny_teacher, audio_folder, km, tmp_path, monkeypatch
):
    config = small_config(tiny_teacher, audio_folder, tmp_path / "whole", labels=str(km[0]))
    l.train(config)
    real = common.save_run

    def stop(*args, **rest):
        real(*args, **rest)
        raise KeyboardInterrupt

    broken = replace(config, out=str(tmp_path / "broken"))
    monkeypatch.setattr(common, "save_run", stop)
    with pytest.raises(KeyboardInterrupt):
        l.train(broken)
    monkeypatch.setattr(common, "save_run", real)
    l.train(broken, resume=True)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    ours, theirs = (common.load_checkpoint(tmp_path / n / "last.pt") for n in ("broken", "whole"))
    for part in ("state_dict", "heads"):
        assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items())


def test_accumulation_gives_the_same_update(tiny_teacher, audio_folder, km, tmp_path):
    weights = []
    for parts in (1, 3):
        config = small_config(
            tiny_teacher, audio_folder, tmp_path / str(parts), steps=2, accumulate=parts,
            dropout=0.0, warmup=0.5, labels=str(km[0]),
        )  # fmt: skip
        student, _, history = l.train(config)
        weights.append((student.state_dict(), history[-1]["loss"]))
    assert weights[0][1] == pytest.approx(weights[1][1], rel=1e-5)
    for name, value in weights[0][0].items():
        torch.testing.assert_close(value, weights[1][0][name], rtol=1e-3, atol=1e-5)


def test_s11_decay_spares_biases_and_norms(tiny_teacher, audio_folder, tmp_path, monkeypatch):
    seen = []
    real = torch.optim.AdamW

    def spy(groups, **settings):
        seen.append((groups, settings))
        return real(groups, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    student, heads, _ = l.train(small_config(tiny_teacher, audio_folder, tmp_path / "r", steps=1))
    (decayed, spared), settings = seen[0]
    assert settings["weight_decay"] == 0.01 and spared["weight_decay"] == 0.0
    names = {id(p): n for m in (student, heads) for n, p in m.named_parameters()}
    spared_names = {names[id(p)] for p in spared["params"]}
    assert {"body.layers.0.bias_hh_l0_reverse", "projection.0.weight", "bias"} <= spared_names
    assert all("bias" in n or "norm" in n or n == "projection.0.weight" for n in spared_names)
    assert len(spared["params"]) + len(decayed["params"]) == len(names)


def test_dropout_is_on_in_training_and_off_outside(tiny_teacher, audio_folder, tmp_path):
    logs = {}
    for rate in (0.0, 0.5):
        out = tmp_path / str(rate)
        config = small_config(tiny_teacher, audio_folder, out, steps=2, save_every=1, dropout=rate)
        student, _, history = l.train(config)
        logs[rate] = [line["loss"] for line in history]
        waves = torch.randn(1, 3000)
        assert torch.equal(student(waves)[0][-1], student(waves)[0][-1])
    assert logs[0.0][1] != logs[0.5][1]  # the second update follows a pass in eval mode


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(
    tiny_teacher, audio_folder, tmp_path
):
    config = small_config(tiny_teacher, audio_folder, tmp_path / "run", lr=1e18, save_every=1)
    with pytest.raises(common.InputError, match="not finite at update"):
        l.train(config)
    saved = common.load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(torch.isfinite(v).all() for v in saved["state_dict"].values())


@pytest.mark.parametrize("changes", [{}, {"unidirectional": True}, l.CLAIM["Transformer"]])
def test_student_file_holds_the_student_and_no_class_head(
    changes, tiny_teacher, audio_folder, tmp_path
):
    config = small_config(tiny_teacher, audio_folder, tmp_path / "run", steps=1, **changes)
    student, _, _ = l.train(config)
    raw = torch.load(tmp_path / "run" / "student.pt", weights_only=True)
    assert set(raw["state_dict"]) == set(student.state_dict())
    loaded = l.load_student(tmp_path / "run" / "student.pt")
    waves, lengths = torch.randn(2, 4000), torch.tensor([4000, 3000])
    assert not loaded.training
    for a, b in zip(loaded(waves, lengths)[0], student(waves, lengths)[0], strict=True):
        assert torch.equal(a, b)


# ---- evaluation ---------------------------------------------------------------------------------


def test_s13_the_feature_is_all_layers(monkeypatch):
    student, seen = make_student().float(), []
    monkeypatch.setattr(common, "cost", lambda *_: {})
    monkeypatch.setattr(common, "run_probes", lambda features, *_: seen.append(features) or {})
    l.score(student, [], torch.device("cpu"), 0)
    hidden, _ = seen[0](torch.randn(1, 3000), None)
    assert [state.shape for state in hidden] == [(1, 9, 16)] * 5


def test_agreement_is_top_1_and_kl_to_the_teacher_on_held_out_audio(
    teacher, tiny_teacher, audio_folder, utterances, tmp_path
):
    config = small_config(tiny_teacher, audio_folder, tmp_path / "x", crop_seconds=9.0)
    student, heads = l.build(config, teacher)
    found = l.agreement(config, teacher, student.train(), heads, utterances[:2])
    assert not student.training
    same, distance = [], []
    for batch in common.heldout_batches(utterances[:2], config.batch_seconds, 9.0):
        with torch.no_grad():
            s, t = heads(student(batch)[0][-1]), l.teacher_logits(teacher, batch)
        for p, q, _ in rows_of(s, t, t.argmax(-1)):
            same.append(p.index(max(p)) == q.index(max(q)))
            distance.append(loop_kl(p, q))
    assert found["agreement"] == pytest.approx(mean(same))
    assert found["KL"] == pytest.approx(mean(distance), rel=1e-4)


def test_claim_rows_are_the_config_with_a_few_fields_changed():
    assert list(l.CLAIM) == ["KD", "cross-entropy", "beta 1", "Transformer"]
    for changes in l.CLAIM.values():
        assert replace(l.Config(), **changes) != l.Config()


def test_table_of_a_run_has_all_rows_and_columns(tiny_teacher, audio_folder, tmp_path):
    config = small_config(tiny_teacher, audio_folder, tmp_path / "run", steps=1)
    rows = l.distil(config)
    assert list(rows) == ["teacher", "untrained", "initialised", "distilled"]
    for row in list(rows)[1:]:
        assert {"parameters", "GMAC/s", "speed", "agreement", "KL"} <= set(rows[row])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loss"] == "dkd"
    assert list(l.evaluate(config, *l.build(config, l.load_teacher(config, "cpu")), False)) == [
        "distilled"
    ]


def test_first_weights_have_the_scales_that_are_said():
    torch.manual_seed(0)
    student = l.Student(replace(SMALL, width=64, conv_channels=32), 2, 0.0, 0.1)
    assert student.projection[1].weight.std().item() == pytest.approx(0.02, rel=0.1)
    conv = student.front_end.convs[3].weight  # He: variance 2 / inputs
    assert conv.std().item() == pytest.approx(math.sqrt(2 / conv[0].numel()), rel=0.1)
    assert not student.projection[1].bias.any()


def test_an_utterance_of_no_sample_at_all_gives_numbers():
    waveforms, lengths = torch.randn(2, 5000).double(), torch.tensor([5000, 0])
    assert torch.isfinite(l.normalise(waveforms, lengths)).all()
    hidden_states, _ = make_student()(waveforms, lengths)
    assert torch.isfinite(hidden_states[-1]).all()


def test_d2_the_state_of_a_stream_does_not_hold_on_to_the_chunk():
    _, (samples, _) = make_student(CAUSAL).stream(torch.randn(1, 20_000).double())
    assert samples.untyped_storage().nbytes() == samples.numel() * 8 < 8 * 800


def test_s12_class_head_and_its_gradient_are_float32_under_autocast(
    tiny_teacher, audio_folder, tmp_path, monkeypatch
):
    """As on CUDA with --amp: what reaches the loss is float32 on both sides."""
    seen, real = [], l.distillation_loss

    def spy(student_logits, teacher_logits, *rest):
        seen.append((student_logits.dtype, teacher_logits.dtype))
        return real(student_logits, teacher_logits, *rest)

    cast = torch.autocast
    monkeypatch.setattr(l, "distillation_loss", spy)
    monkeypatch.setattr(
        torch, "autocast", lambda kind, dtype=None, enabled=True: cast(kind, dtype, bool(dtype))
    )
    l.train(small_config(tiny_teacher, audio_folder, tmp_path / "run", steps=2))
    assert seen and set(seen) == {(torch.float32, torch.float32)}


def test_settings_that_mean_nothing_are_refused(teacher):
    for settings, words in (
        (dict(ce_weight=0.0, loss="ce"), "--ce-weight"),
        (dict(ce_weight=0.0, kd_weight=0.0), "--kd-weight"),
        (dict(unidirectional=True, student="transformer"), "--unidirectional"),
    ):
        for use in (lambda c: l.build(c, teacher), l.describe):
            with pytest.raises(common.InputError, match=words):
                use(l.Config(**settings))


@pytest.mark.parametrize("name", ["no_such_teacher", "gone.pth", "hubert_large_ll60k.pt"])
def test_a_teacher_that_is_not_there_names_those_that_have_a_head(name):
    with pytest.raises(common.InputError, match=f"{name} does not exist.*hubert_base_ls960.pt"):
        l.load_teacher(l.Config(teacher=name), torch.device("cpu"))
