"""pad.py: priors, losses, spans, student, pairs, file, probes on shares of the labels."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import SAID, encoder_config, make_hubert, pretrain_config, tiny_run

import common
import pad


def shaken_student(**changes):
    return pad.Student(make_hubert(encoder_config(**changes)).wav2vec2).eval()


def random_units(seed, sizes, longest, width=6):
    """Units of the given sizes in float64 with random priors; rubbish where nothing is valid."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(sizes), longest, width, generator=generator, dtype=torch.float64)
    valid = torch.arange(longest) < torch.tensor(sizes)[:, None]
    prior = torch.rand(len(sizes), longest, generator=generator, dtype=torch.float64) * valid
    return pad.Units(hidden, prior / prior.sum(1, keepdim=True), valid)


@pytest.fixture
def both():
    return random_units(0, [23, 9, 14], 23), random_units(1, [4, 5, 2], 5)


# ---- attention received -------------------------------------------------------------------------


def test_attention_received_against_loops():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 5, 4, generator=generator, dtype=torch.float64)  # B H N d
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for b, size in enumerate((5, 3)):
        for h in range(3):
            for i in range(size):
                e = [math.exp(query[b, h, i] @ key[b, h, j] / 2) for j in range(size)]
                for j in range(size):
                    expected[b, j] += e[j] / sum(e) / 3
    query.requires_grad_()
    given = pad.attention_received(query, key, valid)
    torch.testing.assert_close(given, expected)
    assert (given[~valid] == 0).all() and not given.requires_grad
    single = pad.attention_received(query.float(), key.float(), valid)
    torch.testing.assert_close(single, expected.float())
    with torch.autocast("cpu", torch.bfloat16):  # bf16 would keep three digits
        rough = pad.attention_received(query.float(), key.float(), valid)
    torch.testing.assert_close(rough, single, rtol=1e-6, atol=1e-7)
    halves = query.bfloat16(), key.bfloat16()  # what the projections give there
    exact = pad.attention_received(*(half.float() for half in halves), valid)
    assert torch.equal(pad.attention_received(*halves, valid), exact)


def test_s6_text_received_against_loops():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 2, 6, 6, generator=generator, dtype=torch.float64)  # L B N N
    pieces = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    received = pad.text_received(maps, pieces)
    for layer in range(3):
        for b, size in enumerate((4, 2)):
            for j in range(6):
                inside = 1 <= j <= size
                total = sum(float(maps[layer, b, i, j]) for i in range(1, size + 1))
                assert received[layer, b, j].item() == pytest.approx(total if inside else 0.0)


def test_word_pieces_are_all_but_the_first_and_last_valid_one_and_padding():
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    expected = [[False, True, True, False], [False, True, False, False], [False] * 4]
    assert pad.word_pieces(valid).tolist() == expected


# ---- equations ----------------------------------------------------------------------------------


def loop_significance(maps, sizes):
    """Eq. 1 from attention maps [layer][utterance][head][row][column], plain Python."""
    priors = []
    for b, size in enumerate(sizes):
        prior = [0.0] * size
        for layer in maps:
            heads = layer[b]
            received = [
                sum(sum(head[row][m] for head in heads) / len(heads) for row in range(size))
                for m in range(size)
            ]
            for m in range(size):
                prior[m] += received[m] / sum(received) / len(maps)
        priors.append(prior)
    return priors


def test_eq1_significance_matches_loop_over_heads_and_layers():
    torch.manual_seed(0)
    sizes, longest, heads = [7, 3], 7, 2
    valid = torch.arange(longest) < torch.tensor(sizes)[:, None]
    maps, received = [], []
    for _ in range(3):
        query, key = torch.randn(2, 2, heads, longest, 4, dtype=torch.float64)
        received.append(pad.attention_received(query, key, valid))
        layer = []
        for b, size in enumerate(sizes):  # each utterance without its padding
            scores = query[b, :, :size] @ key[b, :, :size].mT / 2
            layer.append(scores.softmax(-1).tolist())
        maps.append(layer)
    prior = pad.significance(torch.stack(received), valid)
    for row, expected in zip(prior.tolist(), loop_significance(maps, sizes), strict=True):
        assert row[: len(expected)] == pytest.approx(expected, rel=1e-9)
        assert all(value == 0 for value in row[len(expected) :])  # padding gets exactly nothing
        assert sum(row) == pytest.approx(1)


def test_eq1_each_layer_counts_the_same_however_much_attention_it_has():
    received = torch.tensor([[[3.0, 1.0]], [[10.0, 30.0]]])  # two layers of one utterance
    assert pad.significance(received, torch.ones(1, 2).bool()).tolist() == [[0.5, 0.5]]


def test_eq1_what_padding_received_does_not_count():
    received = torch.tensor([[[3.0, 1.0, 50.0]]])
    valid = torch.tensor([[True, True, False]])
    assert pad.significance(received, valid).tolist() == [[0.75, 0.25, 0.0]]


def test_eq1_uniform_attention_gives_the_uniform_prior():
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    query = torch.zeros(2, 2, 5, 4)
    received = pad.attention_received(query, torch.randn(2, 2, 5, 4), valid)
    prior = pad.significance(received[None], valid)
    torch.testing.assert_close(prior, pad.uniform(valid))
    assert pad.uniform(valid)[1].tolist() == [0.5, 0.5, 0, 0, 0]


def test_eq2_global_loss_matches_loop(both):
    speech, text = both
    for b, value in enumerate(pad.global_loss(speech, text).tolist()):
        total = 0.0
        for d in range(6):
            s = sum(float(speech.prior[b, i] * speech.hidden[b, i, d]) for i in range(23))
            t = sum(float(text.prior[b, j] * text.hidden[b, j, d]) for j in range(5))
            total += abs(s - t)  # a sum over D, not a mean: S10
        assert value == pytest.approx(total, rel=1e-12)


def test_eq2_with_uniform_priors_is_the_distance_of_means(both):
    speech, text = (each._replace(prior=pad.uniform(each.valid).double()) for each in both)
    for b, value in enumerate(pad.global_loss(speech, text).tolist()):
        s = speech.hidden[b, : speech.valid[b].sum()].mean(0)
        t = text.hidden[b, : text.valid[b].sum()].mean(0)
        assert value == pytest.approx(float(torch.linalg.vector_norm(s - t, 1)), rel=1e-6)


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def loop_local(pools, text):
    """Eq. 3 or 6: ``pools`` lists the vectors that each utterance's pieces may choose from."""
    losses = []
    for b, pool in enumerate(pools):
        loss = 0.0
        for j in range(int(text.valid[b].sum())):
            piece = text.hidden[b, j].tolist()
            loss -= float(text.prior[b, j]) * max(cosine(unit, piece) for unit in pool)
        losses.append(loss)
    return losses


def test_eq3_token_loss_matches_loop(both):
    speech, text = both
    pools = [speech.hidden[b, :size].tolist() for b, size in enumerate([23, 9, 14])]
    found = pad.local_loss(speech.hidden, speech.valid, text).tolist()
    assert found == pytest.approx(loop_local(pools, text), rel=1e-9)
    total, parts = pad.alignment_loss(speech, text, "token", (4,), False)
    assert total.item() == pytest.approx(sum(found) / 3) and set(parts) == {"local"}


def test_eq3_with_uniform_priors_is_the_mean_of_the_best_cosines(both):
    speech, text = both
    text = text._replace(prior=pad.uniform(text.valid).double())
    for b, value in enumerate(pad.local_loss(speech.hidden, speech.valid, text).tolist()):
        s = speech.hidden[b, : speech.valid[b].sum()]
        t = text.hidden[b, : text.valid[b].sum()]
        phi = torch.nn.functional.cosine_similarity(s[:, None], t[None], dim=-1)
        assert value == pytest.approx(-phi.amax(0).mean().item(), rel=1e-6)


def test_eq3_is_minus_one_where_each_piece_finds_itself(both):
    _, text = both
    padded = torch.cat([torch.randn(3, 2, 6).double(), 7 * text.hidden], 1)
    usable = torch.cat([torch.ones(3, 2).bool(), text.valid], 1)
    assert pad.local_loss(padded, usable, text).tolist() == pytest.approx([-1, -1, -1])


def test_eq4_anchors_are_the_most_significant_valid_frames(both):
    speech, _ = both
    positions, chosen = pad.choose_anchors(speech, 4, even=False)
    for b, size in enumerate([23, 9, 14]):
        count = max(1, round(size / 4))
        best = sorted(range(size), key=lambda i: -speech.prior[b, i].item())[:count]
        assert positions[b, chosen[b]].tolist() == best
        assert chosen[b].sum() == count
    positions, chosen = pad.choose_anchors(speech, 1000, even=False)  # never fewer than one
    assert chosen.tolist() == [[True]] * 3


def test_s8_even_anchors_are_as_many_and_evenly_spread(both):
    speech, _ = both
    positions, chosen = pad.choose_anchors(speech, 4, even=True)
    assert torch.equal(chosen, pad.choose_anchors(speech, 4, even=False)[1])
    for b, size in enumerate([23, 9, 14]):
        count = int(chosen[b].sum())
        middles = [int((k + 0.5) * size / count) for k in range(count)]
        assert positions[b, chosen[b]].tolist() == middles and max(middles) < size


def test_eq5_spans_of_a_hand_made_example():
    hidden = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(1, 8, 1)  # 1 .. 8; 6 are valid
    speech = pad.Units(hidden, torch.ones(1, 8) / 6, torch.arange(8)[None] < 6)
    means = pad.span_means(speech, torch.tensor([[0, 3, 5]]), (1, 2, 4))
    # begin:end of the nine spans is 0:1 0:1 0:2, 3:4 2:4 1:5, 5:6 4:6 3:6
    assert means[0, :, 0].tolist() == [1, 1, 1.5, 4, 3.5, 3.5, 6, 5.5, 5]


def test_eq5_span_means_equal_slices_and_stop_at_the_utterances_own_end(both):
    speech, _ = both
    positions, chosen = pad.choose_anchors(speech, 3, even=False)
    means = pad.span_means(speech, positions, (3, 6, 40))
    for b, size in enumerate([23, 9, 14]):
        for q in range(means.shape[1]):
            center, width = int(positions[b, q // 3]), (3, 6, 40)[q % 3]
            first, last = max(0, center - width // 2), min(size, center - width // 2 + width)
            expected = speech.hidden[b, first:last].mean(0)
            torch.testing.assert_close(means[b, q], expected, rtol=1e-9, atol=1e-9)


def test_eq6_span_loss_matches_loop_over_all_spans(both):
    speech, text = both
    pools = []
    for b, size in enumerate([23, 9, 14]):
        anchors = sorted(range(size), key=lambda i: -speech.prior[b, i].item())
        pool = []
        for center in anchors[: max(1, round(size / 4))]:
            for width in (2, 4, 8):
                first, last = max(0, center - width // 2), min(size, center + width // 2)
                pool.append(speech.hidden[b, first:last].mean(0).tolist())
        pools.append(pool)
    total, parts = pad.alignment_loss(speech, text, "span", (2, 4, 8), False)
    assert total.item() == pytest.approx(sum(loop_local(pools, text)) / 3, rel=1e-9)
    assert total.dtype == torch.float64 and set(parts) == {"local"}


def test_eq6_with_all_frames_as_anchors_and_width_1_is_eq3(both):
    span, _ = pad.alignment_loss(*both, "span", (1,), False)
    token, _ = pad.alignment_loss(*both, "token", (1,), False)
    assert span.item() == pytest.approx(token.item(), rel=1e-12)


def test_s10_joint_is_the_global_loss_per_dimension_and_the_span_loss(both):
    total, parts = pad.alignment_loss(*both, "joint", (2, 4, 8), False)
    apart = [pad.alignment_loss(*both, name, (2, 4, 8), False)[0] for name in ("global", "span")]
    assert [parts["global"], parts["local"]] == apart
    assert total.item() == pytest.approx((apart[0] / 6 + apart[1]).item())


@pytest.mark.parametrize("alignment", ["global", "token", "span", "joint"])
def test_s3_padding_duplicates_and_order_leave_the_loss_unchanged(both, alignment):
    speech, text = both
    settings = alignment, (2, 4, 8), False
    base = pad.alignment_loss(speech, text, *settings)[0].item()
    padded = []
    for units in both:
        hidden = torch.cat([units.hidden, 1e3 * torch.ones(3, 4, 6).double()], 1)
        extended = (torch.cat([x, torch.zeros(3, 4).to(x.dtype)], 1) for x in units[1:])
        padded.append(pad.Units(hidden, *extended))
    assert pad.alignment_loss(*padded, *settings)[0].item() == pytest.approx(base)
    doubled = [pad.Units(*(torch.cat([x, x]) for x in units)) for units in both]
    assert pad.alignment_loss(*doubled, *settings)[0].item() == pytest.approx(base)
    turned = [pad.Units(*(x[[2, 0, 1]] for x in units)) for units in both]
    assert pad.alignment_loss(*turned, *settings)[0].item() == pytest.approx(base)


@pytest.mark.parametrize("alignment", ["global", "token", "span", "joint"])
def test_gradients_are_finite_and_reach_only_valid_frames(both, alignment):
    speech, text = both
    hidden = speech.hidden.clone().requires_grad_()
    speech = speech._replace(hidden=hidden)
    pad.alignment_loss(speech, text, alignment, (2, 4, 8), False)[0].backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad[speech.valid].abs().sum() > 0
    assert hidden.grad[~speech.valid].abs().sum() == 0


@pytest.mark.parametrize("even", [False, True])
def test_s3_places_that_are_no_anchors_leave_no_trace_in_loss_or_gradient(even):
    """One utterance has ten anchors, one has one: nine of its ten places lie in its padding."""
    speech, text = random_units(3, [40, 2], 40), random_units(4, [3, 2], 3)
    hidden = speech.hidden.clone().requires_grad_()
    total, _ = pad.alignment_loss(speech._replace(hidden=hidden), text, "span", (2, 4), even)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(hidden.grad).all()
    assert hidden.grad[1, :2].abs().sum() > 0 and hidden.grad[1, 2:].abs().sum() == 0


def test_loss_in_bf16_is_computed_in_float32(both):
    speech, text = (each._replace(hidden=each.hidden.bfloat16()) for each in both)
    speech, text = (each._replace(prior=each.prior.float()) for each in (speech, text))
    total, _ = pad.alignment_loss(speech, text, "span", (2, 4), False)
    wide = [each._replace(hidden=each.hidden.float()) for each in (speech, text)]
    assert total.dtype == torch.float32
    assert total.item() == pad.alignment_loss(*wide, "span", (2, 4), False)[0].item()
    for alignment in ("global", "token", "span"):
        exact = pad.alignment_loss(*wide, alignment, (2, 4), False)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(pad.alignment_loss(*wide, alignment, (2, 4), False)[0], exact)


def test_shuffled_transcripts_are_those_of_the_neighbours(both):
    _, text = both
    shuffled = pad.shuffle(text)
    assert torch.equal(shuffled.hidden[1], text.hidden[0])
    assert torch.equal(shuffled.prior[0], text.prior[2])
    assert shuffled.valid.sum(1).tolist() == [2, 4, 5]


def test_health_counts_distinct_frames_and_their_order():
    pieces = torch.eye(4)[None]
    text = pad.Units(pieces, torch.ones(1, 4) / 4, torch.ones(1, 4).bool())

    def health(order):
        frames = torch.cat([pieces[:, order], 9 * torch.eye(4)[None]], 1)  # rubbish behind
        valid = torch.tensor([[True] * len(order) + [False] * 4])
        found = pad.alignment_health(pad.Units(frames, valid / 1.0, valid), text)
        return found["distinct"].item(), found["order"].item()

    assert health([0, 1, 2, 3]) == (1.0, 1.0)
    assert health([3, 2, 1, 0]) == (1.0, -1.0)
    assert health([0, 2, 1, 3]) == (1.0, pytest.approx(4 / 6))  # one of six pairs is turned
    frames = torch.ones(1, 5, 4)  # collapsed: all pieces choose the first frame
    same = pad.Units(frames, torch.ones(1, 5) / 5, torch.ones(1, 5).bool())
    found = pad.alignment_health(same, text)
    assert (found["distinct"].item(), found["order"].item()) == (0.25, 0.0)


# ---- student ------------------------------------------------------------------------------------


def test_student_equals_torchaudio_and_has_the_layer_numbers_of_the_other_files(tiny_teacher):
    teacher = common.load_teacher(str(tiny_teacher))
    student = pad.build(pad.Config(student=str(tiny_teacher)))
    waves = torch.randn(2, 6000)
    ours, frames = student(waves)
    theirs = teacher(waves)
    assert frames is None and len(ours) == len(theirs) == 13
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[1:], teacher.model.extract_features(waves)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_student_equals_torchaudio_on_a_padded_batch():
    """With convolutions that hear one frame at a time, where padding does no harm in torchaudio."""
    student = shaken_student(extractor_mode="layer_norm", extractor_conv_bias=True)
    waves, lengths = torch.randn(3, 6000), torch.tensor([6000, 2500, 400])
    ours, frames = student(waves, lengths)
    theirs, sizes = student.model.extract_features(waves, lengths)
    assert torch.equal(frames, sizes)
    valid = pad.frame_mask(frames, ours[0].shape[1])
    for a, b in zip(ours[1:], theirs, strict=True):
        torch.testing.assert_close(a[valid], b[valid], rtol=1e-4, atol=1e-5)


def test_s3_very_unequal_lengths_give_what_each_utterance_gives_alone():
    """Behind a GroupNorm over time this needs convolutions that never hear the padding."""
    student = shaken_student().double()
    lengths = torch.tensor([16_000, 400, 5_000])
    waves = torch.randn(3, 16_000, dtype=torch.float64)  # rubbish, no zeros, behind the ends
    hidden_states, frames = student(waves, lengths)
    assert frames.tolist() == [49, 1, 15]
    received = student.received(hidden_states, frames)
    for b, (samples, size) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        alone, _ = student(waves[b : b + 1, :samples])
        for together, single in zip(hidden_states, alone, strict=True):
            torch.testing.assert_close(together[b, :size], single[0], rtol=1e-7, atol=1e-7)
        own = student.received(alone, torch.tensor([size]))
        torch.testing.assert_close(received[:, b, :size], own[:, 0], rtol=1e-7, atol=1e-7)
        assert received[:, b, size:].abs().sum() == 0


def test_eq1_attention_received_is_that_of_the_models_own_maps():
    """The maps are caught where torchaudio's attention computes them, in eval mode."""
    student, waves = shaken_student().eval(), torch.randn(2, 4000)
    hidden_states, _ = student(waves)
    frames = torch.full((2,), hidden_states[0].shape[1])
    received = student.received(hidden_states, frames)
    real, caught = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, key, value, **settings):
        caught.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1).sum(1))
        return real(query, key, value, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        student.model.extract_features(waves)
    torch.testing.assert_close(received, torch.stack(caught), rtol=1e-4, atol=1e-5)
    assert not received.requires_grad


def test_s4_no_gradient_passes_through_the_prior_and_dropout_stays_out_of_it():
    student = shaken_student(encoder_attention_dropout=0.9).train()
    config = pad.Config()
    units = pad.listen(config, student, torch.randn(1, 4000), torch.tensor([4000]))
    assert units.hidden.requires_grad and not units.prior.requires_grad
    hidden_states, frames = student(torch.randn(1, 4000), torch.tensor([4000]))
    pair = [student.received(hidden_states, frames) for _ in range(2)]
    assert torch.equal(*pair)


def test_without_a_prior_all_frames_weigh_the_same():
    student, waves, lengths = shaken_student(), torch.randn(2, 4000), torch.tensor([4000, 2000])
    for changes in (dict(prior="uniform"), dict(alignment="token"), {}):
        units = pad.listen(pad.Config(**changes), student, waves, lengths)
        even = pad.uniform(units.valid)
        assert torch.equal(units.prior, even) == bool(changes)
        torch.testing.assert_close(units.prior.sum(1), torch.ones(2))


def test_s6_special_pieces_are_no_units(bert_folder):
    bert, tokenizer = common.load_text_teacher(str(bert_folder))
    rows = [torch.tensor(tokenizer(text)) for text in SAID[:3]]
    text = pad.read(pad.Config(), bert, rows)
    for row, ids in enumerate(rows):
        expected = [False, *[True] * (len(ids) - 2), False]
        assert text.valid[row, : len(ids)].tolist() == expected
        assert not text.valid[row, len(ids) :].any()
        assert (text.prior[row] > 0).tolist() == text.valid[row].tolist()
        alone = pad.read(pad.Config(), bert, [ids])
        torch.testing.assert_close(text.prior[row, : len(ids)], alone.prior[0])
        _, maps = bert(ids[None], ids[None] > 0)
        received = maps[:, 0, 1:-1, 1:-1].sum(1)  # without the rows and columns of both
        prior = (received / received.sum(1, keepdim=True)).mean(0)  # Eq. 1
        torch.testing.assert_close(alone.prior[0, 1:-1], prior)
        torch.testing.assert_close(
            text.hidden[row, : len(ids)], alone.hidden[0], rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(text.prior.sum(1), torch.ones(3))
    even = pad.read(pad.Config(prior="uniform"), bert, rows)
    torch.testing.assert_close(even.prior, pad.uniform(text.valid))


def test_s1_the_last_layers_are_aligned(bert_folder):
    bert, tokenizer = common.load_text_teacher(str(bert_folder))
    ids = torch.tensor(tokenizer(SAID[0]))
    states, _ = bert(ids[None], torch.ones(1, len(ids)).bool())
    assert torch.equal(pad.read(pad.Config(), bert, [ids]).hidden, states[-1])
    student, waves = shaken_student(), torch.randn(1, 4000)
    speech = pad.listen(pad.Config(), student, waves, torch.tensor([4000]))
    torch.testing.assert_close(speech.hidden, student(waves)[0][-1])


def test_s2_all_but_the_convolutions_learn_and_no_layer_is_dropped(bert_folder):
    bert, tokenizer = common.load_text_teacher(str(bert_folder))
    student = shaken_student(encoder_layer_drop=1.0).train()
    before = copy.deepcopy(bert.state_dict())
    text = pad.read(pad.Config(), bert, [torch.tensor(tokenizer(said)) for said in SAID[:2]])
    speech = pad.listen(pad.Config(), student, torch.randn(2, 9000), torch.tensor([9000, 7000]))
    pad.alignment_loss(speech, text, "joint", (2, 4, 8), False)[0].backward()
    for name, parameter in student.model.named_parameters():
        if name.startswith("feature_extractor"):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(not q.requires_grad and q.grad is None for q in bert.parameters())
    assert all(torch.equal(v, before[k]) for k, v in bert.state_dict().items())


PRE_NORM = encoder_config(encoder_layer_norm_first=True)
NORMALISED = encoder_config(extractor_mode="layer_norm")


@pytest.mark.parametrize("config", [PRE_NORM, NORMALISED, "wavlm"], ids=["pre", "norm", "wavlm"])
def test_a_speech_model_of_another_build_is_refused_by_name(tmp_path, config, tiny_wavlm):
    form = tiny_wavlm.state_dict()
    if config != "wavlm":
        form = {"config": pretrain_config(config), "state_dict": make_hubert(config).state_dict()}
    torch.save(form, tmp_path / "other.pt")
    with pytest.raises(common.InputError, match=r"--student other\.pt: a model with post-norm"):
        pad.build(pad.Config(student=str(tmp_path / "other.pt")))


def test_widths_that_differ_are_refused_in_one_sentence(tiny_teacher, bert_folder):
    config = pad.Config(teacher=str(bert_folder), student=str(tiny_teacher))
    pad.build_text(config, pad.build(config))
    wide = shaken_student(encoder_embed_dim=32)
    with pytest.raises(common.InputError, match="has width 16 and --student .* 32"):
        pad.build_text(config, wide)


# ---- pairs of speech and text -------------------------------------------------------------------


def utterance(number, seconds=1.0, **columns):
    return common.Utterance(f"{number}.wav", int(16_000 * seconds), columns)


def test_s11_hours_are_whole_speakers_in_a_seeded_order():
    rows = [utterance(i, 360, speaker=f"s{i % 5}") for i in range(50)]  # five speakers, an hour
    for hours, speakers in ((0.5, 1), (1.0, 1), (1.5, 2), (3.0, 3), (99, 5)):
        chosen = pad.choose_hours(rows, hours, seed=0)
        assert len(chosen) == 10 * speakers
        assert len({u.get("speaker") for u in chosen}) == speakers
    draws = [[u.path for u in pad.choose_hours(rows, 2, seed)] for seed in (*range(8), 3)]
    assert draws[3] == draws[8] and len(set(map(str, draws))) > 2
    turned = pad.choose_hours(rows[::-1], 2, 3)  # the order of the files does not matter
    assert {u.path for u in turned} == set(draws[3])
    nameless = [utterance(i, 360) for i in range(20)]
    assert len(pad.choose_hours(nameless, 0.5, 0)) == 5


def test_s12_long_and_wordless_utterances_are_left_out_and_counted(bert_folder, capsys):
    _, tokenizer = common.load_text_teacher(str(bert_folder))
    rows = [
        utterance(0, text="TURN ON"),
        utterance(1),
        utterance(2, text="   \x01 "),
        utterance(3, seconds=16.5, text="STOP"),
        utterance(4, seconds=16.0, text="STOP " * 40),
    ]
    kept, ids = pad.make_pairs(rows, tokenizer, 16.0)
    assert [u.path for u in kept] == ["0.wav", "4.wav"]
    assert {path: len(row) for path, row in ids.items()} == {"0.wav": 4, "4.wav": 24}  # S15
    line = " ".join(capsys.readouterr().err.split())
    assert "2 pairs" in line and "2 without words, 1 longer than 16 s" in line
    assert "1 cut at 24 word pieces" in line
    with pytest.raises(common.InputError, match=r"no utterance can be used.*trans\.txt"):
        pad.make_pairs(rows[1:4], tokenizer, 16.0)
    with pytest.raises(common.InputError, match=r"no utterance can be used.*--longest-seconds"):
        pad.make_pairs(rows[3:], tokenizer, 0.5)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(prior="uniform"), "--anchors even"),
        (dict(prior="uniform", alignment="joint"), "--anchors even"),
        (dict(widths=(0, 4)), "--widths"),
        (dict(widths=()), "--widths"),
        (dict(label_shares=(0.1, 0.0)), "--label-shares"),
        (dict(label_shares=(1.5,)), "--label-shares"),
        (dict(hours=0.0), "--hours"),
        (dict(longest_seconds=0.0), "--longest-seconds"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(changes, words, tmp_path):
    with pytest.raises(common.InputError, match=words):
        pad.train(pad.Config(out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
    for model in ({}, *pad.CLAIM.values()):
        pad.check(pad.Config(**model))


# ---- training -----------------------------------------------------------------------------------


def test_learning_rate_rises_for_a_tenth_and_ends_at_zero():
    config = pad.Config()
    assert pad.learning_rate(180, config) == pytest.approx(5e-5)
    assert pad.learning_rate(990, config) == pytest.approx(2.5e-5)
    assert pad.learning_rate(1800, config) == 0.0


def test_heldout_loss_is_the_mean_over_utterances_without_dropout(bert_folder, spoken):
    bert, tokenizer = common.load_text_teacher(str(bert_folder))
    kept, ids = pad.make_pairs(common.scan(spoken, None, 0)[:5], tokenizer, 16.0)
    config = pad.Config(widths=(2, 4, 8), anchors="even", batch_seconds=3.0)
    student = shaken_student().train()
    found = pad.heldout_loss(config, student, bert, kept, ids)
    assert not student.training
    alone = []
    for row in kept:
        wave = common.load_audio(row.path)[None]
        speech = pad.listen(config, student, wave, torch.tensor([wave.shape[1]]))
        text = pad.read(config, bert, [ids[row.path]])
        alone.append(pad.alignment_loss(speech, text, "span", (2, 4, 8), True)[0].item())
    assert found["heldout"] == pytest.approx(sum(alone) / 5, rel=1e-5)
    assert found["heldout_shuffled"] != found["heldout"]


def test_log_has_the_loss_its_shuffled_twin_and_the_health_of_the_alignment(
    tiny_files, tmp_path, monkeypatch
):
    used, align = set(), pad.alignment_loss
    monkeypatch.setattr(pad, "alignment_loss", lambda *a: used.add(a[2:]) or align(*a))
    changes = dict(alignment="joint", anchors="even", widths=(2, 6))
    config = pad.Config(**tiny_run("pad", tiny_files, tmp_path, **changes))
    student, history = pad.train(config)
    assert used == {("joint", (2, 6), True)} and not student.training
    for line in history:
        keys = {"step", "lr", "grad_norm", "loss", "global", "local", "shuffled"}
        assert keys | {"distinct", "order"} <= set(line)
        assert line["loss"] == pytest.approx(line["global"] / 16 + line["local"], rel=1e-5)
        assert line["shuffled"] != line["loss"]
        assert ("heldout" in line) == (line["step"] in (4, 8)) == ("heldout_shuffled" in line)


def test_student_file_is_torchaudios_model_and_says_how_to_build_it(
    tiny_teacher, tiny_files, tmp_path
):
    """With dropout everywhere: its rates are among the arguments."""
    changes = dict(student=str(tiny_teacher), steps=2)
    student, _ = pad.train(pad.Config(**tiny_run("pad", tiny_files, tmp_path, **changes)))
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    assert set(saved) == {"method", "config", "arguments", "state_dict"}
    before = common.load_teacher(str(tiny_teacher)).model.state_dict()
    assert set(before) == set(saved["state_dict"])
    for name, value in saved["state_dict"].items():
        assert torch.equal(value, before[name]) == name.startswith("feature_extractor"), name
    model = torchaudio.models.wav2vec2_model(**saved["arguments"]).eval()
    model.load_state_dict(saved["state_dict"])
    attention = model.encoder.transformer.layers[0].attention
    assert str(model) == str(student.model) and attention.dropout == 0.1
    waves = torch.randn(2, 4000)
    for a, b in zip(model.extract_features(waves)[0], student(waves)[0][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    loaded = pad.load_student(tmp_path / "student.pt")
    assert loaded.arguments == student.arguments == saved["arguments"]
    common.write_atomically(
        tmp_path / "again.pt", lambda file: torch.save(pad.student_file(pad.Config(), loaded), file)
    )
    again = pad.load_student(tmp_path / "again.pt")
    assert torch.equal(again(waves)[0][-1], student(waves)[0][-1])


# ---- evaluation ---------------------------------------------------------------------------------


def task(counts, name="intent accuracy (toy)"):
    rows = [
        (common.Utterance(f"{label}-{i}", 16_000, {}), label)
        for label, count in counts.items()
        for i in range(count)
    ]
    return common.Task(name, "utterance", dict(train=rows, dev=rows[:3], test=rows))


def test_d1_few_labels_are_a_share_with_every_class_in_it():
    full = task({"a": 300, "b": 50, "c": 2})
    for share, count in ((0.1, 35), (0.5, 176), (1.0, 352), (0.001, 3)):
        for seed in range(5):
            few = pad.few_labels(full, share, seed)
            rows = [(u.path, label) for u, label in few.parts["train"]]
            assert len(rows) == count == len(set(rows))
            assert {label for _, label in rows} == {"a", "b", "c"}
            assert set(rows) <= {(u.path, label) for u, label in full.parts["train"]}
            assert (few.parts["dev"], few.parts["test"]) == (full.parts["dev"], full.parts["test"])
    assert pad.few_labels(full, 0.1, 0).name == "intent accuracy (toy) 10 %"
    assert pad.few_labels(full, 0.001, 0).name == "intent accuracy (toy) 0.1 %"


@pytest.mark.parametrize("share", [0.25, 0.01])  # the latter: one row of each class
def test_d1_few_labels_follow_from_the_seed_and_take_every_row_at_times(share):
    full = task({"a": 12, "b": 4})
    draws = [
        tuple(u.path for u, _ in pad.few_labels(full, share, seed).parts["train"])
        for seed in (*range(120), 7)
    ]
    assert draws[7] == draws[120] and len(set(draws)) > 20
    assert {path for draw in draws for path in draw} == {u.path for u, _ in full.parts["train"]}


def test_d1_each_seed_draws_labels_of_its_own_and_trains_on_them_shortly(monkeypatch):
    drawn, updates = [], []
    monkeypatch.setattr(pad, "few_labels", lambda task, share, seed: drawn.append((share, seed)))
    monkeypatch.setattr(common, "score_probes", lambda *a, **_: updates.append(a[3:]) or {})
    names = ("intent accuracy", "speaker accuracy", "speaker accuracy (toy)")
    tasks = [task({}, name) for name in names]
    tasks.append(common.Task("phone accuracy", "frame", {}))
    for seed in (0, 1):
        config = pad.Config(seed=seed, label_shares=(0.5, 0.1))
        pad.score_shares(config, {}, tasks, torch.device("cpu"))
    assert len(drawn) == len(set(drawn)) == 2 * 2 * pad.LABEL_DRAWS  # one task is about content
    assert updates == 2 * [(), (pad.FEW_UPDATES,)]


def test_d1_an_ablation_has_its_labels_alone_or_else_all_probes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "scan", lambda *_: [])
    monkeypatch.setattr(pad, "score", lambda *a: [task.name for task in a[2]])
    intent, speaker = "intent accuracy (toy)", "speaker accuracy (toy)"
    for names, expected in (([speaker, intent], [intent]), ([speaker], [speaker])):
        tasks = [task({}, name) for name in names]
        monkeypatch.setattr(common, "find_tasks", lambda _, tasks=tasks: tasks)
        config = pad.Config(out=str(tmp_path))
        assert pad.evaluate(config, shaken_student(), False) == {"distilled": expected}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A manifest with two labels that follow from the words, and two speakers."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    lines = ["path\tspeaker\tsplit\tlabel_intent\ttext"]
    for i in range(24):
        part = ("train", "train", "train", "dev", "test", "test")[i // 2 % 6]
        text, label = (("TURN ON THE LIGHTS", "light"), ("STOP THE MUSIC", "music"))[i % 2]
        wave = 0.1 * rng.standard_normal(int(rng.integers(4_000, 8_000)))
        soundfile.write(folder / f"{i}.wav", wave.astype(np.float32), 16_000)
        lines.append(f"{i}.wav\ts{i % 2}\t{part}\t{label}\t{text}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_d1_table_has_teacher_start_and_student_at_each_share_of_the_labels(
    tiny_files, labelled, tmp_path, monkeypatch
):
    real = common.score_probes
    short = lambda table, tasks, seed, *_, **__: real(table, tasks, seed, 25)  # noqa: E731
    monkeypatch.setattr(common, "score_probes", short)
    monkeypatch.setattr(pad, "LABEL_DRAWS", 2)
    changes = dict(data=str(labelled), label_shares=(0.5, 0.01))
    config = pad.Config(**tiny_run("pad", tiny_files, tmp_path, **changes))
    student = pad.build(config)
    rows = pad.evaluate(config, student)
    assert list(rows) == ["text teacher", "speech model", "distilled"]
    shares = {"intent accuracy", "intent accuracy 50 %", "intent accuracy 1 %"}
    assert set(rows["text teacher"]) == {"parameters"} | shares  # no speaker in a text
    for name in ("speech model", "distilled"):
        assert set(rows[name]) == {"parameters", "speaker accuracy"} | shares
    assert rows["text teacher"]["intent accuracy 1 %"] == 1.0  # the words tell the label
    assert rows["speech model"] == rows["distilled"]  # it was not trained
    del rows["distilled"]["speaker accuracy"]  # an ablation has its labels alone
    assert pad.evaluate(config, student, baselines=False) == {"distilled": rows["distilled"]}


def test_the_text_models_feature_is_the_mean_of_its_word_pieces(
    bert_folder, labelled, monkeypatch, capsys
):
    bert, tokenizer = common.load_text_teacher(str(bert_folder))
    rows, tables = common.scan(labelled, None, 0), []
    monkeypatch.setattr(pad, "score_shares", lambda _, table, *rest: tables.append(table) or {})

    def score(rows):
        tasks = common.find_tasks(rows)
        pad.score_text(pad.Config(), bert, tokenizer, tasks, torch.device("cpu"))
        return tables[-1]

    table = score(rows)
    assert len(table) == len(rows)
    for row in rows[1:3]:
        ids = torch.tensor([tokenizer(row.get("text"))])
        states, _ = bert(ids, ids > 0)
        expected = torch.stack([state[0, 1:-1].mean(0) for state in states])
        torch.testing.assert_close(table[row.path][0], expected)
    rows[0] = replace(rows[0], columns=rows[0].columns | {"text": ""})
    assert score(rows) == {}
    assert "no intent accuracy, an utterance has no words" in capsys.readouterr().err
