"""skill.py: equations, groups, gates, pruning, the four acts and resuming in any of them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchaudio
from conftest import encoder_config, shake, tiny_run
from torch import nn

import common
import skill as s

SMALL = s.Shape(
    conv_channels=(8,) * 7,
    width=16,
    attention_heads=2,
    kept_heads=((0, 1),) * 3,
    feed_forward=(32,) * 3,
    position_kernel=8,
    position_groups=2,
    position_buckets=0,
    max_distance=0,
)
WAVLM = replace(SMALL, position_buckets=12, max_distance=20)
both_kinds = pytest.mark.parametrize("shape", [SMALL, WAVLM], ids=["hubert", "wavlm"])


def small_student(shape=SMALL, dropout=0.0):
    torch.manual_seed(0)
    return shake(s.Student(shape, dropout)).double()


def small_gates(shape=SMALL, seed=0, spread=3.0):
    """Distributions of which some gates are open and some are closed."""
    torch.manual_seed(seed)
    hard_concrete = s.HardConcrete(shape).double()
    hard_concrete.log_alpha.data = spread * torch.randn_like(hard_concrete.log_alpha)
    return hard_concrete


def copied(shape):
    """A student with all weights of torchaudio's HuBERT or WavLM of this shape, and that one."""
    config, models = encoder_config(encoder_num_layers=3, aux_num_out=None), torchaudio.models
    if shape.position_buckets:
        config |= dict(encoder_num_buckets=shape.position_buckets)
        model = models.wavlm_model(**config, encoder_max_distance=shape.max_distance)
    else:
        model = models.wav2vec2_model(**config)
    teacher = common.Teacher(shake(model, 3).double(), "twin", normalise=False)
    student = small_student(shape)
    s.initialise_from_teacher(student, teacher.weights())
    return student, teacher


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---- similarity and groups ----------------------------------------------------------------------


def frames(layers=4, width=5, count=40, seed=0):
    torch.manual_seed(seed)
    mix = torch.randn(layers, width, width).double()
    base = torch.randn(count, width).double()
    return [base @ m + 0.5 * torch.randn(count, width) + 3 for m in mix]


def kernel_alignment(*layers):
    return s.centred_kernel_alignment(*s.layer_moments([x[None] for x in layers]))


def loop_cka(x, y):
    def centre(m):
        means = [sum(column) / len(m) for column in zip(*m)]
        return [[v - mean for v, mean in zip(row, means)] for row in m]

    def norm(a, b):
        total = 0.0
        for i in range(len(a[0])):
            for j in range(len(b[0])):
                total += sum(p[i] * q[j] for p, q in zip(a, b)) ** 2
        return math.sqrt(total)

    a, b = centre(x.tolist()), centre(y.tolist())
    return norm(a, b) ** 2 / (norm(a, a) * norm(b, b))


def test_eq1_alignment_matches_loops():
    layers = frames()
    cka = kernel_alignment(*layers)
    for i, x in enumerate(layers):
        for j, y in enumerate(layers):
            assert cka[i, j].item() == pytest.approx(loop_cka(x, y), rel=1e-10)


def test_eq1_is_one_for_a_layer_with_itself_and_blind_to_rotation_shift_and_scale():
    x, y = frames(2)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5).double())
    cka = kernel_alignment(x, y, -3 * x @ rotation + 7)
    equal(cka.diagonal(), torch.ones(3).double())
    equal(cka[0, 2], torch.ones(()).double())
    equal(cka[0, 1], cka[1, 2])
    equal(cka, cka.T)
    assert 0 < cka[0, 1] < 0.99


def test_eq1_s1_frames_may_come_in_parts_of_any_size():
    layers = frames(3, count=60)
    whole = kernel_alignment(*layers)
    batches = [x.view(3, 20, 5) for x in layers]  # as utterances: no pooling
    equal(s.centred_kernel_alignment(*s.layer_moments(batches)), whole)
    parts = [s.layer_moments([x[None, a:b] for x in layers]) for a, b in ((0, 7), (7, 8), (8, 60))]
    equal(s.centred_kernel_alignment(*(sum(m) for m in zip(*parts))), whole)
    assert s.layer_moments([x.float()[None] for x in layers])[2].dtype == torch.float64


def similarity_of(rows):
    """Of layers whose distances are above the diagonal."""
    d = torch.tensor(rows, dtype=torch.float64)
    return 1 - (d + d.T)


def test_eq2_average_linkage_joins_in_the_order_worked_out_by_hand():
    # 2-3 at 1; then 0 to {2,3}: (5 + 4) / 2 = 4.5, 1 to {2,3}: (2 + 9) / 2 = 5.5, 0-1: 5.
    # Single linkage would join {1, 2, 3} at 2, complete linkage {0, 1} at 5.
    similarity = similarity_of([[0, 5, 5, 4], [0, 0, 2, 9], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert s.agglomerate(similarity, range(4), 3) == [(0,), (1,), (2, 3)]
    assert s.agglomerate(similarity, range(4), 2) == [(0, 2, 3), (1,)]
    assert s.agglomerate(similarity, range(1, 4), 2) == [(1,), (2, 3)]
    assert s.group_distance(similarity, (0,), (2, 3)) == pytest.approx(4.5)
    assert s.group_distance(similarity, (1,), (0, 2, 3)) == pytest.approx((5 + 2 + 9) / 3)


def test_eq2_as_many_groups_as_layers_one_group_and_ties():
    similarity = similarity_of([[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert s.agglomerate(similarity, range(3), 3) == [(0,), (1,), (2,)]
    assert s.agglomerate(similarity, range(3), 1) == [(0, 1, 2)]
    assert s.agglomerate(similarity, range(3), 2) == [(0, 1), (2,)]


def test_groups_by_hand():
    assert s.read_groups("0/4/8/12", 12) == [(0,), (4,), (8,), (12,)]
    assert s.read_groups("0/1,2,3/5,8,7", 12) == [(0,), (1, 2, 3), (5, 8, 7)]
    for wrong in ("", "0/13", "1,4/4", "a", "0//4", "1-3", "0/1,", "/", "0.5", "-1"):
        with pytest.raises(common.InputError, match="--groups"):
            s.read_groups(wrong, 12)
    assert s.name_groups([(0,), (1, 2, 3), (5, 7)]) == "0/1,2,3/5,7"


# ---- loss ---------------------------------------------------------------------------------------


def states(layers=4, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(2, 3, 5).double() for _ in range(layers)]


def test_eq3_target_is_the_mean_state_of_each_group():
    teacher = states()
    target = s.group_means(teacher, [(0,), (1, 3)])
    assert target.shape == (2, 2, 3, 5)
    for b in range(2):
        for t in range(3):
            for d in range(5):
                assert target[0, b, t, d] == teacher[0][b, t, d]
                expected = (float(teacher[1][b, t, d]) + float(teacher[3][b, t, d])) / 2
                assert target[1, b, t, d].item() == pytest.approx(expected)


def test_eq4_s4_prediction_projects_the_mean_layer_0_by_its_own():
    student, groups = states(), [(0,), (1, 3), (0, 2)]
    projections = shake(s.Projections(5)).double()
    predicted = projections(s.group_means(student, groups), groups)
    for g, group in enumerate(groups):
        linear = projections.layer_0 if group == (0,) else projections.others
        for i in range(5):
            for b in range(2):
                mean = sum(student[layer][b, 1] for layer in group) / len(group)
                expected = sum((linear.weight[i, j] * mean[j]).item() for j in range(5))
                expected += linear.bias[i].item()
                assert predicted[g, b, 1, i].item() == pytest.approx(expected)


def test_eq5_singleton_groups_are_dphuberts_loop_over_layers():
    student, teacher, layers = states(13, 1), states(13, 2), (0, 4, 8, 12)
    groups = s.read_groups("0/4/8/12", 12)
    projections = shake(s.Projections(5)).double()
    loss, parts = s.distillation_loss(
        projections(s.group_means(student, groups), groups), s.group_means(teacher, groups)
    )
    l1, cos = [], []
    for layer in layers:
        linear = projections.layer_0 if layer == 0 else projections.others
        for b in range(2):
            for t in range(3):
                p = (linear.weight @ student[layer][b, t] + linear.bias).tolist()
                h = teacher[layer][b, t].tolist()
                l1 += [abs(x - y) for x, y in zip(p, h)]
                dot, a, c = (sum(x * y for x, y in zip(*z)) for z in ((p, h), (p, p), (h, h)))
                cos.append(dot / math.sqrt(a * c))
    assert loss.item() == pytest.approx(sum(l1) / len(l1) - sum(cos) / len(cos), rel=1e-10)
    assert parts["l1"].shape == parts["cos"].shape == (4,)
    assert parts["l1"].mean().item() == pytest.approx(sum(l1) / len(l1), rel=1e-10)


def test_eq4_s4_eq5_projections_start_as_the_identity_so_that_equal_states_give_minus_one():
    means = s.group_means(states(), [(0,), (1, 2)])
    predicted = s.Projections(5).double()(means, [(0,), (1, 2)])
    equal(predicted, means)
    assert s.distillation_loss(predicted, means)[0].item() == pytest.approx(-1.0, abs=1e-12)


# ---- gates and size -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "log_alpha, mean, zero, one", [(0.0, 0.5, 0.168, 0.168), (4.595, 0.987, 0.002, 0.953)]
)
def test_eq6_eq7_frequencies_of_many_draws(log_alpha, mean, zero, one):
    torch.manual_seed(0)
    a = torch.full((400_000,), log_alpha).double()
    z = s.sample_gate(a, torch.rand_like(a))
    assert z.mean().item() == pytest.approx(mean, abs=2e-3)
    assert (z == 0).double().mean().item() == pytest.approx(zero, abs=2e-3)
    assert (z == 1).double().mean().item() == pytest.approx(one, abs=2e-3)
    is_open = s.open_probability(a[:1]).item()
    assert (z != 0).double().mean().item() == pytest.approx(is_open, abs=2e-3)


def test_eq6_of_numbers_worked_out_by_hand():
    u, a = torch.tensor([0.5, 0.9, 0.02]).double(), torch.tensor([0.0, -1.0, 0.5]).double()
    for z, x, y in zip(s.sample_gate(a, u).tolist(), u.tolist(), a.tolist()):
        soft = 1 / (1 + math.exp(-(math.log(x) - math.log(1 - x) + y) * 1.5))
        assert z == pytest.approx(min(1.0, max(0.0, 1.2 * soft - 0.1)))


def test_eq7_start_values_and_sum():
    a = torch.tensor([0.0, math.log(99)]).double()
    assert s.open_probability(a).tolist() == pytest.approx([0.8318, 0.9980], abs=1e-4)
    shift = 2 / 3 * math.log(0.1 / 1.1)
    expected = [1 / (1 + math.exp(-(x - shift))) for x in a.tolist()]
    assert s.open_probability(a).tolist() == pytest.approx(expected)


def test_eq8_counts_decide_what_is_closed_and_the_rest_stays_soft():
    a = torch.tensor([2.0, -3.0, 0.5, -1.0]).double()
    open_ = sum(1 / (1 + math.exp(-(x + 1.5986))) for x in a.tolist())
    assert open_ == pytest.approx(2.72, abs=0.05)  # so one gate is closed: the smallest
    z = s.fixed_gate(a)
    expected = [1 / (1 + math.exp(-1.2 * x)) for x in a.tolist()]
    expected[1] = 0.0
    assert z.tolist() == pytest.approx(expected)


def test_eq8_a_convolution_keeps_its_strongest_channel():
    a = torch.tensor([-9.0, -8.0, -9.5])
    assert s.fixed_gate(a).tolist() == [0, 0, 0]
    assert (s.fixed_gate(a, 1) > 0).tolist() == [False, True, False]
    hard_concrete = s.HardConcrete(SMALL)
    for log_alpha in (-20.0, -300.0):  # the sigmoid of the second is 0 in float32
        nn.init.constant_(hard_concrete.log_alpha, log_alpha)
        gates = hard_concrete.fixed()
        assert all((z > 0).sum() == 1 for z in gates.channels)
        assert not any(z.any() for z in [*gates.heads, *gates.units])
        pruned = s.prune(s.Student(SMALL, 0.0), hard_concrete)
        assert pruned.shape.conv_channels == (1,) * 7


def test_s5_gates_start_nearly_open_but_units_half_way():
    torch.manual_seed(0)
    shape = s.Shape()
    hard_concrete = s.HardConcrete(shape)
    assert hard_concrete.log_alpha.numel() == 40_592
    channels, heads, units = hard_concrete.split(hard_concrete.log_alpha)
    assert [len(kind) for kind in (channels, heads, units)] == [7, 12, 12]
    for vector in [*channels, *heads]:
        assert vector.mean().item() == pytest.approx(math.log(99), abs=0.02)
    for vector in units:
        assert vector.mean().item() == pytest.approx(0.0, abs=0.02)
        assert vector.std().item() == pytest.approx(0.01, rel=0.1)
    sparsity = 1 - hard_concrete.expected_size(shape).item() / s.full_size(shape)
    assert sparsity == pytest.approx(0.102, abs=1e-3)
    drawn = hard_concrete.sample()
    assert drawn.units[0].shape == (3072,) and not torch.equal(drawn.units[0], drawn.units[1])
    assert not torch.equal(drawn.units[0], hard_concrete.sample().units[0])


FULL = s.Shape()
HUBERT = replace(FULL, position_buckets=0, max_distance=0)


@pytest.mark.parametrize("shape", [FULL, HUBERT, WAVLM, SMALL])
def test_eq9_all_open_is_the_number_of_weights_without_the_position_bias(shape):
    with torch.device("meta"):
        student = s.Student(shape, 0.0)
    names = ("rel_attn_embed", "gru_rel_pos")
    counted = [p.numel() for n, p in student.named_parameters() if not any(w in n for w in names)]
    assert s.shape_size(shape) == sum(counted)
    assert s.full_size(shape) == common.count_parameters(student)


def test_eq9_full_size_numbers():
    assert s.shape_size(FULL) == s.shape_size(HUBERT) == s.full_size(HUBERT) == 94_371_456
    assert s.full_size(FULL) == 94_381_680  # 10,224 more
    assert round(0.25 * s.full_size(FULL)) == 23_595_420
    one_less = replace(FULL, kept_heads=(tuple(range(11)), *FULL.kept_heads[1:]))
    assert s.shape_size(FULL) - s.shape_size(one_less) == 196_800
    one_less = replace(FULL, feed_forward=(*FULL.feed_forward[1:], 3071))
    assert s.shape_size(FULL) - s.shape_size(one_less) == 1_537
    assert s.count_size(FULL, [0] * 7, [0] * 12, [0] * 12) == 4_777_088
    empty = replace(FULL, kept_heads=((),) * 12, feed_forward=(0,) * 12)
    assert s.shape_size(replace(empty, conv_channels=(0,) * 7)) == 4_777_088
    assert s.shape_size(empty) == 4_777_088 + 4_200_960 + 395_008 - 768
    with torch.device("meta"):
        student = s.Student(FULL, 0.0)
    assert common.count_parameters(student.feature_extractor) == 4_200_960
    assert common.count_parameters(student.layers[0]) == 7_087_872 + 512 + 8 + 12


def test_eq9_of_pruned_students_is_their_number_of_weights():
    for seed in range(3):
        small = s.prune(small_student(WAVLM), small_gates(WAVLM, seed))
        bias = s.full_size(WAVLM) - s.shape_size(WAVLM)
        assert s.shape_size(small.shape) == common.count_parameters(small) - bias
        assert s.shape_size(small.shape) < s.shape_size(WAVLM)


def test_eq9_expected_size_is_smooth_in_every_gate():
    hard_concrete = small_gates(spread=1.0)
    hard_concrete.expected_size(SMALL).backward()
    assert (hard_concrete.log_alpha.grad > 0).all()  # opening any gate adds parameters


def test_eq10_value_and_signs_of_the_gradients():
    multipliers = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    value = s.sparsity_loss(torch.tensor(0.8).double(), 0.75, multipliers)
    assert value.item() == pytest.approx(0.3 * 0.05 + 2.0 * 0.05**2)
    value.backward()
    assert multipliers.grad.tolist() == pytest.approx([0.05, 0.0025])


def test_eq10_target_rises_from_zero_and_stays():
    config = s.Config()
    assert s.pruning_steps(config) == 50_000
    assert s.target_sparsity(1, config) == 0
    assert s.target_sparsity(2_501, config) == pytest.approx(0.375)
    assert s.target_sparsity(5_001, config) == s.target_sparsity(50_000, config) == 0.75
    at_once = replace(config, sparsity_warmup=0.0)
    assert s.target_sparsity(2, at_once) == 0.75


def test_eq10_alone_brings_the_size_to_its_target():
    torch.manual_seed(0)
    hard_concrete, full = s.HardConcrete(SMALL), s.full_size(SMALL)
    gates, multipliers = [hard_concrete.log_alpha], [hard_concrete.multipliers]
    groups = [{"params": gates}, {"params": multipliers, "maximize": True}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.5, 0.98), weight_decay=0.0)
    for _ in range(400):
        optimizer.zero_grad()
        sparsity = 1 - hard_concrete.expected_size(SMALL) / full
        s.sparsity_loss(sparsity, 0.6, hard_concrete.multipliers).backward()
        optimizer.step()
    assert sparsity.item() == pytest.approx(0.6, abs=0.01)


# ---- student ------------------------------------------------------------------------------------


@both_kinds
def test_copy_with_all_gates_open_is_its_teacher(shape):
    student, teacher = copied(shape)
    waves = torch.randn(2, 6000).double()
    hard_concrete = small_gates(shape)
    all_open = hard_concrete.split(torch.ones_like(hard_concrete.log_alpha))
    theirs = s.teacher_states(teacher, waves)
    for gates in (None, all_open):
        ours, lengths = student(waves, gates=gates)
        assert len(ours) == len(theirs) == 4 and lengths is None
        for a, b in zip(ours, theirs):
            equal(a, b)


def test_a_weight_that_the_student_does_not_know_is_an_error():
    student, teacher = copied(SMALL)
    with pytest.raises(RuntimeError, match="norm.weight"):
        s.initialise_from_teacher(student, teacher.weights() | {"norm.weight": torch.ones(1)})


def test_position_bias_has_torchaudios_buckets():
    shape = replace(WAVLM, position_buckets=320, max_distance=800, attention_heads=16)
    ours = s.PositionBias(shape)
    reference = torchaudio.models.wav2vec2.wavlm_attention.WavLMSelfAttention(
        16, 16, has_relative_attention_bias=True, num_buckets=320, max_distance=800
    )
    ours.weight = reference.rel_attn_embed.weight
    for frames in (3, 30, 1000):
        bias = ours(torch.zeros(1, frames, 16))
        equal(bias, reference.compute_bias(frames, frames))


def test_s3_layer_0_stands_before_the_positional_convolution_and_others_are_counted_from_1():
    _, teacher = copied(SMALL)
    waves = torch.randn(1, 4000).double()
    theirs = s.teacher_states(teacher, waves)
    features, _ = teacher.model.feature_extractor(waves, None)
    equal(theirs[0], teacher.model.encoder.feature_projection(features))
    assert not torch.allclose(theirs[0], teacher(waves)[0])
    for a, b in zip(theirs[1:], teacher(waves)[1:], strict=True):
        equal(a, b)


def test_dropout_is_on_in_training_everywhere_and_off_outside():
    student = small_student(dropout=0.5)
    waves = torch.randn(1, 4000).double()
    still = student(waves)[0]
    assert all(torch.equal(a, b) for a, b in zip(still, student(waves)[0]))
    student.train()
    noisy = student(waves)[0]
    assert (noisy[0] == 0).double().mean() == pytest.approx(0.5, abs=0.15)
    for module in student.layers:  # attention and both blocks by themselves
        x = torch.randn(1, 9, 16).double()
        gap = {}
        for attention_rate, rate in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
            module.attention.dropout, module.dropout.p = attention_rate, rate
            gap[attention_rate, rate] = module(x, None, None, None)
        assert len({v.sum().item() for v in gap.values()}) == 3
    seen = []
    student.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    student(waves)
    assert (seen[0] == 0).double().mean() == pytest.approx(0.5, abs=0.15)  # behind the convolution


# ---- pruning ------------------------------------------------------------------------------------


def opened(shape=SMALL):
    """Distributions of which all gates are open, and their log alphas as vectors to be changed."""
    hard_concrete = small_gates(shape)
    nn.init.constant_(hard_concrete.log_alpha, 100.0)
    return hard_concrete, hard_concrete.split(hard_concrete.log_alpha.data)


def same_states(student, gates, pruned, waves, lengths=None):
    with_gates, _ = student(waves, lengths, gates)
    for a, b in zip(with_gates, pruned(waves, lengths)[0], strict=True):
        equal(a, b)


@both_kinds
@pytest.mark.parametrize("seed", range(3))
def test_pruned_student_computes_what_the_one_with_gates_does(shape, seed):
    student, hard_concrete = small_student(shape), small_gates(shape, seed)
    hard_concrete.split(hard_concrete.log_alpha.data).channels[6][:] = 100.0  # S6
    pruned = s.prune(student, hard_concrete).eval()
    waves, lengths = torch.randn(2, 5000).double(), torch.tensor([5000, 3000])
    for n in (None, lengths):
        same_states(student, hard_concrete.fixed(), pruned, waves, n)
    assert not torch.allclose(pruned(waves)[0][-1], student(waves)[0][-1], atol=1e-3)


def test_s6_gates_of_convolution_7_go_into_the_scale_vector():
    student, (hard_concrete, log_alphas) = small_student(), opened()
    log_alphas.channels[6][:] = torch.linspace(2.5, 6, 8)
    gates = hard_concrete.fixed()
    pruned = s.prune(student, hard_concrete).eval()
    assert all((z > 0).all() for z in gates.channels)  # nothing closed: exact even here
    same_states(student, gates, pruned, torch.randn(1, 3000).double())
    equal(pruned.feature_extractor.scale, student.feature_extractor.scale * gates.channels[6])
    assert not pruned.feature_extractor.scale.requires_grad


def test_s6_with_closed_gates_in_convolution_7_only_the_layer_norm_differs():
    student, (hard_concrete, log_alphas) = small_student(), opened()
    log_alphas.channels[6][:3] = -100.0
    pruned = s.prune(student, hard_concrete).eval()
    waves = torch.randn(1, 3000).double()
    with_gates = student(waves, gates=hard_concrete.fixed())[0][0]
    assert not torch.allclose(with_gates, pruned(waves)[0][0], rtol=1e-3)  # as in the code
    equal(pruned.feature_extractor(waves), student.feature_extractor(waves)[..., 3:])


def test_shapes_follow_the_gates_and_numbers_of_heads_are_kept():
    student, (hard_concrete, log_alphas) = small_student(WAVLM), opened(WAVLM)
    channels, heads, units = log_alphas
    channels[2][1:4], heads[0][0], heads[1][:], units[2][:], units[0][5] = (-100.0,) * 5
    pruned = s.prune(student, hard_concrete).eval()
    shape = pruned.shape
    assert shape.conv_channels == (8, 8, 5, 8, 8, 8, 8)
    assert shape.kept_heads == ((1,), (), (0, 1)) and shape.feed_forward == (31, 32, 0)
    attention = pruned.layers[0].attention
    assert attention.q_proj.weight.shape == attention.v_proj.weight.shape == (8, 16)
    assert attention.out_proj.weight.shape == (16, 8)
    equal(attention.k_proj.weight, student.layers[0].attention.k_proj.weight[8:])
    equal(attention.out_proj.weight, student.layers[0].attention.out_proj.weight[:, 8:])
    again = s.prune(pruned, small_gates(shape, 1))  # heads of a pruned student have numbers too
    assert set(again.shape.kept_heads[0]) <= {1}
    assert all(torch.isfinite(x).all() for x in again.eval()(torch.randn(1, 4000).double())[0])


def test_d1_d2_a_layer_without_heads_or_units_keeps_its_bias_and_the_position_bias_stays():
    student, (hard_concrete, log_alphas) = small_student(WAVLM), opened(WAVLM)
    log_alphas.heads[0][:], log_alphas.units[0][:] = -100.0, -100.0  # layer 1
    pruned = s.prune(student, hard_concrete)
    waves, lengths = torch.randn(2, 5000).double(), torch.tensor([5000, 2000])
    for n in (None, lengths):
        same_states(student, hard_concrete.fixed(), pruned, waves, n)
    x = torch.randn(1, 4, 16).double()
    block = pruned.layers[0].attention(x, None, pruned.rel_attn_embed(x), None)
    equal(block, pruned.layers[0].attention.out_proj.bias.expand_as(x))
    pruned.train()
    (pruned(waves)[0][-1] ** 2).sum().backward()
    assert pruned.rel_attn_embed.weight.grad.abs().sum() > 0


# ---- training -----------------------------------------------------------------------------------


def test_schedule_has_the_corners_of_the_code():
    config = s.Config()
    assert s.schedule(1, config) == pytest.approx(1 / 15_000)
    assert s.schedule(15_000, config) == 1.0
    assert s.schedule(32_500, config) == pytest.approx(0.5)
    assert s.schedule(50_000, config) == 0.0
    assert s.schedule(50_001, config) == pytest.approx(1 / 5_000)  # act 4
    assert s.schedule(55_000, config) == 1.0
    assert s.schedule(75_000, config) == 0.0


@pytest.fixture(scope="module")
def finished(tiny_files, tmp_path_factory):
    """A small run of all four acts: (config, student, projections, history)."""
    changes = dict(steps=9, log_every=1, save_every=2, accumulate=1, dropout=0.1)
    out = tmp_path_factory.mktemp("skill") / "run"
    config = s.Config(**tiny_run("skill", tiny_files, out, **changes))
    return config, *s.train(config)


@pytest.fixture(scope="module")
def teacher(finished):
    return common.load_teacher(finished[0].teacher)


@pytest.fixture(scope="module")
def training(finished):
    return common.train_and_heldout(common.scan(finished[0].data, None))[0]


def log_of(config):
    return (Path(config.out) / "log.jsonl").read_text()


def same_weights(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_the_acts_leave_their_results_in_the_run_folder(finished):
    config, student, _, history = finished
    out = Path(config.out)
    found = json.loads((out / "similarity.json").read_text())
    content = torch.load(out / "student.pt", weights_only=True)
    groups = content["groups"]
    assert len(found["cka"]) == 13 and list(map(tuple, found["groups"])) == groups
    assert groups[0] == (0,) and len(groups) == 4  # S2, S3
    assert sorted(layer for group in groups for layer in group) == list(range(13))
    steps = [(line["step"], line["act"]) for line in history]
    assert steps == [*((i, 3) for i in range(1, 7)), (7, 4), (8, 4), (9, 4)]
    for line in history:
        pruning = line["act"] == 3
        assert all((key in line) == pruning for key in ("sparsity", "target", "lambda1", "size"))
        for name in s.name_groups(groups).split("/"):
            assert f"l1_{name}" in line and f"cos_{name}" in line
        assert ("heldout" in line) == (line["step"] in (2, 4, 6, 8, 9))
    assert history[5]["target"] == config.sparsity
    pruned = s.load_student(out / "pruned.pt")
    assert pruned.shape == student.shape and not same_weights(pruned, student)
    assert torch.equal(pruned.feature_extractor.scale, student.feature_extractor.scale)
    assert set(content) == {"method", "config", "shape", "groups", "state_dict"}


def test_a_missed_sparsity_is_printed(finished, tmp_path, capsys):
    changes = dict(out=str(tmp_path / "r"), gate_lr=1e-6, steps=3)
    student, _, _ = s.train(replace(finished[0], **changes))
    said = " ".join(capsys.readouterr().err.split())
    parameters = common.count_parameters(student)
    assert f"target 0.75; {parameters:,} parameters are left" in said
    assert "act 2: groups 0/1" in said and "act 3: sparsity 0.0" in said


def test_eq6_gradients_of_the_distillation_reach_nearly_all_gates(teacher):
    student, projections, hard_concrete = s.build(s.Config(), teacher)
    nn.init.constant_(hard_concrete.log_alpha, 0.0)  # where Eq. 6 lets gradients through
    waves, groups = torch.randn(2, 6000), [(0,), (1, 2, 3), (4, 12)]
    teacher_hidden = s.group_means(s.teacher_states(teacher, waves), groups)
    for _ in range(6):
        student_hidden, _ = student(waves, gates=hard_concrete.sample())
        predicted = projections(s.group_means(student_hidden, groups), groups)
        s.distillation_loss(predicted, teacher_hidden)[0].backward()
    assert (hard_concrete.log_alpha.grad != 0).double().mean() > 0.9
    assert student.feature_extractor.scale.grad is None  # not trained


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("at", [6, 7, 8], ids=["end of act 3", "start of act 4", "act 4"])
def test_a_run_stopped_in_any_act_goes_on_to_the_same_end(finished, tmp_path, monkeypatch, at):
    """With the projections of act 3, which act 4 takes on, and without acts 1 and 2 once more."""
    config = replace(finished[0], out=str(tmp_path / "run"))
    real, calls = s.schedule, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) > at:
            raise Stop
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(s, "schedule", stop)
        with pytest.raises(Stop):
            s.train(config)
    if at == 6:  # stopped before act 3 could leave its result
        (tmp_path / "run" / "pruned.pt").unlink()
    monkeypatch.setattr(s, "measure", None)
    student, projections, history = s.train(config, resume=True)
    assert history == finished[3] and log_of(config) == log_of(finished[0])
    assert same_weights(student, finished[1]) and same_weights(projections, finished[2])


def test_act_4_goes_on_with_the_projections_of_act_3(finished, teacher, tmp_path):
    config = replace(finished[0], out=str(tmp_path))
    student, projections, hard_concrete = s.build(config, teacher)
    nn.init.normal_(projections.layer_0.weight)
    _, taken = s.end_act_3(config, student, projections, hard_concrete, [(0,)])
    assert taken is not projections and same_weights(taken, projections)


def test_s5_each_part_of_a_batch_has_gates_of_its_own(finished, tmp_path, monkeypatch):
    drawn, real = [], s.HardConcrete.sample
    monkeypatch.setattr(
        s.HardConcrete, "sample", lambda self: drawn.append(real(self)) or drawn[-1]
    )
    changes = dict(out=str(tmp_path / "r"), accumulate=3, steps=3)  # two in act 3
    s.train(replace(finished[0], **changes))
    assert 4 <= len(drawn) <= 6 and not torch.equal(drawn[0].units[0], drawn[1].units[0])


def test_eq10_multipliers_ascend_and_gates_have_a_group_of_their_own(finished, teacher):
    """The rates of all groups are in test_training.py."""
    config = finished[0]
    student, projections, hard_concrete = s.build(config, teacher)
    weights, gates, multipliers = s.make_optimizer(
        config, student, projections, hard_concrete
    ).param_groups
    assert (gates["params"], gates["maximize"]) == ([hard_concrete.log_alpha], False)
    assert (multipliers["params"], multipliers["maximize"]) == ([hard_concrete.multipliers], True)
    assert not weights["maximize"]


def test_random_groups_have_the_sizes_of_the_similar_ones(finished):
    config = finished[0]
    torch.manual_seed(0)
    similarity = torch.corrcoef(torch.randn(13, 4))
    similar = s.find_groups(config, similarity)
    drawn = [s.find_groups(replace(config, groups="random", seed=i), similarity) for i in (0, 1)]
    assert list(map(len, drawn[0])) == list(map(len, similar)) and drawn[0][0] == (0,)
    assert drawn[0] != drawn[1] and drawn[0] != similar
    assert sorted(layer for group in drawn[0] for layer in group) == list(range(13))
    given = s.find_groups(replace(config, groups="0/4,3"), similarity)
    assert given == s.read_groups("0/4,3", 12)


def test_calibration_takes_as_many_utterances_as_asked_for(
    finished, teacher, training, monkeypatch
):
    config, heard, real = finished[0], [], s.teacher_states
    monkeypatch.setattr(s, "teacher_states", lambda *x: heard.append(x[1]) or real(*x))
    found = []
    for count in (2, 4, 500):
        heard.clear()
        found.append(s.measure(replace(config, calibration_utterances=count), teacher, training))
        assert len(heard) == min(count, len(training))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    similarity = kernel_alignment(*(hidden[0] for hidden in real(teacher, heard[0])))
    monkeypatch.setattr(common, "load_audio", lambda *_: heard[0][0])
    again = s.measure(config, teacher, training)  # the same utterance again and again
    assert torch.allclose(again, similarity)


# ---- refusals -----------------------------------------------------------------------------------


def test_sparsity_beyond_the_gates_is_refused_with_what_can_be_reached(finished, teacher, tmp_path):
    shape = s.teacher_shape(teacher)
    nothing = dict(conv_channels=(1,) * 7, kept_heads=((),) * 12, feed_forward=(0,) * 12)
    reachable = 1 - s.shape_size(replace(shape, **nothing)) / s.full_size(shape)
    with pytest.raises(common.InputError, match=f"--sparsity 0.99.*{reachable:.2f}"):
        s.train(replace(finished[0], sparsity=0.99, out=str(tmp_path / "r")))
    assert not (tmp_path / "r" / "config.json").exists()
    s.check(replace(finished[0], sparsity=reachable - 0.001), teacher)


# ---- evaluation ---------------------------------------------------------------------------------


def test_table_tells_the_layers_that_dphubert_picks_from_the_others(finished):
    config, student, projections, _ = finished
    rows = s.evaluate(config, student, projections)
    assert list(rows) == ["teacher", "untrained", "pruned", "distilled"]
    layers = json.loads((Path(config.out) / "layers.json").read_text())
    assert set(layers) == {"untrained", "pruned", "distilled"}
    for name, distances in layers.items():
        row, cosine = rows[name], distances["cosine"]
        assert len(cosine) == len(distances["L1"]) == 13
        assert row["cosine"] == pytest.approx(sum(cosine[1:]) / 12)
        assert row["cosine, layers 4 8 12"] == pytest.approx(sum(cosine[4:13:4]) / 3)
        others = [c for i, c in enumerate(cosine) if i not in (0, 4, 8, 12)]
        assert row["cosine, other layers"] == pytest.approx(sum(others) / 9)
        assert row["parameters"] == common.count_parameters(student)
        assert row["GMAC/s"] < rows["teacher"]["GMAC/s"]
        assert row["parameters"] < rows["teacher"]["parameters"]
    assert rows["untrained"]["cosine"] < rows["pruned"]["cosine"]


def test_heldout_distance_of_act_3_is_that_of_the_nearly_pruned_student(
    finished, teacher, training
):
    config, groups = finished[0], [(0,), (1,), (2, 5)]
    student, projections, hard_concrete = s.build(config, teacher)
    exact = s.distance(config, teacher, student, projections, None, groups, training)
    assert exact["cosine"] == pytest.approx([1.0] * 3, abs=1e-5)  # a copy of the teacher
    assert exact["L1"] == pytest.approx([0.0] * 3, abs=1e-4)
    hard_concrete.log_alpha.data = 3 * torch.randn_like(hard_concrete.log_alpha)
    hard_concrete.split(hard_concrete.log_alpha.data).channels[6][:] = 100.0  # S6
    pruned = s.prune(student, hard_concrete)
    gated, cut = (
        s.distance(config, teacher, model, projections, gates, groups, training)
        for model, gates in ((student, hard_concrete), (pruned, None))
    )
    for name in ("L1", "cosine"):
        assert gated[name] == pytest.approx(cut[name], abs=1e-5)
    assert gated["cosine"][1] < 0.95
