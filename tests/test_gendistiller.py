"""gendistiller.py: equations, causality, generation, WavLM's attention, history, variants."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torchaudio
from conftest import tiny_run
from test_distilhubert import ALL, SOME, loop_cosine, loop_l1, random_pair
from torch import nn

import common
import gendistiller as g

HUBERT = g.Shape(
    conv_channels=8,
    width=16,
    attention_heads=2,
    feed_forward=32,
    position_kernel=8,
    position_groups=2,
    position_buckets=0,
    max_distance=0,
)
WAVLM = replace(HUBERT, position_buckets=12, max_distance=20)
SHAPES = pytest.mark.parametrize("shape", [HUBERT, WAVLM], ids=["hubert", "wavlm"])
VARIANTS = pytest.mark.parametrize("variant", ["2d", "recurrent", "parallel"])
WAVES = 0.3 * torch.randn(2, 6000, generator=torch.Generator().manual_seed(5))  # 18 frames


def small_student(shape=HUBERT, seed=0, **changes):
    """A student in float64 whose norms, biases and embeddings are off their first values."""
    torch.manual_seed(seed)
    student = g.make_student(shape, g.Config(**changes)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student.double()


def small_config(files, folder, **changes):
    return g.Config(**tiny_run("gendistiller", files, folder / "run", **changes))


def random_history(frames=18, batch=2, targets=3, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(targets, batch, frames, 16, generator=generator, dtype=torch.float64)


# ---- equations: the model -----------------------------------------------------------------------


@pytest.mark.parametrize("teacher_kind", ["hubert", "wavlm"])
def test_eq1_speech_block_is_the_teachers_encoder_input(teacher_kind, tiny_teacher, tiny_wavlm):
    teacher = common.load_teacher(str(tiny_teacher))
    if teacher_kind == "wavlm":
        teacher = common.Teacher(tiny_wavlm, "tiny", normalise=False)
    student = g.build(g.Config(), teacher).eval()
    torch.testing.assert_close(student(WAVES)[0][0], teacher(WAVES)[0], rtol=1e-5, atol=1e-5)


def inputs_of_layer(student, run):
    """What reaches the student's first layer while ``run`` is called, one entry a call."""
    seen = []
    hook = student.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run()
    hook.remove()
    return seen


def test_eq2_blocks_are_speech_and_history_each_with_its_embedding():
    student, history = small_student(), random_history()
    a = student(WAVES.double())[0][0]
    (x,) = inputs_of_layer(student, lambda: student(WAVES.double(), history=history))
    assert x.shape == (2, 3, 18, 16)
    torch.testing.assert_close(x[:, 0], a + student.embedding.weight[0])
    for k in (1, 2):
        torch.testing.assert_close(x[:, k], history[k - 1] + student.embedding.weight[k])


def torch_layer(layer):
    """torch's own post-norm Transformer layer with the weights of one without bias."""
    twin = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True).double().eval()
    packed = [layer.q_proj, layer.k_proj, layer.v_proj]
    state = {
        "self_attn.in_proj_weight": torch.cat([p.weight for p in packed]),
        "self_attn.in_proj_bias": torch.cat([p.bias for p in packed]),
    }
    for theirs, ours in {
        "self_attn.out_proj": layer.out_proj,
        "linear1": layer.up,
        "linear2": layer.down,
        "norm1": layer.attention_norm,
        "norm2": layer.final_norm,
    }.items():
        state |= {f"{theirs}.{name}": value for name, value in ours.state_dict().items()}
    twin.load_state_dict(state)
    return twin


def block_mask(blocks, frames, lengths, layer_mask=True):
    """(B, KT, KT), True where query (i, t) must not see key (j, s): written from the paper."""
    forbidden = torch.zeros(len(lengths), blocks * frames, blocks * frames, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for i in range(blocks):
            for j in range(blocks):
                for s in range(frames):
                    if (layer_mask and j > i) or s >= length:
                        forbidden[b, i * frames : (i + 1) * frames, j * frames + s] = True
    return forbidden


@pytest.mark.parametrize("layer_mask", [True, False])
@pytest.mark.parametrize("lengths", [[5, 5], [5, 3]])
def test_eq3_blocks_attend_like_torchs_layer_with_a_dense_mask(layer_mask, lengths):
    student = small_student()
    layer, x = student.layers[0], random_history(5).transpose(0, 1)  # B x K x T x D
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    ours, _ = layer(x, None if lengths == [5, 5] else valid, mask=layer_mask)
    forbidden = block_mask(3, 5, lengths, layer_mask).repeat_interleave(2, 0)  # each head
    theirs = torch_layer(layer)(x.flatten(1, 2), src_mask=forbidden).unflatten(1, (3, 5))
    for b, length in enumerate(lengths):
        torch.testing.assert_close(ours[b, :, :length], theirs[b, :, :length])


def test_eq4_and_eq6_predictions_are_the_shared_projection_of_the_last_layer():
    for variant in ("2d", "recurrent"):
        student, seen = small_student(variant=variant, skip="none"), []
        keep = seen.append
        student.layers[-1].register_forward_hook(lambda *io, keep=keep: keep(io[2][0]))
        states, _ = student(WAVES.double())
        assert len(seen) == 3 and len(student.out) == 1
        for y, predicted in zip(seen, states[1:], strict=True):
            out = student.out[0]
            expected = torch.einsum("btd,ed->bte", y[:, 0], out.weight) + out.bias
            torch.testing.assert_close(predicted, expected)


@pytest.mark.parametrize("skip", ["input", "residual", "none"])
@pytest.mark.parametrize("embedded", [True, False])
def test_eq5_recurrent_steps_match_a_loop_with_torchs_layer(skip, embedded):
    student = small_student(variant="recurrent", skip=skip, step_embedding=embedded)
    assert (student.embedding is not None) == embedded  # S7
    layer, out = torch_layer(student.layers[0]), student.out[0]
    for history in (None, random_history()):
        states, _ = student(WAVES.double(), history=history)
        a = before = states[0]
        for k in range(3):
            u = before + (student.embedding.weight[k] if embedded else 0)
            u = u + a if skip == "input" and k > 0 else u
            p = nn.functional.linear(layer(u), out.weight, out.bias)
            p = p + before if skip == "residual" else p
            torch.testing.assert_close(states[k + 1], p)
            before = p if history is None else history[k]


def test_eq6_residual_skip_predicts_the_difference_to_the_layer_before():
    student = small_student(variant="recurrent", skip="residual")
    nn.init.zeros_(student.out[0].weight), nn.init.zeros_(student.out[0].bias)
    states, _ = student(WAVES.double())
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("padded", [False, True])
def test_eq7_attention_equals_torchaudios_wavlm(tiny_wavlm, padded):
    """Both layers' own gates with the first one's table; 40 frames, so that buckets are shared."""
    teacher = common.Teacher(copy.deepcopy(tiny_wavlm).double(), "tiny", normalise=False)
    student = g.build(g.Config(), teacher).double().eval()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    length = 23 if padded else 40
    valid = torch.arange(40) < torch.tensor([40, length])[:, None]
    padding = torch.zeros_like(valid, dtype=torch.double).masked_fill(~valid, -math.inf)
    ours, theirs, table = x[:, None], x, None
    for layer, source in zip(
        student.layers, teacher.model.encoder.transformer.layers, strict=False
    ):
        bias = student.relative_position(40)
        ours, _ = layer(ours, valid if padded else None, bias)
        theirs, table = source(theirs, None, table, padding if padded else None)
        torch.testing.assert_close(bias, table[0])
        torch.testing.assert_close(ours[0, 0], theirs[0])
        torch.testing.assert_close(ours[1, 0, :length], theirs[1, :length])
    assert len(table[0].unique()) < 2 * 2 * 39  # far distances do share


def test_eq7_bias_matches_a_loop_over_heads_and_frames():
    """Gates and table by hand, over two blocks: the distance in time counts, not the block."""
    student = small_student(WAVLM)
    layer, x = student.layers[1], random_history(6, batch=1)[:, 0]  # K x T x D
    bias = student.relative_position(6)
    added = layer.score_bias(x[1][None], None, bias, 2)
    assert added.shape == (1, 2, 6, 12)
    for head in range(2):
        for t in range(6):
            z = layer.gate.weight @ x[1, t, 8 * head : 8 * head + 8] + layer.gate.bias
            gate, prime = torch.sigmoid(z[:4].sum()), torch.sigmoid(z[4:].sum())
            scale = gate * (prime * layer.gate_scale[head] - 1) + 2
            for s in range(6):
                expected = scale * bias[head, t, s]
                assert added[0, head, t, s].item() == pytest.approx(expected.item())
                assert added[0, head, t, 6 + s].item() == pytest.approx(expected.item())  # S4


# ---- equations: the loss ------------------------------------------------------------------------


def test_eq8_l1_term_matches_loop_over_elements():
    p, h = random_pair()
    assert g.l1_term(p, h).mean().item() == pytest.approx(loop_l1(p, h, ALL), rel=1e-12)


def test_eq9_cosine_term_matches_loop_over_frames():
    p, h = random_pair()
    assert g.cosine_term(p, h).mean().item() == pytest.approx(loop_cosine(p, h, ALL), rel=1e-12)
    assert g.cosine_term(h, 3 * h).mean().item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert g.cosine_term(h, -h).mean().item() == pytest.approx(math.log(1 + math.e))


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("valid", [ALL, SOME])
def test_eq10_is_the_weighted_sum_over_valid_frames(weight, valid):
    p, h = random_pair()
    total, parts = g.distillation_loss(p, h, weight, torch.tensor(valid))
    expected = loop_l1(p, h, valid) + weight * loop_cosine(p, h, valid)
    assert total.dtype == torch.float64 and total.item() == pytest.approx(expected, rel=1e-12)
    for k in range(3):
        one = slice(k, k + 1)
        assert parts["l1"][k].item() == pytest.approx(loop_l1(p[one], h[one], valid))
        assert parts["cos"][k].item() == pytest.approx(loop_cosine(p[one], h[one], valid))


def test_s10_loss_in_bf16_is_computed_in_float32():
    p, h = (x.bfloat16() for x in random_pair())
    assert g.distillation_loss(p, h, 1.0)[0].dtype == torch.float32


def test_d2_padding_duplicates_and_order_leave_the_loss_unchanged():
    p, h = random_pair()
    base, _ = g.distillation_loss(p, h, 1.0)
    mask = torch.arange(7).expand(2, 7) < 5
    padded = [torch.cat([x, 100 * y], 2) for x, y in ((p, p[:, :, :2]), (h, -p[:, :, :2]))]
    assert g.distillation_loss(*padded, 1.0, mask)[0].item() == pytest.approx(base.item())
    doubled = [torch.cat([x, x], 1) for x in (p, h)]
    assert g.distillation_loss(*doubled, 1.0)[0].item() == pytest.approx(base.item())
    swapped = [x[:, [1, 0]] for x in (p, h)]
    assert g.distillation_loss(*swapped, 1.0)[0].item() == pytest.approx(base.item())


# ---- two dimensions -----------------------------------------------------------------------------


@SHAPES
def test_causal_over_layers_earlier_predictions_keep_every_bit(shape):
    student, history = small_student(shape).float(), random_history().float()
    before = student(WAVES, history=history)[0]
    for i in (0, 1):  # history layer i + 1 stands in block i + 1
        changed = history.clone()
        changed[i] += 1.0
        after = student(WAVES, history=changed)[0]
        for k in range(4):  # entry 0 is the speech, entry k comes from block k - 1
            same = torch.equal(before[k], after[k])
            assert same if k - 1 < i + 1 else not same, (i, k)
    last = history.clone()
    last[2] += 1.0  # the last layer is no history
    assert all(map(torch.equal, before, student(WAVES, history=last)[0]))


@SHAPES
def test_full_over_time_a_frame_of_speech_reaches_frames_on_both_sides(shape):
    student = small_student(shape)
    a, bias = torch.randn(1, 18, 16, dtype=torch.float64), None
    if student.relative_position is not None:
        bias = student.relative_position(18)
    moved = a.clone()
    moved[:, 9, 3] += 1.0  # of one channel: LayerNorm would undo a shift of all
    for history in (None, random_history(batch=1)):  # given history: through attention alone
        before = student.predict(a, None, bias, history, None)
        after = student.predict(moved, None, bias, history, None)
        for x, y in zip(before, after, strict=True):
            change = (x - y).abs().amax(-1)[0]
            assert (change > 1e-9).all()  # frames 0 to 17, in every layer


def test_s4_positional_convolution_hears_the_speech_alone_and_leaks_into_no_block():
    student, history, heard = small_student(), random_history(), []
    student.positional_conv.register_forward_hook(lambda _, inputs, __: heard.append(inputs[0]))
    waves = WAVES.double()
    (before,) = inputs_of_layer(student, lambda: student(waves, history=history))
    changed = history.clone()
    changed[0] += torch.randn_like(changed[0])
    (after,) = inputs_of_layer(student, lambda: student(waves, history=changed))
    assert torch.equal(before[:, 0], after[:, 0]) and torch.equal(before[:, 2], after[:, 2])
    assert not torch.equal(before[:, 1], after[:, 1])
    student(waves)
    assert [tuple(x.shape) for x in heard] == [(2, 18, 16)] * 3  # once in each of three passes
    assert torch.equal(heard[0], heard[1]) and torch.equal(heard[0], heard[2])


@SHAPES
@pytest.mark.parametrize("lengths", [None, [6000, 3700]])
def test_one_pass_over_all_blocks_equals_generation_with_a_cache(shape, lengths):
    student, history = small_student(shape), random_history()
    lengths = None if lengths is None else torch.tensor(lengths)
    at_once, frames = student(WAVES.double(), lengths, history)
    by_step, _ = student(WAVES.double(), lengths, history, torch.tensor([True, True]))
    for k in range(4):
        for b, valid in enumerate([18, 18] if frames is None else frames.tolist()):
            torch.testing.assert_close(
                at_once[k][b, :valid], by_step[k][b, :valid], rtol=1e-11, atol=1e-11
            )


def test_s13_each_pass_computes_one_block_and_its_cache_holds_the_others():
    student = small_student()
    seen = inputs_of_layer(student, lambda: student(WAVES.double()))
    assert [tuple(x.shape) for x in seen] == [(2, 1, 18, 16)] * 3
    (x,) = inputs_of_layer(student, lambda: student(WAVES.double(), history=random_history()))
    assert x.shape == (2, 3, 18, 16)
    layer = student.layers[0]
    whole, (keys, _) = layer(x)
    _, cache = layer(x[:, :2])
    last, (cached, _) = layer(x[:, 2:], cache=cache)
    torch.testing.assert_close(last, whole[:, 2:])
    assert keys.shape == cached.shape == (2, 2, 3, 18, 8)


def test_generation_is_a_fixed_point_of_teacher_forcing():
    """Fed its own predictions as history, one pass gives these predictions again."""
    for variant in ("2d", "recurrent"):
        student = small_student(WAVLM, variant=variant)
        states, _ = student(WAVES.double())
        again, _ = student(WAVES.double(), history=torch.stack(states[1:]))
        for x, y in zip(states, again, strict=True):
            torch.testing.assert_close(x, y)


def test_no_layer_mask_lets_blocks_see_later_ones_and_recomputes_them():
    student, history = small_student(layer_mask=False), random_history()
    before = student(WAVES.double(), history=history)[0]
    changed = history.clone()
    changed[1] += torch.randn_like(changed[1])
    after = student(WAVES.double(), history=changed)[0]
    assert not any(map(torch.equal, before[1:], after[1:]))  # block 2 reaches all three
    states, _ = student(WAVES.double())
    blocks = states[:3]
    for k in (1, 2, 3):
        x = torch.stack([block + e for block, e in zip(blocks[:k], student.embedding.weight)], 1)
        for layer in student.layers:
            x, _ = layer(x, mask=False)
        torch.testing.assert_close(states[k], student.out[0](x[:, -1]))
    masked = small_student()(WAVES.double())[0]  # the same weights
    torch.testing.assert_close(masked[1], states[1])
    assert not torch.allclose(masked[3], states[3])


# ---- student ------------------------------------------------------------------------------------


def parameters_of(shape, **changes):
    return common.count_parameters(g.make_student(shape, g.Config(**changes)))


def test_paper_size_students_have_the_derived_parameter_counts():
    plain, wavlm = g.Shape(position_buckets=0, max_distance=0), g.Shape()
    bare = dict(step_embedding=False)  # the embeddings are 3 x 768 on top
    assert parameters_of(plain, variant="recurrent", **bare) == 16_994_944
    assert parameters_of(wavlm, variant="recurrent", **bare) == 16_999_316
    assert parameters_of(wavlm, variant="recurrent") == 16_999_316 + 3 * 768
    assert parameters_of(plain, variant="2d", **bare) == 24_082_816
    assert parameters_of(wavlm, variant="2d") == 24_082_816 + 2 * 532 + 3840 + 3 * 768
    assert parameters_of(plain, variant="parallel") == 25_264_000
    teacher = torchaudio.models.wavlm_base()
    assert round(100 * 16_999_316 / common.count_parameters(teacher), 1) == 18.0
    assert round(100 * (1 - 16_994_944 / 25_264_000), 1) == 32.7


def test_s5_recurrent_has_one_layer_and_the_others_as_many_as_asked():
    for variant, count in (("recurrent", 1), ("2d", 3), ("parallel", 3)):
        assert len(small_student(variant=variant, student_layers=3).layers) == count


def test_s12_parallel_has_a_private_head_for_each_layer_and_no_history():
    student = small_student(variant="parallel")
    assert len(student.out) == 3 and student.embedding is None
    waves = WAVES.double()
    states, _ = student(waves)
    given, _ = student(waves, history=random_history())
    assert all(map(torch.equal, states, given))
    states[2].sum().backward()
    assert student.out[0].weight.grad is None and student.out[1].weight.grad.abs().sum() > 0


@SHAPES
@VARIANTS
def test_padded_frames_never_reach_valid_ones_behind_the_group_norm(shape, variant):
    student = small_student(shape, variant=variant)
    student.feature_extractor.group_norm = nn.Identity()  # the one layer that does see padding
    waves, lengths = WAVES.double(), torch.tensor([6000, 3000])
    waves[1, 3000:] = 0
    batched, frames = student(waves, lengths)
    alone, _ = student(waves[1:, :3000])
    assert frames.tolist() == [18, 9] and len(batched) == 4  # S11: speech and three layers
    for x, y in zip(batched, alone, strict=True):
        torch.testing.assert_close(x[1, :9], y[0])


def test_padding_has_finite_gradients_under_wavlms_gate():
    student = small_student(WAVLM)
    states, _ = student(WAVES.double(), torch.tensor([6000, 3000]))
    sum(state.square().sum() for state in states).backward()
    for name, parameter in student.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_s3_gradient_into_the_convolutions_is_scaled_and_nothing_else():
    grads = {}
    for factor in (1.0, 0.1):
        student = small_student(conv_gradient=factor)
        student(WAVES.double())[0][-1].square().sum().backward()
        grads[factor] = {name: p.grad for name, p in student.named_parameters()}
    for name, full in grads[1.0].items():
        expected = 0.1 * full if name.startswith("feature_extractor") else full
        torch.testing.assert_close(grads[0.1][name], expected)


@SHAPES
@VARIANTS
def test_autocast_to_bf16_stays_near_float32(shape, variant):
    student, history = small_student(shape, variant=variant).float(), random_history().float()
    for settings in ({}, {"history": history}, {"history": history, "given": torch.eye(2)[0] > 0}):
        for lengths in (None, torch.tensor([6000, 4000])):
            exact, _ = student(WAVES, lengths, **settings)
            with torch.autocast("cpu", torch.bfloat16):
                rounded, _ = student(WAVES, lengths, **settings)
            for x, y in zip(exact, rounded, strict=True):
                cosine = nn.functional.cosine_similarity(x.flatten(1), y.float().flatten(1))
                assert cosine.min() > 0.99


# ---- history ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2d", "recurrent"])
def test_s8_mixed_history_is_chosen_utterance_by_utterance(variant):
    student, history = small_student(variant=variant), random_history()
    waves = WAVES.double()
    free, _ = student(waves)
    forced, _ = student(waves, history=history)
    mixed, _ = student(waves, None, history, torch.tensor([True, False]))
    for k in range(4):
        torch.testing.assert_close(mixed[k][0], forced[k][0])
        torch.testing.assert_close(mixed[k][1], free[k][1])
    assert not torch.allclose(free[3][0], forced[3][0])


@pytest.mark.parametrize("variant", ["2d", "recurrent"])
def test_s8_gradient_flows_back_through_the_students_own_history_only(variant):
    student, history = small_student(variant=variant, skip="none"), random_history()
    states, _ = student(WAVES.double(), None, history, torch.tensor([True, False]))
    (gradient,) = torch.autograd.grad(states[3].sum(), states[1])
    assert gradient[0].abs().sum() == 0 and gradient[1].abs().sum() > 0


def test_s8_share_of_the_teachers_history_falls_linearly_to_none():
    config = g.Config(history="mixed", steps=100)
    assert [g.teacher_share(step, config) for step in (1, 26, 51)] == [1.0, 0.75, 0.5]
    assert g.teacher_share(100, config) == pytest.approx(0.01)
    for step in (1, 100):
        assert g.teacher_share(step, replace(config, history="teacher")) == 1.0
        assert g.teacher_share(step, replace(config, history="student")) == 0.0


@pytest.mark.parametrize("mode", ["teacher", "student", "mixed"])
def test_s8_training_uses_the_history_it_says(mode, tiny_files, tmp_path, monkeypatch):
    calls, real = [], g.predict_layers

    def spy(student, waveforms, history=None, given=None):
        if student.training:
            calls.append((history is not None, None if given is None else given.tolist()))
        return real(student, waveforms, history, given)

    monkeypatch.setattr(g, "predict_layers", spy)
    _, lines = g.train(small_config(tiny_files, tmp_path, steps=12, history=mode))
    assert len(calls) == 12
    assert all(history == (mode != "student") for history, _ in calls)
    if mode == "mixed":
        shares = [sum(given) / len(given) for _, given in calls]
        assert shares[0] == 1.0 and sum(shares[:6]) > sum(shares[6:]) and 0 < sum(shares[4:8]) < 4
        pairs = zip(calls, calls[1:])  # drawn anew each time: some get it back
        assert any(not a and b for (_, x), (_, y) in pairs for a, b in zip(x, y))
    else:
        assert all(given is None for _, given in calls)
    same = [line["loss"] == pytest.approx(line["free_running"], rel=1e-5) for line in lines]
    assert all(same) if mode == "student" else not all(same)


def test_d7_heldout_distance_is_free_running(tiny_files, tmp_path):
    config = small_config(tiny_files, tmp_path, steps=2, history="teacher")
    student, lines = g.train(config)
    teacher = common.load_teacher(config.teacher)
    _, heldout = common.train_and_heldout(common.scan(config.data, None, 0))
    sums, frames = torch.zeros(3), 0
    for waves in common.heldout_batches(heldout, config.batch_seconds, config.crop_seconds):
        with torch.no_grad():
            p, h = student(waves)[0][1:], teacher(waves)
        for k, layer in enumerate((4, 8, 12)):
            sums[k] += (p[k] - h[layer]).abs().mean(-1).sum()
        frames += p[0].shape[0] * p[0].shape[1]
    assert lines[-1]["heldout"]["L1"] == pytest.approx((sums / frames).tolist(), rel=1e-5)


# ---- initialisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_s9_student_made_of_all_teacher_layers_is_the_teacher(kind, tiny_teacher, tiny_wavlm_file):
    """With as many layers as the teacher and no projection, the baseline's states are its last."""
    teacher = common.load_teacher(str(tiny_teacher if kind == "hubert" else tiny_wavlm_file))
    student = g.build(g.Config(variant="parallel", student_layers=12), teacher).eval()
    student.out[0] = nn.Identity()
    ours, theirs = student(WAVES)[0], teacher(WAVES)
    for x, y in ((ours[0], theirs[0]), (ours[1], theirs[12])):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@VARIANTS
def test_s9_copies_all_but_the_projection_which_is_the_identity(variant, tiny_wavlm_file):
    teacher = common.load_teacher(str(tiny_wavlm_file))
    config = g.Config(variant=variant)
    random = g.build(replace(config, init_from_teacher=False), teacher).state_dict()
    copied = g.build(config, teacher).state_dict()
    same = {name for name, value in copied.items() if torch.equal(value, random[name])}
    assert same == {name for name in copied if name.startswith(("out.", "embedding."))}
    assert torch.equal(copied["out.0.weight"], torch.eye(16)) and not copied["out.0.bias"].any()


def test_s9_a_teacher_with_other_layers_is_refused_by_name(tiny_teacher):
    teacher = common.load_teacher(str(tiny_teacher))
    config = replace(g.Config(), target_layers=(1,))
    for name, value in (("pre_norm", True), ("num_layers", 1)):
        other = copy.copy(teacher)
        setattr(other, name, value)
        with pytest.raises(common.InputError, match="tiny.pt.*--no-init-from-teacher"):
            g.build(config, other)
        g.build(replace(config, init_from_teacher=False), other)
    other.num_layers = 1
    g.build(replace(config, variant="recurrent"), other)  # one layer is all it takes


def test_s1_target_layers_are_counted_from_one_and_must_be_there(tiny_teacher):
    teacher = common.load_teacher(str(tiny_teacher))
    theirs, _ = teacher.model.extract_features(WAVES)
    targets = g.target_states(teacher, WAVES, (4, 8, 12))
    for target, index in zip(targets, (3, 7, 11), strict=True):
        torch.testing.assert_close(target, theirs[index])
    for layers in ((0, 4), (4, 13)):
        with pytest.raises(common.InputError, match="--target-layers"):
            g.build(g.Config(target_layers=layers), teacher)


# ---- training -----------------------------------------------------------------------------------


@VARIANTS
def test_s2_each_variant_learns_from_a_wavlm_teacher_and_leaves_all_of_itself(
    variant, tiny_wavlm_file, tiny_files, tmp_path
):
    changes = dict(variant=variant, history="mixed", cosine_weight=3.0, lr=5e-3, steps=12)
    config = small_config(tiny_files | dict(teacher=tiny_wavlm_file), tmp_path, **changes)
    student, lines = g.train(config)
    assert student.shape.position_buckets == 12
    assert lines[-1]["free_running"] < lines[0]["free_running"]
    for line in lines:
        l1, cos = (sum(line[f"{part}_{i}"] for i in (4, 8, 12)) / 3 for part in ("l1", "cos"))
        assert line["loss"] == pytest.approx(l1 + 3 * cos, rel=1e-5)
    for name, parameter in student.named_parameters():
        assert parameter.grad.any(), name
    loaded = g.load_student(tmp_path / "run" / "student.pt")
    states, frames = loaded(WAVES, torch.tensor([6000, 4000]))
    assert len(states) == 4 and frames.tolist() == [18, 12]  # S11, with the projection (S14)
    for a, b in zip(states, student(WAVES, torch.tensor([6000, 4000]))[0], strict=True):
        assert torch.equal(a, b)


def test_learning_rate_has_the_corners_of_distilhuberts_code():
    config = g.Config()
    assert g.learning_rate(1, config) == pytest.approx(2e-4 / 14_000)
    assert g.learning_rate(14_000, config) == pytest.approx(2e-4)
    assert g.learning_rate(107_000, config) == pytest.approx(1e-4)
    assert g.learning_rate(200_000, config) == 0.0


def test_s1_repeated_target_layers_and_idle_settings_are_refused(tiny_teacher):
    teacher = common.load_teacher(str(tiny_teacher))
    with pytest.raises(common.InputError, match="name each once"):
        g.build(g.Config(target_layers=(4, 4, 8)), teacher)
    for settings, words in (
        (dict(skip="none"), "--skip"),
        (dict(variant="recurrent", layer_mask=False), "--layer-mask"),
        (dict(variant="parallel", step_embedding=False), "--step-embedding"),
    ):
        with pytest.raises(common.InputError, match=words):
            g.check(g.Config(**settings))
    config = g.Config(target_layers=(12, 8, 4), history="teacher", layer_mask=False)
    g.check(config)
    g.build(config, teacher)


@pytest.mark.parametrize(
    "settings", [dict(student_layers=3), dict(step_embedding=False), dict(history="student")]
)
def test_rows_of_the_claim_ignore_a_flag_that_they_have_no_use_for(settings, tiny_teacher):
    teacher = common.load_teacher(str(tiny_teacher))
    for changes in g.CLAIM.values():
        g.build(replace(g.Config(**settings), **changes), teacher)


def test_dropout_acts_on_blocks_and_within_layers_in_training_only():
    student = small_student(dropout=0.5)
    layer, x = student.layers[0], random_history(5).transpose(0, 1)
    assert torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(student.embedded(x[:, 0], 0), x[:, 0] + student.embedding.weight[0])
    student.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert (student.embedded(x[:, 0], 0) == 0).double().mean() == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize(
    "variant, calls", [("2d", 3 + 3 * 2 * 3), ("recurrent", 3 + 3 * 3), ("parallel", 1 + 2 * 3)]
)
def test_every_dropout_of_the_recipe_is_there(variant, calls, monkeypatch):
    """One on the input of each pass; after attention, in and after feed-forward in each layer."""
    rates, attention, real = [], [], torch.nn.functional.scaled_dot_product_attention
    student = small_student(variant=variant, dropout=0.25).train()
    monkeypatch.setattr(g.F, "dropout", lambda x, rate, training=True: rates.append(rate) or x)

    def spy(*args, dropout_p=0.0, **settings):
        attention.append(dropout_p)
        return real(*args, **settings)

    monkeypatch.setattr(g.F, "scaled_dot_product_attention", spy)
    student(WAVES.double())
    assert rates == [0.25] * calls and set(attention) == {0.25}


def test_first_weights_have_the_scales_that_are_said():
    torch.manual_seed(0)
    student = g.make_student(replace(WAVLM, width=64, feed_forward=256), g.Config())
    for weight in (
        student.layers[0].up.weight,
        student.projection.weight,
        student.embedding.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    conv = student.feature_extractor.convs[3].weight  # He: variance 2 / inputs
    assert conv.std().item() == pytest.approx(math.sqrt(2 / conv[0].numel()), rel=0.2)
    assert not student.projection.bias.any() and not student.layers[1].down.bias.any()


def test_s11_features_are_the_speech_and_all_generated_layers(monkeypatch):
    monkeypatch.setattr(common, "score", lambda model, features, *_: features)
    student = small_student().float()
    states = g.score(student, [], torch.device("cpu"), 0)(WAVES)
    assert [tuple(state.shape) for state in states] == [(2, 18, 16)] * 4


def test_describe_counts_each_step():
    rows = {v: g.describe(g.Config(variant=v)) for v in ("2d", "recurrent", "parallel")}
    once, thrice = rows["parallel"], rows["recurrent"]
    layer, conv = (thrice[f"Recurrent.{part}"] for part in ("layers.0", "positional_conv"))
    assert layer["GMAC/s"] == pytest.approx(3 * once["Parallel.layers.0"]["GMAC/s"])
    assert conv == once["Parallel.positional_conv"]
    assert once["Parallel"]["GMAC/s"] * 10 == pytest.approx(35.8, abs=0.05)
    assert thrice["Recurrent"]["GMAC/s"] * 10 == pytest.approx(39.7, abs=0.05)
    assert rows["2d"]["TwoDimensional"]["parameters"] == 24_090_024
