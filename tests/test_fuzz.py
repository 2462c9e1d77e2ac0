"""Damaged and hostile files at every loader: the mutations of fuzz.py, and what they once found."""

import copy
import os
import signal
import threading

import numpy as np
import pytest
import soundfile
from fuzz import one_sentence, saved, small_students, table, watch

import common
import distilhubert
from common import InputError

CASES = int(os.environ.get("FUZZ_CASES", 30))  # of each kind


@pytest.fixture(scope="module")
def found():
    result = watch(CASES)
    print(table(*result))
    return result


@pytest.mark.slow
def test_damaged_files_give_a_clean_error_or_load(found):
    outcomes, unclean, peak = found
    assert not unclean, table(*found)
    assert peak < 1500  # MiB, with 640 of an idle torch


@pytest.mark.slow
def test_the_mutations_do_damage_and_leave_some_files_readable(found):
    """Neither is every file refused at its first byte, nor does a mutation change nothing."""
    successes = {kind: counts["success"] / CASES for kind, counts in found[0].items()}
    assert all(sum(counts.values()) == CASES for counts in found[0].values())
    assert max(successes.values()) < 0.9 and len(successes) == 25, successes
    assert 0.1 < sum(successes.values()) / len(successes) < 0.6, successes


def test_an_exception_memory_a_file_a_crash_and_a_hang_would_be_noticed():
    outcomes, unclean, _ = watch(1, planted=True, seconds=3)
    assert len(unclean) == len(outcomes) == 5
    words = ("KeyError", "MemoryError", "file was written", "code -11", "no end")
    for (_, _, what), word in zip(unclean, words):
        assert word in what


# ---- what it found -----------------------------------------------------------------------------


@pytest.fixture
def in_time():
    """An exception ends a test that hangs."""

    def end(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def noise(path, rate=22_050, **how):
    wave = 0.3 * np.random.default_rng(0).standard_normal(4000)
    soundfile.write(path, wave.astype(np.float32), rate, **how)
    return bytearray(path.read_bytes())


def test_a_flac_that_claims_to_be_endless_is_one_sentence(tmp_path):
    path = tmp_path / "x.flac"
    content = noise(path)
    content[21] |= 0x0F  # the 36 bits of its length
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    assert soundfile.info(path).frames > 1e10
    common._examine(str(path))
    try:
        common.load_audio(path)  # whole: where memory is not limited it may succeed
    except InputError as error:
        one_sentence(error)


def test_an_mp3_that_claims_to_be_endless_is_read_to_its_end(tmp_path, in_time):
    path = tmp_path / "x.mp3"
    content = noise(path)
    at = max(content.find(b"Xing"), content.find(b"Info"))
    assert at > 0
    content[at + 8 : at + 12] = b"\x7f\xff\xff\xff"  # MPEG frames
    path.write_bytes(content)
    assert soundfile.info(path).frames > 1e11
    samples, problem = common._examine(str(path))
    assert not problem and samples < 16_000


def test_a_file_without_samples_is_an_empty_wave(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(0, np.float32), 22_050)
    assert common.load_audio(tmp_path / "x.wav").shape == (0,)


def test_a_pipe_is_called_unreadable_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    found = []
    look = threading.Thread(
        target=lambda: found.append(common._examine(str(tmp_path / "pipe.wav"))), daemon=True
    )
    look.start()
    look.join(5)
    assert found == [(0, "unreadable")]


@pytest.mark.parametrize(
    "line", ["{", "{}", "[1]", '{"path": 3, "samples": 5}', '{"samples": "5"}']
)
def test_a_damaged_list_of_the_audio_is_named(line, tmp_path):
    (tmp_path / "scan.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="scan.jsonl is damaged"):
        common.scan(tmp_path, tmp_path / "scan.jsonl")


@pytest.mark.parametrize(
    ("name", "value"), [("student_layers", 10**9), ("width", 4096), ("feed_forward", 1 << 14)]
)
def test_a_small_file_cannot_ask_for_a_huge_student(name, value, tmp_path, in_time):
    content = copy.deepcopy(small_students()[distilhubert])
    content["config" if name in content["config"] else "shape"][name] = value
    (tmp_path / "student.pt").write_bytes(saved(content))
    with pytest.raises(InputError, match="ask for more weights than it holds"):
        distilhubert.load_student(tmp_path / "student.pt")


def test_a_file_of_another_writer_is_no_student(tmp_path):
    (tmp_path / "student.pt").write_bytes(saved({"method": [1, 2]}))
    with pytest.raises(InputError, match="no student of this project"):
        distilhubert.load_student(tmp_path / "student.pt")
