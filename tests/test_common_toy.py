"""The toy world and its teacher: exact labels, repeatable, unheard speakers, no stale cache."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import common


def test_an_utterance_is_a_function_of_speaker_and_index():
    first, again = common.toy_utterance(3, 1), common.toy_utterance(3, 1)
    other = common.toy_utterance(3, 2)
    assert np.array_equal(first.wave, again.wave) and first.alignment == again.alignment
    assert len(first.wave) != len(other.wave) or not np.array_equal(first.wave, other.wave)


@pytest.mark.parametrize("speaker", [0, 45, 59, 1500])
def test_labels_agree_with_each_other_and_with_the_wave(speaker):
    for index in range(4):
        said = common.toy_utterance(speaker, index)
        spelled = " ".join(common.TOY_LEXICON[word] for word in said.words).split()
        assert said.phones == spelled == [p for p, _ in said.alignment if p != "SIL"]
        ends = [end for _, end in said.alignment]
        assert ends == sorted(ends) and ends[0] > 0 and ends[-1] == len(said.wave)
        assert said.wave.dtype == np.float32 and np.isfinite(said.wave).all()
        assert 0.01 < np.abs(said.wave).max() <= 1.0
        seconds = len(said.wave) / 16_000
        assert 1.29 <= seconds <= 3.01 and said.intent in common.TOY_INTENTS


def test_sound_is_where_the_alignment_says():
    """Vowels are louder than silence, and the hiss of S lies higher than any vowel."""
    loudness, centre = {"vowel": [], "SIL": []}, {"S": [], "AA": [], "IY": []}
    for speaker in range(12):
        said, start = common.toy_utterance(speaker, 0), 0
        for phone, end in said.alignment:
            piece, start = said.wave[start:end], end
            if phone in ("SIL", "AA", "AE", "IY", "EY"):
                kind = "SIL" if phone == "SIL" else "vowel"
                loudness[kind].append(np.sqrt(np.mean(piece**2)) / np.abs(said.wave).max())
            if phone in centre and len(piece) > 400:
                power = np.abs(np.fft.rfft(piece * np.hanning(len(piece)))) ** 2
                hz = np.fft.rfftfreq(len(piece), 1 / 16_000)
                centre[phone].append((hz * power).sum() / power.sum())
    assert np.median(loudness["vowel"]) > 4 * np.median(loudness["SIL"])
    assert np.median(centre["S"]) > 2 * max(np.median(centre["AA"]), np.median(centre["IY"]))


def test_units_are_the_halves_of_the_phone_in_the_middle_of_each_frame():
    names = list(common.TOY_PHONES)
    alignment = [("SIL", 1000), ("AA", 2000), ("S", 2400)]
    units = common.toy_units(alignment, 6)  # middles at 200, 520, 840, 1160, 1480, 1800
    sil, aa = 2 * names.index("SIL"), 2 * names.index("AA")
    assert units.tolist() == [sil, sil + 1, sil + 1, aa, aa, aa + 1]


def test_no_test_or_dev_speaker_is_heard_by_the_teacher_or_in_training():
    parts = [set(speakers) for speakers in common.TOY_SPEAKERS.values()]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    heard = {1000 + i for i in range(common.TOY_TEACHER_TRAINING["speakers"])}
    assert not heard & set().union(*parts)


def test_no_number_word_is_in_the_lexicon():
    numbers = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()
    assert not set(numbers) & set(common.TOY_LEXICON)


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(common, "TOY_RECORDINGS", {"train": 1, "dev": 1, "test": 17})
    monkeypatch.setattr(
        common,
        "TOY_SPEAKERS",
        {"train": range(0, 3), "dev": range(44, 46), "test": range(50, 52)},
    )


def test_world_on_disk_is_scanned_and_gives_all_probes(little, tmp_path):
    manifest = common.make_toy_world(tmp_path)
    utterances = common.scan(manifest, tmp_path / "files.jsonl")
    assert len(utterances) == 3 + 2 + 34
    first = utterances[0]
    wave, rate = soundfile.read(first.path)
    assert rate == 16_000 and len(wave) == first.samples
    said = common.toy_utterance(0, 0)
    assert first.alignment == " ".join(f"{p}:{e}" for p, e in said.alignment)
    labels = common.frame_labels(first)
    assert len(labels) == common.frame_count(first.samples)
    assert set(labels) <= set(common.TOY_PHONES)
    kinds = {task.kind for task in common.probe_tasks(utterances)}
    assert "frame" in kinds and any(u.sid_split == "dev" for u in utterances)


def test_world_is_reused_and_made_anew_after_a_change(little, tmp_path, monkeypatch):
    manifest = common.make_toy_world(tmp_path)
    before = manifest.stat().st_mtime_ns
    assert common.make_toy_world(tmp_path) == manifest
    assert manifest.stat().st_mtime_ns == before
    text = manifest.read_text()
    monkeypatch.setattr(common, "TOY_SECONDS", (1.4, 2.8))
    common.make_toy_world(tmp_path)
    assert manifest.read_text() != text


def test_start_that_was_interrupted_is_not_taken_for_a_world(little, tmp_path):
    manifest = common.make_toy_world(tmp_path)
    expected = manifest.read_text()
    manifest.unlink()  # the manifest is written last
    next(tmp_path.glob("toy_*/*.wav")).write_bytes(b"half")
    assert common.make_toy_world(tmp_path).read_text() == expected
    for path in tmp_path.glob("toy_*/*.wav"):
        assert soundfile.info(path).frames > 16_000


def test_teacher_is_trained_once_and_kept_under_a_name_of_its_recipe(tmp_path, monkeypatch):
    training = common.TOY_TEACHER_TRAINING | {"speakers": 8, "updates": 3, "batch": 2}
    monkeypatch.setattr(common, "TOY_TEACHER_TRAINING", training)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    state = torch.get_rng_state()
    path = common.toy_teacher()
    assert torch.equal(torch.get_rng_state(), state)
    assert path.parent == tmp_path / "checkpoints" and len(list(path.parent.iterdir())) == 1
    written = path.stat().st_mtime_ns
    assert common.toy_teacher() == path and path.stat().st_mtime_ns == written
    content = torch.load(path, weights_only=True)
    teacher = common.load_teacher("toy")
    assert teacher.name == "toy" and teacher.num_layers == 12
    assert teacher.logits(teacher(torch.randn(1, 4000))[0][-1]).shape[-1] == 70
    path.unlink()
    again = torch.load(common.toy_teacher(), weights_only=True)
    for key, value in content["state_dict"].items():
        assert torch.equal(value, again["state_dict"][key]), key
    monkeypatch.setattr(common, "TOY_TEACHER_TRAINING", training | {"updates": 4})
    assert common.toy_teacher() != path


def test_masked_logits_are_those_of_the_pretraining_model():
    """The fast scoring of all units equals torchaudio's own, for the mask that was drawn."""
    torch.manual_seed(0)
    model = common.toy_teacher_model().eval()
    waves, labels = torch.randn(2, 8000), torch.randint(70, (2, common.frame_count(8000)))
    torch.manual_seed(1)
    logits, mask = common.toy_teacher_logits(model, waves)
    torch.manual_seed(1)
    masked, unmasked, _ = model(waves, labels)
    assert 0 < mask.sum() < mask.numel()
    for theirs, chosen in ((masked, mask), (unmasked, ~mask)):
        ours = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen])
        target = torch.zeros(len(theirs), dtype=torch.long)
        torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(theirs, target))


# ---- real recordings, where they are there ------------------------------------------------------

REAL = Path(os.environ.get("SPEECH_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.skipif(
    not (REAL / "manifest.tsv").exists(), reason="no real recordings at SPEECH_DATA"
)
def test_real_recordings_are_all_usable_and_keep_their_splits(tmp_path):
    utterances = common.scan(REAL, tmp_path / "files.jsonl")
    rows = (REAL / "manifest.tsv").read_text().splitlines()[1:]
    assert len(utterances) == len(rows)
    for split in ("train", "dev", "test"):
        assert {u.speaker for u in utterances if u.split == split} - {""}
    speakers = {
        s: {u.speaker for u in utterances if u.split == s} - {""} for s in ("train", "test")
    }
    assert not speakers["train"] & speakers["test"]
    train, heldout = common.train_and_heldout(utterances)
    listed = set((REAL / "distill.txt").read_text().split())
    assert {str(Path(u.path).relative_to(REAL)) for u in train} == listed
    assert not {u.path for u in train} & {u.path for u in heldout}


@pytest.mark.skipif(
    not (REAL / "teacher_reference").exists(), reason="no reference features at SPEECH_DATA"
)
def test_frame_count_of_the_reference_utterance():
    states = np.load(REAL / "teacher_reference" / "sample.base.L9.npy")
    assert common.frame_count(190_800) == len(states)
    tiny = torchaudio.models.hubert_pretrain_model(**common.TOY_TEACHER_CONFIG).wav2vec2
    assert tiny.feature_extractor(torch.zeros(1, 190_800), None)[0].shape[1] == len(states)
