"""gendistiller.py: equations, causality, generation, WavLM's attention, history, variants."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torchaudio
from conftest import shake, tiny_run
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
STEPS = ("recurrent", "recurrent-gelu", "recurrent-no-skip")
VARIANTS = pytest.mark.parametrize("variant", ["2d", *STEPS, "parallel"])
GENERATED = pytest.mark.parametrize("variant", ["2d", "recurrent"])
WAVES = 0.3 * torch.randn(2, 6000, generator=torch.Generator().manual_seed(5))  # 18 frames
BOTH = torch.tensor([True, True])


def small_student(shape=HUBERT, variant="2d", dropout=0.0, conv_gradient=0.1):
    """A student in float64 whose norms, biases and embeddings are off their first values."""
    torch.manual_seed(0)
    return shake(g.Student(shape, variant, 3, dropout, conv_gradient)).double()


def random_hidden(frames=18, batch=2):
    """Teacher's target layers K x B x T x D."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(3, batch, frames, 16, generator=generator, dtype=torch.float64)


def layer_calls(student, layer, *arguments):
    """Hidden states of the student, and (input, output) of each call of one of its layers."""
    calls = []
    hook = student.layers[layer].register_forward_hook(
        lambda _, inputs, output: calls.append((inputs[0], output))
    )
    hidden_states, _ = student(*arguments)
    hook.remove()
    return hidden_states, calls


# ---- equations: the model -----------------------------------------------------------------------


def test_eq2_blocks_are_speech_and_history_each_with_its_embedding():
    student, hidden = small_student(), random_hidden()
    (speech, *_), calls = layer_calls(student, 0, WAVES.double(), None, hidden, BOTH)
    for (x, _), v, e in zip(calls, [speech, *hidden[:2]], student.embedding.weight, strict=True):
        torch.testing.assert_close(x, v + e)


def torch_layer(layer):
    """torch's own post-norm Transformer layer with the weights of one without bias."""
    twin = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True).double().eval()
    packed = [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]
    state = {
        "self_attn.in_proj_weight": torch.cat([p.weight for p in packed]),
        "self_attn.in_proj_bias": torch.cat([p.bias for p in packed]),
    }
    for theirs, ours in {
        "self_attn.out_proj": layer.attention.out_proj,
        "linear1": layer.feed_forward.intermediate_dense,
        "linear2": layer.feed_forward.output_dense,
        "norm1": layer.layer_norm,
        "norm2": layer.final_layer_norm,
    }.items():
        state |= {f"{theirs}.{name}": value for name, value in ours.state_dict().items()}
    twin.load_state_dict(state)
    return twin


def block_mask(blocks, frames, lengths):
    """(B, KT, KT), True where query (i, t) must not see key (j, s): written from the paper."""
    forbidden = torch.zeros(len(lengths), blocks * frames, blocks * frames, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for i in range(blocks):
            for j in range(blocks):
                for s in range(frames):
                    if j > i or s >= length:
                        forbidden[b, i * frames : (i + 1) * frames, j * frames + s] = True
    return forbidden


@pytest.mark.parametrize("lengths", [[6000, 6000], [6000, 3700]])
def test_eq3_generation_equals_one_pass_of_torchs_layers_with_a_dense_mask(lengths):
    student, hidden = small_student(), random_hidden()
    padded = None if lengths[0] == lengths[1] else torch.tensor(lengths)
    arguments = (WAVES.double(), padded, hidden, BOTH)
    (speech, *predicted), frames = student(*arguments)
    row = torch.stack([speech, *hidden[:2]], 1) + student.embedding.weight[:, None]
    y = row.flatten(1, 2)  # B x KT x D
    frames = [18, 18] if frames is None else frames.tolist()
    forbidden = block_mask(3, 18, frames).repeat_interleave(2, 0)  # each head
    for layer in student.layers:
        y = torch_layer(layer)(y, src_mask=forbidden)
    for k, p in enumerate(student.output(y).unflatten(1, (3, 18)).unbind(1)):
        for b, valid in enumerate(frames):
            torch.testing.assert_close(predicted[k][b, :valid], p[b, :valid])


def test_eq4_predictions_are_the_shared_output_layer_of_the_last_layer():
    student = small_student()
    (_, *predicted), calls = layer_calls(student, 1, WAVES.double())
    out = student.output
    for (_, y), p in zip(calls, predicted, strict=True):
        torch.testing.assert_close(p, torch.einsum("btd,ed->bte", y, out.weight) + out.bias)


@pytest.mark.parametrize("given", [None, BOTH])
def test_eq5_each_step_is_torchs_layer_of_the_history_alone(given):
    student, hidden = small_student(variant="recurrent"), random_hidden()
    history = (None, None) if given is None else (hidden, given)
    hidden_states, calls = layer_calls(student, 0, WAVES.double(), None, *history)
    before = hidden_states if given is None else [hidden_states[0], *hidden]
    assert len(calls) == 3
    for (x, u), v in zip(calls, before, strict=False):
        assert torch.equal(x, v)
        torch.testing.assert_close(u, torch_layer(student.layers[0])(v))


@pytest.mark.parametrize("variant", STEPS)
def test_eq6_skip_goes_around_the_layer_and_the_output_layer_comes_after_it(variant):
    student = small_student(variant=variant)
    layer, out = torch_layer(student.layers[0]), student.output
    (v, *predicted), _ = student(WAVES.double())
    for p in predicted:
        summed = layer(v) if variant == "recurrent-no-skip" else layer(v) + v
        expected = torch.einsum("btd,ed->bte", summed, out.weight) + out.bias
        if variant == "recurrent-gelu":  # x times the normal distribution function of x
            expected = expected * (1 + torch.erf(expected / math.sqrt(2))) / 2
        torch.testing.assert_close(p, expected)
        v = p


@pytest.mark.parametrize("padded", [False, True])
def test_eq7_attention_equals_torchaudios_wavlm(tiny_wavlm, padded):
    """Both layers' own gates with the first one's table; 40 frames, so that buckets are shared."""
    teacher = common.Teacher(copy.deepcopy(tiny_wavlm).double(), "tiny", normalise=False)
    student = g.build(g.Config(), teacher).double().eval()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    length = 23 if padded else 40
    valid = torch.arange(40) < torch.tensor([40, length])[:, None]
    padding = torch.zeros_like(valid, dtype=torch.double).masked_fill(~valid, -math.inf)
    position = student.rel_attn_embed(g.distance_buckets(40, student.shape, x.device))
    position, ours, theirs, table = position.permute(2, 0, 1), x, x, None
    sources = teacher.model.encoder.transformer.layers[:2]
    for layer, source in zip(student.layers, sources, strict=True):
        ours = layer(ours, [], position, valid[:, None, None] if padded else None)
        theirs, table = source(theirs, None, table, padding if padded else None)
        torch.testing.assert_close(position, table[0])
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1, :length], theirs[1, :length])
    assert len(table[0].unique()) < 2 * 2 * 39  # far distances do share


def test_eq7_bias_matches_a_loop_over_heads_and_frames():
    attention = small_student(WAVLM).layers[1].attention
    x = random_hidden(6, batch=1)[0]  # 1 x T x D
    position = torch.randn(2, 6, 6, dtype=torch.float64)
    bias = attention.position_bias(x, position)
    linear, const = attention.gru_rel_pos_linear, attention.gru_rel_pos_const.flatten()
    for head in range(2):
        for t in range(6):
            z = linear.weight @ x[0, t, 8 * head : 8 * head + 8] + linear.bias
            gate, prime = torch.sigmoid(z[:4].sum()), torch.sigmoid(z[4:].sum())
            scale = gate * (prime * const[head] - 1) + 2
            torch.testing.assert_close(bias[0, head, t], scale * position[head, t])


# ---- equations: the loss ------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("valid", [ALL, SOME])
def test_eq8_eq9_eq10_match_loops_over_the_valid_frames_of_each_layer(weight, valid):
    p, h = random_pair()
    total, parts = g.distillation_loss(p, h, weight, torch.tensor(valid))
    expected = loop_l1(p, h, valid) + weight * loop_cosine(p, h, valid)
    assert total.dtype == torch.float64 and total.item() == pytest.approx(expected, rel=1e-12)
    layers = [(p[k : k + 1], h[k : k + 1], valid) for k in range(3)]
    assert parts["l1"].tolist() == pytest.approx([loop_l1(*row) for row in layers], rel=1e-12)
    assert parts["cos"].tolist() == pytest.approx([loop_cosine(*row) for row in layers], rel=1e-12)


# ---- two dimensions -----------------------------------------------------------------------------


@SHAPES
def test_causal_over_layers_earlier_predictions_keep_every_bit(shape):
    student, hidden = small_student(shape), random_hidden()
    before = student(WAVES.double(), None, hidden, BOTH)[0]
    for i in range(3):  # h_i stands in block i + 1; the last one is no history
        changed = hidden.clone()
        changed[i] += 1.0
        after = student(WAVES.double(), None, changed, BOTH)[0]
        same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert same == [k <= i + 1 for k in range(4)]  # entry 0 is the speech, k + 1 is p_k


@SHAPES
def test_full_over_time_a_frame_of_speech_reaches_frames_on_both_sides(shape):
    student = small_student(shape)
    a = torch.randn(1, 18, 16, dtype=torch.float64)
    moved = a.clone()
    moved[:, 9, 3] += 1.0  # of one channel: LayerNorm would undo a shift of all
    position = torch.randn(2, 18, 18, dtype=torch.float64) if shape is WAVLM else None
    history = (random_hidden(batch=1), torch.tensor([True]))  # speech comes by attention alone
    for arguments in ((None, None), history):
        before = student.two_dimensional(a, position, None, *arguments)
        after = student.two_dimensional(moved, position, None, *arguments)
        for x, y in zip(before, after, strict=True):
            assert ((x - y).abs().amax(-1) > 1e-9).all()  # frames 0 to 17, in every layer


@SHAPES
def test_s3_positions_are_those_of_time_the_same_for_all_blocks(shape):
    """Blocks of the same content and embedding are attended to as one of them would be."""
    layer = small_student(shape).layers[0]
    x = random_hidden(6)[0]
    position = torch.randn(2, 6, 6, dtype=torch.float64) if shape is WAVLM else None
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None, None, None]
    past = []
    first, second = (layer(x, past, position, mask) for _ in range(2))
    torch.testing.assert_close(first, second)


@GENERATED
def test_generation_is_a_fixed_point_of_teacher_forcing(variant):
    """Given its own predictions as history, the student gives these predictions again."""
    student = small_student(WAVLM, variant)
    hidden_states, _ = student(WAVES.double())
    again, _ = student(WAVES.double(), None, torch.stack(hidden_states[1:]), BOTH)
    assert all(map(torch.equal, hidden_states, again))


# ---- student ------------------------------------------------------------------------------------


def test_paper_size_students_have_the_derived_parameter_counts():
    plain, wavlm = g.Shape(position_buckets=0, max_distance=0), g.Shape()

    def count(shape, variant):
        with torch.device("meta"):
            return common.count_parameters(g.make_student(g.Config(variant=variant), shape))

    assert [count(plain, variant) for variant in STEPS] == [16_994_944] * 3
    assert count(wavlm, "recurrent") == 16_999_316
    assert count(plain, "2d") == 24_082_816 + 3 * 768  # the embeddings
    assert count(wavlm, "2d") == 24_090_024
    assert count(plain, "parallel") == 25_264_000
    teacher = common.count_parameters(torchaudio.models.wavlm_base())
    assert round(100 * 16_999_316 / teacher, 1) == 18.0
    assert round(100 * (1 - 16_994_944 / 25_264_000), 1) == 32.7


def test_s4_parallel_has_a_private_head_for_each_layer_and_no_history():
    student, waves = small_student(variant="parallel"), WAVES.double()
    hidden_states, _ = student(waves)
    assert all(map(torch.equal, hidden_states, student(waves, None, random_hidden(), BOTH)[0]))
    hidden_states[2].sum().backward()
    used = [head.weight.grad is not None for head in student.heads]
    assert used == [False, True, False] and len(student.layers) == 2


@pytest.mark.parametrize(
    "variant, calls", [("2d", 3 + 3 * 2 * 3), ("recurrent", 3 + 3 * 3), ("parallel", 1 + 2 * 3)]
)
def test_every_dropout_of_the_recipe_is_there(variant, calls, monkeypatch):
    """One on the input of each step; after attention, in and after feed-forward in each layer."""
    rates, attention, real = [], [], torch.nn.functional.scaled_dot_product_attention
    student = small_student(variant=variant, dropout=0.25).train()
    monkeypatch.setattr(g.F, "dropout", lambda x, rate, *_: rates.append(rate) or x)

    def spy(*args, dropout_p=0.0, **settings):
        attention.append(dropout_p)
        return real(*args, **settings)

    monkeypatch.setattr(g.F, "scaled_dot_product_attention", spy)
    student(WAVES.double())
    assert rates == [0.25] * calls and set(attention) == {0.25}


def test_first_weights_have_the_scales_that_are_said():
    student = g.make_student(g.Config(), replace(WAVLM, width=64, feed_forward=256))
    for weight in (
        student.layers[0].feed_forward.intermediate_dense.weight,
        student.feature_projection["projection"].weight,
        student.embedding.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    conv = student.feature_extractor.conv_layers[3].conv.weight  # He: variance 2 / inputs
    assert conv.std().item() == pytest.approx(math.sqrt(2 / conv[0].numel()), rel=0.2)
    assert not student.layers[1].feed_forward.output_dense.bias.any()


# ---- history ------------------------------------------------------------------------------------


@GENERATED
def test_s7_history_is_chosen_utterance_by_utterance(variant):
    student, hidden, waves = small_student(variant=variant), random_hidden(), WAVES.double()
    free, _ = student(waves)
    forced, _ = student(waves, None, hidden, BOTH)
    mixed, _ = student(waves, None, hidden, torch.tensor([True, False]))
    for k in range(4):
        torch.testing.assert_close(mixed[k][0], forced[k][0])
        torch.testing.assert_close(mixed[k][1], free[k][1])
    assert not torch.allclose(free[3][0], forced[3][0])


@GENERATED
def test_s7_gradient_flows_back_through_the_students_own_history_only(variant):
    student, given = small_student(variant=variant), torch.tensor([True, False])
    hidden_states, _ = student(WAVES.double(), None, random_hidden(), given)
    (gradient,) = torch.autograd.grad(hidden_states[3].sum(), hidden_states[1])
    assert gradient[0].abs().sum() == 0 and gradient[1].abs().sum() > 0


def test_s7_share_of_the_teachers_history_falls_linearly_to_none():
    config = g.Config(steps=100)
    assert [g.teacher_share(step, config) for step in (1, 26, 51)] == [1.0, 0.75, 0.5]
    assert g.teacher_share(100, config) == pytest.approx(0.01)


def test_s7_training_draws_the_history_of_each_utterance_anew(tiny_files, tmp_path, monkeypatch):
    calls, real = [], g.Student.forward

    def spy(student, waveforms, lengths=None, teacher_hidden=None, given=None):
        if student.training:
            calls.append(given.tolist())
        return real(student, waveforms, lengths, teacher_hidden, given)

    monkeypatch.setattr(g.Student, "forward", spy)
    g.train(g.Config(**tiny_run("gendistiller", tiny_files, tmp_path / "run", steps=12)))
    shares = [sum(given) / len(given) for given in calls]
    assert len(shares) == 12 and shares[0] == 1.0
    assert sum(shares[:6]) > sum(shares[6:]) and 0 < sum(shares[4:8]) < 4
    pairs = zip(calls, calls[1:])  # drawn anew each time: some get it back
    assert any(not a and b for one, two in pairs for a, b in zip(one, two))


def test_heldout_distance_is_that_of_the_students_own_history(tiny_files, tmp_path):
    config = g.Config(**tiny_run("gendistiller", tiny_files, tmp_path / "run", steps=2))
    student, history = g.train(config)
    teacher = common.load_teacher(config.teacher)
    _, heldout = common.train_and_heldout(common.scan(config.data, None, 0))
    sums, frames = torch.zeros(3), 0
    for waves in common.heldout_batches(heldout, config.batch_seconds, config.crop_seconds):
        with torch.no_grad():
            p, h = student(waves)[0][1:], teacher(waves)
        for k, layer in enumerate((4, 8, 12)):
            sums[k] += (p[k] - h[layer]).abs().mean(-1).sum()
        frames += p[0].shape[0] * p[0].shape[1]
    assert history[-1]["heldout"]["L1"] == pytest.approx((sums / frames).tolist(), rel=1e-5)


# ---- start from the teacher ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_eq1_s2_student_made_of_all_teacher_layers_is_the_teacher(
    kind, tiny_teacher, tiny_wavlm_file
):
    """The speech is its encoder input; with all its layers and no head, the states are its last."""
    teacher = common.load_teacher(str(tiny_teacher if kind == "hubert" else tiny_wavlm_file))
    student = g.build(g.Config(variant="parallel"), teacher).eval()
    student.layers = nn.ModuleList(g.TransformerLayer(student.shape, 0.0) for _ in range(12))
    g.initialise_from_teacher(student.eval(), teacher.weights())
    student.heads[0] = nn.Identity()
    ours, theirs = student(WAVES)[0], teacher(WAVES)
    for x, y in ((ours[0], theirs[0]), (ours[1], theirs[12])):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@VARIANTS
def test_s2_and_s6_all_is_copied_but_output_layers_which_are_the_identity(variant, tiny_wavlm_file):
    teacher = common.load_teacher(str(tiny_wavlm_file))
    config = g.Config(variant=variant)
    random = g.build(replace(config, init_from_teacher=False), teacher).state_dict()
    student = g.build(config, teacher)
    copied = student.state_dict()
    same = {name for name, value in copied.items() if torch.equal(value, random[name])}
    new = ("output.", "heads.", "embedding.")
    assert same == {name for name in copied if name.startswith(new)}
    for output in student.heads if variant == "parallel" else [student.output]:
        scale = 0.5 if variant in ("recurrent", "recurrent-gelu") else 1.0
        assert torch.equal(output.weight, scale * torch.eye(16)) and not output.bias.any()


# ---- training -----------------------------------------------------------------------------------


@VARIANTS
def test_s1_each_variant_learns_from_a_wavlm_teacher(
    variant, tiny_wavlm_file, tiny_files, tmp_path
):
    changes = dict(variant=variant, cosine_weight=3.0, lr=5e-3, steps=12)
    files = tiny_files | dict(teacher=tiny_wavlm_file)
    student, history = g.train(
        g.Config(**tiny_run("gendistiller", files, tmp_path / "run", **changes))
    )
    assert student.shape.position_buckets == 12
    first, last = (sum(history[i]["heldout"]["L1"]) for i in (1, -1))
    assert last < first
    for line in history:
        l1, cos = (sum(line[f"{part}_{i}"] for i in (4, 8, 12)) / 3 for part in ("l1", "cos"))
        assert line["loss"] == pytest.approx(l1 + 3 * cos, rel=1e-5)
    for name, parameter in student.named_parameters():
        assert parameter.grad.any(), name
    loaded = g.load_student(tmp_path / "run" / "student.pt")
    assert all(map(torch.equal, loaded(WAVES)[0], student(WAVES)[0]))


def test_s3_describe_counts_each_step():
    with torch.device("meta"):
        once, thrice = (g.describe(g.Config(variant=v)) for v in ("parallel", "recurrent"))
    # S3: the positional convolution runs once, on the speech
    layer, conv = (thrice[f"Student.{part}"] for part in ("layers.0", "pos_conv_embed"))
    assert layer["GMAC/s"] == pytest.approx(3 * once["Student.layers.0"]["GMAC/s"])
    assert conv == once["Student.pos_conv_embed"]
    assert once["Student"]["GMAC/s"] * 10 == pytest.approx(35.8, abs=0.05)
    assert thrice["Student"]["GMAC/s"] * 10 == pytest.approx(39.7, abs=0.05)
