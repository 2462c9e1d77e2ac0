"""Files and audio: what is written stays whole, what is read is right, what is broken is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import CONV_SHAPES, encoder_config
from torch.utils._python_dispatch import TorchDispatchMode
from torchaudio.models import wav2vec2_model

import common
from common import InputError, Utterance

REPOSITORY = Path(common.__file__).parent


def sine(rate, seconds=1.0, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def strongest_frequency(wave, rate=16_000):
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), n=1 << 18))
    return spectrum.argmax() * rate / (1 << 18)


def sentence(error):
    """The message, which must be one line."""
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def utterances_of(seconds, **columns):
    return [Utterance(f"{i}.wav", int(16_000 * s), **columns) for i, s in enumerate(seconds)]


# ---- files -------------------------------------------------------------------------------------


def test_a_failing_write_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path):
    path = tmp_path / "log.json"
    common.write_text(path, "old")

    def fail(file):
        file.write(b"new, half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["log.json"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("zip"), RuntimeError()]
)
def test_a_write_error_is_told_in_one_sentence(tmp_path, error):
    def fail(file):
        raise error

    with pytest.raises(InputError, match="cannot write .*model.pt") as caught:
        common.write_atomically(tmp_path / "model.pt", fail)
    assert str(error.args[-1] if error.args else "") in sentence(caught)
    assert os.listdir(tmp_path) == []


def test_writing_below_a_file_or_under_an_endless_name_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "run" / "config.json", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot write"):
            common.write_text(path, "text")


def test_a_real_full_disk_keeps_the_old_checkpoint(tmp_path):
    """The kernel refuses files above 64 kB, as a full disk would, half-way through torch.save."""
    script = """
import resource, sys, torch, common
path, log = sys.argv[1] + "/last.pt", common.Path(sys.argv[1], "log.jsonl")
save = lambda tensors: common.write_atomically(path, lambda file: torch.save(tensors, file))
save({"step": torch.tensor(1)})
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
for attempt in (lambda: save({"step": torch.zeros(100_000)}),
                lambda: common.write_log(log, {"x": "x" * 100_000})):
    try:
        attempt()
    except common.InputError as error:
        print("told:", error)
print(torch.load(path)["step"].item())
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3 and lines[2] == "1"
    assert lines[0].startswith("told: cannot write") and "last.pt" in lines[0]
    assert lines[1].startswith("told: cannot write") and "File too large" in lines[1]
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "log.jsonl"]


def test_write_text_makes_the_folder_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    common.write_text(path, "eins")
    common.write_text(path, "zwei – ä")
    assert path.read_text(encoding="utf-8") == "zwei – ä"


SETTINGS = {"seed": 1, "betas": (0.9, 0.98), "device": "cpu", "workers": 0, "batch_seconds": 4.0}


def start(out, **changes):
    out = common.open_run(out, SETTINGS | changes, resume=False)
    common.start_run(out, SETTINGS | changes, [{"step": 1}, {"step": 2}])
    return out


def test_a_new_run_keeps_its_settings_and_is_not_overwritten(tmp_path):
    out = start(tmp_path / "run")
    kept = (out / "config.json").read_text()
    assert json.loads(kept) == SETTINGS | {"betas": [0.9, 0.98]}
    assert (out / "log.jsonl").read_text().splitlines() == ['{"step": 1}', '{"step": 2}']
    with pytest.raises(InputError, match="--resume"):
        start(out, seed=2)
    assert (out / "config.json").read_text() == kept


def test_resuming_needs_a_run_and_the_same_settings(tmp_path):
    with pytest.raises(InputError, match="no run"):
        common.open_run(tmp_path / "run", SETTINGS, resume=True)
    out = start(tmp_path / "run")
    common.write_text(out / "scan.jsonl", "the scan")
    assert common.open_run(out, SETTINGS | {"device": "cuda", "workers": 3}, resume=True) == out
    assert (out / "scan.jsonl").exists()
    with pytest.raises(InputError, match="--batch-seconds") as caught:
        common.open_run(out, SETTINGS | {"batch_seconds": 8.0}, resume=True)
    assert "--seed" not in sentence(caught)


def test_a_start_that_failed_is_not_in_the_way_of_the_next(tmp_path):
    """Its scan may be of another folder, so it must not be taken for the new run's."""
    common.write_text(tmp_path / "run" / "scan.jsonl", "the scan of a mistyped --data")
    out = common.open_run(tmp_path / "run", SETTINGS, resume=False)
    assert not (out / "scan.jsonl").exists()


def test_a_file_in_place_of_the_run_folder_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError):
            start(out)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("batch_seconds", 0.0),
        ("lr", float("nan")),
        ("clip", float("inf")),
        ("weight_decay", -0.1),
        ("dropout", 1.0),
        ("warmup", 1.5),
    ],
)
def test_a_number_that_no_run_can_have_is_refused_by_its_flag(name, value, tmp_path):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} {value}"):
        common.open_run(tmp_path / "run", SETTINGS | {name: value}, resume=False)
    common.check_settings(
        {"seed": 0, "weight_decay": 0.0, "dropout": 0.0, "warmup": 0.0, "amp": False}
    )


def test_random_state_comes_back():
    state = common.get_random_state()
    first = torch.rand(3)
    torch.rand(100)
    common.set_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_a_device_that_is_not_there_is_an_input_error():
    assert common.pick_device("cpu") == torch.device("cpu")
    assert common.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("toaster", "", "cuda:99"):
        with pytest.raises(InputError, match="--device .*try cpu") as caught:
            common.pick_device(name)
        sentence(caught)


def test_an_error_that_crossed_a_process_keeps_only_its_sentence():
    message = (
        "Caught InputError in worker 0.\nTraceback:\n  File\ncommon.InputError: cannot read a.wav\n"
    )
    assert str(InputError(message)) == "cannot read a.wav"
    assert str(InputError("plain: sentence")) == "plain: sentence"


# ---- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how", "tolerance"),
    [
        ("a.wav", {}, 1e-4),
        ("a.flac", {}, 1e-4),
        ("a.ogg", {}, 0.05),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}, 0.05),
        ("a.mp3", {}, 0.05),
    ],
)
def test_every_format_gives_the_wave_back(tmp_path, name, how, tolerance):
    wave = sine(16_000)
    soundfile.write(tmp_path / name, wave, 16_000, **how)
    loaded = common.load_audio(tmp_path / name)
    assert loaded.dtype == torch.float32 and loaded.shape == (16_000,)
    middle = slice(2_000, 14_000)
    assert np.abs(loaded.numpy() - wave)[middle].max() < tolerance


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any torch function makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(
    ("rate", "channels"),
    [(8_000, 2), (11_025, 1), (22_050, 1), (44_100, 1), (44_099, 1), (48_000, 3), (96_000, 1)],
)
def test_any_rate_becomes_16_khz_mono(tmp_path, rate, channels):
    """Pitch and length are kept; an odd rate must not make a resampling kernel of gigabytes."""
    wave = np.stack([sine(rate) * (1 + c) / channels for c in range(channels)], axis=1)
    soundfile.write(tmp_path / "a.wav", wave, rate)
    with LargestTensor() as largest:
        loaded = common.load_audio(tmp_path / "a.wav")
    assert largest.elements < 3_000_000
    assert abs(len(loaded) - 16_000) <= 1
    assert abs(strongest_frequency(loaded.numpy()) - 440) < 0.2
    mean_gain = np.mean([(1 + c) / channels for c in range(channels)])
    assert loaded[4_000:12_000].abs().max() == pytest.approx(0.5 * mean_gain, rel=0.02)


def test_the_ratio_of_any_rate_is_simple_and_within_a_thousandth():
    for rate in [*range(1_000, 60_000, 37), 44_099, 191_904, 768_000]:
        ratio = common._ratio_to_16k(rate)
        assert abs(ratio * rate / 16_000 - 1) < 1e-3
        assert ratio.denominator <= 1_000


@pytest.mark.parametrize("rate", [1, 999, 800_000])
def test_an_absurd_rate_is_an_input_error(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.ones(100), rate)
    with pytest.raises(InputError, match=f"a.wav.*{rate} Hz"):
        common.load_audio(tmp_path / "a.wav")


def test_a_piece_equals_the_slice_of_the_whole(tmp_path):
    wave = 0.1 * np.random.default_rng(0).standard_normal((16_000, 2))
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    whole = common.load_audio(tmp_path / "a.wav")
    assert torch.allclose(whole, torch.from_numpy(wave.mean(1)).float(), atol=1e-7)
    for start, samples in [(0, 400), (7, 4_000), (12_000, 4_000), (15_999, 1)]:
        piece = common.load_audio(tmp_path / "a.wav", start, samples)
        assert torch.equal(piece, whole[start : start + samples])
    assert torch.equal(common.load_audio(tmp_path / "a.wav", 9_000), whole[9_000:])


@pytest.mark.parametrize(("rate", "start"), [(8_000, 5_000), (48_000, 5_001), (44_100, 4_800)])
def test_a_resampled_piece_is_close_to_the_slice_of_the_whole(tmp_path, rate, start):
    """Inside its edges: there the resampling filter has nothing beyond the piece to see."""
    soundfile.write(tmp_path / "a.wav", sine(rate, frequency=700.0), rate, subtype="FLOAT")
    whole = common.load_audio(tmp_path / "a.wav")
    piece = common.load_audio(tmp_path / "a.wav", start, 4_000)
    assert piece.shape == (4_000,)
    assert (piece - whole[start : start + 4_000])[100:-100].abs().max() < 1e-3


def test_a_missing_file_and_a_piece_beyond_the_end_are_named(tmp_path):
    with pytest.raises(InputError, match="none.wav"):
        common.load_audio(tmp_path / "none.wav")
    soundfile.write(tmp_path / "a.wav", sine(16_000), 16_000)
    with pytest.raises(InputError, match="a.wav.*shorter"):
        common.load_audio(tmp_path / "a.wav", 15_000, 2_000)
    with pytest.raises(InputError, match="a.wav"):
        common.load_audio(tmp_path / "a.wav", 17_000, 100)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 44_099, 48_000])
def test_scan_counts_the_samples_that_load_audio_gives(tmp_path, rate):
    """One sample off can be one frame off, and then frame labels do not fit the features."""
    folder = tmp_path / "audio"
    folder.mkdir()
    for frames in range(rate, rate + 12):
        soundfile.write(folder / f"{frames}.wav", 0.1 * np.ones(frames), rate)
    for utterance in common.scan(folder, tmp_path / "files.jsonl"):
        assert utterance.samples == len(common.load_audio(utterance.path))
        last = common.load_audio(utterance.path, utterance.samples - 1_000, 1_000)
        assert len(last) == 1_000


# ---- scanning ----------------------------------------------------------------------------------


def write_broken_files(folder):
    """One file of each kind that cannot be used, and two that can; returns problem -> name."""
    folder.mkdir(exist_ok=True)
    wave = sine(16_000)
    soundfile.write(folder / "good.wav", wave, 16_000)
    (folder / "sub").mkdir()
    soundfile.write(folder / "sub" / "GOOD.FLAC", wave, 16_000, format="FLAC")
    (folder / "text.wav").write_text("this is no audio")
    (folder / "nothing.ogg").write_bytes(b"")
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000)
    soundfile.write(folder / "cut.flac", noise, 16_000)
    whole = (folder / "cut.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "zero.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "short.wav", wave[:160], 16_000)
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    wave[100] = np.nan
    soundfile.write(folder / "nan.wav", wave, 16_000, subtype="FLOAT")
    return {
        "text.wav": "unreadable",
        "nothing.ogg": "unreadable",
        "cut.flac": "unreadable",
        "zero.wav": "empty",
        "short.wav": "too short",
        "silent.wav": "silent",
        "nan.wav": "NaN",
    }


def test_scan_leaves_out_counts_and_names_what_is_broken(tmp_path, capsys):
    problems = write_broken_files(tmp_path / "audio")
    utterances = common.scan(tmp_path / "audio", tmp_path / "files.jsonl")
    assert [Path(u.path).name for u in utterances] == ["good.wav", "GOOD.FLAC"]
    assert [u.samples for u in utterances] == [16_000, 16_000]
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.split("\n") if "skipped" in line]
    assert len(lines) == 1
    assert "2 files, 0.0 min" in lines[0] and "skipped 7" in lines[0] and "and 2 more" in lines[0]
    assert "3 unreadable" in lines[0]
    for problem in ("empty", "too short", "silent", "NaN"):
        assert f"1 {problem}" in lines[0]
    named = [name for name in problems if name in lines[0]]
    assert len(named) == 5
    for name in named:
        assert f"{name} ({problems[name]})" in lines[0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("text.wav", "unreadable"),
        ("nothing.ogg", "unreadable"),
        ("cut.flac", "unreadable"),
        ("zero.wav", "empty"),
        ("short.wav", "too short"),
        ("silent.wav", "silent"),
        ("nan.wav", "NaN"),
        ("missing.wav", "missing"),
        ("good.wav", ""),
    ],
)
def test_each_broken_file_is_called_what_it_is(tmp_path, name, problem):
    write_broken_files(tmp_path / "a")
    assert common._examine(str(tmp_path / "a" / name))[1] == problem


def test_a_frame_of_audio_is_long_enough_and_one_sample_less_is_not(tmp_path):
    for samples in (399, 400):
        soundfile.write(tmp_path / f"{samples}.wav", 0.1 * np.ones(samples), 16_000)
    assert common._examine(str(tmp_path / "399.wav"))[1] == "too short"
    assert common._examine(str(tmp_path / "400.wav")) == (400, "")


def test_a_second_scan_reads_only_the_cache(tmp_path, audio_folder, monkeypatch):
    first = common.scan(audio_folder, tmp_path / "files.jsonl")
    monkeypatch.setattr(common, "_examine", None)
    monkeypatch.setattr(common, "_find_audio", None)
    assert common.scan(audio_folder, tmp_path / "files.jsonl") == first
    assert len(first) == 12


def test_scan_gives_the_same_for_any_number_of_workers(tmp_path, audio_folder):
    one, many = (common.scan(audio_folder, tmp_path / str(n), workers=n) for n in (0, 4))
    assert one == many == sorted(one, key=lambda utterance: utterance.path)


def test_no_usable_audio_says_what_was_found(tmp_path):
    cache = tmp_path / "files.jsonl"
    with pytest.raises(InputError, match="does not exist"):
        common.scan(tmp_path / "nowhere", cache)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="it is empty"):
        common.scan(empty, cache)
    (empty / "a.txt").write_text("a")
    (empty / "b.txt").write_text("b")
    with pytest.raises(InputError, match="2 x .txt"):
        common.scan(empty, cache)
    (empty / "a.wav").write_text("a")
    soundfile.write(empty / "b.wav", np.zeros(16_000), 16_000)
    with pytest.raises(InputError, match="2 files.*1 unreadable.*1 silent"):
        common.scan(empty, cache)
    assert not cache.exists()


def write_manifest(folder, *rows):
    (folder / "manifest.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return folder / "manifest.tsv"


def test_a_manifest_gives_labels_and_is_found_in_its_folder(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", sine(16_000), 16_000)
    soundfile.write(tmp_path / "b.wav", sine(16_000), 16_000)
    soundfile.write(tmp_path / "unlisted.wav", sine(16_000), 16_000)
    manifest = write_manifest(
        tmp_path,
        ("path", "split", "speaker", "favourite colour", "text"),
        ("a.wav", "train", "anna", "blue", '"cheese'),
        (str(tmp_path / "b.wav"), "test", "bob", "red"),
        ("gone.wav", "train", "carl", "red", "no"),
    )
    expected = [
        Utterance(str(tmp_path / "a.wav"), 16_000, speaker="anna", split="train", text='"cheese'),
        Utterance(str(tmp_path / "b.wav"), 16_000, speaker="bob", split="test"),
    ]
    assert common.scan(manifest, tmp_path / "one.jsonl") == expected
    err = capsys.readouterr().err
    assert "skipped 1 (1 missing)" in err and "gone.wav (missing)" in err
    assert common.scan(tmp_path, tmp_path / "two.jsonl") == expected


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"file\tsplit\na.wav\ttrain\n", "column 'path'"),
        (b"path,split\na.wav,train\n", "column 'path'"),
        (b"path\tsplit\n", "a line per file"),
        (b"", "column 'path'"),
        (b"path\tsplit\na.wav\ttrain\n\ttrain\n", "line 3"),
        ("path\ttext\na.wav\tübel\n".encode("latin-1"), "UTF-8"),
        (bytes(range(256)) * 20, "UTF-8"),
        (b"\0\1\2\n" * 20, "column 'path'"),
        (b"path\n" + b"x" * 200_000, "UTF-8"),
    ],
)
def test_a_broken_manifest_is_an_input_error(tmp_path, content, match):
    path = tmp_path / "manifest.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        common.scan(path, tmp_path / "files.jsonl")
    assert "manifest.tsv" in sentence(caught)


# ---- splits ------------------------------------------------------------------------------------


def test_the_split_column_decides_and_test_is_never_touched():
    rows = [
        *utterances_of([1.0] * 5, split="train"),
        *utterances_of([2.0] * 3, split="dev"),
        *utterances_of([3.0] * 4, split="test"),
    ]
    train, heldout = common.train_and_heldout(rows)
    assert [u.split for u in train] == ["train"] * 5
    assert sorted(u.path for u in heldout) == ["0.wav", "1.wav", "2.wav"]
    assert {u.split for u in heldout} == {"dev"}


@pytest.mark.parametrize("split", ["", "train"])
def test_without_dev_a_hundredth_of_training_is_held_out(split):
    rows = utterances_of([1.0] * 300, split=split) + utterances_of([3.0] * 50, split="test")
    train, heldout = common.train_and_heldout(rows)
    assert len(train) == 297 and len(heldout) == 3
    assert {u.path for u in train} | {u.path for u in heldout} == {u.path for u in rows[:300]}
    assert not any(u.split == "test" for u in train + heldout)
    assert common.train_and_heldout(rows) == (train, heldout)
    assert [len(part) for part in common.train_and_heldout(rows[:2])] == [1, 1]


@pytest.mark.parametrize("split", ["", "dev"])
def test_about_ten_minutes_are_held_out_however_much_there_is(split):
    """A hundredth of LibriSpeech would be ten hours, at each evaluation."""
    rows = utterances_of([15.0] * 10_000, split=split)
    rows += utterances_of([15.0] * 10, split="train")
    train, heldout = common.train_and_heldout(rows)
    assert 500 <= sum(u.samples for u in heldout) / 16_000 <= 615
    if not split:
        assert len(train) + len(heldout) == 10_010


def test_fewer_than_two_training_files_are_an_input_error():
    for rows in ([], utterances_of([1.0]), utterances_of([1.0] * 5, split="test")):
        with pytest.raises(InputError, match="at least 2 files of split train"):
            common.train_and_heldout(rows)


# ---- frames and batches ------------------------------------------------------------------------


def test_frame_count_equals_the_convolutions_one_by_one():
    for samples in [*range(400, 2_100), 16_000, 250_000, 1_234_567]:
        frames = samples
        for kernel, stride in CONV_SHAPES:
            frames = (frames - kernel) // stride + 1
        assert common.frame_count(samples) == frames
    lengths = torch.tensor([400, 719, 720])
    assert common.frame_count(lengths).tolist() == [1, 1, 2]


def test_frame_count_equals_the_output_of_a_real_model():
    extractor = wav2vec2_model(
        **encoder_config(encoder_num_layers=1), aux_num_out=None
    ).feature_extractor
    with torch.no_grad():
        for samples in (400, 719, 720, 1_039, 1_040, 3_200, 16_000, 16_001, 16_079, 16_080, 16_081):
            assert extractor(torch.zeros(1, samples), None)[0].shape[1] == common.frame_count(
                samples
            )


@pytest.mark.parametrize(
    ("longest", "shortest"),
    [(250_000, 20_000), (16_000, 16_000), (24_000, 400), (400, 400), (80_000, 90_000)],
)
def test_crop_lengths_are_few_whole_frames_and_reach_the_shortest(longest, shortest):
    lengths = common.crop_lengths(longest, shortest)
    assert longest - 320 < lengths[0] <= longest
    assert lengths[-1] <= shortest
    assert all(length % 320 == 80 and length >= 400 for length in lengths)
    assert all(length <= shortest or later for length, later in zip(lengths, lengths[1:] + [0]))
    for longer, shorter in zip(lengths, lengths[1:]):
        assert shorter < longer and abs(longer * 0.8 - shorter) <= 2 * 320
    assert len(lengths) <= 2 + np.log(longest / min(shortest, longest)) / -np.log(0.8)


def draw_samples(seed, count=200, low=8_000, high=320_000):
    return np.random.default_rng(seed).integers(low, high, count).tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("batch_samples", "longest"), [(1_600_000, 250_000), (300_000, 250_000), (20_000, 20_000)]
)
def test_an_epoch_holds_every_utterance_once_in_full_equal_batches(seed, batch_samples, longest):
    samples = draw_samples(seed)
    epochs = [
        common.make_batches(samples, batch_samples, longest, seed, epoch) for epoch in range(3)
    ]
    for batches in epochs:
        assert sorted(i for batch in batches for i, _, _ in batch) == list(range(len(samples)))
        for batch in batches:
            lengths = {length for _, _, length in batch}
            assert len(lengths) == 1
            length = lengths.pop()
            assert len(batch) == 1 or len(batch) * length <= batch_samples
            for i, start, _ in batch:
                assert 0 <= start and start + length <= samples[i]
                assert (
                    length > 0.75 * min(samples[i], longest)
                    or len(batch) * length > 0.5 * batch_samples
                )
    assert len({len(batches) for batches in epochs}) == 1
    assert len({length for batches in epochs for batch in batches for _, _, length in batch}) <= 18


def test_batches_are_mostly_full():
    """Left-overs join the next shorter length: few batches hold less than they could."""
    samples = draw_samples(0, count=1_000)
    batches = common.make_batches(samples, 800_000, 250_000, seed=0, epoch=0)
    full = [len(batch) * batch[0][2] > 0.7 * 800_000 for batch in batches]
    assert np.mean(full) > 0.9


def test_left_overs_join_the_next_shorter_length_only_if_that_fills_a_batch():
    """64,320 samples hold 4 crops of 16,080 or 5 of 12,560."""

    def shapes(long, short):
        samples = [16_080] * long + [12_880] * short
        batches = common.make_batches(samples, 64_320, 16_080, 0, 0)
        return sorted((len(batch), batch[0][2]) for batch in batches)

    assert shapes(6, 6) == [(3, 12_560), (4, 16_080), (5, 12_560)]
    assert shapes(5, 2) == [(1, 16_080), (2, 12_560), (4, 16_080)]


def test_batches_depend_on_seed_and_epoch_alone():
    samples = draw_samples(0)

    def make(seed, epoch):
        return common.make_batches(samples, 800_000, 250_000, seed, epoch)

    first = make(0, 0)
    np.random.seed(1)
    torch.manual_seed(1)
    assert make(0, 0) == first
    others = [make(0, 1), make(1, 0), make(1, 1)]
    for i, other in enumerate(others):
        assert other != first and other not in others[:i]
        assert {frozenset(i for i, _, _ in b) for b in other} != {
            frozenset(i for i, _, _ in b) for b in first
        }
        assert len(other) == len(first)


def test_the_start_of_a_crop_reaches_both_ends():
    starts = {
        common.make_batches([4_320], 3_920, 3_920, 0, epoch)[0][0][1] for epoch in range(4_000)
    }
    assert min(starts) == 0 and max(starts) == 400
    assert len(starts) > 390


@pytest.fixture(scope="module")
def utterances(audio_folder, tmp_path_factory):
    return common.scan(audio_folder, tmp_path_factory.mktemp("cache") / "files.jsonl")


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_from_update_k_continues_the_sequence_exactly(utterances, workers):
    """Over the end of an epoch, with and without processes; the global RNG is left alone."""

    def load(first, last):
        return list(common.load_batches(utterances, 3.0, 1.0, 5, first, last, workers))

    per_epoch = len(list(common.load_batches(utterances, 3.0, 1.0, 5, 0, None, 0)))
    last = 2 * per_epoch + 1
    before = torch.get_rng_state()
    whole = load(0, last)
    assert len(whole) == last
    for first in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        rest = load(first, last)
        assert len(rest) == last - first
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[first:]))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(torch.equal(a, b) for a, b in zip(whole, whole[per_epoch:]))


def test_a_batch_holds_the_crops_that_make_batches_cut(utterances):
    samples = [u.samples for u in utterances]
    crops = common.make_batches(samples, 48_000, 16_000, 3, 0)
    batches = list(common.load_batches(utterances, 3.0, 1.0, 3, 0, len(crops), 0))
    for batch, waves in zip(crops, batches, strict=True):
        assert waves.dtype == torch.float32 and waves.shape == (len(batch), batch[0][2])
        for (i, start, length), wave in zip(batch, waves):
            whole, _ = soundfile.read(utterances[i].path, dtype="float32")
            assert np.array_equal(wave.numpy(), whole[start : start + length])


def test_heldout_batches_are_the_same_at_each_pass(utterances):
    first, second = (list(common.heldout_batches(utterances, 3.0, 1.0)) for _ in range(2))
    parts = list(common.heldout_batches(utterances, 3.0, 1.0, accumulate=2))
    assert len(parts) > len(first)
    assert sum(waves.sum() for waves in parts) == pytest.approx(sum(waves.sum() for waves in first))
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sum(len(waves) for waves in first) == len(utterances)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanished_is_one_clean_sentence(tmp_path, utterances, workers):
    gone = Utterance(str(tmp_path / "gone.wav"), 16_000)
    batches = iter(common.load_batches([*utterances, gone], 1.0, 1.0, 0, 0, None, workers))
    with pytest.raises(InputError) as caught:
        list(batches)
    assert sentence(caught).startswith("cannot read ") and "gone.wav" in str(caught.value)
    if workers:
        batches._shutdown_workers()  # as common.Updates does


def test_batches_shorter_than_a_frame_are_refused(utterances):
    for batch_seconds, crop_seconds in [(0.02, 1.0), (1.0, 0.02), (1.0, 0.0), (-1.0, 1.0)]:
        with pytest.raises(InputError, match="0.025"):
            common.load_batches(utterances, batch_seconds, crop_seconds, 0, 0, None, 0)
    assert next(iter(common.load_batches(utterances, 0.025, 1.0, 0, 0, 1, 0))).shape == (1, 400)


def test_labels_are_those_of_the_frames_of_the_crop(utterances):
    """A label made from the audio itself is found again in every crop, at its frame."""

    def loudest(wave):  # of each frame, where and how loud
        return wave.unfold(0, common.FIELD, common.HOP).abs().max(-1).values

    labels = [loudest(common.load_audio(utterance.path)) for utterance in utterances]
    batches = common.load_batches(utterances, 4.0, 1.0, 0, 0, 6, 0, labels)
    seen = 0
    for waves, given in batches:
        assert given.shape == (len(waves), common.frame_count(waves.shape[1]))
        for wave, row in zip(waves, given, strict=True):
            assert torch.equal(loudest(wave), row)
            seen += 1
    assert seen > 6
    for waves, given in common.heldout_batches(utterances, 4.0, 1.0, labels=labels):
        assert torch.equal(torch.stack([loudest(wave) for wave in waves]), given)
