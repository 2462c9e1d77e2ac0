"""Evaluation: size, MACs, distance, labels, probes, and the table."""

import json
import math
import time
from dataclasses import asdict, dataclass
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
from common import InputError, ProbeTask, Utterance

# ---- size and speed ----------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution, a linear layer, attention with two heads: few enough to count by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 400, 320)
        self.linear = nn.Linear(4, 6)
        self.linear.requires_grad_(False)

    def forward(self, wave, lengths):
        x = self.linear(self.conv(wave[:, None]).mT)  # 1 x T x 6
        heads = x.view(1, -1, 2, 3).transpose(1, 2)
        return [F.scaled_dot_product_attention(heads, heads, heads)], None


def test_macs_equal_a_count_by_hand():
    frames = 49  # of one second
    conv, linear, attention = frames * 4 * 400, frames * 4 * 6, 2 * frames * frames * 6
    assert common.count_macs(Small(), "cpu", seconds=1.0) == conv + linear + attention
    assert (
        common.count_macs(
            lambda wave, _: Small().linear(Small().conv(wave[:, None]).mT), "cpu", 1.0
        )
        == conv + linear
    )


def test_macs_are_per_second():
    """Attention grows with the square, all else with the length: 99 frames in two seconds."""
    attention = 2 * 99 * 99 * 6
    assert common.count_macs(Small(), "cpu", 2.0) == (99 * 4 * 400 + 99 * 4 * 6 + attention) / 2


@pytest.mark.slow
def test_hubert_base_needs_74_giga_macs_for_ten_seconds():
    with torch.random.fork_rng():
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
    assert common.count_macs(model.extract_features, "cpu") * 10 == total
    assert total / 1e9 == pytest.approx(74.07, abs=0.005)
    assert common.count_parameters(model) == pytest.approx(94.4e6, rel=0.001)


def test_cost_counts_frozen_parameters_too():
    cost = common.cost(Small(), Small(), "cpu")
    assert cost["parameters"] == 4 * 400 + 4 + 4 * 6 + 6
    assert cost["GMAC/s"] == common.count_macs(Small(), "cpu") / 1e9


def test_speed_is_the_median_over_interleaved_rounds():
    calls = []

    def sleeper(name, milliseconds):
        def features(wave, lengths):
            assert wave.shape == (1, 8_000) and lengths is None
            slow = 10 if len(calls) in (0, 2) else 1  # the warm-up and one round
            calls.append(name)
            time.sleep(slow * milliseconds / 1_000)

        return features

    speed = common.measure_speed(
        {"a": sleeper("a", 5), "b": sleeper("b", 20)}, "cpu", 0.5, rounds=5
    )
    rounds = [tuple(calls[i : i + 2]) for i in range(0, 12, 2)]
    assert len(calls) == 12 and set(rounds) == {("a", "b"), ("b", "a")}
    assert 0.3 * 100 < speed["a"] <= 100 and 0.3 * 25 < speed["b"] <= 25


def test_a_runs_rows_have_means_of_lists_and_speed_against_the_teacher(monkeypatch, tmp_path):
    plain, headed, head, teacher = (torch.nn.Linear(1, 1) for _ in range(4))
    config = SimpleNamespace(data="", out=str(tmp_path), workers=0, seed=3)
    heldout, asked = [object()], []

    def speed(models, device):
        assert models == {"teacher": teacher, "student": headed} and not headed.training
        return {"teacher": 4.0, "student": 12.0}

    def measure(*given):
        asked.append(given)
        return {"L1": [1.0, 2.0, 6.0], "KL": 0.25}

    monkeypatch.setattr(common, "scan", lambda *_: ["all"])
    monkeypatch.setattr(common, "train_and_heldout", lambda rows: ([], heldout))
    monkeypatch.setattr(common, "probe_tasks", lambda rows: ["task"])
    monkeypatch.setattr(common, "measure_speed", speed)
    monkeypatch.setattr(common, "teacher_row", lambda model, *_: {"of": model})
    score = lambda model, tasks, device, seed: {"probe": model, "seed": (tasks, seed)}  # noqa: E731
    students = {"untrained": plain, "distilled": (headed, head)}
    rows = common.compare(config, teacher, students, measure, score)
    assert list(rows) == ["teacher", "untrained", "distilled"] and rows["teacher"]["of"] is teacher
    same = {"speed": 3.0, "L1": 3.0, "KL": 0.25, "seed": (["task"], 3)}
    assert rows["untrained"] == same | {"probe": plain}
    assert rows["distilled"] == same | {"probe": headed}
    assert asked == [(config, teacher, plain, heldout), (config, teacher, headed, head, heldout)]
    alone = common.compare(config, teacher, {"distilled": (headed, head)}, measure, score)
    assert alone == {"distilled": rows["distilled"]}  # an ablation brings no teacher


def test_description_gives_shape_parameters_and_macs_of_each_module():
    model = Small()
    rows = common.describe_modules(
        {"all": model, "conv": model.conv, "linear": model.linear},
        lambda wave: model(wave, None),
        1.0,
    )
    assert rows["conv"] == {"output": "1 x 4 x 49", "parameters": 1_604, "GMAC/s": 49 * 1_600 / 1e9}
    assert rows["linear"] == {"output": "1 x 49 x 6", "parameters": 30, "GMAC/s": 49 * 24 / 1e9}
    assert rows["all"]["output"] == "1 x 2 x 49 x 3"
    assert rows["all"]["GMAC/s"] == pytest.approx((49 * 1_624 + 2 * 49 * 49 * 6) / 1e9)
    assert not model.conv._forward_hooks and not model.conv._forward_pre_hooks


# ---- distance to the teacher -------------------------------------------------------------------


def test_layer_distance_equals_loops_over_frames():
    """Batches of unequal size: each frame counts the same."""
    generator = torch.Generator().manual_seed(0)
    predicted = [torch.randn(2, b, t, 3, generator=generator) for b, t in ((2, 4), (1, 9))]
    target = [torch.randn(2, b, t, 3, generator=generator) for b, t in ((2, 4), (1, 9))]
    batches = [torch.tensor([[float(n)]]) for n in range(2)]
    result = common.layer_distance(
        lambda wave: list(predicted[int(wave)]),
        lambda wave: list(target[int(wave)]),
        batches,
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


# ---- tasks -------------------------------------------------------------------------------------


def test_frame_labels_are_the_phones_at_the_middle_of_frames():
    """Frame t hears samples 320 t .. 320 t + 400: its middle is sample 320 t + 200."""
    utterance = Utterance("a.wav", 1_700, alignment="a:200 b:520 b:521 c:1160 d:e:1700")
    # middles: 200 (a has just ended), 520 (the second b), 840 (c), 1160 (d:e has just begun), 1480
    assert common.frame_labels(utterance) == ["b", "b", "c", "d:e", "d:e"]
    assert (
        common.frame_labels(Utterance("a.wav", 1_700, alignment="a:201 b:300")) == ["a"] + ["b"] * 4
    )
    assert len(common.frame_labels(Utterance("a.wav", 16_000, alignment="a:16000"))) == 49


@pytest.mark.parametrize("alignment", [" ", "a", "a:b", "a:100 :"])
def test_frame_labels_refuse_what_is_no_alignment(alignment):
    with pytest.raises(common.InputError, match="a.wav must be phone:end pairs"):
        common.frame_labels(Utterance("a.wav", 1_700, alignment=alignment))


def rows_of(**columns):
    """Two utterances in each of train, dev and test, the same split for both splits."""
    return [
        Utterance(f"{part}{i}.wav", 16_000, split=part, sid_split=part, **columns)
        for part in ("train", "dev", "test")
        for i in range(2)
    ]


def alternate(rows, column, values):
    return [
        Utterance(**{**vars(row), column: values[i % len(values)]}) for i, row in enumerate(rows)
    ]


def names(rows, only=()):
    return [task.name for task in common.probe_tasks(rows, only)]


def test_only_the_first_content_task_is_taken_unless_another_is_asked_for():
    rows = rows_of(alignment="a:8000 b:16000", phones="AH0 B", text="ab")
    assert names(rows) == ["frames"]
    assert names(rows, ["phones"]) == ["phone errors"]
    assert names(rows, ["characters", "frames"]) == ["frames", "character errors"]
    assert names(rows_of(text="ab")) == ["character errors"]
    assert names(rows_of(phones="AH0 B", text="ab")) == ["phone errors"]


def test_targets_are_phones_without_stress_and_single_characters():
    rows = rows_of(phones="AH0 B IY1", text="ab c", alignment="a:8000 b:16000")
    frames, phones, characters = common.probe_tasks(rows, ["phones", "characters", "frames"])
    assert [task.kind for task in (frames, phones, characters)] == ["frame", "ctc", "ctc"]
    assert phones.parts["dev"][1] == (rows[3], ["AH", "B", "IY"])
    assert characters.parts["test"][0] == (rows[4], ["a", "b", " ", "c"])
    labels = frames.parts["train"][0][1]
    assert len(labels) == 49 and set(labels) == {"a", "b"}


def test_a_task_needs_train_dev_and_test():
    rows = rows_of(phones="A B")
    for part in ("train", "dev", "test"):
        assert names([row for row in rows if row.split != part]) == []
        assert (
            names(
                [row if row.split != part else Utterance(row.path, 1, split=part) for row in rows]
            )
            == []
        )


def test_a_label_task_needs_two_classes_and_none_that_training_never_shows():
    rows = alternate(rows_of(label_kind="intent"), "label", ["yes", "no"])
    assert names(rows) == ["intent"]
    assert names(alternate(rows_of(), "label", ["yes", "no"])) == ["label"]
    assert names(alternate(rows_of(), "label", ["yes"])) == []
    for i in (3, 5):  # one of dev, one of test
        changed = list(rows)
        changed[i] = Utterance(**{**vars(rows[i]), "label": "maybe"})
        assert names(changed) == []


def test_labels_with_slots_are_a_task_for_each_slot_and_their_mean_counts():
    """By hand: roast has a value that train lacks, so its presence counts; shots never changes."""
    labels = (
        ["order;size=big;shots=1", "stop;shots=1"]  # train
        + ["order;shots=1", "stop;shots=1"]  # dev
        + ["order;roast=dark;shots=1", "order;size=big;shots=1"]  # test
    )
    rows = alternate(rows_of(label_kind="intent_slots", dataset="cafe"), "label", labels)
    assert names(rows) == ["slots cafe"] * 2  # roast never changes in train
    rows[1] = Utterance(**{**vars(rows[1]), "label": "stop;roast=light;shots=1"})
    tasks = common.probe_tasks(rows)
    assert [task.name for task in tasks] == ["slots cafe"] * 3
    intent, roast, size = ([[t for _, t in rows] for rows in task.parts.values()] for task in tasks)
    assert intent == [["order", "stop"], ["order", "stop"], ["order", "order"]]
    assert roast == [["False", "True"], ["False", "False"], ["True", "False"]]
    assert size == [["big", ""], ["", ""], ["", "big"]]
    table = {common._key(row): (torch.randn(1, 4), None) for row in rows}
    scores = [list(common.score_probes(table, [task], 0).values())[0] for task in tasks]
    assert common.score_probes(table, tasks, 0) == {"slots cafe": pytest.approx(np.mean(scores))}


def test_speakers_are_split_by_their_own_column():
    rows = alternate(rows_of(), "speaker", ["anna", "bob"])
    assert names(rows) == ["speaker"]
    (task,) = common.probe_tasks([Utterance(**{**vars(row), "split": ""}) for row in rows])
    assert [target for _, target in task.parts["test"]] == ["anna", "bob"]
    assert names([Utterance(**{**vars(row), "sid_split": ""}) for row in rows]) == []


def test_data_sets_are_probed_one_by_one():
    rows = rows_of(dataset="toy", phones="A B") + rows_of(dataset="fluent", text="a b")
    tasks = common.probe_tasks(rows)
    assert [task.name for task in tasks] == ["character errors fluent", "phone errors toy"]
    assert all(u.dataset == "toy" for part in tasks[1].parts.values() for u, _ in part)


def write_manifest(folder, audio_folder, header, row):
    """A manifest over the twelve wavs: six train, three dev, three test."""
    parts = ["train"] * 6 + ["dev"] * 3 + ["test"] * 3
    lines = ["\t".join(["path", "split", *header])]
    for i, (path, part) in enumerate(zip(sorted(audio_folder.glob("*.wav")), parts)):
        lines.append("\t".join([str(path), part, *row(i)]))
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.tsv"


def test_labelled_tasks_reads_a_manifest_and_leaves_nothing_behind(tmp_path, audio_folder):
    manifest = write_manifest(
        tmp_path, audio_folder, ["label", "text"], lambda i: ("ab"[i % 2], "hello")
    )
    for given in (manifest, tmp_path):
        assert [t.name for t in common.labelled_tasks(given, "")] == ["label"]  # content enough
    assert [t.name for t in common.labelled_tasks(manifest, "characters")] == ["character errors"]
    assert [t.name for t in common.labelled_tasks(manifest, "label")] == ["label"]
    assert sorted(tmp_path.iterdir()) == [manifest]


def test_labelled_tasks_errors_say_what_is_missing(tmp_path, audio_folder):
    manifest = write_manifest(tmp_path, audio_folder, ["label"], lambda i: ("ab"[i % 2],))
    with pytest.raises(InputError, match="unknown --task colour: choose from frames, .*speaker"):
        common.labelled_tasks(manifest, "label,colour")
    with pytest.raises(InputError, match="--task-data"):
        common.labelled_tasks("", "label")
    with pytest.raises(InputError, match="no labels for phones"):
        common.labelled_tasks(manifest, "phones")
    with pytest.raises(InputError, match="no labels for any task"):
        common.labelled_tasks(audio_folder, "")
    with pytest.raises(InputError, match="does not exist"):
        common.labelled_tasks(tmp_path / "none", "")


# ---- features ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def utterances(audio_folder, tmp_path_factory):
    return common.scan(audio_folder, tmp_path_factory.mktemp("cache") / "files.jsonl")


def test_features_equal_a_call_for_each_utterance_alone(utterances):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchaudio.models.wav2vec2_model(**large(encoder_num_layers=2), aux_num_out=None)
    teacher = common.Teacher(model, "test", normalise=True)
    frame_rows, utterance_rows = utterances[:3], utterances[2:5]
    tasks = [
        ProbeTask("f", "frame", {"train": [(u, None) for u in frame_rows]}),
        ProbeTask("u", "utterance", {"train": [(u, None) for u in utterance_rows]}),
    ]
    table = common.extract_features(teacher, tasks, "cpu")
    assert set(table) == {u.path for u in utterances[:5]}
    for utterance in utterances[:5]:
        wave, _ = soundfile.read(utterance.path, dtype="float32")
        hidden, _ = teacher(torch.from_numpy(wave)[None])
        mean, frames = table[utterance.path]
        for layer, state in enumerate(hidden):
            assert torch.allclose(mean[layer], state[0].mean(0), atol=1e-5)
        if utterance in frame_rows:
            assert frames.dtype == torch.float16 and frames.shape == (3, *hidden[0].shape[1:])
            assert torch.allclose(frames.float(), torch.stack([s[0] for s in hidden]), atol=5e-3)
        else:
            assert frames is None


# ---- classification probe ----------------------------------------------------------------------


def labelled(count, noise, seed, layers=3, width=6, classes=4):
    """Features (N, L, D) whose middle layer holds the label in one direction each, and labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=generator)
    x = torch.randn(count, layers, width, generator=generator)
    x[:, 1] = 5.0 + noise * x[:, 1] + F.one_hot(y, width)
    return x, [f"class {k}" for k in y.tolist()]


def probe_parts(noise, count=200):
    return {
        part: labelled(count, noise, seed) for seed, part in enumerate(("train", "dev", "test"))
    }


def test_the_probe_separates_what_one_layer_tells():
    assert common.classification_probe(probe_parts(noise=0.1), seed=0) > 0.9


def test_the_probe_is_at_chance_on_noise():
    assert 0.15 < common.classification_probe(probe_parts(noise=1e6, count=400), seed=0) < 0.35


def test_the_probe_is_blind_to_scale_and_shift_of_the_features():
    parts = probe_parts(noise=0.7)
    moved = {part: (1_000 * x - 300, y) for part, (x, y) in parts.items()}
    assert common.classification_probe(moved, 0) == pytest.approx(
        common.classification_probe(parts, 0), abs=0.02
    )


def test_a_class_that_training_never_shows_counts_as_an_error():
    parts = probe_parts(noise=0.1)
    x, y = parts["test"]
    parts["test"] = (x, ["never seen"] * 100 + y[100:])
    assert 0.45 < common.classification_probe(parts, seed=0) <= 0.5


@pytest.mark.parametrize("seed", [0, 2])
def test_test_data_choose_nothing(seed):
    """The score of two test sets together is their mean: the choice was made without them."""
    parts = {part: labelled(60, 1.0, 10 * seed + i) for i, part in enumerate(("train", "dev"))}
    first, second = (labelled(64, 1.0, 10 * seed + i) for i in (3, 4))
    both = (torch.cat([first[0], second[0]]), first[1] + second[1])
    one, two, together = (
        common.classification_probe(parts | {"test": test}, seed) for test in (first, second, both)
    )
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


def test_the_probe_follows_its_seed_and_leaves_the_global_generators_alone():
    parts = probe_parts(noise=2.0)
    one, two = same_and_silent(lambda: common.classification_probe(parts, seed=3))
    assert one == two


# ---- CTC probe ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "decoded"),
    [
        ([0, 0, 0], []),
        ([1, 1, 2], [1, 2]),
        ([1, 0, 1], [1, 1]),
        ([0, 3, 3, 0, 0, 3, 2, 2, 1, 0], [3, 3, 2, 1]),
        ([2], [2]),
    ],
)
def test_greedy_decoding_merges_repeats_then_drops_blanks(path, decoded):
    log_probs = (
        F.one_hot(torch.tensor(path), 4).float() + 0.3 * torch.rand(len(path), 4)
    ).log_softmax(-1)
    assert common.greedy_decode(log_probs) == decoded


def spelled(count, seed, noise=0.05, symbols="abcd"):
    """Features (L, T, D) that spell three to five symbols in the second layer, and the symbols."""
    rng = np.random.default_rng(seed)
    features, targets = [], []
    for _ in range(count):
        target = rng.integers(len(symbols), size=rng.integers(3, 6))
        clean = np.zeros((6 * len(target), 8))
        for i, k in enumerate(target):
            clean[6 * i + 1 : 6 * i + 5, k] = 1.0
        layers = np.stack([np.zeros_like(clean), clean]) + noise * rng.standard_normal(
            (2, *clean.shape)
        )
        features.append(torch.from_numpy(layers).half())
        targets.append([symbols[k] for k in target])
    return features, targets


def test_the_ctc_probe_learns_to_spell():
    parts = {
        part: spelled(count, seed)
        for seed, (part, count) in enumerate(dict(train=32, dev=8, test=16).items())
    }
    assert common.ctc_probe(parts, seed=0, epochs=12) < 0.15


def test_the_ctc_probe_learns_nothing_from_noise_and_follows_its_seed():
    parts = {
        part: spelled(16, seed, noise=1e3) for seed, part in enumerate(("train", "dev", "test"))
    }
    one, two = same_and_silent(lambda: common.ctc_probe(parts, seed=0, epochs=4))
    assert one == two
    assert one > 0.6


def test_symbols_that_training_never_shows_count_as_errors():
    parts = {part: spelled(8, seed) for seed, part in enumerate(("train", "dev"))}
    test, targets = spelled(8, 2)
    parts["test"] = (test, [["z"] * len(target) for target in targets])
    assert common.ctc_probe(parts, seed=0, epochs=4) >= 1.0


# ---- all of it ---------------------------------------------------------------------------------


def spectrum(waveforms, lengths):
    """Features by hand: 8 magnitudes of each frame of 400 samples, 320 apart."""
    frames = waveforms.unfold(1, 400, 320)  # B x T x 400
    return [torch.fft.rfft(frames).abs()[..., 5:37:4].log1p()], None


def test_run_probes_gives_a_score_to_each_task(tmp_path):
    """Low and high tones: their order is the text, the louder speaker shouts."""
    tones, rows = {"l": 200.0, "h": 1_000.0}, []
    for i in range(24):
        word, speaker = ["lh", "hl"][i % 2], ["quiet", "shouts"][i // 2 % 2]
        rng = np.random.default_rng(i)
        halves = [np.sin(2 * np.pi * tones[c] * np.arange(4_000) / 16_000) for c in word]
        wave = (0.3 if speaker == "shouts" else 0.05) * np.concatenate(halves)
        path = tmp_path / f"{i:02d}.wav"
        soundfile.write(path, wave + 0.001 * rng.standard_normal(8_000), 16_000)
        part = ("train", "train", "train", "train", "dev", "test")[i // 4]
        alignment = f"{word[0]}:4000 {word[1]}:8000"
        rows.append(
            Utterance(str(path), 8_000, "", speaker, part, part, "", "", word, "", alignment)
        )
    tasks = common.probe_tasks(rows)
    scores = common.run_probes(spectrum, tasks, "cpu", seed=0)
    assert list(scores) == ["frames", "speaker"]
    assert scores["frames"] > 0.9 and scores["speaker"] == 1.0
    tasks = common.probe_tasks(rows, ["characters"])
    assert 0.0 <= common.run_probes(spectrum, tasks, "cpu", seed=0)["character errors"] <= 1.0


# ---- the table ---------------------------------------------------------------------------------

ROWS = {
    "teacher": {"parameters": 94_370_000, "GMAC/s": 7.4068, "note": "frozen"},
    "student, 3 seeds": {"GMAC/s": 12.345, "accuracy": [0.5, 0.6, 0.7], "L1": -0.25},
    "speeds": {"accuracy": [10.0, 30.0], "L1": [0.125]},
}


def test_the_table_shows_counts_numbers_and_means_over_seeds():
    lines = common.format_table(ROWS).split("\n")
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "parameters", "GMAC/s", "note", "accuracy", "L1"]
    assert set(lines[1]) == {"|", "-", ":"}
    assert cells[2] == ["teacher", "94,370,000", "7.407", "frozen", "", ""]
    assert cells[3] == ["student, 3 seeds", "", "12.3", "", "0.600 ± 0.100", "-0.250"]
    assert cells[4] == ["speeds", "", "", "", "20.0 ± 14.1", "0.125"]


def test_results_come_back_as_they_were_written(tmp_path):
    text = common.write_results(tmp_path, ROWS)
    assert text == common.format_table(ROWS)
    assert common.read_results(tmp_path) == ROWS
    kept = (tmp_path / "results.txt").read_text(encoding="utf-8")
    assert kept.startswith(text) and f"torch {torch.__version__}" in kept
    assert json.loads((tmp_path / "results.json").read_text())["command"] in kept


@pytest.mark.parametrize("layers, both", [(1, False), (2, True)])
def test_macs_of_an_lstm_are_its_weights_times_frames(layers, both):
    """torch's own counter finds none."""
    lstm = nn.LSTM(10, 6, num_layers=layers, bidirectional=both, batch_first=True)
    matrices = sum(p.numel() for p in lstm.parameters() if p.ndim == 2)
    frames = torch.zeros(3, 7, 10)
    assert common.count_macs(lambda *_: lstm(frames), "cpu", seconds=1.0) == 21 * matrices
    rows = common.describe_modules({"lstm": lstm}, lambda _: lstm(frames), seconds=1.0)
    assert rows["lstm"]["GMAC/s"] == pytest.approx(21 * matrices / 1e9)


def test_repeat_sets_the_method_beside_its_ablations_over_seeds(tmp_path):
    @dataclass
    class Config:
        out: str
        seed: int = 5
        size: int = 1

    ran = []

    def distil(config, resume, baselines):
        ran.append((Path(config.out).name, config.seed, config.size, resume, baselines))
        common.start_run(Path(config.out), asdict(config), [])
        start = {"untrained": {"x": -1.0}} if baselines else {}
        return start | {"distilled": {"x": 10.0 * config.size + config.seed}}

    config = Config(str(tmp_path))
    table = common.repeat(distil, config, 2, {"Twice, no mask": dict(size=2)}, False)
    assert ran == [
        ("distilled-seed-5", 5, 1, False, True),
        ("twice-no-mask-seed-5", 5, 2, False, False),
        ("distilled-seed-6", 6, 1, False, True),
        ("twice-no-mask-seed-6", 6, 2, False, False),
    ]
    assert table == {
        "untrained": {"x": [-1.0, -1.0]},
        "distilled": {"x": [15.0, 16.0]},
        "Twice, no mask": {"x": [25.0, 26.0]},
    }
    (tmp_path / "twice-no-mask-seed-6" / "results.json").unlink()  # stopped inside this one
    assert common.repeat(distil, config, 2, {"Twice, no mask": dict(size=2)}, True) == table
    assert ran[4:] == [("twice-no-mask-seed-6", 6, 2, True, False)]
    with pytest.raises(common.InputError, match="--size"):
        common.repeat(distil, config, 1, {"Twice, no mask": dict(size=3)}, True)
