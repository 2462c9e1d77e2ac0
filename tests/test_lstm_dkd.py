"""lstm_dkd.py: equations, student, start from the teacher, targets, agreement."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import encoder_config, large, make_hubert, pretrain_config, shake, tiny_run
from torch import nn

import common
import lstm_dkd as l

SMALL = l.Shape(width=16, clusters=10, conv_channels=8)
BASE = replace(SMALL, conv_norm="group", normalise=False)


def make_student(shape=SMALL, layers=4, dropout=0.0):
    """A small student in float64 whose biases and norms are off their first values."""
    torch.manual_seed(0)
    return shake(l.Student(shape, layers, dropout, conv_gradient=0.1)).double()


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


def test_paper_size_student_has_the_papers_parameter_counts():
    config = l.Config()
    shape = l.Shape(2 * config.hidden)  # with the front end of LARGE
    student = l.Student(shape, config.student_layers, config.dropout, config.conv_gradient)
    assert common.count_parameters(student.front_end) == 4_206_592
    assert common.count_parameters(student.projection) == 395_008
    assert common.count_parameters(student.body) == 14_180_352
    assert common.count_parameters(student) == 18_781_952
    assert common.count_parameters(l.Heads(shape.width, shape.clusters)) == 384_500
    base = l.FrontEnd(replace(shape, conv_norm="group"))
    assert common.count_parameters(base) == 4_200_448


def test_first_weights_have_the_scales_that_are_said():
    torch.manual_seed(0)
    student = l.Student(replace(SMALL, width=64, conv_channels=32), 2, 0.0, 0.1)
    assert student.projection[1].weight.std().item() == pytest.approx(0.02, rel=0.1)
    conv = student.front_end.convs[3].weight  # He: variance 2 / inputs
    assert conv.std().item() == pytest.approx(math.sqrt(2 / conv[0].numel()), rel=0.1)
    assert not student.projection[1].bias.any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [encoder_config, large])
def test_s3_front_end_and_projection_of_the_teacher_give_its_features(kind, bias):
    model, normalise = make_hubert(kind(extractor_conv_bias=bias)).wav2vec2, kind is large
    embeddings = torch.randn(10, 12)
    teacher = common.Teacher(model, "test", normalise, label_embeddings=embeddings)
    student, heads = l.build(l.Config(hidden=8), teacher)
    assert heads.weight.shape == (10, 16)
    waves = 3 * torch.randn(2, 5000) + 1
    heard = nn.functional.layer_norm(waves, (5000,)) if normalise else waves  # S5
    with torch.no_grad():
        theirs = model.encoder.feature_projection(model.feature_extractor(heard, None)[0])
        ours = student(waves)[0][0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_s3_of_another_width_only_the_linear_is_new(teacher):
    source, convs = teacher.model.encoder.feature_projection, teacher.model.feature_extractor
    for hidden, start in ((6, True), (8, True), (8, False)):
        config = l.Config(hidden=hidden, student_layers=2, init_from_teacher=start)
        student, _ = l.build(config, teacher)
        norm, linear = student.projection
        assert len(student.body.layers) == 2 and linear.weight.shape == (2 * hidden, 8)
        assert torch.equal(norm.weight, source.layer_norm.weight) == start
        conv, theirs = student.front_end.convs[0].weight, convs.conv_layers[0].conv.weight
        assert torch.equal(conv, theirs) == start
        same = torch.equal(linear.weight, source.projection.weight)
        assert same == (start and hidden == 8)


def test_frames_are_those_of_hubert():
    samples = torch.tensor([400, 719, 720, 16_000, 250_000])
    assert make_student().front_end.frames(samples).tolist() == [1, 1, 2, 49, 781]
    assert make_student()(torch.randn(1, 719).double())[0][0].shape[1] == 1


def test_s2_body_is_torchs_four_layer_lstm_and_nothing_else():
    student = make_student()
    theirs = nn.LSTM(16, 8, 4, batch_first=True, bidirectional=True).double()
    for i, layer in enumerate(student.body.layers):
        for name, value in layer.named_parameters():
            getattr(theirs, name.replace("l0", f"l{i}")).data = value.data
    hidden, lengths = student(torch.randn(2, 4000).double())
    assert len(hidden) == 5 and lengths is None
    torch.testing.assert_close(hidden[-1], theirs(hidden[0])[0], rtol=1e-10, atol=1e-10)


def test_s2_dropout_is_on_the_input_of_each_layer():
    student, seen = make_student(dropout=0.5).train(), []
    for layer in student.body.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hidden = student(torch.randn(1, 9000).double())[0]
    for given, before in zip(seen, hidden[:-1], strict=True):
        dropped = given == 0
        assert 0.3 < dropped.double().mean() < 0.7
        torch.testing.assert_close(given[~dropped], 2 * before[~dropped])


def test_s14_a_forget_gate_starts_open_and_the_other_biases_at_zero():
    """An input of zeros: the cell keeps sigmoid(1) of itself at each step, and adds nothing."""
    for lstm in l.Student(SMALL, 4, 0.0, 0.1).body.layers:
        for name, weight in lstm.named_parameters():
            if "weight" in name:  # torch draws from +- 1 / sqrt(units)
                assert weight.abs().max().item() == pytest.approx(8**-0.5, rel=0.1)
                nn.init.zeros_(weight)
        cell = torch.rand(2, 1, 8)
        _, (_, after) = lstm(torch.zeros(1, 3, 16), (torch.zeros_like(cell), cell))
        torch.testing.assert_close(after, cell * torch.sigmoid(torch.tensor(1.0)) ** 3)


def padded():
    waves, lengths = torch.randn(4, 6000).double(), torch.tensor([6000, 3003, 400, 5999])
    for wave, n in zip(waves, lengths):
        wave[n:] = 7.0  # whatever stands in the padding
    return waves, lengths


def test_padded_batch_equals_single_utterances_for_every_valid_frame():
    student, (waves, lengths) = make_student(), padded()
    batched, frames = student(waves, lengths)
    assert frames.tolist() == [18, 9, 1, 18]
    for i, n in enumerate(lengths):
        alone, _ = student(waves[i : i + 1, :n])
        for a, b in zip(batched, alone, strict=True):
            torch.testing.assert_close(a[i, : frames[i]], b[0], rtol=1e-9, atol=1e-10)
    wrong = student.body(batched[0])[-1]  # not packed, the backward direction reads the padding
    assert (wrong[1, : frames[1]] - batched[-1][1, : frames[1]]).abs().max() > 1e-3


def test_padded_batch_of_a_base_front_end_differs_by_its_group_norm_alone():
    student, (waves, lengths) = make_student(BASE), padded()
    for exact in (False, True):
        if exact:
            student.front_end.norms[0] = nn.Identity()
        (*_, batched), frames = student(waves, lengths)
        (*_, alone), _ = student(waves[1:2, : lengths[1]])
        difference = (batched[1, : frames[1]] - alone[0]).abs().max()
        assert (difference < 1e-10) == exact


def test_equal_lengths_are_not_packed_and_an_utterance_without_a_frame_is_no_crash(monkeypatch):
    student, waves = make_student(), torch.randn(2, 4000).double()
    (*_, alone), _ = student(waves[:1])
    for samples in (100, 0):
        hidden, frames = student(waves, torch.tensor([4000, samples]))
        assert frames.tolist() == [12, (samples - 400) // 320 + 1]
        torch.testing.assert_close(hidden[-1][:1], alone)
        assert torch.isfinite(hidden[-1]).all()

    def refuse(*_, **__):
        raise AssertionError("packed")

    monkeypatch.setattr(l, "pack_padded_sequence", refuse)
    (*_, same), _ = student(waves, torch.tensor([4000, 4000]))
    torch.testing.assert_close(same[:1], alone)
    with pytest.raises(AssertionError, match="packed"):
        student(waves, torch.tensor([4000, 3000]))


def test_s5_each_utterance_is_normalised_over_its_valid_samples():
    waves, lengths = 3 * torch.randn(2, 4000).double() + 1, torch.tensor([4000, 2500])
    for given in (lengths, None):
        ours = l.normalise(waves, given)
        for wave, row, n in zip(waves, ours, lengths if given is not None else [4000] * 2):
            expected = (wave[:n] - wave[:n].mean()) / (wave[:n].var(correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(row[:n], expected)
            assert not row[n:].any()
    for normalise in (True, False):
        student = make_student(replace(SMALL, normalise=normalise))
        difference = student(waves)[0][-1] - student(5 * waves + 3)[0][-1]
        assert (difference.abs().max() < 1e-4) == normalise


def test_s4_gradient_into_the_convolutions_is_scaled_and_nothing_else():
    waves, grads = torch.randn(1, 2000).double(), {}
    for factor in (1.0, 0.1):
        student = make_student()
        student.conv_gradient = factor
        student(waves)[0][-1].square().sum().backward()
        grads[factor] = {name: p.grad for name, p in student.named_parameters()}
    for name, full in grads[1.0].items():
        expected = 0.1 * full if name.startswith("front_end") else full
        torch.testing.assert_close(grads[0.1][name], expected)


def test_s12_the_lstm_stays_in_float32_under_autocast():
    student = make_student().float()
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = student(torch.randn(1, 3000))
        assert student.projection[1](torch.randn(2, 8)).dtype == torch.bfloat16
    assert all(state.dtype == torch.float32 for state in hidden)


# ---- teacher and targets ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [encoder_config, large])
def test_s7_logits_are_those_of_hubert_pretrain_model_with_nothing_masked(kind, tmp_path):
    hubert = make_hubert(kind())
    form = {"config": pretrain_config(kind()), "state_dict": hubert.state_dict()}
    torch.save(form, tmp_path / "hubert.pt")
    teacher = l.load_teacher(l.Config(teacher=str(tmp_path / "hubert.pt")), torch.device("cpu"))
    waves = torch.randn(2, 5000) * torch.tensor([[1.0], [20.0]])
    heard = nn.functional.layer_norm(waves, (5000,)) if kind is large else waves
    with torch.no_grad():
        head = hubert.logit_generator
        projected = head.final_proj(hubert.wav2vec2(heard)[0])[:, :, None]
        theirs = 10 * nn.functional.cosine_similarity(projected, head.label_embeddings, dim=-1)
    ours = l.teacher_logits(teacher, waves)
    assert ours.shape == (2, 15, 10) and theirs.std() > 0.1  # there is something to get wrong
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    rounded = l.teacher_logits(teacher, waves, amp=True)
    assert rounded.dtype == torch.float32 and 0 < (ours - rounded).abs().max() < 1.0


def test_a_teacher_without_a_head_names_the_files_that_have_one(tmp_path, monkeypatch):
    monkeypatch.setattr(common.BUNDLES["hubert_base"], "get_model", None)  # nothing is downloaded
    config = encoder_config(encoder_embed_dim=128, encoder_num_layers=1)  # 64 channels a head
    bare = tmp_path / "bare.pt"
    torch.save(make_hubert(config).wav2vec2.state_dict(), bare)
    cases = {"hubert_base": "no cluster head", str(bare): "no cluster head"}
    missing = (l.Config.teacher, "no_such_teacher", "gone.pth")
    for name, problem in (cases | dict.fromkeys(missing, "does not exist")).items():
        with pytest.raises(common.InputError, match=problem) as caught:
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


def test_s6_the_target_is_the_teachers_top_class(tiny_files, tmp_path, losses):
    numbers = dict(tau=2.0, alpha=3.0, beta=5.0, ce_weight=7.0, kd_weight=11.0)
    l.train(l.Config(**tiny_run("lstm_dkd", tiny_files, tmp_path, steps=1, **numbers)))
    _, teacher_logits, target, *rest = losses[0]
    assert torch.equal(target, teacher_logits.argmax(-1))
    assert rest == ["dkd", 2.0, 3.0, 5.0, 7.0, 11.0]


def test_s12_logits_are_float32_under_autocast(tiny_files, tmp_path, losses):
    config = l.Config(**tiny_run("lstm_dkd", tiny_files, tmp_path, steps=2, amp=True))
    l.train(config)
    assert {x.dtype for given in losses for x in given[:2]} == {torch.float32}


# ---- training and evaluation --------------------------------------------------------------------


def test_defaults_are_the_papers():
    config = l.Config()
    assert (config.tau, config.alpha, config.beta) == (1.0, 1.0, 4.0)
    assert (config.steps, config.hidden, config.student_layers) == (200_000, 384, 4)
    # D1: 32 of DistilHuBERT's average utterances, of which 24 are 290 s
    assert config.batch_seconds == pytest.approx(32 / 24 * 290, abs=0.5)
    for changes in l.CLAIM.values():
        assert replace(config, **changes) != config


def test_learning_rate_has_the_papers_corners():
    config = l.Config()
    assert l.learning_rate(1, config) == pytest.approx(2e-4 / 14_000)
    assert l.learning_rate(14_000, config) == pytest.approx(2e-4)
    assert l.learning_rate(107_000, config) == pytest.approx(1e-4)
    assert l.learning_rate(200_000, config) == 0.0


@pytest.mark.parametrize(
    "changes, flag",
    [
        (dict(hidden=0), "--hidden"),
        (dict(student_layers=0), "--student-layers"),
        (dict(tau=0.0), "--tau"),
        (dict(ce_weight=0.0, loss="ce"), "--ce-weight"),
        (dict(ce_weight=0.0, kd_weight=0.0), "--kd-weight"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, flag, tmp_path):
    with pytest.raises(common.InputError, match=flag):
        l.train(l.Config(out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_agreement_is_top_1_and_kl_to_the_teacher_on_held_out_audio(
    teacher, audio_folder, tmp_path
):
    config = l.Config(hidden=8, batch_seconds=3.0, crop_seconds=9.0)
    utterances = common.scan(audio_folder, None, 1)[:2]
    student, heads = l.build(config, teacher)
    found = l.agreement(config, teacher, student.train(), heads, utterances)
    assert not student.training
    same, distance = [], []
    for batch in common.heldout_batches(utterances, config.batch_seconds, 9.0):
        with torch.no_grad():
            s, t = heads(student(batch)[0][-1]), l.teacher_logits(teacher, batch)
        for p, q, _ in rows_of(s, t, t.argmax(-1)):
            same.append(p.index(max(p)) == q.index(max(q)))
            distance.append(loop_kl(p, q))
    assert found["agreement"] == pytest.approx(mean(same))
    assert found["KL"] == pytest.approx(mean(distance), rel=1e-4)


def test_s13_the_feature_is_all_layers(monkeypatch):
    monkeypatch.setattr(common, "score", lambda module, features, *_: features)
    features = l.score(make_student().float(), [], torch.device("cpu"), 0)
    assert [state.shape for state in features(torch.randn(1, 3000))] == [(1, 9, 16)] * 5
