"""SUPERB's tasks on miniature folders of each data set, and the probes that score them."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from test_command_line import ROOT, SCRIPTS, inside, sentence, small
from test_common_evaluation import spectrum, spelled

import common
from common import InputError, ProbeTask, Utterance

# ---- miniature data sets: noises of half a second ------------------------------------------------


def noise(path, seconds=0.5, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(seed).standard_normal(int(16_000 * seconds))
    soundfile.write(path, wave, 16_000)


def make_ks(root, version="v0.01"):
    """Two keywords and two other words of four speakers, noise, and the test set of its own."""
    home = root / "SpeechCommands" / f"speech_commands_{version}"
    for i, word in enumerate(("yes", "go", "bed", "cat")):
        for speaker in "abcd":
            noise(home / word / f"{speaker}_nohash_0.wav", seed=i)
    listed = {s: [f"{w}/{s}_nohash_0.wav" for w in ("yes", "go", "bed", "cat")] for s in "cd"}
    (home / "validation_list.txt").write_text("\n".join(listed["c"]) + "\n")
    (home / "testing_list.txt").write_text("\n".join(listed["d"]) + "\n")
    noise(home / "_background_noise_" / "rain.wav", 12.3, seed=9)
    test = home.with_name(f"speech_commands_test_set_{version}")
    for i, word in enumerate(("yes", "go", "_unknown_", "_silence_")):
        noise(test / word / "e_nohash_0.wav", seed=i)
    return root


COMMANDS = [("activate", "lights", "kitchen"), ("activate", "music", "none")]
COMMANDS += [("deactivate", "lights", "none"), ("bring", "socks", "none")]


def make_ic(root):
    home, header = root / "fluent_speech_commands_dataset", "path,speakerId,transcription"
    for part in ("train", "valid", "test"):
        lines = [f",{header},action,object,location"]
        for i, slots in enumerate(COMMANDS):
            path = f"wavs/speakers/s{part}/{part}-{i}.wav"
            noise(home / path, seed=i)
            lines.append(",".join([str(i), path, f"s{part}", "words", *slots]))
        (home / "data").mkdir(exist_ok=True)
        (home / "data" / f"{part}_data.csv").write_text("\n".join(lines) + "\n")
    return root


def make_sid(root):
    lines = []
    for speaker in ("id10001", "id10270"):
        for number in (1, 1, 1, 2, 3):  # train, train, train, dev, test
            path = f"{speaker}/video{len(lines)}/00001.wav"
            noise(root / "wav" / path, seed=len(lines))
            lines.append(f"{number} {path}")
    (root / "iden_split.txt").write_text("\n".join(lines) + "\n")
    return root


EMOTIONS = ("neu", "hap", "exc", "ang", "sad", "fru", "xxx")


def make_er(root):
    for session in range(1, 6):
        home, name = root / "IEMOCAP" / f"Session{session}", f"Ses0{session}F_impro01"
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n"]
        for i, emotion in enumerate(EMOTIONS):
            noise(home / "sentences" / "wav" / name / f"{name}_F{i:03d}.wav", seed=i)
            lines.append(f"[6.2 - 8.2]\t{name}_F{i:03d}\t{emotion}\t[2.5, 2.5, 2.5]\n")
        (home / "dialog" / "EmoEvaluation").mkdir(parents=True)
        (home / "dialog" / "EmoEvaluation" / f"{name}.txt").write_text("".join(lines))
    return root


TEXTS = ["A CAT SAT", "DON'T SIT", "THE XYZZY SAT"]


def make_libri(root):
    for speaker, part in enumerate(("train-clean-100", "dev-clean", "test-clean")):
        home = root / "LibriSpeech" / part / f"{speaker}" / "7"
        for i in range(len(TEXTS)):
            noise(home / f"{speaker}-7-000{i}.flac", 0.5 + 0.3 * i, seed=i)
        lines = [f"{speaker}-7-000{i} {text}" for i, text in enumerate(TEXTS)]
        (home / f"{speaker}-7.trans.txt").write_text("\n".join(lines) + "\n")
    words = ["A  AH0", "A(1)  EY1", "CAT  K AE1 T", "DON'T  D OW1 N T", "SAT  S AE1 T"]
    words += ["SIT  S IH1 T", "THE  DH AH0", "THE(1)  DH IY0"]
    (root / "cmudict-0.7b").write_text(";;; comment\n" + "\n".join(words) + "\n")
    (root / "cmudict-0.7b.symbols").write_text("AA\nAA0\n")
    return root


MAKE = dict(ks=make_ks, ic=make_ic, sid=make_sid, er=make_er, asr=make_libri, pr=make_libri)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    libri = make_libri(tmp_path_factory.mktemp("libri"))
    made = {name: MAKE[name](tmp_path_factory.mktemp(name)) for name in ("ks", "ic", "sid", "er")}
    return made | {"asr": libri, "pr": libri}


def only(roots, name):
    (task,) = common.labelled_tasks(roots[name], name)
    return task


def targets(task, part):
    return [target for _, target in task.parts[part]]


# ---- splits and labels ---------------------------------------------------------------------------


def test_every_task_reads_whole_files_that_are_there_and_knows_their_length(roots):
    assert set(common.SUPERB) == set(MAKE)
    for name, root in roots.items():
        for task in common.labelled_tasks(root, name):
            assert task.name == f"{name} {common.SUPERB[name][1]}"
            assert set(task.parts) == {"train", "dev", "test"}
            for utterance in (u for rows in task.parts.values() for u, _ in rows):
                assert Path(utterance.path).is_file()
                if utterance.start < 0:
                    assert utterance.samples == soundfile.info(utterance.path).frames


def test_ks_has_keywords_unknown_and_silence_and_the_test_set_of_its_own(roots):
    task = only(roots, "ks")
    words = ["yes", "go", "_unknown_", "_unknown_"]
    assert sorted(targets(task, "train")) == sorted(2 * words + 11 * ["_silence_"])
    assert sorted(targets(task, "dev")) == sorted([*words, "_silence_"])
    assert sorted(targets(task, "test")) == ["_silence_", "_unknown_", "go", "yes"]
    assert {Path(u.path).name[0] for u, t in task.parts["train"] if t != "_silence_"} == {"a", "b"}
    assert {Path(u.path).name[0] for u, t in task.parts["dev"] if t != "_silence_"} == {"c"}
    assert all("test_set" in u.path for u, _ in task.parts["test"])
    assert task.balanced and not any(only(roots, name).balanced for name in ("ic", "sid"))


def test_the_seconds_of_noise_are_the_silences_every_tenth_for_dev(roots):
    task = only(roots, "ks")
    seconds = {
        part: [u.start / 16_000 for u, t in rows if u.start >= 0 and t == "_silence_"]
        for part, rows in task.parts.items()
    }
    assert seconds == {"train": [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11], "dev": [9], "test": []}
    piece = task.parts["dev"][-1][0]
    wave, _ = soundfile.read(piece.path, dtype="float32")
    (expected,), _ = spectrum(torch.from_numpy(wave)[None, 9 * 16_000 : 10 * 16_000], None)
    assert torch.equal(common.utterance_features(spectrum, piece, "cpu"), expected)
    table = common.extract_features(spectrum, [task], "cpu")
    assert len(table) == 8 + 4 + 12 + 4 and torch.equal(
        table[f"{piece.path}:144000"][0], expected.mean(1)
    )


def test_ks_takes_version_2_where_version_1_is_not_there(tmp_path):
    task = only({"ks": make_ks(tmp_path, "v0.02")}, "ks")
    assert all("v0.02" in u.path for rows in task.parts.values() for u, _ in rows)


def test_ic_has_three_slots(roots):
    task = only(roots, "ic")
    for part, name in (("train", "train"), ("dev", "valid"), ("test", "test")):
        assert targets(task, part) == COMMANDS
        assert all(Path(u.path).name.startswith(name) for u, _ in task.parts[part])


def test_sid_follows_iden_split(roots):
    task = only(roots, "sid")
    assert [targets(task, part) for part in ("train", "dev", "test")] == [
        [1] * 3 + [270] * 3,
        [1, 270],
        [1, 270],
    ]
    assert [Path(u.path).parent.name for u, _ in task.parts["dev"]] == ["video3", "video8"]


def test_er_tests_on_each_session_once_and_merges_excited_into_happy(roots):
    tasks = common.labelled_tasks(roots["er"], "er")
    assert [task.name for task in tasks] == ["er accuracy"] * 5
    for number, task in enumerate(tasks, start=1):
        assert targets(task, "test") == ["neu", "hap", "hap", "ang", "sad"]
        assert all(f"Session{number}" in u.path for u, _ in task.parts["test"])
        rest = [u.path for part in ("train", "dev") for u, _ in task.parts[part]]
        assert len(set(rest)) == 20 and not any(f"Session{number}" in path for path in rest)
        assert len(task.parts["train"]) == 16 and len(task.parts["dev"]) == 4
    again = common.labelled_tasks(roots["er"], "er")
    assert [task.parts for task in again] == [task.parts for task in tasks]


def test_asr_spells_and_counts_words(roots):
    task = only(roots, "asr")
    assert task.kind == "ctc" and task.words
    for part, folder in (
        ("train", "train-clean-100"),
        ("dev", "dev-clean"),
        ("test", "test-clean"),
    ):
        assert targets(task, part) == [list(text) for text in TEXTS]
        assert all(f"/{folder}/" in u.path for u, _ in task.parts[part])


def test_pr_takes_first_pronunciations_with_stress_and_leaves_unknown_words_out(roots, capsys):
    task = only(roots, "pr")
    assert task.kind == "ctc" and not task.words
    for part in ("train", "dev", "test"):
        assert targets(task, part) == [
            "AH0 K AE1 T S AE1 T".split(),
            "D OW1 N T S IH1 T".split(),
        ]
    assert "3 utterances" in capsys.readouterr().err


def test_tasks_can_be_asked_for_together_and_beside_a_manifest(roots, tmp_path):
    names = [task.name for task in common.labelled_tasks(roots["asr"], "asr,pr")]
    assert names == ["asr WER", "pr PER"]
    root = make_sid(tmp_path)
    lines = ["path\tsplit\tlabel"]
    for i, path in enumerate(sorted((root / "wav").rglob("*.wav"))):
        lines.append(f"{path}\t{('train', 'dev', 'test')[i // 2 % 3]}\t{'ab'[i % 2]}")
    (root / "manifest.tsv").write_text("\n".join(lines) + "\n")
    for given in ("", "manifest", "label"):
        assert [task.name for task in common.labelled_tasks(root, given)] == ["label"]
    for given in ("sid,label", "manifest,sid"):
        names = [task.name for task in common.labelled_tasks(root, given)]
        assert names == ["sid accuracy", "label"]


# ---- the probes ----------------------------------------------------------------------------------


def test_all_slots_must_be_right():
    """The first slot is told by the features; the second is in the test half another than ever."""
    parts = {}
    for part in ("train", "dev", "test"):
        first = ["left", "left", "right", "right"] * 10
        x = torch.tensor([[[v, -v]] for v in (-1.0, -2.0, 1.0, 2.0)] * 10)
        second = [("late" if part == "test" and i % 2 else "early") for i in range(40)]
        parts[part] = (x, list(zip(first, second)))
    single = {part: (x, [label for label, _ in labels]) for part, (x, labels) in parts.items()}
    assert common.classification_probe(single, 0) == 1.0
    assert common.classification_probe(parts, 0) == 0.5


def test_one_label_and_a_tuple_of_it_score_the_same():
    generator = torch.Generator().manual_seed(0)
    parts = {
        part: (torch.randn(50, 2, 5, generator=generator), ["ab"[i % 2] for i in range(50)])
        for part in ("train", "dev", "test")
    }
    tuples = {part: (x, [(label,) for label in labels]) for part, (x, labels) in parts.items()}
    assert common.classification_probe(parts, 0) == common.classification_probe(tuples, 0)


def test_balanced_classes_count_the_same():
    """One in twenty is rare, with features that overlap: it is found where it counts as much."""
    parts = {}
    for seed, (part, rare) in enumerate({"train": 10, "dev": 10, "test": 200}.items()):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(200, 1, 2, generator=generator)
        x[:rare, :, 0] += 1.5
        parts[part] = (x, ["rare"] * rare + ["often"] * (200 - rare))
    assert common.classification_probe(parts, 0) < 0.35
    assert common.classification_probe(parts, 0, balanced=True) > 0.6


def test_the_test_part_of_a_balanced_task_counts_files():
    """75 files of a class that is always right, 25 of one that is never there in training."""
    x = torch.eye(2)[[0, 1] * 50, None]
    parts = {part: (x, ["a", "b"] * 50) for part in ("train", "dev")}
    parts["test"] = (torch.eye(2)[[0] * 100, None], ["a"] * 75 + ["never"] * 25)
    assert common.classification_probe(parts, 0, balanced=True) == 0.75


@pytest.mark.parametrize(
    ("words", "edits", "total"), [(True, 2, 3), (False, 7, 11)], ids=["words", "symbols"]
)
def test_errors_in_words_and_in_symbols(monkeypatch, words, edits, total):
    """ "a cat" for "the cat sat": "a" for "the", and "sat" is missing."""
    reference, heard = list("the cat sat"), "a cat"
    features, _ = spelled(3, 0)
    parts = {part: (features, [reference] * 3) for part in ("train", "dev", "test")}
    names = sorted(set(reference))
    monkeypatch.setattr(common, "greedy_decode", lambda _: [names.index(c) + 1 for c in heard])
    assert common.ctc_probe(parts, 0, epochs=1, words=words) == edits / total


def test_tasks_of_one_name_are_folds_and_their_mean_counts(monkeypatch):
    scores = iter([0.1, 0.2, 0.6])
    monkeypatch.setattr(common, "classification_probe", lambda *_: next(scores))
    utterance = Utterance("x", 1)
    rows = {part: [(utterance, "a")] for part in ("train", "dev", "test")}
    tasks = [ProbeTask("er", "utterance", rows)] * 2 + [ProbeTask("ks", "utterance", rows)]
    table = {"x": (torch.zeros(1, 2), None)}
    assert common.score_probes(table, tasks, 0) == pytest.approx({"er": 0.15, "ks": 0.6})


@pytest.mark.parametrize(("count", "updates"), [(1, 400), (30_000, 585)])
def test_large_training_parts_are_passed_twenty_times(monkeypatch, count, updates):
    seen = []
    monkeypatch.setattr(common, "classification_probe", lambda *given: seen.append(given[2]) or 0.0)
    rows = {part: [(Utterance("x", 1), "a")] for part in ("dev", "test")}
    rows["train"] = [(Utterance("x", 1), "a")] * count
    task = ProbeTask("t", "utterance", rows)
    common.score_probes({"x": (torch.zeros(1, 2), None)}, [task], 0)
    assert seen == [updates]


def counted(calls):
    def features(waveforms, lengths):
        calls.append(waveforms.shape[1])
        return spectrum(waveforms, lengths)

    return features


def test_frames_beyond_the_memory_limit_are_computed_at_each_pass_to_the_same_score(
    roots, monkeypatch
):
    tasks, scores, calls = common.labelled_tasks(roots["asr"], "asr,pr"), [], []
    for limit in (4_000_000_000, 1, 0):
        monkeypatch.setattr(common, "FEATURE_BYTES", limit)
        calls.append([])
        table = common.extract_features(counted(calls[-1]), tasks, "cpu")
        assert sum(torch.is_tensor(kept) for _, kept in table.values()) == {1: 1, 0: 0}.get(
            limit, 9
        )
        scores.append(common.score_probes(table, tasks, 0))
    assert scores[0] == scores[1] == scores[2]
    assert len(calls[0]) == 9 and len(calls[2]) > len(calls[1]) > 16 * 3
    assert max(calls[2]) == 17_600


def test_computed_frames_are_rounded_as_kept_ones_are():
    class Exact:
        """Frames in float32, of which only a rounded copy can be had."""

        def __init__(self, frames):
            self.half = lambda: frames

    kept = {part: spelled(4, seed) for seed, part in enumerate(("train", "dev", "test"))}
    computed = {
        part: ([lambda x=x: Exact(x) for x in features], targets)
        for part, (features, targets) in kept.items()
    }
    assert common.ctc_probe(computed, 0, epochs=2) == common.ctc_probe(kept, 0, epochs=2)


def test_a_manifest_knows_whole_files_only(audio_folder, tmp_path):
    path = sorted(audio_folder.glob("*.wav"))[0]
    (tmp_path / "manifest.tsv").write_text(f"path\tstart\n{path}\t16000\n")
    (utterance,) = common.scan(tmp_path, tmp_path / "scan.jsonl")
    assert utterance.start == -1


def test_the_mean_is_there_where_the_frames_are_not(roots, monkeypatch):
    """An utterance of a CTC task and of a class task: one is computed anew, the other is kept."""
    monkeypatch.setattr(common, "FEATURE_BYTES", 0)
    task = only(roots, "asr")
    classes = {part: [(u, "a") for u, _ in rows] for part, rows in task.parts.items()}
    both = [task, ProbeTask("class", "utterance", classes)]
    table = common.extract_features(spectrum, both, "cpu")
    utterance = task.parts["test"][0][0]
    mean, again = table[utterance.path]
    assert torch.equal(mean, common.utterance_features(spectrum, utterance, "cpu").mean(1))
    assert torch.equal(again(), common.utterance_features(spectrum, utterance, "cpu"))


def test_means_of_many_files_are_kept_in_float16(roots, monkeypatch):
    task = only(roots, "sid")
    before = common.extract_features(spectrum, [task], "cpu")
    monkeypatch.setattr(common, "MANY_FILES", 9)
    after = common.extract_features(spectrum, [task], "cpu")
    for key, (mean, kept) in after.items():
        assert mean.dtype == torch.float16 and kept is None
        assert torch.allclose(mean.float(), before[key][0], atol=1e-2)
    assert 0.0 <= common.score_probes(after, [task], 0)["sid accuracy"] <= 1.0


def test_features_that_are_not_finite_are_named(roots):
    utterance = only(roots, "sid").parts["test"][0][0]
    with pytest.raises(InputError, match=f"features of {utterance.path} are not finite"):
        common.utterance_features(
            lambda *_: ([torch.full((1, 3, 2), torch.nan)], None), utterance, "cpu"
        )


# ---- at the command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tiny_teacher, audio_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "run"
    done = inside("distilhubert.py", *small("distilhubert.py", audio_folder, tiny_teacher, out))
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "student.pt"


@pytest.mark.parametrize("name", MAKE)
def test_evaluate_prints_the_score_and_what_differs_from_superb(name, roots, student):
    flags = ["--evaluate", student, "--task", name, "--task-data", roots[name]]
    done = inside("distilhubert.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    header, _, row, _, note, *rest = done.stdout.splitlines()
    metric = {"asr": "WER", "pr": "PER"}.get(name, "accuracy")
    assert header.rstrip("| ").endswith(f"| {name} {metric}") and str(student) in row
    score = float(row.rstrip("| ").rsplit("|", 1)[1])
    assert 0.0 <= score <= (1.0 if metric == "accuracy" else 2.0)
    assert not rest and note.startswith(f"{name}: {metric} as in SUPERB")
    assert {"asr": "BLSTM", "pr": "linear"}.get(name, "projection to 256, mean") in note


def test_evaluate_of_a_manifest_has_no_note(roots, student, tmp_path):
    table = common.format_table({"x": {"a": 1.0}}, [ProbeTask("a", "ctc", {})])
    assert table == common.format_table({"x": {"a": 1.0}})
    for script in SCRIPTS:  # each prints the notes of its tasks
        source = (ROOT / script).read_text()
        words = r"common\.score_file\(|common\.format_table\(\{args\.evaluate: .*\}, tasks\)"
        assert re.search(words, source), script


# ---- what is missing -----------------------------------------------------------------------------

BREAK = {  # task: [(path to take away, words of the sentence)]
    "ks": [
        ("SpeechCommands", "SPEECHCOMMANDS"),
        ("SpeechCommands/speech_commands_v0.01/testing_list.txt", "testing_list.txt"),
        ("SpeechCommands/speech_commands_test_set_v0.01", "no file for test"),
    ],
    "ic": [
        ("fluent_speech_commands_dataset", "FluentSpeechCommands"),
        ("fluent_speech_commands_dataset/data/valid_data.csv", "valid_data.csv"),
        ("fluent_speech_commands_dataset/wavs/speakers/stest/test-2.wav", "test-2.wav"),
    ],
    "sid": [("wav", "VoxCeleb1Identification"), ("iden_split.txt", "no .*iden_split.txt")],
    "er": [("IEMOCAP", "IEMOCAP/ with Session1/"), ("IEMOCAP/Session3", "no file for test")],
    "asr": [
        ("LibriSpeech", "LIBRISPEECH"),
        ("LibriSpeech/dev-clean", "dev-clean"),
        ("LibriSpeech/dev-clean/1/7/1-7.trans.txt", "1-7.trans.txt"),
    ],
    "pr": [("cmudict-0.7b", "CMUDict"), ("LibriSpeech/test-clean", "test-clean")],
}


@pytest.mark.parametrize(
    ("name", "gone", "words"), [(name, *case) for name, cases in BREAK.items() for case in cases]
)
def test_what_is_missing_is_told_in_one_sentence_and_nothing_is_downloaded(
    name, gone, words, tmp_path, monkeypatch
):
    def download(*_, **__):
        raise AssertionError("a download was tried")

    for module in ("speechcommands", "voxceleb1", "librispeech", "cmudict"):
        monkeypatch.setattr(f"torchaudio.datasets.{module}.download_url_to_file", download)
    root = MAKE[name](tmp_path / "data")
    (root / gone).rename(tmp_path / "gone")
    with pytest.raises(InputError, match=words) as caught:
        common.labelled_tasks(root, name)
    sentence = str(caught.value)
    assert "\n" not in sentence and "download=True`" not in sentence and "Please" not in sentence
    if not gone.endswith(".wav"):
        assert f"--task {name} reads torchaudio.datasets." in sentence and str(root) in sentence


def test_broken_and_short_files_are_named(tmp_path):
    root = make_sid(tmp_path)
    victim = root / "wav" / "id10270" / "video7" / "00001.wav"
    victim.write_text("no audio")
    with pytest.raises(InputError, match=f"^cannot use {victim}"):
        common.labelled_tasks(root, "sid")
    noise(victim, 0.02)
    with pytest.raises(InputError, match=f"{victim} \\(too short, 320 samples"):
        common.labelled_tasks(root, "sid")


def test_wrong_use_at_the_command_line(roots, student, tmp_path):
    base = ["--evaluate", student]
    line = sentence(inside("distilhubert.py", *base, "--task", "ks"))
    assert "--task-data" in line
    line = sentence(inside("distilhubert.py", *base, "--task", "kws", "--task-data", tmp_path))
    assert "unknown --task kws" in line and "manifest, ks, ic, sid, er, asr, pr" in line
    line = sentence(inside("distilhubert.py", *base, "--task", "sid", "--task-data", tmp_path))
    assert "VoxCeleb1Identification" in line and "iden_split.txt" in line
    root = make_libri(tmp_path / "cut")
    victim = root / "LibriSpeech" / "dev-clean" / "1" / "7" / "1-7-0002.flac"
    victim.write_bytes(victim.read_bytes()[:9000])  # its header is whole
    line = sentence(inside("distilhubert.py", *base, "--task", "asr", "--task-data", root))
    assert f"cannot read {victim}" in line


def test_torchaudio_has_the_classes_that_the_sentences_name():
    for _, _, classes, *_ in common.SUPERB.values():
        for name in classes.split(" and "):
            assert hasattr(torchaudio.datasets, name)
