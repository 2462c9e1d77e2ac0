"""The toy world and its teachers: exact labels, repeatable, disjoint speakers, no stale files."""

import ast
import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import toy
from torch.nn import functional as F

import common


def test_nothing_of_this_project_is_imported():
    nodes = list(ast.walk(ast.parse(Path(toy.__file__).read_text())))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {n.name for node in nodes if isinstance(node, ast.Import) for n in node.names}
    allowed = sys.stdlib_module_names | {"numpy", "soundfile", "torch", "torchaudio", "tqdm"}
    assert {name.split(".")[0] for name in names} <= allowed


@pytest.mark.parametrize("speaker", [0, 45, 59, 1500])
def test_labels_agree_with_each_other_and_with_the_wave(speaker):
    for index in range(3):
        spoken, again = toy.utterance(speaker, index), toy.utterance(speaker, index)
        assert np.array_equal(spoken.wave, again.wave) and spoken[1:] == again[1:]
        pronounced = " ".join(toy.LEXICON[word] for word in spoken.words).split()
        assert spoken.phones == pronounced == [p for p, _ in spoken.alignment if p != "SIL"]
        ends = [end for _, end in spoken.alignment]
        assert ends == sorted(ends) and ends[0] > 0 and ends[-1] == len(spoken.wave)
        assert spoken.wave.dtype == np.float32 and 0.01 < np.abs(spoken.wave).max() <= 1.0
        assert 1.29 <= len(spoken.wave) / 16_000 <= 3.01 and spoken.intent in toy.INTENTS
    assert not np.array_equal(spoken.wave, toy.utterance(speaker, 0).wave)


def test_acoustics_follow_the_alignment():
    """Vowels are louder than silence, and the spectral centre of S is higher than any vowel's."""
    loudness, centre = {"vowel": [], "SIL": []}, {"S": [], "AA": [], "IY": []}
    for speaker in range(12):
        spoken, start = toy.utterance(speaker, 0), 0
        for phone, end in spoken.alignment:
            piece, start = spoken.wave[start:end], end
            if phone in ("SIL", "AA", "AE", "IY", "EY"):
                kind = "SIL" if phone == "SIL" else "vowel"
                loudness[kind].append(np.sqrt(np.mean(piece**2)) / np.abs(spoken.wave).max())
            if phone in centre and len(piece) > 400:
                power = np.abs(np.fft.rfft(piece * np.hanning(len(piece)))) ** 2
                hz = np.fft.rfftfreq(len(piece), 1 / 16_000)
                centre[phone].append((hz * power).sum() / power.sum())
    assert np.median(loudness["vowel"]) > 4 * np.median(loudness["SIL"])
    assert np.median(centre["S"]) > 2 * max(np.median(centre["AA"]), np.median(centre["IY"]))


def test_speakers_are_disjoint_and_digits_are_unseen_words():
    parts = [*toy.SPEAKERS.values(), range(1000, 1000 + toy.HUBERT_TRAINING["speakers"])]
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert not set("ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()) & set(toy.LEXICON)


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(toy, "RECORDINGS", {"train": 1, "dev": 1, "test": 17})
    speakers = {"train": range(0, 3), "dev": range(44, 46), "test": range(50, 52)}
    monkeypatch.setattr(toy, "SPEAKERS", speakers)


def test_world_has_the_labels_of_its_utterances_and_all_tasks(little, tmp_path):
    manifest = toy.world(tmp_path)
    with open(manifest, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    columns = "path dataset speaker split speaker_split label_intent text phones alignment"
    assert list(rows[0]) == columns.split()
    parts = [row["speaker_split"] for row in rows]
    assert parts == [""] * 5 + (["train"] * 12 + ["dev"] * 3 + ["test"] * 2) * 2
    utterances = common.scan(manifest, tmp_path / "scan.jsonl")
    for row, scanned, number in zip(rows, utterances, [0, 1, 2, 44, 45, 50]):
        spoken = toy.utterance(number, 0)
        assert row["speaker"] == f"toy-{number:02d}" and row["label_intent"] == spoken.intent
        assert row["text"].split() == spoken.words and row["phones"].split() == spoken.phones
        assert np.abs(soundfile.read(scanned.path)[0] - spoken.wave).max() < 1e-4
        labels = [list(toy.PHONES).index(phone) for phone in common.frame_labels(scanned)]
        assert labels == (toy.frame_units(spoken.alignment, len(labels)) // 2).tolist()
        assert len(labels) == common.frame_count(len(spoken.wave))
    titles = {task.name for task in common.find_tasks(utterances, every=True)}
    assert {"phone accuracy (toy)", "phone error rate (toy)", "speaker accuracy (toy)"} <= titles


def test_world_is_kept_and_made_anew_after_an_interruption_or_a_change(
    little, tmp_path, monkeypatch
):
    manifest = toy.world(tmp_path)
    written, text = manifest.stat().st_mtime_ns, manifest.read_text()
    assert toy.world(tmp_path) == manifest and manifest.stat().st_mtime_ns == written
    manifest.unlink()  # it is written last
    next(tmp_path.glob("toy_*/*.wav")).write_bytes(b"half")
    assert toy.world(tmp_path).read_text() == text
    assert all(soundfile.info(path).frames > 16_000 for path in tmp_path.glob("toy_*/*.wav"))
    monkeypatch.setattr(toy, "SECONDS", (1.4, 2.8))
    assert toy.world(tmp_path).read_text() != text


def test_a_recipe_changes_with_what_its_function_uses_and_nothing_else(monkeypatch):
    functions = (toy.world, toy.teacher, toy.text_teacher)
    before = [toy.recipe(function) for function in functions]
    assert before == [common.toy().recipe(function) for function in functions]  # another import
    for name, uses in (
        ("STEP", [True, True, False]),
        ("INTENTS", [True, True, True]),
        ("RECORDINGS", [True, False, False]),
        ("HUBERT_TRAINING", [False, True, False]),
        ("BERT_TRAINING", [False, False, True]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(toy, name, "changed")
            assert [toy.recipe(f) != b for f, b in zip(functions, before)] == uses, name


# ---- teachers -----------------------------------------------------------------------------------


def test_units_are_the_halves_of_the_phone_in_the_middle_of_each_frame():
    names = list(toy.PHONES)
    alignment = [("SIL", 1000), ("AA", 2000), ("S", 2400)]
    units = toy.frame_units(alignment, 6)  # middles at 200, 520, 840, 1160, 1480, 1800
    sil, aa = 2 * names.index("SIL"), 2 * names.index("AA")
    assert units.tolist() == [sil, sil + 1, sil + 1, aa, aa, aa + 1]


def test_masked_logits_are_those_of_the_pretraining_model():
    """Scoring all units at once equals torchaudio's own forward, for the same random mask."""
    torch.manual_seed(0)
    model = toy.hubert().eval()
    waves, labels = torch.randn(2, 8000), torch.randint(70, (2, 24))
    torch.manual_seed(1)
    logits, mask = toy.masked_logits(model, waves)
    torch.manual_seed(1)
    masked, unmasked, _ = model(waves, labels)
    assert 0 < mask.sum() < mask.numel()
    for theirs, chosen in ((masked, mask), (unmasked, ~mask)):
        expected = F.cross_entropy(theirs, torch.zeros(len(theirs), dtype=torch.long))
        torch.testing.assert_close(F.cross_entropy(logits[chosen], labels[chosen]), expected)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Trainings of three updates, kept in a folder of their own."""
    training = {"speakers": 8, "updates": 3, "batch": 2}
    monkeypatch.setattr(toy, "HUBERT_TRAINING", toy.HUBERT_TRAINING | training)
    monkeypatch.setattr(toy, "BERT_TRAINING", toy.BERT_TRAINING | {"updates": 3, "sentences": 200})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(common, "toy", lambda: toy)
    return tmp_path / "checkpoints"


def text_teacher():
    return toy.text_teacher(common.TextTeacher, common.Tokenizer) / "pytorch_model.bin"


@pytest.mark.parametrize("make", [toy.teacher, text_teacher])
def test_a_teacher_is_trained_once_and_always_to_the_same_weights(make, quick):
    state = torch.get_rng_state()
    path = make()
    assert torch.equal(torch.get_rng_state(), state)
    written, content = path.stat().st_mtime_ns, torch.load(path, weights_only=True)
    assert make() == path and path.stat().st_mtime_ns == written
    path.unlink()
    assert make() == path and len(list(quick.iterdir())) == 1
    content, again = (c.get("state_dict", c) for c in (content, torch.load(path)))
    assert all(torch.equal(value, again[key]) for key, value in content.items())


def test_teachers_can_be_loaded(quick):
    teacher = common.load_teacher("toy")
    assert teacher.name == "toy" and teacher.num_layers == 12
    assert teacher.logits(teacher(torch.randn(1, 4000))[-1]).shape[-1] == 70
    model, tokenizer = common.load_text_teacher("toy")
    ids = torch.tensor([tokenizer("Turn on the lights, robot")])
    assert ids[0, 1] == tokenizer.ids["turn"] and tokenizer.ids["##s"] in ids
    assert len(model(ids, ids >= 0)[0]) == 3 and model.width == 64

    class Changed(common.TextTeacher):
        pass

    assert toy.text_teacher(Changed, common.Tokenizer) != text_teacher().parent


def test_pieces_are_masked_as_in_bert():
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4} | {"a": 5, "b": 6}
    target = torch.tensor([2, *[5] * 10_000, 3, 0]).expand(4, -1)
    ids, masked = toy.mask_pieces(target, special, np.random.default_rng(0))
    assert not masked[:, [0, -2, -1]].any() and torch.equal(ids[~masked], target[~masked])
    # 60 % of the pieces; of these 80 % [MASK], 10 % one of a, b at random, 10 % as they are
    shares = [masked.float().mean(), *((ids == k)[masked].float().mean() for k in (4, 5, 6))]
    assert np.allclose(shares, [0.6, 0.8, 0.15, 0.05], atol=0.01)


@pytest.mark.slow
def test_text_teacher_tells_the_intents():
    """Ridge regression on mean hidden states of 350 commands; PAD's probe reaches .99."""
    model, tokenizer = common.load_text_teacher("toy")
    rng, features, intents = np.random.default_rng(0), [], []
    for _ in range(850):
        words, intent = toy.draw_sentence(rng)
        ids = torch.tensor([tokenizer(" ".join(words))])
        features.append(torch.cat(model(ids, ids >= 0)[0])[:, 1:-1].mean(1).flatten())
        intents.append(list(toy.INTENTS).index(intent))
    x, y = torch.stack(features), torch.tensor(intents)
    x = (x - x[:350].mean(0)) / x[:350].std(0)
    target = F.one_hot(y[:350]) - 1 / len(toy.INTENTS)
    gram = x[:350].T @ x[:350] + 10 * torch.eye(x.shape[1])
    guesses = (x[350:] @ torch.linalg.solve(gram, x[:350].T @ target)).argmax(1)
    assert (guesses == y[350:]).float().mean() > 0.95


# ---- real recordings, where they are there ------------------------------------------------------

REAL = Path(os.environ.get("SPEECH_DATA", Path(__file__).parents[2] / "shared" / "data"))
MANIFESTS = [REAL / name for name in ("manifest_labels.tsv", "manifest.tsv")]
MANIFEST = next((path for path in MANIFESTS if path.exists()), None)


@pytest.mark.skipif(MANIFEST is None, reason="no real recordings at SPEECH_DATA")
def test_real_recordings_are_all_usable_and_keep_their_splits(tmp_path):
    utterances = common.scan(MANIFEST, tmp_path / "scan.jsonl")
    assert len(utterances) == len(MANIFEST.read_text().splitlines()) - 1
    speakers = {
        split: {u.get("speaker") for u in utterances if u.get("split") == split} - {""}
        for split in ("train", "dev", "test")
    }
    assert all(speakers.values()) and not speakers["train"] & speakers["test"]
    train, heldout = common.train_and_heldout(utterances)
    listed = set((REAL / "distill.txt").read_text().split())
    assert {str(Path(u.path).relative_to(REAL)) for u in train} == listed
    assert not {u.path for u in train} & {u.path for u in heldout}
