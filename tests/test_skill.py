"""skill.py: equations, gates, pruning, groups, the four acts, resume in any of them, picture."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchaudio
from conftest import encoder_config, large, make_hubert, shake, tiny_run
from torch import nn

import common
import skill as s

SMALL = s.Shape(
    conv_channels=(8,) * 7,
    width=16,
    attention_heads=2,
    heads=((0, 1),) * 3,
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
    """Gates of which some are open and some are closed."""
    torch.manual_seed(seed)
    gates = s.Gates(shape).double()
    gates.log_alpha.data = spread * torch.randn_like(gates.log_alpha)
    return gates


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
    s.initialise_from_teacher(student, teacher.model)
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


def test_eq1_s2_frames_may_come_in_parts_of_any_size():
    layers = frames(3, count=60)
    whole = kernel_alignment(*layers)
    batches = [x.view(3, 20, 5) for x in layers]  # as utterances: no pooling
    equal(s.centred_kernel_alignment(*s.layer_moments(batches)), whole)
    parts = [s.layer_moments([x[None, a:b] for x in layers]) for a, b in ((0, 7), (7, 8), (8, 60))]
    equal(s.centred_kernel_alignment(*(sum(m) for m in zip(*parts))), whole)
    assert s.layer_moments([x.float()[None] for x in layers])[2].dtype == torch.float64


def symmetric(rows):
    d = torch.tensor(rows, dtype=torch.float64)
    return d + d.T


def test_eq2_average_linkage_joins_in_the_order_worked_out_by_hand():
    # 2-3 at 1; then 0 to {2,3}: (5 + 4) / 2 = 4.5, 1 to {2,3}: (2 + 9) / 2 = 5.5, 0-1: 5
    d = symmetric([[0, 5, 5, 4], [0, 0, 2, 9], [0, 0, 0, 1], [0, 0, 0, 0]])
    groups, merges = s.agglomerate(d, 2)
    assert groups == [[0, 2, 3], [1]]
    assert [(first, second) for _, first, second in merges] == [([2], [3]), ([0], [2, 3])]
    assert [height for height, *_ in merges] == pytest.approx([1, 4.5])
    # single linkage would join {1, 2, 3} at 2, complete linkage 0-1 at 5
    height, *_ = s.agglomerate(d, 1)[1][-1]
    assert height == pytest.approx((5 + 2 + 9) / 3)


def test_eq2_as_many_groups_as_layers_one_group_and_ties():
    d = symmetric([[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    assert s.agglomerate(d, 3) == ([[0], [1], [2]], [])
    assert s.agglomerate(d, 1)[0] == [[0, 1, 2]]
    assert s.agglomerate(d, 2)[0] == [[0, 1], [2]]


def test_groups_by_hand():
    assert s.read_groups("0/4/8/12", 12) == [(0,), (4,), (8,), (12,)]
    assert s.read_groups("0/1,2,3/5,8,7", 12) == [(0,), (1, 2, 3), (5, 8, 7)]
    assert s.read_groups("", 12) == s.read_groups("random", 12) == []
    for wrong in ("0/13", "1,4/4", "a", "0//4", "1-3", "0/1,", "/", "0.5", "-1"):
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


def test_eq4_s8_prediction_projects_the_mean_layer_0_by_its_own():
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


def test_eq4_s8_projections_are_the_identity_at_the_start():
    means = s.group_means(states(), [(0,), (1,)])
    equal(s.Projections(5).double()(means, [(0,), (1,)]), means)


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


def test_eq5_of_equal_states_is_minus_one_and_in_bf16_computed_in_float32():
    means = s.group_means(states(), [(0,), (1, 2)])
    loss, _ = s.distillation_loss(s.Projections(5).double()(means, [(0,), (1, 2)]), means)
    assert loss.item() == pytest.approx(-1.0, abs=1e-12)
    assert s.distillation_loss(means.bfloat16(), means.bfloat16())[0].dtype == torch.float32


def test_eq5_counts_each_group_alike_and_does_not_see_duplicates_or_order():
    student, teacher = states(seed=1), states(seed=2)
    groups = [(0,), (1, 2, 3)]
    p, t = (s.group_means(x, groups) for x in (student, teacher))
    both = s.distillation_loss(p, t)[0]
    each = [s.distillation_loss(p[i : i + 1], t[i : i + 1])[0] for i in (0, 1)]
    equal(both, (each[0] + each[1]) / 2)
    equal(s.distillation_loss(torch.cat([p, p], 1), torch.cat([t, t], 1))[0], both)
    equal(s.distillation_loss(p.flip(1), t.flip(1))[0], both)


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


def test_eq8_d5_a_convolution_keeps_its_strongest_channel():
    a = torch.tensor([-9.0, -8.0, -9.5])
    assert s.fixed_gate(a).tolist() == [0, 0, 0]
    assert (s.fixed_gate(a, 1) > 0).tolist() == [False, True, False]
    gates = s.Gates(SMALL)
    for log_alpha in (-20.0, -300.0):  # the sigmoid of the second is 0 in float32
        nn.init.constant_(gates.log_alpha, log_alpha)
        masks = gates.fixed()
        assert all((z > 0).sum() == 1 for z in masks.channels)
        assert not any(z.any() for z in [*masks.heads, *masks.units])
        assert s.materialise(s.Student(SMALL, 0.0), gates).shape.conv_channels == (1,) * 7


def test_s11_gates_start_nearly_open_but_units_half_way():
    torch.manual_seed(0)
    shape = s.Shape()
    gates = s.Gates(shape)
    assert gates.log_alpha.numel() == 40_592
    channels, heads, units = gates.split(gates.log_alpha)
    assert [len(kind) for kind in (channels, heads, units)] == [7, 12, 12]
    for vector in [*channels, *heads]:
        assert vector.mean().item() == pytest.approx(math.log(99), abs=0.02)
    for vector in units:
        assert vector.mean().item() == pytest.approx(0.0, abs=0.02)
        assert vector.std().item() == pytest.approx(0.01, rel=0.1)
    sparsity = 1 - gates.size(shape).item() / s.full_size(shape)
    assert sparsity == pytest.approx(0.102, abs=1e-3)
    drawn = gates.sample()
    assert drawn.units[0].shape == (3072,) and not torch.equal(drawn.units[0], drawn.units[1])
    assert not torch.equal(drawn.units[0], gates.sample().units[0])


FULL = s.Shape()
HUBERT = replace(FULL, position_buckets=0, max_distance=0)


@pytest.mark.parametrize("shape", [FULL, HUBERT, WAVLM, SMALL])
def test_eq9_all_open_is_the_number_of_weights_without_the_position_bias(shape):
    with torch.device("meta"):
        student = s.Student(shape, 0.0)
    names = ("position_bias", "bias_gate", "bias_constant")
    counted = [p.numel() for n, p in student.named_parameters() if not any(w in n for w in names)]
    assert s.shape_size(shape) == sum(counted)
    assert s.full_size(shape) == common.count_parameters(student)


def test_eq9_full_size_numbers():
    assert s.shape_size(FULL) == s.shape_size(HUBERT) == s.full_size(HUBERT) == 94_371_456
    assert s.full_size(FULL) == 94_381_680  # S14: 10,224 more
    assert round(0.25 * s.full_size(FULL)) == 23_595_420
    one_less = replace(FULL, heads=(tuple(range(11)), *FULL.heads[1:]))
    assert s.shape_size(FULL) - s.shape_size(one_less) == 196_800
    one_less = replace(FULL, feed_forward=(*FULL.feed_forward[1:], 3071))
    assert s.shape_size(FULL) - s.shape_size(one_less) == 1_537
    assert s.count_size(FULL, [0] * 7, [0] * 12, [0] * 12) == 4_777_088
    empty = replace(FULL, heads=((),) * 12, feed_forward=(0,) * 12)
    assert s.shape_size(replace(empty, conv_channels=(0,) * 7)) == 4_777_088
    assert s.shape_size(empty) == 4_777_088 + 4_200_960 + 395_008 - 768
    with torch.device("meta"):
        student = s.Student(FULL, 0.0)
    assert common.count_parameters(student.feature_extractor) == 4_200_960
    assert common.count_parameters(student.layers[0]) == 7_087_872 + 512 + 8 + 12


def test_eq9_of_pruned_students_is_their_number_of_weights():
    for seed in range(3):
        small = s.materialise(small_student(WAVLM), small_gates(WAVLM, seed))
        bias = s.full_size(WAVLM) - s.shape_size(WAVLM)
        assert s.shape_size(small.shape) == common.count_parameters(small) - bias
        assert s.shape_size(small.shape) < s.shape_size(WAVLM)


def test_eq9_expected_size_is_smooth_in_every_gate():
    gates = small_gates(spread=1.0)
    gates.size(SMALL).backward()
    assert (gates.log_alpha.grad > 0).all()  # opening any gate adds parameters


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


def test_eq10_alone_brings_the_size_to_its_target():
    torch.manual_seed(0)
    gates, full = s.Gates(SMALL), s.full_size(SMALL)
    optimizer = torch.optim.AdamW(
        [
            {"params": [gates.log_alpha], "lr": 0.1},
            {"params": [gates.multipliers], "lr": 0.1, "maximize": True},
        ],
        betas=(0.5, 0.98),
        weight_decay=0.0,
    )
    for _ in range(400):
        optimizer.zero_grad()
        sparsity = 1 - gates.size(SMALL) / full
        s.sparsity_loss(sparsity, 0.6, gates.multipliers).backward()
        optimizer.step()
    assert sparsity.item() == pytest.approx(0.6, abs=0.01)


# ---- student ------------------------------------------------------------------------------------


@both_kinds
def test_copy_with_all_gates_open_is_its_teacher(shape):
    student, teacher = copied(shape)
    waves = torch.randn(2, 6000).double()
    ones = small_gates(shape)
    masks = ones.split(torch.ones_like(ones.log_alpha))
    theirs = s.teacher_states(teacher, waves)
    for given in (None, masks):
        ours, lengths = student(waves, masks=given)
        assert len(ours) == len(theirs) == 4 and lengths is None
        for a, b in zip(ours, theirs):
            equal(a, b)


@both_kinds
def test_padded_frames_never_reach_valid_ones_behind_the_group_norm(shape):
    student = small_student(shape)
    student.feature_extractor.group_norm = nn.Identity()  # the one layer that does see padding
    waves, lengths = torch.randn(3, 6000).double(), torch.tensor([6000, 4321, 1000])
    batched, frames = student(waves, lengths)
    assert frames.tolist() == [18, 13, 2]
    for i, n in enumerate(lengths):
        alone, _ = student(waves[i : i + 1, :n])
        for a, b in zip(batched, alone, strict=True):
            equal(a[i, : frames[i]], b[0])


@pytest.mark.parametrize("frames", [3, 30])
def test_position_bias_has_torchaudios_buckets(frames):
    student, teacher = copied(WAVLM)
    theirs = teacher.model.encoder.transformer.layers[0].attention.compute_bias(frames, frames)
    equal(student.position_bias(frames), theirs)
    shape = replace(WAVLM, position_buckets=320, max_distance=800, attention_heads=16)
    ours = s.PositionBias(shape)
    reference = torchaudio.models.wav2vec2.wavlm_attention.WavLMSelfAttention(
        16, 16, has_relative_attention_bias=True, num_buckets=320, max_distance=800
    )
    ours.embedding.weight = reference.rel_attn_embed.weight
    equal(ours(1000), reference.compute_bias(1000, 1000))


def test_s6_layer_0_stands_before_the_positional_convolution_and_others_are_counted_from_1():
    _, teacher = copied(SMALL)
    waves = torch.randn(1, 4000).double()
    theirs = s.teacher_states(teacher, waves)
    features, _ = teacher.model.feature_extractor(waves, None)
    equal(theirs[0], teacher.model.encoder.feature_projection(features))
    assert not torch.allclose(theirs[0], teacher(waves)[0])
    for a, b in zip(theirs[1:], teacher(waves)[1:], strict=True):
        equal(a, b)


def test_s12_dropout_is_on_in_training_everywhere_and_off_outside():
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
            module.attention.dropout, module.dropout = attention_rate, rate
            gap[attention_rate, rate] = module(x, None, None, (None, None))
        assert len({v.sum().item() for v in gap.values()}) == 3
    seen = []
    student.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    student(waves)
    assert (seen[0] == 0).double().mean() == pytest.approx(0.5, abs=0.15)  # behind the convolution


# ---- pruning ------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("seed", range(3))
def test_pruned_student_computes_what_the_masked_one_does(shape, seed):
    student, gates = small_student(shape), small_gates(shape, seed)
    gates.log_alpha.data[6 * 8 : 7 * 8] = 100.0  # S13: all of convolution 7
    small = s.materialise(student, gates).eval()
    waves, lengths = torch.randn(2, 5000).double(), torch.tensor([5000, 3000])
    for n in (None, lengths):
        masked, _ = student(waves, n, gates.fixed())
        pruned, _ = small(waves, n)
        for a, b in zip(masked, pruned):
            equal(a, b)
    assert not torch.allclose(pruned[-1], student(waves, lengths)[0][-1], atol=1e-3)


def test_s13_soft_gates_of_convolution_7_go_into_the_scale_vector():
    student, gates = small_student(), small_gates()
    nn.init.constant_(gates.log_alpha, 100.0)
    gates.log_alpha.data[6 * 8 : 7 * 8] = torch.linspace(2.5, 6, 8)
    masks = gates.fixed()
    small = s.materialise(student, gates).eval()
    waves = torch.randn(1, 3000).double()
    assert all((z > 0).all() for z in masks.channels)  # nothing closed: exact even here
    for a, b in zip(student(waves, masks=masks)[0], small(waves)[0]):
        equal(a, b)
    equal(small.feature_extractor.scale, student.feature_extractor.scale * masks.channels[6])
    assert not small.feature_extractor.scale.requires_grad


def test_s13_with_closed_gates_in_convolution_7_only_the_layer_norm_differs():
    student, gates = small_student(), small_gates()
    nn.init.constant_(gates.log_alpha, 100.0)
    gates.log_alpha.data[6 * 8 : 6 * 8 + 3] = -100.0
    small = s.materialise(student, gates).eval()
    waves = torch.randn(1, 3000).double()
    masked, pruned = student(waves, masks=gates.fixed())[0][0], small(waves)[0][0]
    assert not torch.allclose(masked, pruned, rtol=1e-3)  # as in the code
    kept = student.feature_extractor(waves, None)[..., 3:]
    equal(small.feature_extractor(waves, None), kept)


def test_shapes_follow_the_gates_and_numbers_of_heads_are_kept():
    student, gates = small_student(WAVLM), small_gates(WAVLM)
    nn.init.constant_(gates.log_alpha, 100.0)
    channels, heads, units = gates.split(gates.log_alpha.data)
    channels[2][1:4], heads[0][0], heads[1][:], units[2][:], units[0][5] = (-100.0,) * 5
    small = s.materialise(student, gates).eval()
    shape = small.shape
    assert shape.conv_channels == (8, 8, 5, 8, 8, 8, 8)
    assert shape.heads == ((1,), (), (0, 1)) and shape.feed_forward == (31, 32, 0)
    attention = small.layers[0].attention
    assert attention.q_proj.weight.shape == attention.v_proj.weight.shape == (8, 16)
    assert attention.out_proj.weight.shape == (16, 8)
    equal(attention.k_proj.weight, student.layers[0].attention.k_proj.weight[8:])
    equal(attention.out_proj.weight, student.layers[0].attention.out_proj.weight[:, 8:])
    again = s.materialise(small, small_gates(shape, 1))  # heads of a pruned student have names too
    assert set(again.shape.heads[0]) <= {1}
    assert all(torch.isfinite(x).all() for x in again.eval()(torch.randn(1, 4000).double())[0])


def test_d3_d4_a_layer_without_heads_or_units_keeps_its_bias_and_the_position_bias_lives_on():
    student, gates = small_student(WAVLM), small_gates(WAVLM)
    nn.init.constant_(gates.log_alpha, 100.0)
    _, heads, units = gates.split(gates.log_alpha.data)
    heads[0][:], units[0][:] = -100.0, -100.0  # layer 1
    small = s.materialise(student, gates)
    waves, lengths = torch.randn(2, 5000).double(), torch.tensor([5000, 2000])
    for n in (None, lengths):
        for a, b in zip(student(waves, n, gates.fixed())[0], small(waves, n)[0]):
            equal(a, b)
    x = torch.randn(1, 4, 16).double()
    block = small.layers[0].attention(x, None, small.position_bias(4), None)
    equal(block, small.layers[0].attention.out_proj.bias.expand_as(x))
    small.train()
    hidden = small(waves)[0]
    (hidden[-1] ** 2).sum().backward()
    assert small.position_bias.embedding.weight.grad.abs().sum() > 0


# ---- training -----------------------------------------------------------------------------------


def test_schedule_has_the_corners_of_the_code():
    assert s.schedule(1, 50_000, 0.3) == pytest.approx(1 / 15_000)
    assert s.schedule(15_000, 50_000, 0.3) == 1.0
    assert s.schedule(32_500, 50_000, 0.3) == pytest.approx(0.5)
    assert s.schedule(50_000, 50_000, 0.3) == 0.0
    assert s.schedule(5_000, 25_000, 0.2) == 1.0


@pytest.fixture(scope="module")
def finished(tiny_files, tmp_path_factory):
    """A small run of all four acts: (config, run)."""
    changes = dict(steps=9, log_every=1, save_every=2, accumulate=1, dropout=0.1)
    out = tmp_path_factory.mktemp("skill") / "run"
    config = s.Config(**tiny_run("skill", tiny_files, out, **changes))
    return config, s.train(config)[0]


def log_of(config):
    return (Path(config.out) / "log.jsonl").read_text()


def same_weights(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def test_the_acts_leave_their_results_in_the_run_folder(finished):
    config, run = finished
    out = Path(config.out)
    found = json.loads((out / "similarity.json").read_text())
    assert len(found["cka"]) == 13 and len(found["merges"]) == 11
    assert run.groups[0] == (0,) and len(run.groups) == 4  # S5, S6
    assert sorted(layer for g in run.groups for layer in g) == list(range(13))
    steps = [(line["step"], line["act"]) for line in run.history]
    assert steps == [*((i, 3) for i in range(1, 7)), (7, 4), (8, 4), (9, 4)]
    for line in run.history:
        pruning = line["act"] == 3
        assert all((key in line) == pruning for key in ("sparsity", "target", "lambda1", "size"))
        for name in s.name_groups(run.groups).split("/"):
            assert f"l1_{name}" in line and f"cos_{name}" in line
        assert ("heldout" in line) == (line["step"] in (2, 4, 6, 8, 9))
    assert run.history[5]["target"] == config.sparsity
    pruned = s.load_student(out / "pruned.pt")
    assert pruned.shape == run.student.shape and not same_weights(pruned, run.student)
    content = torch.load(out / "student.pt", weights_only=True)
    assert set(content) == {"method", "config", "shape", "groups", "state_dict"}
    assert s.read_groups(content["groups"], 12) == run.groups


def test_act_4_goes_on_with_the_pruned_student_its_projections_and_the_same_targets(finished):
    config, run = finished
    last = common.load_checkpoint(Path(config.out) / "last.pt")
    assert "gates" not in last and last["step"] == 9
    assert set(last["state_dict"]) == set(run.student.state_dict())
    student, projections = s.load_pruned(Path(config.out), torch.device("cpu"))

    def moved(other):
        pairs = zip(projections.parameters(), other.parameters(), strict=True)
        return [(a - b).abs().max().item() for a, b in pairs]

    assert min(moved(s.Projections(16))) > 0  # trained in act 3, taken along
    assert 0 < max(moved(run.projections)) < 0.05  # and trained on in act 4
    assert torch.equal(student.feature_extractor.scale, run.student.feature_extractor.scale)


def test_eq6_gradients_of_the_distillation_reach_nearly_all_gates(tiny_teacher):
    teacher = common.load_teacher(str(tiny_teacher))
    student, projections, gates = s.build(s.Config(), teacher)
    nn.init.constant_(gates.log_alpha, 0.0)  # where the clamp of Eq. 6 lets gradients through
    waves, groups = torch.randn(2, 6000), [(0,), (1, 2, 3), (4, 12)]
    target = s.group_means(s.teacher_states(teacher, waves), groups)
    for _ in range(6):
        states, _ = student(waves, masks=gates.sample())
        predicted = projections(s.group_means(states, groups), groups)
        s.distillation_loss(predicted, target)[0].backward()
    assert (gates.log_alpha.grad != 0).double().mean() > 0.9
    assert student.feature_extractor.scale.grad is None  # S13: no parameter of the training


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("at", [5, 6, 7, 8], ids=["act 3", "its end", "start of act 4", "act 4"])
def test_a_run_stopped_in_any_act_goes_on_to_the_same_end(finished, tmp_path, monkeypatch, at):
    config, run = finished
    config = replace(config, out=str(tmp_path / "run"))
    real, calls = s.schedule, []

    def stop(*args):
        calls.append(args)
        if len(calls) > at:
            raise Stop
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(s, "schedule", stop)
        with pytest.raises(Stop):
            s.train(config)
    if at == 6:  # stopped before act 3 could leave its result
        (tmp_path / "run" / "pruned.pt").unlink()
    monkeypatch.setattr(s, "measure", None)  # act 1 is not done again
    resumed, history = s.train(config, resume=True)
    assert history == run.history and log_of(config) == log_of(finished[0])
    assert same_weights(run.student, resumed.student)


def test_stages_one_after_another_are_the_whole_run(finished, tmp_path):
    config, run = finished
    config = replace(config, out=str(tmp_path / "run"))
    first, _ = s.train(replace(config, stage="measure"))
    assert first.student is None and (tmp_path / "run" / "similarity.json").exists()
    assert not (tmp_path / "run" / "last.pt").exists()
    second, history = s.train(replace(config, stage="prune"), resume=True)
    assert (tmp_path / "run" / "pruned.pt").exists()
    assert not (tmp_path / "run" / "student.pt").exists() and len(history) == 6
    third, _ = s.train(config, resume=True)
    assert log_of(config) == log_of(finished[0]) and same_weights(run.student, third.student)
    with pytest.raises(common.InputError, match="past act 2"):
        s.train(replace(config, stage="measure"), resume=True)
    again, _ = s.train(replace(config, stage="prune"), resume=True)  # shows what act 3 left
    assert same_weights(again.student, second.student)


def test_s11_each_part_of_a_batch_has_gates_of_its_own(finished, tmp_path, monkeypatch):
    config, _ = finished
    drawn, real = [], s.Gates.sample
    monkeypatch.setattr(s.Gates, "sample", lambda self: drawn.append(real(self)) or drawn[-1])
    s.train(replace(config, out=str(tmp_path / "r"), accumulate=3, steps=3))  # two in act 3
    assert 4 <= len(drawn) <= 6 and not torch.equal(drawn[0].units[0], drawn[1].units[0])


def test_s10_optimizers_of_the_two_acts(finished, tmp_path, monkeypatch):
    config, _ = finished
    seen, real = [], torch.optim.AdamW

    def spy(groups, **settings):
        seen.append((real(groups, **settings), settings))
        return seen[-1][0]

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    s.train(replace(config, out=str(tmp_path / "r"), steps=3, lr=1e-4, final_lr=3e-4))
    (third, settings), (fourth, _) = seen
    assert settings["weight_decay"] == 0.0
    assert [g["peak"] for g in third.param_groups] == [1e-4, 0.1, config.multiplier_lr]
    assert [g["maximize"] for g in third.param_groups] == [False, False, True]
    assert [g["peak"] for g in fourth.param_groups] == [3e-4]
    assert len(third.param_groups[1]["params"]) == len(third.param_groups[2]["params"]) == 1


def test_random_groups_have_the_sizes_of_the_similar_ones(finished, tmp_path):
    config, run = finished
    drawn = []
    for seed in (0, 1):
        out = str(tmp_path / str(seed))
        changed = replace(config, groups="random", stage="measure", seed=seed, out=out)
        drawn.append(s.train(changed)[0].groups)
    assert sorted(map(len, drawn[0])) == sorted(map(len, run.groups)) and drawn[0][0] == (0,)
    assert drawn[0] != drawn[1] and drawn[0] != run.groups
    assert sorted(layer for g in drawn[0] for layer in g) == list(range(13))


def test_s3_calibration_hears_as_many_utterances_as_asked_for(finished, tmp_path, monkeypatch):
    config, run = finished
    heard, real = [], s.teacher_states
    monkeypatch.setattr(s, "teacher_states", lambda *x: heard.append(x[1]) or real(*x))
    found = []
    for count in (2, 4, 500):
        heard.clear()
        run.config = replace(config, calibration_utterances=count)
        found.append(s.measure(run))
        assert len(heard) == min(count, len(run.training))
    run.config = config
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    similarity = s.centred_kernel_alignment(*s.layer_moments(real(run.teacher, heard[0])))
    monkeypatch.setattr(common, "load_audio", lambda *_: heard[0][0])
    assert torch.allclose(s.measure(run), similarity)  # the same utterance again and again


def test_act_2_says_the_groups_and_whether_all_are_of_neighbours(finished, tmp_path, capsys):
    run = replace(finished[1], out=tmp_path)
    layers = torch.arange(13) % 2  # even layers are alike, and odd ones
    s.make_groups(run, (layers[:, None] == layers).double())
    said = " ".join(capsys.readouterr().err.split())
    assert "act 2: groups 0/1" in said and "not all groups are of neighbours" in said
    s.make_groups(run, torch.eye(13).double())
    assert json.loads((tmp_path / "similarity.json").read_text())["groups"][0] == [0]
    assert "not all groups" not in capsys.readouterr().err


# ---- refusals -----------------------------------------------------------------------------------


def test_sparsity_beyond_the_gates_is_refused_with_what_can_be_reached(finished, tmp_path):
    config, run = finished
    shape = s.teacher_shape(run.teacher)
    smallest = replace(shape, conv_channels=(1,) * 7, heads=((),) * 12, feed_forward=(0,) * 12)
    reachable = 1 - s.shape_size(smallest) / s.full_size(shape)
    with pytest.raises(common.InputError, match=f"--sparsity 0.99.*{reachable:.2f}"):
        s.train(replace(config, sparsity=0.99, out=str(tmp_path / "r")))
    assert not (tmp_path / "r" / "config.json").exists()
    s.check(replace(config, sparsity=reachable - 0.001), run.teacher)


def test_d6_a_missed_target_ends_in_a_sentence_and_may_be_accepted_afterwards(finished, tmp_path):
    changes = dict(out=str(tmp_path / "r"), tolerance=0.01, gate_lr=1e-6, steps=3)
    config = replace(finished[0], **changes)
    with pytest.raises(common.InputError, match="act 3 ended at sparsity 0.*--tolerance"):
        s.train(config)
    run, history = s.train(replace(config, tolerance=1.0), resume=True)
    assert history[-1]["step"] == 3 and s.shape_size(run.student.shape) > 0


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(groups="0/14"), "--groups"),
        (dict(clusters=0), "--clusters"),
        (dict(clusters=13), "--clusters"),
        (dict(steps=1), "--steps"),
        (dict(calibration_utterances=1), "--calibration-utterances"),
        (dict(sparsity=1.0), "--sparsity 1.0: .* below one"),
    ],
)
def test_impossible_settings_are_named(finished, changes, words):
    with pytest.raises(common.InputError, match=words):
        s.check(replace(finished[0], **changes), finished[1].teacher)


def test_a_teacher_of_another_kind_is_refused():
    teacher = common.Teacher(make_hubert(large()).wav2vec2, "big", normalise=True)
    with pytest.raises(common.InputError, match="big.*wavlm_base_plus"):
        s.check(s.Config(), teacher)
    model = make_hubert(encoder_config(extractor_conv_bias=True)).wav2vec2
    with pytest.raises(common.InputError, match="odd: its convolutions are not those of HuBERT"):
        s.build(s.Config(), common.Teacher(model, "odd", normalise=False))


# ---- evaluation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(finished):
    config, run = finished
    return s.evaluate(config, run)


def test_table_tells_the_layers_that_dphubert_picks_from_the_others(evaluated, finished):
    config, run = finished
    assert list(evaluated) == ["teacher", "untrained", "pruned", "distilled"]
    layers = json.loads((Path(config.out) / "layers.json").read_text())
    assert set(layers) == {"untrained", "pruned", "distilled"}
    for name, distances in layers.items():
        row, cosine = evaluated[name], distances["cosine"]
        assert len(cosine) == len(distances["L1"]) == 13
        assert row["cosine"] == pytest.approx(sum(cosine[1:]) / 12)
        assert row["cosine, layers 4 8 12"] == pytest.approx(sum(cosine[4:13:4]) / 3)
        others = [c for i, c in enumerate(cosine) if i not in (0, 4, 8, 12)]
        assert row["cosine, other layers"] == pytest.approx(sum(others) / 9)
        assert row["parameters"] == common.count_parameters(run.student)
        assert row["GMAC/s"] < evaluated["teacher"]["GMAC/s"]
        assert row["parameters"] < evaluated["teacher"]["parameters"]
    assert evaluated["untrained"]["cosine"] < evaluated["pruned"]["cosine"]


def test_a_copy_of_the_teacher_has_no_distance_to_it(finished):
    _, run = finished
    student, projections, _ = s.build(run.config, run.teacher)
    exact = s.distance(run, student, projections, [(0,), (1,), (2, 5)])
    assert exact["cosine"] == pytest.approx([1.0] * 3, abs=1e-5)
    assert exact["L1"] == pytest.approx([0.0] * 3, abs=1e-4)


def test_heldout_distance_of_act_3_is_that_of_the_nearly_pruned_student(finished):
    _, run = finished
    student, projections, gates = s.build(run.config, run.teacher)
    gates.log_alpha.data = 3 * torch.randn_like(gates.log_alpha)
    channels, _, _ = gates.split(gates.log_alpha.data)
    channels[6][:] = 100.0  # S13
    masked = s.distance(run, student, projections, run.groups, gates)
    pruned = s.distance(run, s.materialise(student, gates), projections, run.groups)
    for name in ("L1", "cosine"):
        assert masked[name] == pytest.approx(pruned[name], abs=1e-5)
    assert masked["cosine"][1] < 0.95


def test_after_act_2_the_table_is_the_similarity(finished):
    run = replace(finished[1], student=None)
    rows = s.evaluate(finished[0], run)
    assert list(rows) == [f"layer {i}" for i in range(13)]
    assert all(rows[f"layer {i}"][str(i)] == pytest.approx(1) for i in range(13))


def test_picture_has_the_merges_the_similarity_and_what_is_kept(finished, tmp_path, monkeypatch):
    module = pytest.importorskip("matplotlib.figure")
    drawn, real = [], module.Figure
    monkeypatch.setattr(module, "Figure", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    run = replace(finished[1], out=tmp_path)
    found = json.loads((Path(finished[0].out) / "similarity.json").read_text())
    s.draw(run, found)
    assert (tmp_path / "skill.png").read_bytes().startswith(b"\x89PNG")
    tree, matrix, bars, _ = drawn[0].axes  # and the bar of colours
    legs = [line.get_ydata() for line in tree.lines]  # up from one group, across, down to another
    heights = [height for height, _, _ in found["merges"]]
    assert [y[1] for y in legs] == [y[2] for y in legs] == heights
    assert sorted(foot for y in legs for foot in (y[0], y[3]) if foot) == sorted(heights[:-1])
    assert matrix.images[0].get_array().tolist() == found["cka"]
    shape = run.student.shape
    kept = [n / 8 for n in shape.conv_channels] + [len(h) / 2 for h in shape.heads]
    kept += [n / 32 for n in shape.feed_forward]
    assert [bar.get_height() for bar in bars.patches] == kept


def test_without_matplotlib_a_line_says_that_there_is_no_picture(
    finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    s.draw(replace(finished[1], out=tmp_path), {})
    assert "no picture skill.png: matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "skill.png").exists()
