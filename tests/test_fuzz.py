"""Damaged and hostile files at every loader: the mutations of fuzz.py, and what they once found."""

import os
import signal

import numpy as np
import pytest
import soundfile
import torch
from fuzz import one_sentence, saved, small_students, table, watch

import common
import distilhubert
from common import InputError

HUGE = torch.zeros(1).half().expand(1 << 14, 1 << 14)  # all values are one
CASES = int(os.environ.get("FUZZ_CASES", 6))  # of each kind


def test_an_exception_memory_a_file_a_crash_and_a_hang_would_be_noticed():
    outcomes, unclean, _ = watch(1, planted=True, seconds=1)
    assert len(unclean) == len(outcomes) == 5
    words = ("KeyError", "MemoryError", "file was written", "code -11", "no end")
    assert all(word in what for word, (_, _, what) in zip(words, unclean))


def test_damaged_files_give_one_sentence_or_load():
    """The damage is neither none nor total: some files of each sort can be read, others cannot."""
    found = watch(CASES)
    outcomes, unclean, peak = found
    assert not unclean, table(*found)
    assert peak < 860, "MiB beyond an idle torch"
    assert all(counts.total() == CASES for counts in outcomes.values()) and len(outcomes) == 10
    read = sum(counts["success"] for counts in outcomes.values()) / CASES / len(outcomes)
    assert 0.15 < read < 0.6, table(*found)


# ---- what it found -----------------------------------------------------------------------------


@pytest.fixture
def in_time():
    """A test that hangs fails; what ends it is no Exception, which a loader may catch."""

    def end(*_):
        pytest.fail("no end after 20 s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def noise(path):
    wave = 0.3 * np.random.default_rng(0).standard_normal(4000)
    soundfile.write(path, wave.astype(np.float32), 22_050)
    return bytearray(path.read_bytes())


def test_a_flac_that_claims_to_be_endless_is_one_sentence(tmp_path, in_time):
    path = tmp_path / "x.flac"
    content = noise(path)
    content[21] |= 0x0F  # the 36 bits of its length
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    assert soundfile.info(path).frames > 1e10
    common.examine(str(path))
    try:
        common.load_audio(path)  # whole: where memory is not limited it may succeed
    except InputError as error:
        assert one_sentence(error)


def test_an_mp3_that_claims_to_be_endless_is_read_to_its_end(tmp_path, in_time):
    path = tmp_path / "x.mp3"
    content = noise(path)
    at = max(content.find(b"Xing"), content.find(b"Info"))
    assert at > 0
    content[at + 8 : at + 12] = b"\x7f\xff\xff\xff"  # MPEG frames
    path.write_bytes(content)
    assert soundfile.info(path).frames > 1e11
    samples, problem = common.examine(str(path))
    assert not problem and samples < 16_000


@pytest.mark.parametrize("rate", [0, 1, 2**31 - 1])
def test_a_wav_with_an_absurd_sample_rate_is_unreadable(rate, tmp_path, in_time):
    path = tmp_path / "x.wav"
    content = noise(path)
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)
    samples, problem = common.examine(str(path))
    assert samples == 0 and problem.startswith("unreadable: ")
    with pytest.raises(InputError, match="cannot read .*x.wav"):
        common.load_audio(path)


def test_a_file_without_samples_is_an_empty_wave(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(0, np.float32), 22_050)
    assert common.load_audio(tmp_path / "x.wav").shape == (0,)


def test_a_pipe_is_no_file_and_not_waited_for(tmp_path, in_time):
    os.mkfifo(tmp_path / "pipe.wav")
    assert common.examine(str(tmp_path / "pipe.wav")) == (0, "no file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"student_layers": 10**9}}, "student.pt is damaged"),
        ({"shape": {"width": 4096}}, "student.pt is damaged"),
        ({"shape": {"feed_forward": 1 << 14}}, "student.pt is damaged"),
        ({"state_dict": {"norm.weight": torch.zeros(16, device="meta")}}, "student.pt is damaged"),
        ({"state_dict": {"norm.weight": HUGE}}, "student.pt is damaged"),
        ({"method": torch.eye(3)}, "is no student of"),  # printed in three lines
    ],
)
def test_a_small_file_cannot_ask_for_a_huge_student(change, words, tmp_path, in_time):
    """Its weights are all in the file; and a file of another writer is no student."""
    content = small_students()[distilhubert]
    for part, values in change.items():
        content[part] = content[part] | values if isinstance(values, dict) else values
    (tmp_path / "student.pt").write_bytes(saved(content))
    with pytest.raises(InputError, match=words) as error:
        distilhubert.load_student(tmp_path / "student.pt")
    assert "\n" not in str(error.value)
