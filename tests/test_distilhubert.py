"""distilhubert.py: equations, student, start from the teacher, schedule, target layers."""

import copy
import math

import pytest
import torch
import torchaudio
from conftest import encoder_config, shake, tiny_run
from torch import nn

import common
import distilhubert as d

SMALL = d.Shape(
    conv_channels=8,
    width=16,
    attention_heads=2,
    feed_forward=32,
    position_kernel=8,
    position_groups=2,
)


def small_student(dropout=0.0, layers=2, seed=0):
    torch.manual_seed(seed)
    return d.Student(SMALL, layers, dropout, d.Config.conv_gradient).eval()


# ---- equations ----------------------------------------------------------------------------------


def random_pair():
    """Predictions and teacher's states in float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, 5, 4)  # N x B x T x D
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def loop_l1(p, h, valid):
    values = [
        sum(abs(float(p[n, b, t, i] - h[n, b, t, i])) for i in range(p.shape[3])) / p.shape[3]
        for n in range(p.shape[0])
        for b in range(p.shape[1])
        for t in range(p.shape[2])
        if valid[b][t]
    ]
    return sum(values) / len(values)


def loop_cosine(p, h, valid):
    values = []
    for n in range(p.shape[0]):
        for b in range(p.shape[1]):
            for t in range(p.shape[2]):
                if valid[b][t]:
                    x, y = p[n, b, t].tolist(), h[n, b, t].tolist()
                    dot = sum(i * j for i, j in zip(x, y, strict=True))
                    cosine = dot / math.hypot(*x) / math.hypot(*y)
                    values.append(math.log(1 + math.exp(-cosine)))
    return sum(values) / len(values)


ALL = [[True] * 5] * 2
SOME = [[True] * 5, [True, True, False, False, False]]


def test_eq2_lies_between_its_values_at_cosine_1_and_minus_1():
    h = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    assert d.cosine_term(h, 3 * h).mean().item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert d.cosine_term(h, -h).mean().item() == pytest.approx(math.log(1 + math.e))
    assert d.cosine_term(h, 3 * h).mean().item() == pytest.approx(0.3133, abs=1e-4)
    assert d.cosine_term(h, -h).mean().item() == pytest.approx(1.3133, abs=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("valid", [ALL, SOME])
def test_eq1_eq2_eq3_match_loops_over_the_valid_frames_of_each_head(weight, valid):
    p, h = random_pair()
    total, parts = d.distillation_loss(p, h, weight, torch.tensor(valid))
    expected = loop_l1(p, h, valid) + weight * loop_cosine(p, h, valid)
    assert total.dtype == torch.float64  # the sum is not silently rounded
    assert total.item() == pytest.approx(expected, rel=1e-12)
    heads = [(p[n : n + 1], h[n : n + 1], valid) for n in range(3)]
    assert parts["l1"].tolist() == pytest.approx([loop_l1(*head) for head in heads], rel=1e-12)
    assert parts["cos"].tolist() == pytest.approx([loop_cosine(*head) for head in heads], rel=1e-12)


# ---- student ------------------------------------------------------------------------------------


def torchaudio_twin(student):
    """torchaudio's model with the student's weights, without its extra LayerNorm (S2)."""
    config = encoder_config(encoder_num_layers=len(student.layers))
    model = torchaudio.models.wav2vec2_model(**config, aux_num_out=None).eval()
    model.to(next(student.parameters()).dtype)
    model.encoder.feature_projection.layer_norm = nn.Identity()
    where = {"feature_extractor": "", "feature_projection": "encoder."}
    weights = {
        where.get(name.split(".")[0], "encoder.transformer.") + name: value
        for name, value in student.state_dict().items()
    }
    model.load_state_dict(weights)
    return model


def test_student_equals_torchaudio_with_and_without_padding():
    student = shake(small_student().double())
    twin = torchaudio_twin(student)
    waves = torch.randn(3, 6000, dtype=torch.float64)
    lengths = torch.tensor([6000, 4321, 1000])
    for n in (None, lengths):
        ours, frames = student(waves, n)
        theirs, their_frames = twin.extract_features(waves, n)
        assert len(ours) == 3  # 0: input of layer 1, then the two layers
        for a, b in zip(ours[1:], theirs, strict=True):
            for row in range(3):
                valid = a.shape[1] if n is None else int(frames[row])
                torch.testing.assert_close(a[row, :valid], b[row, :valid], rtol=1e-9, atol=1e-9)
        if n is not None:
            assert frames.tolist() == their_frames.tolist()


def test_s1_each_head_is_private():
    heads = d.Heads(16, 3)
    heads(torch.randn(2, 5, 16))[1].sum().backward()
    for number, head in enumerate(heads.heads):
        assert all(
            (p.grad is not None and p.grad.any()) == (number == 1) for p in head.parameters()
        )


# ---- initialisation -----------------------------------------------------------------------------


def test_s4_student_made_of_all_teacher_layers_is_the_teacher(tiny_teacher):
    """With the teacher's two LayerNorms put back, as many layers as the teacher give its states."""
    teacher = common.load_teacher(str(tiny_teacher))
    student = small_student(layers=12, seed=1)
    d.initialise_from_teacher(student, teacher.weights())
    student.feature_projection["projection"] = teacher.model.encoder.feature_projection
    student.layer_norm = teacher.model.encoder.transformer.layer_norm
    waves = torch.randn(2, 5000)
    for ours, theirs in zip(student(waves)[0], teacher(waves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_s4_copies_all_but_the_layer_norm(tiny_teacher):
    teacher = common.load_teacher(str(tiny_teacher))
    student = small_student(seed=1)
    before = copy.deepcopy(student.state_dict())
    d.initialise_from_teacher(student, teacher.weights())
    same = {
        name for name, value in student.state_dict().items() if torch.equal(value, before[name])
    }
    assert same == {"layer_norm.weight", "layer_norm.bias"}


def test_linear_layers_begin_as_berts():
    """Standard deviation 0.02, no bias."""
    student = d.Student(d.Shape(width=64, attention_heads=1), 1, 0.0, 1.0)
    linears = [module for module in student.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 7 and not any(module.bias.any() for module in linears)
    for module in linears:
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_student_file_of_an_earlier_version_is_refused_in_one_sentence(tmp_path):
    """Its weights had other names: "norm.weight" for "layer_norm.weight"."""
    content = common.student_content("distilhubert", d.Config(), small_student())
    content["state_dict"]["norm.weight"] = content["state_dict"].pop("layer_norm.weight")
    torch.save(content, tmp_path / "student.pt")
    with pytest.raises(
        common.InputError, match="this version of distilhubert.py names its weights"
    ):
        d.load_student(tmp_path / "student.pt")


# ---- schedule -----------------------------------------------------------------------------------


def test_learning_rate_has_the_corners_of_the_authors_code():
    config = d.Config()
    assert d.learning_rate(1, config) == pytest.approx(2e-4 / 14_000)
    assert d.learning_rate(14_000, config) == pytest.approx(2e-4)
    assert d.learning_rate(107_000, config) == pytest.approx(1e-4)
    assert d.learning_rate(200_000, config) == 0.0
    rates = [d.learning_rate(step, config) for step in range(1, 200_001, 100)]
    assert max(rates) <= 2e-4 and rates.index(max(rates)) == 140


# ---- training -----------------------------------------------------------------------------------


def test_log_has_both_parts_for_each_target_layer_and_their_weighted_sum(tiny_files, tmp_path):
    changes = dict(steps=2, target_layers=(3, 11), cosine_weight=3.0)
    _, _, (line,) = d.train(d.Config(**tiny_run("distilhubert", tiny_files, tmp_path, **changes)))
    l1, cos = ((line[f"{part}_3"] + line[f"{part}_11"]) / 2 for part in ("l1", "cos"))
    assert line["loss"] == pytest.approx(l1 + 3 * cos, rel=1e-5)
    assert [len(values) for values in line["heldout"].values()] == [2, 2]
