"""Evaluation: size, MACs, speed, distance, tasks, probes, tables."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import CONV_SHAPES, large
from torch import nn
from torch.nn import functional as F

import common
from common import InputError, Task, Utterance

# ---- size and speed ------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution, a linear layer, attention with two heads: few enough to count by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 400, 320)
        self.linear = nn.Linear(4, 6)
        self.linear.requires_grad_(False)

    def forward(self, waveforms):
        x = self.linear(self.conv(waveforms[:, None]).mT)  # 1 x T x 6
        heads = x.view(1, -1, 2, 3).transpose(1, 2)
        return [F.scaled_dot_product_attention(heads, heads, heads)]


def test_macs_equal_a_count_by_hand():
    """Per second of audio, of 10 s: attention is 2 T x T x D, all else grows with the length."""
    frames = 499
    conv, linear, attention = frames * 4 * 400, frames * 4 * 6, 2 * frames * frames * 6
    assert common.count_macs(Small(), "cpu") == (conv + linear + attention) / 10


def test_hubert_base_needs_74_giga_macs_for_ten_seconds():
    with torch.device("meta"):
        model = torchaudio.models.hubert_base().eval()
    total, frames, channels = 0, 160_000, 1
    for kernel, stride in CONV_SHAPES:
        frames = (frames - kernel) // stride + 1
        total += frames * 512 * channels * kernel
        channels = 512
    total += frames * 512 * 768
    total += (frames + 1) * 768 * 128 * 768 // 16  # the positional convolution makes one frame more
    for _ in range(12):
        total += 4 * frames * 768 * 768 + 2 * frames * frames * 768 + 2 * frames * 768 * 3_072
    assert common.count_macs(model.extract_features, "meta") * 10 == total
    assert total / 1e9 == pytest.approx(74.07, abs=0.005)
    assert common.count_parameters(model) == pytest.approx(94.4e6, rel=0.001)


@pytest.mark.parametrize("layers, both", [(1, False), (2, True)])
def test_macs_of_an_lstm_are_its_weights_times_frames(layers, both):
    """torch's own counter finds none."""
    lstm = nn.LSTM(10, 6, num_layers=layers, bidirectional=both, batch_first=True)
    matrices = sum(p.numel() for p in lstm.parameters() if p.ndim == 2)
    frames = torch.zeros(3, 7, 10)
    assert common.count_macs(lambda _: lstm(frames), "cpu") == 21 * matrices / 10
    rows = common.describe([lstm], lambda _: lstm(frames))
    assert rows["LSTM"]["GMAC/s"] == pytest.approx(21 * matrices / 1e10)
    shapes = [list(p.shape) for p in lstm.parameters()]  # as the kernel of CUDA takes them
    assert common.lstm_flops([3, 7, 10], shapes, 4) == 2 * 21 * matrices


def test_speed_is_the_median_of_rounds_with_an_order_of_their_own():
    calls = []

    def sleeper(name, milliseconds):
        def features(waveforms):
            assert waveforms.shape == (1, 160_000)
            slow = 10 if len(calls) < 8 else 1  # the warm-up, and three of seven rounds
            calls.append(name)
            time.sleep(slow * milliseconds / 1_000)

        return features

    speed = common.measure_speed({"a": sleeper("a", 5), "b": sleeper("b", 20)}, "cpu")
    rounds = [tuple(calls[i : i + 2]) for i in range(0, 16, 2)]
    assert len(calls) == 16 and set(rounds) == {("a", "b"), ("b", "a")}
    assert 0.3 * 2_000 < speed["a"] <= 2_000 and 0.3 * 500 < speed["b"] <= 500


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        first, second = self.layers
        return second(first(first(self.norm(x))))


def test_description_gives_parameters_and_macs_of_models_and_their_parts():
    """Down to the entries of a list; each call counts; frozen parameters are parameters."""
    model, stack, frames = Small(), Stack(), 499
    rows = common.describe([model, stack], lambda waveforms: stack(model(waveforms)[0]))
    conv, linear, attention = frames * 4 * 400, frames * 4 * 6, 2 * frames * frames * 6
    layer = 2 * frames * 3 * 3  # of two heads
    expected = {
        "Small": (1_634, conv + linear + attention),
        "Small.conv": (1_604, conv),
        "Small.linear": (30, linear),
        "Stack": (30, 3 * layer),
        "Stack.layers.0": (12, 2 * layer),
        "Stack.layers.1": (12, layer),
    }
    for name, (parameters, macs) in expected.items():
        gmac = pytest.approx(macs / 1e10)
        assert rows[name] == {"parameters": parameters, "GMAC/s": gmac}, name
    assert rows.keys() == expected.keys()


# ---- distance to the teacher ---------------------------------------------------------------------


def test_layer_distance_equals_loops_over_frames():
    """Batches of unequal size: each frame counts the same."""
    generator = torch.Generator().manual_seed(0)
    predicted = [torch.randn(2, b, t, 3, generator=generator) for b, t in ((2, 4), (1, 9))]
    target = [torch.randn(2, b, t, 3, generator=generator) for b, t in ((2, 4), (1, 9))]
    result = common.layer_distance(
        lambda wave: list(predicted[int(wave)]),
        lambda wave: list(target[int(wave)]),
        [torch.tensor([[float(n)]]) for n in range(2)],
        "cpu",
    )
    for layer in range(2):
        l1 = cosine = frames = 0
        for p, h in zip(predicted, target):
            for b in range(p.shape[1]):
                for t in range(p.shape[2]):
                    x, y = p[layer, b, t].tolist(), h[layer, b, t].tolist()
                    l1 += sum(abs(i - j) for i, j in zip(x, y)) / 3
                    dot = sum(i * j for i, j in zip(x, y))
                    cosine += dot / math.sqrt(sum(i * i for i in x) * sum(j * j for j in y))
                    frames += 1
        assert frames == 17
        assert result["L1"][layer] == pytest.approx(l1 / frames, abs=1e-5)
        assert result["cosine"][layer] == pytest.approx(cosine / frames, abs=1e-5)


# ---- tasks ---------------------------------------------------------------------------------------


def test_frame_labels_are_the_phones_at_the_middle_of_frames():
    """Frame t is samples 320 t .. 320 t + 400: its middle is sample 320 t + 200."""

    def labels(samples, alignment):
        return common.frame_labels(Utterance("a.wav", samples, {"alignment": alignment}))

    # middles: 200 (a has just ended), 520 (the second b), 840 (c), 1160 (d:e has just begun), 1480
    assert labels(1_700, "a:200 b:520 b:521 c:1160 d:e:1700") == ["b", "b", "c", "d:e", "d:e"]
    assert labels(1_700, "a:201 b:300") == ["a"] + ["b"] * 4
    assert len(labels(16_000, "a:16000")) == 49
    for alignment in (" ", "a", "a:b", "a:100 :"):
        with pytest.raises(InputError, match="alignment .phone:end pairs, in samples. of a.wav"):
            labels(1_700, alignment)


def rows_of(**columns):
    """Two utterances in each of train, dev and test; a list gives them its values in turn."""
    rows = []
    for i, split in enumerate(("train", "train", "dev", "dev", "test", "test")):
        values = {k: v[i % len(v)] if isinstance(v, list) else v for k, v in columns.items()}
        values = {k: v for k, v in ({"split": split} | values).items() if v}
        rows.append(Utterance(f"{split}{i}.wav", 16_000, values))
    return rows


def titles(rows, every=False):
    return [task.name for task in common.find_tasks(rows, every)]


CONTENT = dict(alignment="a:8000 b:16000", phones="AH0 B IY1", text="ab c", label_x=["1", "2"])


def test_phones_and_text_are_left_out_where_another_task_is_about_the_content():
    speaker = dict(speaker=["anna", "bob"])
    everything = rows_of(**CONTENT, **speaker)
    assert titles(everything) == ["phone accuracy", "x accuracy", "speaker accuracy"]
    all_five = ["phone accuracy", "phone error rate", "x accuracy", "character error rate"]
    assert titles(everything, every=True) == [*all_five, "speaker accuracy"]
    assert titles(rows_of(phones="A", text="a")) == ["phone error rate"]
    assert titles(rows_of(label_x=["1", "2"], text="a")) == ["x accuracy"]
    assert titles(rows_of(text="a", **speaker)) == ["character error rate", "speaker accuracy"]


def test_targets_are_phones_without_stress_and_single_characters():
    rows = rows_of(**CONTENT)
    frames, phones, label, characters = common.find_tasks(rows, every=True)
    kinds = [task.kind for task in (frames, phones, label, characters)]
    assert kinds == ["frame", "ctc", "utterance", "ctc"]
    assert phones.parts["dev"][1] == (rows[3], ["AH", "B", "IY"])
    assert label.parts["test"] == [(rows[4], "1"), (rows[5], "2")]
    assert characters.parts["test"][0] == (rows[4], ["a", "b", " ", "c"])
    assert len(frames.parts["train"][0][1]) == 49


def test_a_task_needs_all_parts_and_two_classes_and_none_that_train_lacks():
    rows = rows_of(phones="A B")
    for part in ("train", "dev", "test"):
        others = [row for row in rows if row.get("split") != part]
        unlabelled = Utterance("x.wav", 16_000, {"split": part})
        assert titles(others) == titles([*others, unlabelled]) == []
    for labels, found in (
        (["yes", "no"], ["x accuracy"]),
        ("yes", []),
        (["yes", "no", "yes", "maybe", "yes", "no"], []),  # unseen in dev, and in test
        (["yes", "no", "yes", "no", "yes", "maybe"], []),
    ):
        assert titles(rows_of(label_x=labels)) == found
    two = ["a", "b"]  # each label column in their order, and no other column
    rows = rows_of(seconds=two, label_z=two, gender=two, label_a=two, lang=two, label=two)
    assert titles(rows) == ["z accuracy", "a accuracy"]


@pytest.mark.parametrize("column", ["speaker", "label_x"])
def test_a_column_of_its_own_can_give_the_split(column):
    """Which then counts alone: an utterance without it is in no part."""
    splits = ["test", "train", "dev", "train", "", "test"]
    rows = rows_of(**{column: ["a", "a", "b", "b", "a", "b"], f"{column}_split": splits})
    (task,) = common.find_tasks(rows)
    found = [[u.path for u, _ in part] for part in task.parts.values()]
    assert found == [["train1.wav", "dev3.wav"], ["dev2.wav"], ["train0.wav", "test5.wav"]]


def test_data_sets_are_probed_one_by_one():
    """The columns label_x_split are a split of data set b, and no label."""
    rows = rows_of(dataset="toy", phones="A B", label_x=["1", "2"])
    for splits in (["train", "dev"], ["test", "train"]):
        rows += rows_of(dataset="b", label_x=["1", "2"], label_x_split=splits)
    tasks = common.find_tasks(rows)
    names = ["x accuracy (b)", "phone error rate (toy)", "x accuracy (toy)"]
    assert [task.name for task in tasks] == names
    assert [u.get("dataset") for u, _ in tasks[1].parts["test"]] == ["toy", "toy"]
    assert [len(part) for part in tasks[2].parts.values()] == [2, 2, 2]


# ---- features ------------------------------------------------------------------------------------


def spectrum(waveforms):
    """Features by hand: 8 magnitudes of each frame of 400 samples, 320 apart."""
    frames = waveforms.unfold(1, 400, 320)  # B x T x 400
    return [torch.fft.rfft(frames).abs()[..., 5:37:4].log1p()]


@pytest.fixture(scope="module")
def utterances(audio_folder):
    return common.scan(audio_folder, None)


def test_features_equal_a_call_for_each_utterance_alone(utterances):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchaudio.models.wav2vec2_model(**large(encoder_num_layers=2), aux_num_out=None)
    teacher = common.Teacher(model, "test", normalise=True)
    frame_rows, utterance_rows = utterances[:3], utterances[2:5]
    tasks = [
        Task("f", "frame", {"train": [(u, None) for u in frame_rows]}),
        Task("u", "utterance", {"train": [(u, None) for u in utterance_rows]}),
    ]
    table = common.extract_features(teacher, tasks, "cpu")
    assert set(table) == {u.path for u in utterances[:5]}
    for utterance in utterances[:5]:
        wave, _ = soundfile.read(utterance.path, dtype="float32")
        hidden = teacher(torch.from_numpy(wave)[None])
        mean, frames = table[utterance.path]
        for layer, state in enumerate(hidden):
            assert torch.allclose(mean[layer], state[0].mean(0), atol=1e-5)
        if utterance in frame_rows:
            assert frames.dtype == torch.float16 and frames.shape == (3, *hidden[0].shape[1:])
            assert torch.allclose(frames.float(), torch.stack([s[0] for s in hidden]), atol=5e-3)
        else:
            assert frames is None


def test_frames_beyond_the_memory_limit_are_computed_at_each_pass_to_the_same_score(
    utterances, monkeypatch
):
    parts = {"train": utterances[:6], "dev": utterances[6:9], "test": utterances[9:]}
    ctc = Task("c", "ctc", {part: [(u, list("ab")) for u in parts[part]] for part in parts})
    labels = {part: [(u, "ab"[i % 2]) for i, u in enumerate(parts[part])] for part in parts}
    tasks, scores, calls = [ctc, Task("u", "utterance", labels)], [], []

    def features(waveforms):
        calls[-1] += 1
        return spectrum(waveforms)

    probe, linear = common.ctc_probe, common.linear_probe
    monkeypatch.setattr(common, "ctc_probe", lambda *given, **more: probe(*given, 4, **more))
    monkeypatch.setattr(common, "linear_probe", lambda parts, seed, _: linear(parts, seed, 50))
    for limit in (4_000_000_000, 1, 0):
        monkeypatch.setattr(common, "FEATURE_BYTES", limit)
        calls.append(0)
        table = common.extract_features(features, tasks, "cpu")
        kept = sum(torch.is_tensor(frames) for _, frames in table.values())
        assert kept == {1: 1, 0: 0}.get(limit, 12)
        scores.append(common.score_probes(table, tasks, 0))
    assert scores[0] == scores[1] == scores[2]
    assert calls[0] == 12 and calls[2] > calls[1] > 12 + 4 * 5
    frames = Task("f", "frame", {part: [(u, []) for u in parts[part]] for part in parts})
    table = common.extract_features(features, [ctc, frames], "cpu")  # a linear probe needs them all
    assert all(torch.is_tensor(kept) for _, kept in table.values())


def test_features_that_are_not_finite_are_named(utterances):
    broken = lambda _: [torch.full((1, 3, 2), torch.nan)]  # noqa: E731
    with pytest.raises(InputError, match=f"features of {utterances[0].path} are not finite"):
        common.utterance_features(broken, utterances[0], "cpu")


# ---- linear probe --------------------------------------------------------------------------------


def labelled(count, noise, seed, layers=3, width=6, classes=4):
    """Features (N, L, D) whose middle layer holds the label in one direction each, and labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=generator)
    x = torch.randn(count, layers, width, generator=generator)
    x[:, 1] = 5.0 + noise * x[:, 1] + F.one_hot(y, width)
    return x, [f"class {k}" for k in y.tolist()]


def probe_parts(noise, count=200):
    parts = ("train", "dev", "test")
    return {part: labelled(count, noise, seed) for seed, part in enumerate(parts)}


def test_the_linear_probe_separates_classes_in_one_layer_and_is_at_chance_on_noise():
    """A class that train lacks counts as an error; scale and shift of the features do not count."""
    parts = probe_parts(noise=0.1)
    assert common.linear_probe(parts, 0, 200) > 0.9
    x, y = parts["test"]
    unseen = parts | {"test": (x, ["never seen"] * 100 + y[100:])}
    assert 0.45 < common.linear_probe(unseen, 0, 200) <= 0.5
    assert 0.15 < common.linear_probe(probe_parts(noise=1e6, count=400), 0, 100) < 0.35
    parts = probe_parts(noise=0.7)
    moved = {part: (1_000 * x - 300, y) for part, (x, y) in parts.items()}
    score = common.linear_probe(parts, 0, 200)
    assert common.linear_probe(moved, 0, 200) == pytest.approx(score, abs=0.02)


@pytest.mark.parametrize("seed", [0, 2])
def test_the_test_part_chooses_nothing(seed):
    """The score of two test sets together is their mean: the choice was made without them."""
    parts = {part: labelled(60, 1.0, 10 * seed + i) for i, part in enumerate(("train", "dev"))}
    first, second = (labelled(64, 1.0, 10 * seed + i) for i in (3, 4))
    both = (torch.cat([first[0], second[0]]), first[1] + second[1])
    tests = first, second, both
    one, two, together = (common.linear_probe(parts | {"test": t}, seed, 200) for t in tests)
    assert 0.3 < together < 0.95
    assert together == pytest.approx((one + two) / 2, abs=1e-9)


def same_and_silent(probe):
    """Two scores with all global generators at different states, which must come out unchanged."""
    scores = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        scores.append(probe())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
    return scores


def test_the_linear_probe_follows_its_seed_and_leaves_the_global_generators_alone():
    parts = probe_parts(noise=2.0)
    one, two = same_and_silent(lambda: common.linear_probe(parts, 3, 50))
    assert one == two


# ---- CTC probe -----------------------------------------------------------------------------------


def error_rate(path, target, symbols):
    """ctc_error_rate of one utterance: ``path`` holds the best entry of the head at each frame."""
    head = nn.Module()
    head.out, head.forward = nn.Linear(1, 1), lambda x: x[:, :, 0]  # B x T x L x D
    scores = F.one_hot(torch.tensor(path), 1 + len(symbols)).float()
    scores += 0.3 * torch.rand(scores.shape)
    return common.ctc_error_rate(head, [scores.log_softmax(-1)[None]], [target], symbols)


def test_greedy_decoding_merges_repeats_then_drops_blanks_and_edits_are_per_symbol():
    cases = [("112", "ab"), ("101", "aa"), ("0330032210", "ccba"), ("0002", "b")]
    for path, target in cases:
        assert error_rate([*map(int, path)], [*target], "abc") == 0.0
    assert error_rate([0, 0, 0], ["a", "b"], "abc") == 1.0
    # "a cat" for "the cat sat": "the" against "a" is 3 edits, and 4 symbols are missing
    symbols = sorted(set("the cat sat"))
    path = [number for symbol in "a cat" for number in (symbols.index(symbol) + 1, 0)]
    assert error_rate(path, [*"the cat sat"], symbols) == 7 / 11


def spelled(count, seed, noise=0.05, symbols="abcd"):
    """Features (L, T, D) that spell three to five symbols in the second layer, and the symbols."""
    rng = np.random.default_rng(seed)
    features, targets = [], []
    for _ in range(count):
        target = rng.integers(len(symbols), size=rng.integers(3, 6))
        clean = np.zeros((6 * len(target), 8))
        for i, k in enumerate(target):
            clean[6 * i + 1 : 6 * i + 5, k] = 1.0
        layers = np.stack([np.zeros_like(clean), clean])
        layers += noise * rng.standard_normal(layers.shape)
        features.append(torch.from_numpy(layers).half())
        targets.append([symbols[k] for k in target])
    return features, targets


def test_the_ctc_probe_learns_to_spell_but_not_from_noise_nor_symbols_that_train_lacks():
    parts = {
        part: spelled(n, i) for i, (part, n) in enumerate(dict(train=32, dev=8, test=16).items())
    }
    assert common.ctc_probe(parts, seed=0, epochs=12) < 0.15
    features, targets = parts["test"]
    unseen = parts | {"test": (features, [["z"] * len(target) for target in targets])}
    assert common.ctc_probe(unseen, seed=0, epochs=4) >= 1.0
    noise = {part: spelled(16, i, noise=1e3) for i, part in enumerate(parts)}
    one, two = same_and_silent(lambda: common.ctc_probe(noise, seed=0, epochs=4))
    assert one == two > 0.6


def test_the_epoch_of_the_ctc_probe_is_chosen_on_dev(monkeypatch):
    """Of the second half of the epochs, here four: dev is best at the last of them."""
    parts = {part: spelled(8, seed) for seed, part in enumerate(("train", "dev", "test"))}
    rates = {"dev": iter([0.5, 0.4, 0.6, 0.3]), "test": iter([0.1, 0.2, 0.7])}

    def error_rate(head, features, targets, symbols):
        (part,) = (part for part in rates if parts[part][0] is features)
        return next(rates[part])

    monkeypatch.setattr(common, "ctc_error_rate", error_rate)
    assert common.ctc_probe(parts, 0, epochs=7) == 0.7


def test_a_batch_of_the_ctc_probe_holds_neighbours_in_length(monkeypatch):
    rows = [(Utterance(f"{seconds}.wav", 16_000 * seconds, {}), "ab") for seconds in (3, 1, 2)]
    table = {utterance.path: (None, utterance.path) for utterance, _ in rows}
    seen = []
    monkeypatch.setattr(common, "ctc_probe", lambda parts, *_, **__: seen.append(parts) or 0.0)
    common.score_probes(table, [Task("t", "ctc", {"train": rows})], 0)
    assert seen == [{"train": (("1.wav", "2.wav", "3.wav"), ["ab"] * 3)}]


def test_computed_frames_are_rounded_as_kept_ones_are():
    frames = torch.randn(2, 5, 3)
    kept, computed = (common.ctc_input(x, "cpu") for x in (frames.half(), lambda: frames))
    assert torch.equal(kept, computed) and kept.shape == (5, 2, 3) and kept.dtype == torch.float32


# ---- all probes of a model -----------------------------------------------------------------------


def test_a_row_has_size_speed_and_the_score_of_each_task_in_any_order(tmp_path, monkeypatch):
    """Low and high tones: their order is the text, the louder speaker shouts."""
    probe = common.linear_probe
    monkeypatch.setattr(common, "linear_probe", lambda parts, seed, _: probe(parts, seed, 100))
    tones, rows = {"l": 200.0, "h": 1_000.0}, []
    for i in range(24):
        word, speaker = ["lh", "hl"][i % 2], ["quiet", "shouts"][i // 2 % 2]
        rng = np.random.default_rng(i)
        halves = [np.sin(2 * np.pi * tones[c] * np.arange(4_000) / 16_000) for c in word]
        wave = (0.3 if speaker == "shouts" else 0.05) * np.concatenate(halves)
        path = tmp_path / f"{i:02d}.wav"
        soundfile.write(path, wave + 0.001 * rng.standard_normal(8_000), 16_000)
        split = ("train", "train", "train", "train", "dev", "test")[i // 4]
        columns = dict(split=split, speaker=speaker, text=word)
        columns["alignment"] = f"{word[0]}:4000 {word[1]}:8000"
        rows.append(Utterance(str(path), 8_000, columns))
    tasks = common.find_tasks(rows, every=True)
    row = common.score(Small(), spectrum, tasks, "cpu", 0, speed=2.0)
    size = ["parameters", "GMAC/s", "speed"]
    assert list(row) == size + ["phone accuracy", "character error rate", "speaker accuracy"]
    assert row["parameters"] == 1_634 and row["speed"] == 2.0
    assert row["GMAC/s"] == common.count_macs(spectrum, "cpu") / 1e9
    assert row["phone accuracy"] > 0.9 and row["speaker accuracy"] == 1.0
    assert 0.0 <= row["character error rate"] <= 1.0
    again = common.score(Small(), spectrum, tasks[::-1], "cpu", 0)
    assert again == {column: row[column] for column in row if column != "speed"}


def test_scores_of_one_name_are_averaged_and_a_large_train_part_gets_twenty_epochs(monkeypatch):
    scores, updates = iter([0.1, 0.2, 0.6]), []
    monkeypatch.setattr(
        common, "linear_probe", lambda *given: updates.append(given[2]) or next(scores)
    )
    rows = {part: [(Utterance("x", 1, {}), "a")] for part in ("train", "dev", "test")}
    large = rows | {"train": rows["train"] * 30_000}
    tasks = [Task("two", "utterance", rows)] * 2 + [Task("one", "utterance", large)]
    table = {"x": (torch.zeros(1, 2), None)}
    assert common.score_probes(table, tasks, 0) == pytest.approx({"two": 0.15, "one": 0.6})
    assert updates == [400, 400, 585]


# ---- tables --------------------------------------------------------------------------------------

ROWS = {
    "teacher": {"parameters": 94_370_000, "GMAC/s": 7.4068},
    "student, 3 seeds": {"GMAC/s": 12.345, "accuracy": [0.5, 0.6, 0.7], "L1": -0.25},
    "speeds": {"accuracy": [10.0, 30.0], "L1": [0.125]},
}


def test_the_table_shows_counts_numbers_and_means_over_seeds():
    lines = common.format_table(ROWS).split("\n")
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "parameters", "GMAC/s", "accuracy", "L1"]
    assert set(lines[1]) == {"|", "-", ":"}
    assert cells[2] == ["teacher", "94,370,000", "7.407", "", ""]
    assert cells[3] == ["student, 3 seeds", "", "12.3", "0.600 ± 0.100", "-0.250"]
    assert cells[4] == ["speeds", "", "", "20.0 ± 14.1", "0.125"]


def test_evaluate_probes_a_student_on_a_manifest_and_leaves_nothing_behind(tmp_path, audio_folder):
    splits = ["train"] * 6 + ["dev"] * 3 + ["test"] * 3
    lines = ["path\tsplit\tlabel_x\ttext"]
    for i, (path, split) in enumerate(zip(sorted(audio_folder.glob("*.wav")), splits)):
        lines.append(f"{path}\t{split}\t{'ab'[i % 2]}\thello")
    manifest = tmp_path / "manifest.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    args = SimpleNamespace(evaluate="student.pt")

    def evaluate(data):
        config = SimpleNamespace(data=str(data), device="cpu", workers=1, seed=3)
        return common.score_file(lambda *given: given, score, config, args)

    def score(student, tasks, device, seed):
        assert student == ("student.pt", device) and device == torch.device("cpu") and seed == 3
        return {task.name: 0.5 for task in tasks}

    for given in (manifest, tmp_path):
        assert evaluate(given) == common.format_table({"student.pt": {"x accuracy": 0.5}})
    assert list(tmp_path.iterdir()) == [manifest]
    with pytest.raises(InputError, match=f"{audio_folder} has no labels to probe"):
        evaluate(audio_folder)


@dataclass
class Config:
    out: str
    data: str = "audio"
    seed: int = 5
    size: int = 1


def make_table(config, ran=None, seeds=1, claim=False, resume=False, twice=None):
    """make_table of a method that trains nothing and writes down its runs in ``ran``."""

    def train(config, resume):
        common.start_run(config, None)
        return "student", "heads", resume, []

    def evaluate(config, student, heads, resume, baselines=True):
        assert (student, heads) == ("student", "heads")
        ran.append((Path(config.out).name, config.seed, config.size, resume, baselines))
        start = {"untrained": {"x": -1.0}} if baselines else {}
        return start | {"distilled": {"x": 10.0 * config.size + config.seed, "parameters": 7}}

    ran = [] if ran is None else ran
    args = SimpleNamespace(seeds=seeds, claim=claim, resume=resume)
    return common.make_table(
        train, evaluate, config, args, {"Twice, no mask": twice or {"size": 2}}
    )


def read_rows(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_a_single_run_writes_its_table_where_it_ran(tmp_path):
    ran = []
    text = make_table(Config(str(tmp_path / "run")), ran)
    assert ran == [("run", 5, 1, False, True)]
    rows = {"untrained": {"x": -1.0}, "distilled": {"x": 15.0, "parameters": 7}}
    assert read_rows(tmp_path / "run") == rows and text == common.format_table(rows)
    kept = (tmp_path / "run" / "results.txt").read_text(encoding="utf-8")
    assert kept.startswith(text) and f"torch {torch.__version__}" in kept
    assert json.loads((tmp_path / "run" / "results.json").read_text())["command"] in kept
    make_table(Config(str(tmp_path / "run")), ran, resume=True)
    assert ran[1:] == [("run", 5, 1, True, True)]


def test_the_claim_sets_the_method_beside_its_ablations_over_seeds(tmp_path):
    ran, config = [], Config(str(tmp_path))
    text = make_table(config, ran, seeds=2, claim=True)
    assert ran == [
        ("distilled-seed-5", 5, 1, False, True),
        ("twice-no-mask-seed-5", 5, 2, False, False),
        ("distilled-seed-6", 6, 1, False, True),
        ("twice-no-mask-seed-6", 6, 2, False, False),
    ]
    rows = {
        "untrained": {"x": [-1.0, -1.0]},
        "distilled": {"x": [15.0, 16.0], "parameters": [7, 7]},
        "Twice, no mask": {"x": [25.0, 26.0], "parameters": [7, 7]},
    }
    assert read_rows(tmp_path / "claim") == rows and text == common.format_table(rows)
    assert "25.5 ± 0.7" in text
    assert read_rows(tmp_path / "claim" / "twice-no-mask-seed-6")["distilled"]["x"] == 26.0
    (tmp_path / "claim" / "distilled-seed-6" / "results.json").unlink()  # stopped inside this run
    for path in (tmp_path / "claim" / "twice-no-mask-seed-6").iterdir():  # and this never began
        path.unlink()
    assert make_table(config, ran, seeds=2, claim=True, resume=True) == text
    assert ran[4:] == [
        ("distilled-seed-6", 6, 1, True, True),
        ("twice-no-mask-seed-6", 6, 2, False, False),
    ]
    with pytest.raises(InputError, match="twice-no-mask-seed-5 had another --size"):
        make_table(config, claim=True, resume=True, twice={"size": 3})


def test_seeds_repeat_the_method_alone_and_process_0_evaluates_and_writes(tmp_path, monkeypatch):
    ran = []
    make_table(Config(str(tmp_path)), ran, seeds=3)
    assert [name for name, *_ in ran] == [f"distilled-seed-{seed}" for seed in (5, 6, 7)]
    assert read_rows(tmp_path / "seeds")["distilled"]["x"] == [15.0, 16.0, 17.0]
    monkeypatch.setattr(common, "rank", lambda: 1)
    make_table(Config(str(tmp_path / "other")), ran, seeds=2)
    assert len(ran) == 3 and not list((tmp_path / "other").rglob("results.*"))


def test_without_data_a_run_is_in_the_toy_world(tmp_path, monkeypatch):
    toy = SimpleNamespace(world=lambda folder: folder / "here")
    monkeypatch.setattr(common, "toy", lambda: toy)
    make_table(Config(str(tmp_path), data=""))
    data = json.loads((tmp_path / "config.json").read_text())["data"]
    assert data == str(tmp_path / "toy_world" / "here")
