"""Files and audio: what is written stays whole, what is read is right, what is broken is named."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import CONV_SHAPES
from torch.utils._python_dispatch import TorchDispatchMode

import common
from common import InputError, Utterance


def sine(rate, seconds=1.0, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def utterances_of(seconds, **columns):
    return [Utterance(f"{i}.wav", int(16_000 * s), columns) for i, s in enumerate(seconds)]


def names(utterances):
    return [Path(utterance.path).name for utterance in utterances]


# ---- files -------------------------------------------------------------------------------------


def test_a_failing_write_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path):
    path = tmp_path / "new" / "last.pt"  # the folder is made
    common.write_text(path, "zwei – ä")

    def fail(file):
        file.write(b"new, half")
        raise cause

    for cause in (KeyboardInterrupt(), RuntimeError("a bug"), OSError(28, "No space left")):
        with pytest.raises(InputError if isinstance(cause, OSError) else type(cause)) as caught:
            common.write_atomically(path, fail)
        assert path.read_text(encoding="utf-8") == "zwei – ä"
        assert os.listdir(path.parent) == ["last.pt"]
    assert f"cannot write {path} (No space left): make room" in str(caught.value)
    for unwritable in (path / "run" / "config.json", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot write"):
            common.write_text(unwritable, "text")


def test_an_error_that_crossed_a_process_keeps_only_its_sentence():
    message = "Caught InputError in worker 0.\n  File\ncommon.InputError: cannot read a.wav\n"
    assert str(InputError(message)).strip() == "cannot read a.wav"
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
    assert np.abs(loaded.numpy() - wave)[2_000:14_000].max() < tolerance


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
    [(8_000, 2), (11_025, 1), (44_100, 1), (44_099, 1), (48_000, 3), (96_000, 1)],
)
def test_any_rate_becomes_16_khz_mono(tmp_path, rate, channels):
    """Pitch and length are kept; an odd rate must not make a resampling kernel of gigabytes."""
    gains = [(1 + c) / channels for c in range(channels)]
    soundfile.write(tmp_path / "a.wav", sine(rate)[:, None] * gains, rate)
    with LargestTensor() as largest:
        loaded = common.load_audio(tmp_path / "a.wav").numpy()
    assert largest.elements < 3_000_000
    assert abs(len(loaded) - 16_000) <= 1
    spectrum = np.abs(np.fft.rfft(loaded * np.hanning(len(loaded)), n=1 << 18))
    assert abs(spectrum.argmax() * 16_000 / (1 << 18) - 440) < 0.2
    assert np.abs(loaded[4_000:12_000]).max() == pytest.approx(0.5 * np.mean(gains), rel=0.02)


def test_the_ratio_of_any_rate_is_simple_and_within_a_thousandth():
    for rate in [*range(1_000, 60_000, 37), 44_099, 191_904, 768_000]:
        ratio = common.ratio_to_16k(rate)
        assert abs(ratio * rate / 16_000 - 1) < 1e-3 and ratio.denominator <= 1_000
    for rate in (1, 999, 800_000):
        with pytest.raises(InputError, match=f"{rate} Hz is not speech"):
            common.ratio_to_16k(rate)


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


def without_length(content):
    """FLAC as an encoder writes it into a pipe."""
    return content[:21] + bytes([content[21] & 0xF0]) + bytes(4) + content[26:]


def with_a_picture(content):
    """FLAC behind an ID3 tag of 300,000 bytes, in which libsndfile fails to find some places."""
    return b"ID3\3\0\0" + bytes([0, 18, 39, 96]) + bytes(300_000) + content


@pytest.mark.parametrize(
    ("name", "how", "seconds", "change"),
    [
        ("a.wav", {"subtype": "GSM610"}, 2, bytes),
        ("a.au", {"subtype": "G721_32"}, 2, bytes),
        ("a.flac", {}, 70, without_length),  # more than a block of Stream
        ("a.flac", {}, 40, with_a_picture),
    ],
)
def test_what_does_not_seek_or_has_no_length_is_read(tmp_path, name, how, seconds, change):
    """From the start; and cut at the same places as any other file."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(16_000 * seconds)
    soundfile.write(tmp_path / name, noise, 16_000, **how)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    (utterance,) = common.scan(tmp_path, None)
    whole = common.load_audio(utterance.path)
    assert utterance.samples == len(whole) and abs(len(whole) - len(noise)) < 320
    for start in np.linspace(0, len(whole) - 4_000, 20, dtype=int).tolist():
        piece = common.load_audio(utterance.path, start, 4_000)
        assert torch.equal(piece, whole[start : start + 4_000])


def test_what_cannot_be_loaded_is_named(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(16_000), 16_000)
    soundfile.write(tmp_path / "odd.wav", np.ones(100), 999)
    for name, piece, match in [
        ("none.wav", (), "cannot read .*none.wav.*--resume"),
        ("odd.wav", (), "odd.wav.*999 Hz"),
        ("a.wav", (15_000, 2_000), "a.wav is shorter than when it was scanned"),
        ("a.wav", (17_000, 100), "a.wav"),
    ]:
        with pytest.raises(InputError, match=match) as caught:
            common.load_audio(tmp_path / name, *piece)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_099, 48_000])
def test_scan_counts_the_samples_that_load_audio_gives(tmp_path, rate):
    """One sample off can be one frame off, and then frame labels do not fit the features."""
    for frames in range(rate, rate + 12):
        soundfile.write(tmp_path / f"{frames}.wav", 0.1 * np.ones(frames), rate)
    for utterance in common.scan(tmp_path, None):
        assert utterance.samples == len(common.load_audio(utterance.path))
        last = common.load_audio(utterance.path, utterance.samples - 1_000, 1_000)
        assert len(last) == 1_000


# ---- scanning ----------------------------------------------------------------------------------


def test_scan_leaves_out_counts_and_names_what_is_broken(tmp_path, capsys):
    """Five in the line, all in a file, with libsndfile's reason; names may hold line breaks."""
    folder, noise = tmp_path / "audio", 0.1 * np.random.default_rng(0).standard_normal(16_000)
    (folder / "sub").mkdir(parents=True)
    soundfile.write(folder / "good.wav", noise, 16_000)
    soundfile.write(folder / "sub" / "GOOD.FLAC", noise, 16_000, format="FLAC")
    (folder / "a\ntext.wav").write_text("this is no audio")
    (folder / "b_nothing.ogg").write_bytes(b"")
    soundfile.write(folder / "c_cut.flac", noise, 16_000)
    os.truncate(folder / "c_cut.flac", os.path.getsize(folder / "c_cut.flac") // 2)
    soundfile.write(folder / "d_zero.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "e_short.wav", noise[:399], 16_000)
    soundfile.write(folder / "frame.wav", noise[:400], 16_000)
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(folder / "silent_as_mono.wav", np.stack([noise, -noise], 1), 16_000)
    noise[100] = np.nan
    soundfile.write(folder / "z_nan.wav", noise, 16_000, subtype="FLOAT")
    found = common.scan(folder, tmp_path / "run" / "scan.jsonl")
    expected = [("frame.wav", 400), ("good.wav", 16_000), ("GOOD.FLAC", 16_000)]
    assert [(Path(u.path).name, u.samples) for u in found] == expected
    rows = (tmp_path / "run" / "left_out.tsv").read_text().splitlines()
    rows = [row.removeprefix(f"{folder}/").split("\t") for row in rows]
    assert rows[0] == ["a\\ntext.wav", "unreadable: Format not recognised"]
    assert [problem.partition(":")[0] for _, problem in rows] == [
        *["unreadable"] * 3,
        "empty",
        "too short",
        *["silent"] * 2,
        "NaN",
    ]
    assert common.examine(str(folder / "missing.wav"))[1] == "no file"
    out, err = capsys.readouterr()
    (line,) = [line for line in err.split("\n") if "left out" in line]
    assert out == "" and "3 files, 0.0 min" in line
    assert "left out 8 (3 unreadable, 1 empty, 1 too short, 2 silent, 1 NaN): " in line
    assert [f"{folder}/{name} ({problem})" in line for name, problem in rows] == [True] * 5 + [
        False
    ] * 3
    assert line.endswith(f"; all are in {tmp_path}/run/left_out.tsv")


def test_a_second_scan_reads_only_the_cache_and_none_keeps_none(tmp_path, audio_folder):
    first = common.scan(audio_folder, tmp_path / "scan.jsonl", workers=0)
    assert len(first) == 12 and first == sorted(first, key=lambda utterance: utterance.path)
    with pytest.raises(InputError, match="does not hold the files of the run's scan"):
        common.scan("/none", tmp_path / "scan.jsonl")
    assert common.scan(audio_folder, tmp_path / "scan.jsonl") == first
    (tmp_path / "moved").symlink_to(audio_folder)
    moved = common.scan(tmp_path / "moved", tmp_path / "scan.jsonl")
    assert [Path(u.path).relative_to(tmp_path / "moved") for u in moved] == [
        Path(u.path).relative_to(audio_folder) for u in first
    ]
    (tmp_path / "moved").unlink()
    assert common.scan(audio_folder, None) == first
    assert os.listdir(tmp_path) == ["scan.jsonl"]
    lines = (tmp_path / "scan.jsonl").read_text().splitlines()
    expected = dict(path=Path(first[0].path).name, samples=first[0].samples, columns={}, start=0)
    assert json.loads(lines[0]) == expected
    (tmp_path / "scan.jsonl").write_text("\n".join(lines)[:-9])  # by another program
    with pytest.raises(InputError, match="scan.jsonl is damaged"):
        common.scan(audio_folder, tmp_path / "scan.jsonl")


def test_no_usable_audio_says_what_was_found(tmp_path):
    cache, empty = tmp_path / "scan.jsonl", tmp_path / "empty"
    with pytest.raises(InputError, match="does not exist"):
        common.scan(tmp_path / "nowhere", cache)
    empty.mkdir()
    with pytest.raises(InputError, match="holds no .wav .* nothing"):
        common.scan(empty, cache)
    (empty / "a.txt").write_text("a")
    with pytest.raises(InputError, match="holds no .wav .* .txt"):
        common.scan(empty, cache)
    (empty / "a.wav").write_text("a")
    soundfile.write(empty / "b.wav", np.zeros(16_000), 16_000)
    with pytest.raises(InputError, match="2 files looked at, 1 unreadable, 1 silent; all .*tsv"):
        common.scan(empty, cache)
    assert not cache.exists()
    assert (tmp_path / "left_out.tsv").read_text().count("\n") == 2


def test_links_to_folders_are_followed_once_and_trees_may_be_deep(tmp_path, monkeypatch, capsys):
    """A folder has its path without links, if there is one; what cannot be entered is counted."""
    data, elsewhere, deep = tmp_path / "data", tmp_path / "disk", [tmp_path / "data"]
    for folder in (elsewhere / "b", data / "z", data / "closed"):
        folder.mkdir(parents=True)
        soundfile.write(folder / "x.wav", sine(16_000), 16_000)
    for name, to in dict(a=elsewhere, loop=data, zz=data / "z", self="self", gone="no").items():
        (data / name).symlink_to(to)
    for _ in range(1_000):
        deep.append(f"{deep[-1]}/d")
        os.mkdir(deep[-1])
    soundfile.write(data / "y.wav", sine(16_000), 16_000)
    (data / "y.wav").rename(f"{deep[-1]}/y.wav")  # longer than the names that libsndfile opens
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    try:
        found = common.scan(data, None)
    finally:  # shutil.rmtree, and so pytest, cannot
        os.unlink(f"{deep[-1]}/y.wav")
        for folder in reversed(deep[1:]):
            os.rmdir(folder)
    assert [utterance.path for utterance in found] == [
        *(f"{data}/a/b/x.wav", f"{deep[-1]}/y.wav", f"{data}/z/x.wav")
    ]
    line = capsys.readouterr().err
    assert "left out 3 (2 link to nothing, 1 folder not entered)" in line
    assert "closed (folder not entered: Permission denied)" in line


def test_every_format_of_libsndfile_is_found_and_other_audio_is_counted(tmp_path, capsys):
    formats = soundfile.available_formats().keys() - {"RAW"}
    for kind in formats:
        soundfile.write(tmp_path / f"{kind}.{kind.lower()}", sine(16_000), 16_000, format=kind)
    for name in ("A.AIF", "a.aifc", "a.oga", "a.opus", "a.snd", "a.sph", "a.wave"):
        soundfile.write(tmp_path / name, sine(16_000), 16_000, format="WAV")
    for name in ("b.m4a", "b.webm", "b.MP4", "b.pcm", "b.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert len(common.scan(tmp_path, None)) == len(formats) + 7
    assert "4 not a format of libsndfile" in capsys.readouterr().err


def test_a_name_that_is_not_utf_8_is_read_and_printed(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", sine(16_000), 16_000)
    for name, content in ((b"caf\xe9.wav", tmp_path / "a.wav"), (b"bad\xe9.wav", __file__)):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(Path(content).read_bytes())
    found = common.scan(tmp_path, tmp_path / "scan.jsonl")
    assert len(found) == 2 and common.scan(tmp_path, tmp_path / "scan.jsonl") == found
    (batch,) = common.load_batches(found, 3.0, 1.0)
    assert batch.shape == (2, 15_760) and batch[0].abs().max() > 0.4
    assert "bad\\udce9.wav (unreadable" in capsys.readouterr().err
    assert "bad\\udce9.wav" in (tmp_path / "left_out.tsv").read_text()


def test_a_manifest_gives_its_columns_and_is_found_in_its_folder(tmp_path, capsys):
    for name in ("a.wav", "b.wav", "unlisted.wav"):
        soundfile.write(tmp_path / name, sine(16_000), 16_000)
    rows = [
        ("path", "split", "speaker", "favourite colour", "text"),
        ("a.wav", "train", "anna", "blue", '"cheese'),
        (str(tmp_path / "b.wav"), "test", "bob", "", ""),
        ("gone.wav", "train", "carl", "red", "no"),
    ]
    (tmp_path / "manifest.tsv").write_text("\n".join(map("\t".join, rows)) + "\n")
    a, b = common.scan(tmp_path / "manifest.tsv", tmp_path / "scan.jsonl")
    assert (a.path, b.path) == (str(tmp_path / "a.wav"), str(tmp_path / "b.wav"))
    assert a.columns == dict(zip(rows[0][1:], rows[1][1:]))
    assert b.columns == {"split": "test", "speaker": "bob"}  # what is empty is not there
    assert (a.get("favourite colour"), b.get("text"), b.get("path")) == ("blue", "", "")
    err = capsys.readouterr().err
    assert "left out 1 (1 no file)" in err and "gone.wav (no file)" in err
    assert common.scan(tmp_path, None) == common.scan(tmp_path, tmp_path / "scan.jsonl") == [a, b]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"file\tsplit\na.wav\ttrain\n", "column 'path'"),
        (b"client_id\tpath\tsentence\na\ta.mp3\tno\n", "none of .* exists, .*a.mp3 .* clips/"),
        (b"/data/LibriSpeech\na.flac\t16000\n", "give the folder of the audio, or a manifest"),
        (b"a-1 sph2pipe -f wav a.sph |\n", "give the folder of the audio, or a manifest"),
        (b'{"audio_filepath": "a.wav"}\n', "give the folder of the audio, or a manifest"),
        (b"path,split\na.wav,train\n", "column 'path'"),
        (b"path\tsplit\n", "a line for each file"),
        (b"", "column 'path'"),
        (b"path\tsplit\na.wav\ttrain\n\ttrain\n", "line 3"),
        ("path\ttext\na.wav\tübel\n".encode("latin-1"), "utf-8"),
        (bytes(range(256)) * 20, "utf-8"),
        (b"\0\1\2\n" * 20, "column 'path'"),
        (b"path\n" + b"x" * 200_000, "field larger"),
    ],
)
def test_a_broken_manifest_is_an_input_error(tmp_path, content, match):
    (tmp_path / "manifest.tsv").write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        common.scan(tmp_path, None)
    assert "manifest.tsv" in str(caught.value) and "\n" not in str(caught.value)


def test_an_audio_file_as_data_is_told_from_a_manifest(tmp_path):
    for name in ("a.wav", "a.m4a"):
        (tmp_path / name).write_bytes(b"\xff\x00")
        with pytest.raises(InputError, match=f"{name} is an audio file: give its folder, or a"):
            common.scan(tmp_path / name, None)


def test_words_for_splits_are_understood_and_unknown_ones_are_named(tmp_path, capsys):
    words = {"Training": "train", "TRAIN": "train", "valid": "dev", "Validation": "dev"}
    words |= {"val": "dev", "Test": "test", "eval": "test", "dev": "dev", "trian": "trian"}
    rows = ["path\tsplit\tspeaker_split\tsplit_sentence"]
    for i, word in enumerate(words):
        soundfile.write(tmp_path / f"{i}.wav", sine(16_000), 16_000)
        rows.append(f"{i}.wav\t{word}\t{word}\tvalid")
    (tmp_path / "manifest.tsv").write_text("\n".join(rows) + "\n")
    found = common.scan(tmp_path, None)
    assert [u.get("split") for u in found] == [u.get("speaker_split") for u in found]
    assert [u.get("split") for u in found] == list(words.values())
    assert {u.get("split_sentence") for u in found} == {"valid"}
    assert "splits other than train, dev and test are not used: 'trian' (2)" in (
        capsys.readouterr().err
    )


def test_of_many_unknown_words_for_splits_nine_are_named(tmp_path, capsys):
    soundfile.write(tmp_path / "x.wav", sine(16_000), 16_000)
    rows = ["path\tsplit", *(f"x.wav\tfold {i}" for i in range(12))]
    (tmp_path / "manifest.tsv").write_text("\n".join(rows) + "\n")
    common.scan(tmp_path, None)
    assert capsys.readouterr().err.count("'fold") == 9


def test_librispeech_transcripts_give_text_and_speaker(tmp_path):
    """A file without a line, a line without a file; a byte order mark, CRLF, no words."""
    folder = tmp_path / "dev-clean" / "84" / "121123"
    folder.mkdir(parents=True)
    for number in range(4):
        soundfile.write(folder / f"84-121123-{number}.flac", sine(16_000), 16_000)
    lines = b"\xef\xbb\xbf84-121123-0 D'ACCORD  \r\n84-121123-1 GO ON\r\n84-121123-9 GONE\n\n"
    (folder / "84-121123.trans.txt").write_bytes(lines + b"84-121123-2\n")
    found = common.scan(tmp_path, tmp_path / "scan.jsonl")
    assert [u.get("text") for u in found] == ["D'ACCORD", "GO ON", "", ""]
    assert [u.get("speaker") for u in found] == ["84", "84", "84", ""]
    assert [(u.get("split"), u.get("folder_part")) for u in found] == [("", "dev")] * 4
    (folder / "84-121123.trans.txt").write_bytes(b"84-121123-0000 \xff\xfe\n")
    assert common.scan(tmp_path, tmp_path / "scan.jsonl") == found
    with pytest.raises(InputError, match=r"84-121123\.trans\.txt is .*utf-8"):
        common.scan(tmp_path, None)


# ---- splits ------------------------------------------------------------------------------------


def test_the_split_column_decides_and_test_is_never_touched():
    parts = {"train": utterances_of([1.0] * 5, split="train")}
    parts["dev"] = utterances_of([2.0] * 3, split="dev")
    train, heldout = common.train_and_heldout(
        [*parts["train"], *parts["dev"], *utterances_of([3.0] * 4, split="test")]
    )
    assert train == parts["train"] and heldout == parts["dev"]


def test_folders_give_parts_for_training_and_held_out_audio_alone(tmp_path, capsys):
    """Without a train part all is used; the uppermost name counts, below --data."""
    root = tmp_path / "testament"
    names = {"test-clean/1": "test", "dev-other/2": "dev", "Valid": "dev", "noise": ""}
    names |= {"TRAIN/test/1": "train", "x/train-clean-100/3": "train"}
    for name in names:
        (root / name).mkdir(parents=True)
        soundfile.write(root / name / "a-0.wav", sine(16_000), 16_000)
        (root / name / "a.trans.txt").write_text("a-0 HELLO\n")
    found = common.scan(root, None)
    parts = {str(Path(u.path).parent.relative_to(root)): u.get("folder_part") for u in found}
    assert parts == names and common.find_tasks(found) == []
    train, heldout = common.train_and_heldout(found)
    assert {u.get("folder_part") for u in train} == {"train", ""} and len(train) == 3
    assert [u.get("folder_part") for u in heldout] == ["dev"] * 2
    assert "; by folder: 2 train, 2 dev, 1 other, 1 test\n" in capsys.readouterr().err
    (root / "manifest.tsv").write_text("path\tsplit\ndev-other/2/a-0.wav\ttrain\n")
    assert common.scan(root, None)[0].columns == {"split": "train"}
    for name in ("manifest.tsv", "TRAIN/test/1/a-0.wav", "x/train-clean-100/3/a-0.wav"):
        (root / name).unlink()
    assert len(sum(common.train_and_heldout(common.scan(root, None)), [])) == 4
    assert "2 dev, 1 other, 1 test; no train, so all are used\n" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [{}, {"split": "train"}])
def test_without_dev_a_hundredth_of_training_is_held_out(columns):
    rows = utterances_of([1.0] * 300, **columns)
    train, heldout = common.train_and_heldout(rows + utterances_of([3.0] * 50, split="test"))
    assert len(train) == 297 and len(heldout) == 3
    assert sorted(names(train + heldout)) == sorted(names(rows))
    assert [len(part) for part in common.train_and_heldout(rows[:2])] == [1, 1]


@pytest.mark.parametrize("split", ["", "dev"])
def test_about_ten_minutes_are_held_out_however_much_there_is(split):
    """A hundredth of LibriSpeech would be ten hours, at each evaluation."""
    rows = utterances_of([15.0] * 10_000, split=split)
    rows += utterances_of([15.0] * 10, split="train")
    train, heldout = common.train_and_heldout(rows)
    assert 500 <= sum(u.samples for u in heldout) / 16_000 <= 615
    assert len(train) == (10 if split else 10_010 - len(heldout))


def test_a_recording_of_more_than_a_minute_counts_as_many_pieces(tmp_path):
    """Of one length, side by side; what is read is the audio of the piece."""
    wave = 0.4 * np.sin(np.arange(16_000 * 130) ** 1.5 / 10_000)
    soundfile.write(tmp_path / "long.wav", wave, 16_000)
    (long,) = common.scan(tmp_path, None)
    short, rest = utterances_of([60.0]), {"path": long.path, "columns": {}}
    train, heldout = common.train_and_heldout([*short, long])
    pieces = sorted(train + heldout, key=lambda utterance: (utterance.path, utterance.start))
    third = long.samples // 3
    bounds = [(0, third), (third, third), (2 * third, long.samples - 2 * third)]
    cut = [Utterance(start=start, samples=samples, **rest) for start, samples in bounds]
    assert sorted(cut, key=lambda u: u.start) == [u for u in pieces if u.path == long.path]
    assert short[0] in pieces and len(heldout) == 1
    crops = common.make_batches([u.samples for u in cut], 48_000, 32_000, 0, 0)
    for batch, waves in zip(crops, common.load_batches(cut, 3.0, 2.0), strict=True):
        for (i, start, length), found in zip(batch, waves, strict=True):
            begin = cut[i].start + start
            assert np.allclose(found, wave[begin : begin + length], atol=1e-4)
    assert long in common.train_and_heldout([*short, long, long], whole=True)[0]
    rows = utterances_of([3_600.0], split="dev") + utterances_of([1.0] * 2)
    assert sum(u.samples for u in common.train_and_heldout(rows)[1]) == 600 * 16_000


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
    assert common.frame_count(torch.tensor([400, 719, 720])).tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("longest", "shortest"),
    [(250_000, 20_000), (16_000, 16_000), (24_000, 400), (400, 400), (80_000, 90_000)],
)
def test_crop_lengths_are_few_whole_frames_and_reach_the_shortest(longest, shortest):
    lengths = common.crop_lengths(longest, shortest)
    assert longest - 320 < lengths[0] <= longest
    assert lengths[-1] <= shortest and all(length > shortest for length in lengths[:-1])
    assert all(length % 320 == 80 and length >= 400 for length in lengths)
    for longer, shorter in zip(lengths, lengths[1:]):
        assert shorter < longer and abs(longer * 0.8 - shorter) <= 2 * 320


def draw_samples(seed, count=200, low=8_000, high=320_000):
    return np.random.default_rng(seed).integers(low, high, count).tolist()


def test_the_data_order_is_the_one_that_the_tables_were_measured_with():
    """Numbers of the version before: other ones would make every measured table another's."""
    samples = [16_000, 24_000, 9_000, 12_500, 31_000, 8_200, 20_000, 15_900]
    assert common.make_batches(samples, 48_000, 24_000, seed=3, epoch=1) == [
        [(3, 43, 12_240)],
        [(6, 2_629, 15_120), (0, 495, 15_120), (7, 708, 15_120)],
        [(1, 103, 23_760), (4, 6_117, 23_760)],
        [(2, 407, 7_760), (5, 243, 7_760)],
    ]
    whole = common.make_whole_batches(samples, 60_000, seed=3, epoch=0)
    order = [[1, 6], [4], [7, 0, 3], [2, 5]]
    assert whole == [[(i, 0, samples[i]) for i in batch] for batch in order]
    many = draw_samples(1)
    crops = common.make_batches(many, 800_000, 250_000, 1, 2)
    whole = [[i for i, *_ in batch] for batch in common.make_whole_batches(many, 800_000, 1, 2)]
    found = [zlib.crc32(json.dumps(batches).encode()) for batches in (crops, whole)]
    assert found == [2_347_314_886, 7_968_692]
    rows = utterances_of([1 + i % 7 for i in range(700)])
    heldout = names(common.train_and_heldout(rows)[1])
    assert heldout == [f"{i}.wav" for i in (26, 164, 304, 310, 401, 478, 543)]
    rows = utterances_of([60 + 60 * (i % 2) for i in range(30)], split="dev")
    heldout = common.train_and_heldout(rows + utterances_of([1.0] * 3), whole=True)[1]
    assert names(heldout) == [f"{i}.wav" for i in (2, 4, 10, 11, 16, 21, 26, 28)]


@pytest.mark.parametrize("seed", range(2))
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
            length = batch[0][2]
            assert {crop[2] for crop in batch} == {length}
            assert len(batch) == 1 or len(batch) * length <= batch_samples
            for i, start, _ in batch:
                assert 0 <= start and start + length <= samples[i]
                enough = length > 0.75 * min(samples[i], longest)
                assert enough or len(batch) * length > 0.5 * batch_samples
    assert len({len(batches) for batches in epochs}) == 1
    assert len({crop[2] for batches in epochs for batch in batches for crop in batch}) <= 18


def test_left_overs_join_the_next_shorter_length_only_if_that_fills_a_batch():
    """Most batches are full then. 64,320 samples hold 4 crops of 16,080 or 5 of 12,560."""
    batches = common.make_batches(draw_samples(0, count=1_000), 800_000, 250_000, 0, 0)
    assert np.mean([len(batch) * batch[0][2] > 0.7 * 800_000 for batch in batches]) > 0.9

    def shapes(long, short):
        samples = [16_080] * long + [12_880] * short
        batches = common.make_batches(samples, 64_320, 16_080, 0, 0)
        return sorted((len(batch), batch[0][2]) for batch in batches)

    assert shapes(6, 6) == [(3, 12_560), (4, 16_080), (5, 12_560)]
    assert shapes(5, 2) == [(1, 16_080), (2, 12_560), (4, 16_080)]


def test_whole_utterances_are_beside_others_of_their_length():
    samples = draw_samples(0, low=6_400, high=256_000)
    batches = common.make_whole_batches(samples, 1_600_000, seed=0, epoch=3)
    assert sorted(piece[0] for batch in batches for piece in batch) == list(range(200))
    assert all(piece == (piece[0], 0, samples[piece[0]]) for batch in batches for piece in batch)
    padded = [len(batch) * max(piece[2] for piece in batch) for batch in batches]
    assert max(padded) <= 1_600_000 and sum(samples) / sum(padded) > 0.85
    batches = common.make_whole_batches([50_000, 900, 40_000], 30_000, 0, 0)
    assert sorted(batch[0][0] for batch in batches) == [0, 1, 2]  # each longer than a batch


@pytest.mark.parametrize("whole", [False, True])
def test_batches_depend_on_seed_and_epoch_alone(whole):
    samples = draw_samples(0)

    def make(seed, epoch):
        if whole:
            return common.make_whole_batches(samples, 800_000, seed, epoch)
        return common.make_batches(samples, 800_000, 250_000, seed, epoch)

    first, epochs = make(0, 0), [make(0, 0), make(0, 1), make(1, 0), make(1, 1)]
    np.random.seed(1)
    torch.manual_seed(1)
    assert make(0, 0) == first
    assert len({len(batches) for batches in epochs}) == 1
    sets = [{frozenset(i for i, *_ in batch) for batch in batches} for batches in epochs]
    for i, one in enumerate(sets):
        assert all(len(one & other) < len(one) / 2 for other in sets[:i])  # neighbours change


def test_the_start_of_a_crop_reaches_both_ends():
    starts = {
        common.make_batches([4_320], 3_920, 3_920, 0, epoch)[0][0][1] for epoch in range(4_000)
    }
    assert min(starts) == 0 and max(starts) == 400 and len(starts) > 390


# ---- loaders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def utterances(audio_folder):
    return common.scan(audio_folder, None)


def as_tensors(batches):
    return [(batch,) if isinstance(batch, torch.Tensor) else tuple(batch) for batch in batches]


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        all(map(torch.equal, a, b)) for a, b in zip(ours, theirs)
    )


@pytest.mark.parametrize(("crop_seconds", "workers"), [(1.0, 0), (1.0, 2), (None, 1)])
def test_loading_from_update_k_continues_the_sequence_exactly(utterances, crop_seconds, workers):
    """Over the end of an epoch, with and without processes; the global RNG is left alone."""

    def load(first, last):
        return as_tensors(
            common.load_batches(utterances, 3.0, crop_seconds, 5, first, last, workers)
        )

    per_epoch, before = len(load(0, None)), torch.get_rng_state()
    last = 2 * per_epoch + 1
    whole = load(0, last)
    assert len(whole) == last
    for first in (1, per_epoch, per_epoch + 2):
        assert equal(load(first, last), whole[first:])
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(whole, whole[per_epoch:]))


def test_a_batch_holds_the_crops_that_make_batches_cut(utterances):
    samples = [u.samples for u in utterances]
    crops = common.make_batches(samples, 48_000, 16_000, 3, 0)
    batches = common.load_batches(utterances, 3.0, 1.0, 3, 0, len(crops), 0)
    for batch, waves in zip(crops, batches, strict=True):
        assert waves.dtype == torch.float32 and waves.shape == (len(batch), batch[0][2])
        for (i, start, length), wave in zip(batch, waves):
            whole, _ = soundfile.read(utterances[i].path, dtype="float32")
            assert np.array_equal(wave.numpy(), whole[start : start + length])


def test_whole_utterances_come_with_numbers_padding_and_lengths(utterances):
    seen, padded = [], False
    for numbers, waves, lengths in common.load_batches(utterances, 4.0, None, 0, 0, None, 0):
        assert lengths.tolist() == [utterances[i].samples for i in numbers]
        assert waves.shape == (len(numbers), lengths.max())
        for wave, i, length in zip(waves, numbers.tolist(), lengths, strict=True):
            assert torch.equal(wave[:length], common.load_audio(utterances[i].path))
            assert wave[length:].abs().sum() == 0
        seen += numbers.tolist()
        padded |= bool(lengths.min() < lengths.max())
    assert sorted(seen) == list(range(12)) and padded


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_process_has_its_share_of_every_batch(count, monkeypatch):
    epochs = [[list("abcde"), list("fg"), ["h"]], [list("hg"), list("fedcb"), ["a"]]]
    shares, whole = [], []
    monkeypatch.setattr(common, "processes", lambda: count)
    for number in range(count):
        monkeypatch.setattr(common, "rank", lambda number=number: number)
        order = common.BatchOrder(lambda epoch: epochs[epoch], 1, 5)
        shares.append(list(order))
        assert len(shares[-1]) == 4
        whole.append(list(common.BatchOrder(lambda epoch: epochs[epoch], 0, None)))
    assert whole == [epochs[0]] * count  # an evaluation is one process's alone
    for batch, parts in zip([*epochs[0][1:], *epochs[1][:2]], zip(*shares), strict=True):
        sizes = [len(part) for part in parts]
        if len(batch) >= count:
            assert [x for part in parts for x in part] == batch and max(sizes) - min(sizes) <= 1
        else:  # nobody has nothing to do
            assert sizes == [1] * count and {x for part in parts for x in part} == set(batch)


def test_heldout_batches_are_the_same_at_each_pass_and_come_in_parts(utterances):
    first, second = (list(common.heldout_batches(utterances, 3.0, 1.0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sum(len(waves) for waves in first) == len(utterances)
    parts = list(common.heldout_batches(utterances, 3.0, 1.0, accumulate=2))
    assert len(parts) > len(first) and max(map(len, parts)) < max(map(len, first))
    assert equal([tuple(w for p in parts for w in p)], [tuple(w for b in first for w in b)])


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_all_vanished_are_one_clean_sentence(tmp_path, workers):
    gone = [Utterance(str(tmp_path / f"{i}gone.wav"), 16_000, {}) for i in range(3)]
    batches = iter(common.load_batches(gone, 1.0, 1.0, 0, 0, None, workers))
    with pytest.raises(InputError, match=r"^cannot read \S*gone.wav[^\n]*\n?$"):
        list(batches)
    if workers:
        batches._shutdown_workers()  # as common.updates does


@pytest.mark.parametrize("workers", [0, 2])
def test_a_crop_that_cannot_be_read_is_replaced_and_named_once(tmp_path, workers, capfd):
    """By the same crop of another file whenever it is asked for; all else stays as it was."""
    rng = np.random.default_rng(0)
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(20_000 + i), 16_000)
    utterances = common.scan(tmp_path, None)

    def load(first, last):
        return list(common.load_batches(utterances, 3.0, 1.0, 5, first, last, workers))

    before = load(0, 9)
    (tmp_path / "2.wav").unlink()
    os.truncate(tmp_path / "4.wav", 9_000)
    after = load(0, 9)
    changed = sum((a != b).any(1).sum() for a, b in zip(before, after, strict=True))
    assert changed == 2 * 4 + 1 and equal(as_tensors(load(4, 9)), as_tensors(after[4:]))
    assert all(0.05 < wave.std() < 0.2 for batch in after for wave in batch)
    said = capfd.readouterr().err
    assert said.count("cannot read") == 1 and said.count("replaced by other audio") == 2
    assert "2.wav (No such file or directory): replaced" in said and "4.wav is shorter" in said


def test_a_whole_utterance_is_replaced_by_one_of_about_its_length_with_its_number(tmp_path):
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", sine(16_000, 0.5 + 0.1 * i), 16_000)
    utterances = common.scan(tmp_path, None)
    (tmp_path / "0.wav").unlink()
    (tmp_path / "5.wav").unlink()
    seen = []
    for numbers, waves, lengths in common.load_batches(utterances, 1.0, None, last=6):
        for i, wave, length in zip(numbers.tolist(), waves, lengths, strict=True):
            assert torch.equal(wave[:length], common.load_audio(utterances[i].path))
        seen += numbers.tolist()
    assert sorted(seen) == [1, 1, 2, 3, 4, 4]


def test_the_only_file_that_is_long_enough_is_replaced_by_a_shorter_one_again_and_again(tmp_path):
    soundfile.write(tmp_path / "short.wav", sine(16_000, 0.2), 16_000)
    rows = [*common.scan(tmp_path, None), Utterance(str(tmp_path / "gone.wav"), 16_000, {})]
    long = max(common.load_batches(rows, 1.0, 1.0), key=lambda batch: batch.shape[1])
    short = common.load_audio(rows[0].path)
    assert long.shape == (1, 15_760) and torch.equal(long[0], short.repeat(5)[:15_760])


def test_the_shortest_batch_has_one_frame(utterances):
    assert next(iter(common.load_batches(utterances, 0.025, 1.0, 0, 0, 1, 0))).shape == (1, 400)
