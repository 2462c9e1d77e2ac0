"""pad.py: priors, losses, spans, student, pairs, file, probes on shares of the labels."""

import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import SAID, encoder_config, make_hubert, tiny_run

import common
import pad

SIZES = [23, 9, 14]  # frames of the three utterances of ``both``; their word pieces are 4, 5, 2


def shaken_student(**changes):
    return pad.Student(make_hubert(encoder_config(**changes)).wav2vec2).eval()


def random_units(seed, sizes, longest, width=6):
    """Units of the given sizes in float64 with random priors; rubbish where nothing is valid."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(sizes), longest, width, generator=generator, dtype=torch.float64)
    mask = torch.arange(longest) < torch.tensor(sizes)[:, None]
    prior = torch.rand(len(sizes), longest, generator=generator, dtype=torch.float64) * mask
    return pad.Units(hidden, prior / prior.sum(1, keepdim=True), mask)


@pytest.fixture
def both():
    return random_units(0, SIZES, 23), random_units(1, [4, 5, 2], 5)


def loss_of(speech, text, alignment="span", widths=(2, 4, 8), even=False):
    return pad.alignment_loss(speech, text, alignment, widths, even)[0]


# ---- significance -------------------------------------------------------------------------------


def random_maps(places, heads=2):
    """Maps of three layers; what the units in other places pay and receive is rubbish."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, len(places), heads, 7, 7)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def loop_significance(maps, places):
    """Eq. 1 in plain Python: the prior of the units in ``places`` of each utterance."""
    priors = []
    for b, units in enumerate(places):
        prior = dict.fromkeys(units, 0.0)
        for layer in maps.tolist():
            heads = layer[b]
            received = {
                i: sum(sum(head[k][i] for head in heads) / len(heads) for k in units) for i in units
            }
            for i in units:
                prior[i] += received[i] / sum(received.values()) / len(maps)
        priors.append(prior)
    return priors


@pytest.mark.parametrize("places", [[range(7), range(3)], [range(1, 6), range(1, 3)]])
def test_eq1_significance_matches_loop_over_heads_and_layers(places):
    """Frames of a padded batch; word pieces between [CLS] and [SEP]."""
    maps = random_maps(places)
    mask = torch.tensor([[i in units for i in range(7)] for units in places])
    prior = pad.significance(maps.requires_grad_(), mask)
    for row, expected in zip(prior.tolist(), loop_significance(maps, places), strict=True):
        assert row == pytest.approx([expected.get(i, 0.0) for i in range(7)], rel=1e-9)
        assert all((row[i] == 0) == (i not in expected) for i in range(7))
    assert not prior.requires_grad
    with torch.autocast("cpu", torch.bfloat16):  # bf16 would keep three digits
        rough = pad.significance(maps.float(), mask)
    assert torch.equal(rough, pad.significance(maps.float(), mask))


def test_eq1_uniform_attention_gives_the_uniform_prior():
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    maps = mask[None, :, None, None].expand(3, 2, 2, 5, 5) / mask.sum(1)[:, None, None, None]
    torch.testing.assert_close(pad.significance(maps, mask), pad.uniform(mask))
    assert pad.uniform(mask)[1].tolist() == [0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize("amp", [False, True])
def test_eq1_attention_maps_are_the_models_own(amp):
    """They are caught where torchaudio's attention computes them; in bf16 its query and key."""
    student, waves = shaken_student(), torch.randn(2, 4000)
    real, caught = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, key, value, **settings):
        with torch.autocast("cpu", enabled=False):
            scores = query.float() @ key.float().mT / query.shape[-1] ** 0.5
            caught.append(scores.softmax(-1))
        return real(query, key, value, **settings)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, amp):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
            hidden_states, _ = student(waves)
        mask = torch.ones(hidden_states[0].shape[:2]).bool()
        maps = list(student.attention_maps(hidden_states, mask))
    assert len(maps) == len(caught) == 12
    torch.testing.assert_close(maps, caught, rtol=1e-4, atol=1e-5)


# ---- losses -------------------------------------------------------------------------------------


def test_eq2_global_loss_matches_loop(both):
    speech, text = both
    for b, value in enumerate(pad.global_loss(speech, text).tolist()):
        total = 0.0
        for d in range(6):
            s = sum(float(speech.prior[b, i] * speech.hidden[b, i, d]) for i in range(23))
            t = sum(float(text.prior[b, j] * text.hidden[b, j, d]) for j in range(5))
            total += abs(s - t)  # a sum over D, not a mean: S8
        assert value == pytest.approx(total, rel=1e-12)


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def loop_local(pools, text):
    """Eq. 3 or 6: ``pools`` lists the vectors that each utterance's pieces may choose from."""
    losses = []
    for b, pool in enumerate(pools):
        loss = 0.0
        for j in range(int(text.mask[b].sum())):
            piece = text.hidden[b, j].tolist()
            loss -= float(text.prior[b, j]) * max(cosine(unit, piece) for unit in pool)
        losses.append(loss)
    return losses


def test_eq3_token_loss_matches_loop(both):
    speech, text = both
    pools = [speech.hidden[b, :size].tolist() for b, size in enumerate(SIZES)]
    found = pad.local_loss(speech.hidden, speech.mask, text).tolist()
    assert found == pytest.approx(loop_local(pools, text), rel=1e-9)
    total, terms = pad.alignment_loss(speech, text, "token", (4,))
    assert total.item() == pytest.approx(sum(found) / 3) and set(terms) == {"local"}


def most_significant(speech, b, size, xi):
    count = max(1, round(size / xi))
    return sorted(range(size), key=lambda i: -speech.prior[b, i].item())[:count]


def test_eq4_anchors_are_the_most_significant_frames_and_no_padding(both):
    speech, _ = both
    anchors, mask = pad.choose_anchors(speech, 4, even=False)
    for b, size in enumerate(SIZES):
        assert anchors[b, mask[b]].tolist() == most_significant(speech, b, size, 4)
    anchors, mask = pad.choose_anchors(speech, 1000, even=False)  # never fewer than one
    assert mask.tolist() == [[True]] * 3


def test_s7_even_anchors_are_as_many_and_evenly_spread(both):
    speech, _ = both
    anchors, mask = pad.choose_anchors(speech, 4, even=True)
    assert torch.equal(mask, pad.choose_anchors(speech, 4, even=False)[1])
    for b, size in enumerate(SIZES):
        count = int(mask[b].sum())
        middles = [int((k + 0.5) * size / count) for k in range(count)]
        assert anchors[b, mask[b]].tolist() == middles and max(middles) < size


def test_eq5_span_means_equal_slices_and_stop_at_the_utterances_own_end(both):
    speech, _ = both
    anchors, _ = pad.choose_anchors(speech, 3, even=False)
    means = pad.span_means(speech, anchors, (3, 6, 40))
    for b, size in enumerate(SIZES):
        for q in range(means.shape[1]):
            anchor, width = int(anchors[b, q // 3]), (3, 6, 40)[q % 3]
            first, last = max(0, anchor - width // 2), min(size, anchor - width // 2 + width)
            expected = speech.hidden[b, first:last].mean(0)
            torch.testing.assert_close(means[b, q], expected, rtol=1e-9, atol=1e-9)


def test_eq6_span_loss_matches_loop_over_all_spans(both):
    speech, text = both
    pools = []
    for b, size in enumerate(SIZES):
        pool = []
        for anchor in most_significant(speech, b, size, 4):
            for width in (2, 4, 8):
                first, last = max(0, anchor - width // 2), min(size, anchor + width // 2)
                pool.append(speech.hidden[b, first:last].mean(0).tolist())
        pools.append(pool)
    total, terms = pad.alignment_loss(speech, text, "span", (8, 2, 4))
    assert total.item() == pytest.approx(sum(loop_local(pools, text)) / 3, rel=1e-9)
    assert total.dtype == torch.float64 and set(terms) == {"local"}


def test_eq6_with_all_frames_as_anchors_and_width_1_is_eq3(both):
    span, token = loss_of(*both, "span", (1,)), loss_of(*both, "token", (1,))
    assert span.item() == pytest.approx(token.item(), rel=1e-12)


def test_s8_joint_is_the_global_loss_per_dimension_and_the_span_loss(both):
    total, terms = pad.alignment_loss(*both, "joint", (2, 4, 8))
    apart = [loss_of(*both, "global"), loss_of(*both, "span")]
    assert [terms["global"], terms["local"]] == apart
    assert total.item() == pytest.approx((apart[0] / 6 + apart[1]).item())


@pytest.mark.parametrize("alignment", ["global", "token", "span", "joint"])
def test_s3_padding_duplicates_and_order_change_neither_loss_nor_gradient(both, alignment):
    base = loss_of(*both, alignment).item()
    padded = []
    for units in both:
        hidden = torch.cat([units.hidden, 1e3 * torch.ones(3, 4, 6).double()], 1)
        extended = (torch.cat([x, torch.zeros(3, 4).to(x.dtype)], 1) for x in units[1:])
        padded.append(pad.Units(hidden, *extended))
    assert loss_of(*padded, alignment).item() == pytest.approx(base)
    speech, text = both
    hidden = speech.hidden.clone().requires_grad_()
    loss_of(speech._replace(hidden=hidden), text, alignment).backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad[speech.mask].any()
    assert not hidden.grad[~speech.mask].any()
    for rows in ([0, 1, 2, 0, 1, 2], [2, 0, 1]):  # doubled, and turned
        chosen = [pad.Units(*(x[rows] for x in units)) for units in both]
        assert loss_of(*chosen, alignment).item() == pytest.approx(base)


@pytest.mark.parametrize("even", [False, True])
def test_s3_places_that_are_no_anchors_leave_no_trace_in_loss_or_gradient(even):
    """One utterance has ten anchors, one has one: nine of its ten places lie in its padding."""
    speech, text = random_units(3, [40, 2], 40), random_units(4, [3, 2], 3)
    hidden = speech.hidden.clone().requires_grad_()
    total = loss_of(speech._replace(hidden=hidden), text, widths=(2, 4, 5), even=even)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(hidden.grad).all()
    assert hidden.grad[1, :2].abs().sum() > 0 and hidden.grad[1, 2:].abs().sum() == 0


def test_loss_in_bf16_is_computed_in_float32(both):
    both = [each._replace(prior=each.prior.float(), hidden=each.hidden.bfloat16()) for each in both]
    wide = [each._replace(hidden=each.hidden.float()) for each in both]
    assert loss_of(*both).dtype == torch.float32 and torch.equal(loss_of(*both), loss_of(*wide))
    for alignment in ("global", "token", "span"):
        with torch.autocast("cpu", torch.bfloat16):
            rough = loss_of(*wide, alignment)
        assert torch.equal(rough, loss_of(*wide, alignment))


# ---- student ------------------------------------------------------------------------------------


def test_student_equals_torchaudio_and_has_the_layer_numbers_of_the_other_files(tiny_teacher):
    teacher = common.load_teacher(str(tiny_teacher))
    student = pad.build(pad.Config(student=str(tiny_teacher)))
    waves = torch.randn(2, 6000)
    ours, frames = student(waves)
    theirs = teacher(waves)
    assert frames is None and len(ours) == len(theirs) == 13
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    last = teacher.model.extract_features(waves)[0][-1]
    torch.testing.assert_close(ours[-1], last, rtol=1e-5, atol=1e-5)


def test_s3_prior_of_very_unequal_lengths_is_what_each_utterance_has_alone():
    student = shaken_student().double()
    lengths = torch.tensor([16_000, 400, 5_000])
    waves = torch.randn(3, 16_000, dtype=torch.float64)  # rubbish, no zeros, behind the ends
    prior, mask = student.prior(waves, lengths)
    assert mask.sum(1).tolist() == [49, 1, 15] and prior[~mask].sum() == 0
    for b, (samples, size) in enumerate(zip(lengths.tolist(), [49, 1, 15])):
        alone, _ = student.prior(waves[b : b + 1, :samples], lengths[b : b + 1])
        torch.testing.assert_close(prior[b, :size], alone[0], rtol=1e-7, atol=1e-7)


def test_s4_prior_is_free_of_dropout_and_of_gradients():
    """Two passes choose the same anchors, as in eval mode; the modes are what they were."""
    student = shaken_student(dropout=0.1)
    waves, lengths, found = torch.randn(2, 9000), torch.tensor([9000, 6000]), []
    for training in (False, True, True):
        prior, mask = student.train(training).prior(waves, lengths)
        assert {module.training for module in student.modules()} == {training}
        assert not prior.requires_grad
        hidden_states, _ = student(waves, lengths)
        units = pad.Units(hidden_states[-1], prior, mask)
        found.append((prior, pad.choose_anchors(units, 4, even=False)[0], units.hidden))
    for prior, anchors, hidden in found[1:]:
        assert torch.equal(prior, found[0][0]) and torch.equal(anchors, found[0][1])
        assert not torch.equal(hidden, found[0][2])  # which has dropout


def test_without_a_prior_all_frames_weigh_the_same_and_no_pass_is_spent():
    student, waves, lengths = shaken_student(), torch.randn(2, 4000), torch.tensor([4000, 2000])
    expected, mask = student.prior(waves, lengths)
    for changes in ({}, dict(alignment="global"), dict(alignment="joint", prior="even")):
        assert torch.equal(
            pad.speech_prior(pad.Config(**changes), student, waves, lengths)[0], expected
        )
    student.forward = None
    for changes in (dict(prior="uniform"), dict(alignment="token"), dict(prior="even")):
        prior, same = pad.speech_prior(pad.Config(**changes), student, waves, lengths)
        assert torch.equal(prior, pad.uniform(mask)) and torch.equal(same, mask)
    assert not torch.equal(expected, prior)


def test_s5_special_pieces_are_no_units(bert_folder):
    bert, tokenizer = common.load_text_teacher(str(bert_folder))
    rows = [torch.tensor(tokenizer(text)) for text in SAID[:3]]
    text = pad.text_units(pad.Config(), bert, rows)
    for row, ids in enumerate(rows):
        words = [False, *[True] * (len(ids) - 2), *[False] * (text.mask.shape[1] - len(ids) + 1)]
        assert text.mask[row].tolist() == words == (text.prior[row] > 0).tolist()
        alone = pad.text_units(pad.Config(), bert, [ids])
        torch.testing.assert_close(text.prior[row, : len(ids)], alone.prior[0])
        hidden_states, maps = bert(ids[None], ids[None] > 0)
        received = maps[:, 0, 1:-1, 1:-1].sum(1)  # without the rows and columns of both
        prior = (received / received.sum(1, keepdim=True)).mean(0)  # Eq. 1
        torch.testing.assert_close(alone.prior[0, 1:-1], prior)
        last = hidden_states[-1][0]  # S1
        torch.testing.assert_close(text.hidden[row, : len(ids)], last, rtol=1e-4, atol=1e-5)
    even = pad.text_units(pad.Config(prior="uniform"), bert, rows)
    torch.testing.assert_close(even.prior, pad.uniform(text.mask))


def test_s2_no_layer_is_dropped():
    student, calls = shaken_student(encoder_layer_drop=1.0).train(), []
    for layer in student.model.encoder.transformer.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    student(torch.randn(1, 4000))
    assert len(calls) == 12


def test_models_of_unequal_width_are_refused_in_one_sentence(tiny_teacher, bert_folder):
    config = pad.Config(teacher=str(bert_folder), student=str(tiny_teacher))
    pad.build_text(config, pad.build(config))
    with pytest.raises(common.InputError, match="has width 16 and --student .* 32"):
        pad.build_text(config, shaken_student(encoder_embed_dim=32))


# ---- pairs of speech and text -------------------------------------------------------------------


def utterance(number, seconds=1.0, **columns):
    return common.Utterance(f"{number}.wav", int(16_000 * seconds), columns)


def test_s9_hours_are_whole_speakers_in_a_seeded_order():
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


def test_s9_long_and_wordless_utterances_are_left_out_and_counted(bert_folder, capsys):
    _, tokenizer = common.load_text_teacher(str(bert_folder))
    rows = [
        utterance(0, text="TURN ON"),
        utterance(1),
        utterance(2, text="   \x01 "),
        utterance(3, seconds=16.5, text="STOP"),
        utterance(4, seconds=16.0, text="STOP " * 40),
    ]
    pairs, ids = pad.make_pairs(rows, tokenizer, 16.0)
    assert [u.path for u in pairs] == ["0.wav", "4.wav"]
    assert [len(ids[u.path]) for u in pairs] == [4, 24]  # the latter is cut
    line = " ".join(capsys.readouterr().err.split())
    assert "2 pairs" in line and "2 without words, 1 longer than 16 s" in line
    with pytest.raises(common.InputError, match=r"transcripts are needed, \*\.trans\.txt"):
        pad.make_pairs(rows[1:4], tokenizer, 16.0)
    with pytest.raises(common.InputError, match="--longest-seconds"):
        pad.make_pairs(rows[3:], tokenizer, 0.5)


# ---- training -----------------------------------------------------------------------------------


def test_heldout_loss_is_the_mean_over_utterances_without_dropout(bert_folder, spoken):
    bert, tokenizer = common.load_text_teacher(str(bert_folder))
    pairs, ids = pad.make_pairs(common.scan(spoken, None, 0)[:5], tokenizer, 16.0)
    config = pad.Config(widths=(2, 4, 8), prior="even", batch_seconds=3.0)
    student, alone = shaken_student().train(), []
    found = pad.heldout_loss(config, student, bert, pairs, ids)
    for row in pairs:
        wave = common.load_audio(row.path)[None]
        prior, mask = student.eval().prior(wave, torch.tensor([wave.shape[1]]))
        speech = pad.Units(student(wave)[0][-1], prior, mask)
        text = pad.text_units(config, bert, [ids[row.path]])
        alone.append(loss_of(speech, text, even=True).item())
    assert found == pytest.approx(sum(alone) / 5, rel=1e-5)


def test_flags_reach_the_loss_and_the_log_has_its_parts(tiny_files, tmp_path, monkeypatch):
    used, align = set(), pad.alignment_loss
    monkeypatch.setattr(pad, "alignment_loss", lambda *a: used.add(a[2:]) or align(*a))
    changes = dict(alignment="joint", prior="even", widths=(2, 6, 7))
    config = pad.Config(**tiny_run("pad", tiny_files, tmp_path, **changes))
    _, history = pad.train(config)
    assert used == {("joint", (2, 6, 7), True)}
    for line in history:
        assert line["loss"] == pytest.approx(line["global"] / 16 + line["local"], rel=1e-5)
        assert ("heldout" in line) == (line["step"] in (4, 8))


def test_s4_under_autocast_all_that_learns_gets_a_gradient(tiny_files, tmp_path, monkeypatch):
    """torch 2.8 kept casts of weights, made without gradient, to the end of an autocast block.

    So the cast weights must be gone between the pass for P(S) and that of the training.
    """
    events = []

    def watch(owner, name, event):
        real = getattr(owner, name)

        def spy(*arguments):
            events.append(event(*arguments))
            return real(*arguments)

        monkeypatch.setattr(owner, name, spy)

    def learned(parameters, _):
        assert all(p.grad is not None and p.grad.any() for p in parameters)
        return "update"

    watch(torch, "clear_autocast_cache", lambda: "clear")
    watch(pad.Student, "prior", lambda *_: "prior")
    watch(pad.Student, "forward", lambda student, *_: "training" if student.training else "")
    watch(torch.nn.utils, "clip_grad_norm_", learned)
    changes = dict(steps=2, accumulate=2, amp=True, save_every=100)
    pad.train(pad.Config(**tiny_run("pad", tiny_files, tmp_path, **changes)))
    text = " ".join(filter(None, events))
    assert text.count("training") == 4 and "prior training" not in text


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
    torch.save(pad.student_content(pad.Config(), loaded), tmp_path / "again.pt")
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
        pad.score_shares({}, tasks, torch.device("cpu"), seed)
    assert {share for share, _ in drawn} == {0.1, 0.01}
    assert len(drawn) == len(set(drawn)) == 2 * 2 * pad.LABEL_DRAWS  # one task is about content
    assert updates == 2 * [(), (pad.FEW_UPDATES,)]


def test_d1_an_ablation_has_its_labels_alone_or_else_all_probes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "scan", lambda *_: [])
    monkeypatch.setattr(pad, "score", lambda _, tasks, *rest: [task.name for task in tasks])
    intent, speaker = "intent accuracy (toy)", "speaker accuracy (toy)"
    for names, expected in (([speaker, intent], [intent]), ([speaker], [speaker])):
        tasks = [task({}, name) for name in names]
        monkeypatch.setattr(common, "find_tasks", lambda _, tasks=tasks: tasks)
        config = pad.Config(out=str(tmp_path))
        assert pad.evaluate(config, shaken_student(), False) == {"distilled": expected}


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """A manifest with a label that follows from the words, and two speakers."""
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
    tiny_files, commands, tmp_path, monkeypatch
):
    real = common.score_probes
    short = lambda table, tasks, seed, *_, **__: real(table, tasks, seed, 25)  # noqa: E731
    monkeypatch.setattr(common, "score_probes", short)
    monkeypatch.setattr(pad, "LABEL_DRAWS", 2)
    config = pad.Config(**tiny_run("pad", tiny_files, tmp_path, data=str(commands)))
    student = pad.build(config)
    rows = pad.evaluate(config, student)
    assert list(rows) == ["text teacher", "speech model", "distilled"]
    shares = {"intent accuracy", "intent accuracy 10 %", "intent accuracy 1 %"}
    assert set(rows["text teacher"]) == {"parameters"} | shares  # no speaker in a text
    for name in ("speech model", "distilled"):
        assert set(rows[name]) == {"parameters", "speaker accuracy"} | shares
    assert rows["text teacher"]["intent accuracy 1 %"] == 1.0  # the words tell the label
    assert rows["speech model"] == rows["distilled"]  # it was not trained


def test_the_text_models_feature_is_the_mean_of_its_word_pieces(
    bert_folder, commands, monkeypatch, capsys
):
    bert, tokenizer = common.load_text_teacher(str(bert_folder))
    rows, tables = common.scan(commands, None, 0), []
    monkeypatch.setattr(pad, "score_shares", lambda table, *rest: tables.append(table) or {})

    def score(rows):
        pad.score_text(bert, tokenizer, common.find_tasks(rows), torch.device("cpu"), 0)
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
