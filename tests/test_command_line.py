"""The scripts as a user runs them: right use, wrong use, broken input. One clear sentence each.

What common.py alone does is tried through one script. Most calls are of main() in this process,
because importing torch takes seconds.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import METHODS, tiny_run
from conftest import run_script as inside

import common

ROOT = Path(__file__).parent.parent
ONE = "distilhubert"


COUNTS = {  # what --describe must show: the paper's numbers of parameters
    "distilhubert": (
        "Student | 23,491,200",
        "Student.feature_extractor | 4,200,448",
        "Student.feature_projection.projection | 393,984",
        "Student.pos_conv_embed | 4,719,488",
        "Student.layers.1 | 7,087,872",
        "Heads.heads.0 | 1,181,184",
        "Student and Heads | 27,034,752",
    ),
    "gendistiller": ("Student | 24,090,024", "Student.layers.1 | 7,088,404"),
    "lstm_dkd": (
        "Student | 18,781,952",
        "Student.feature_extractor | 4,206,592",
        "Student.feature_projection.projection | 393,984",
        "Student.layers.3 | 3,545,088",
        "Head | 384,500",
        "Student of a Base teacher | 18,775,808",
    ),
    "skill": ("94,381,680", "23,595,420"),
    "pad": ("94,370,944", "108,891,648", "7,087,872"),
}
ROWS = {name: ("teacher", "untrained", "initialised", "distilled") for name in METHODS} | {
    "skill": ("teacher", "untrained", "pruned", "distilled"),
    "pad": ("text teacher", "speech model", "distilled"),
}


def method_of(script):
    return importlib.import_module(script)


def flags_of(config):
    """The command line of a Config's fields."""
    texts = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in config.items()}
    return [f"--{key.replace('_', '-')}={value}" for key, value in texts.items()]


def small(script, files, out, **changes):
    """Command line of a run of seconds."""
    changes = dict(steps=4, save_every=2, log_every=1) | changes
    return flags_of(tiny_run(script, files, out, **changes))


def real(*command, **settings):
    """A process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    settings = dict(capture_output=True, text=True, env=environment, timeout=300) | settings
    return subprocess.run([sys.executable, *map(str, command)], **settings)


def sentence(done, code=1):
    """The last line on stderr, of a user's mistake: progress bars aside, nothing else is there."""
    assert done.returncode == code, done.stderr[-1500:]
    assert "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr.strip().replace("\r", "\n").splitlines()[-1]


@pytest.fixture(scope="module", params=METHODS)
def script(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Evaluations without what takes long there; their numbers are not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        probe = common.linear_probe
        patch.setattr(common, "linear_probe", lambda parts, seed, *_: probe(parts, seed, 4))
        patch.setattr(common, "measure_speed", lambda models, _: dict.fromkeys(models, 1.0))
        yield


@pytest.fixture(scope="module")
def finished(script, tiny_files, tmp_path_factory):
    """Folder and output of a finished small run; tests/test_user_path.py starts a real process."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = inside(script, *small(script, tiny_files, out))
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done


# ---- right use ----------------------------------------------------------------------------------


def test_importing_the_scripts_does_nothing(tmp_path):
    done = real("-c", f"import {', '.join(METHODS)}", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_help_shows_every_flag_and_its_default(script):
    done, config = inside(script, "--help"), asdict(method_of(script).Config())
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and f"[{config['lr']}]" in said and "--no-amp" in said
    every = ["toy", "resume", "claim", "seeds", "describe", "evaluate", *config]
    assert [name for name in every if f"--{name.replace('_', '-')}" not in said] == []
    assert ("--export" in said) == (script == "distilhubert")


def test_describe_prints_the_paper_size_student(script, monkeypatch):
    monkeypatch.setattr(common, "SAMPLE_RATE", 800)  # half a second instead of ten
    done = inside(script, "--describe")
    assert done.returncode == 0
    table = re.sub(" +", " ", done.stdout)
    assert [count for count in COUNTS[script] if count not in table] == []


def test_run_folder_is_complete_and_the_table_is_printed(script, finished):
    out, done = finished
    for name in ("scan.jsonl", "last.pt", "student.pt", "results.json", "results.txt"):
        assert (out / name).stat().st_size > 0, name
    for row in ROWS[script]:
        assert f"| {row} " in done.stdout
    assert (out / "results.txt").read_text().startswith(done.stdout.strip() + "\n")
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").open()] == [1, 2, 3, 4]
    assert json.loads((out / "config.json").read_text())["steps"] == 4
    assert not list(out.glob(".*"))


def test_no_second_start_changes_a_finished_run(script, finished, tiny_files):
    out, first = finished
    names = ("student.pt", "last.pt", "log.jsonl", "config.json", "scan.jsonl")
    before = [(out / name).read_bytes() for name in names]
    flags = small(script, tiny_files, out)
    assert "holds a run already" in sentence(inside(script, *flags))
    line = sentence(inside(script, *flags, "--resume", "--seed", "5", "--clip", "0.5"))
    assert "--seed, --clip" in line and "--betas" not in line
    if script == ONE:
        done = inside(script, *flags, "--resume")
        rows = [line.split("|")[1] for line in done.stdout.splitlines()]
        assert rows == [line.split("|")[1] for line in first.stdout.splitlines()]
    else:
        config = method_of(script).Config(**json.loads((out / "config.json").read_text()))
        method_of(script).train(config, resume=True)
    assert before == [(out / name).read_bytes() for name in names]


def test_evaluate_probes_a_student_file(script, finished, labelled):
    before = sorted(labelled.parent.iterdir())
    done = inside(script, "--evaluate", finished[0] / "student.pt", "--data", labelled)
    assert done.returncode == 0, done.stderr[-1000:]
    head, _, row = done.stdout.splitlines()
    assert "speaker accuracy (tones)" in head and "colour accuracy (tones)" in head
    assert "seconds" not in head and row.startswith(f"| {finished[0] / 'student.pt'} ")
    assert sorted(labelled.parent.iterdir()) == before  # nothing is written beside the audio


def test_seeds_and_claim_keep_their_runs_apart_and_print_means(tiny_files, tmp_path):
    base = small(ONE, tiny_files, tmp_path / "o", steps=2, student_layers=1)
    done = inside(ONE, *base, "--seeds", "2")
    assert done.returncode == 0, done.stderr[-1000:]
    assert "±" in done.stdout and done.stdout.count("| distilled ") == 1
    assert len(list((tmp_path / "o" / "seeds").glob("distilled-seed-*"))) == 2
    done = inside(ONE, *base, "--claim", "--seeds", "1")
    for row in (*ROWS[ONE], *method_of(ONE).CLAIM):
        assert f"| {row} " in done.stdout
    again = inside(ONE, *base, "--claim", "--seeds", "1", "--resume")
    assert again.stdout == done.stdout and "distil:" not in again.stderr  # nothing is done twice
    line = sentence(inside(ONE, *base, "--claim", "--seeds", "1", "--resume", "--clip", "0.5"))
    assert "--clip" in line


def test_each_ablation_of_a_claim_is_a_config_of_its_own(script):
    method = method_of(script)
    assert method.Config().seed == 0  # as in README's tables
    for base in (method.Config(), method.Config(**method.TOY)):
        configs = [base, *(replace(base, **changes) for changes in method.CLAIM.values())]
        assert all(one not in configs[:i] for i, one in enumerate(configs)) and len(configs) > 1
        for config in configs:
            common.check_settings(config)


def test_a_choice_from_python_is_one_of_those_of_the_flag():
    with pytest.raises(common.InputError, match="loss 'DKD': must be one of dkd, kd, ce"):
        common.check_settings(method_of("lstm_dkd").Config(loss="DKD"))


# ---- wrong use ----------------------------------------------------------------------------------


UNKNOWN = """
    distilhubert                         | --data DIR takes your audio, and --toy
    distilhubert --toy --no-such-flag    | --no-such-flag
    distilhubert --toy --steps many      | --steps
    distilhubert --toy --amp=1           | --amp
    distilhubert --toy --betas 0.9,x     | --betas
    distilhubert --toy --tea toy         | --tea
    distilhubert --toy --seeds 0         | --seeds
    distilhubert --toy --export onnx     | --export
    gendistiller                         | --data DIR takes your audio, and --toy
    gendistiller --toy --variant 3d      | --variant
    gendistiller --toy --export onnx     | --export
    lstm_dkd                             | --data DIR takes your audio, and --toy
    lstm_dkd --toy --loss mse            | --loss
    skill                                | --data DIR takes your audio, and --toy
    pad                                  | --data DIR takes your audio, and --toy
    pad --toy --alignment none           | --alignment
"""


def rows(table):
    return [line.strip() for line in table.strip().splitlines()]


@pytest.mark.parametrize("line", rows(UNKNOWN))
def test_flags_that_are_not_there_and_values_that_are_none_exit_with_2(line):
    command, words = line.split(" | ")
    script, *flags = command.split()
    done = inside(script, *flags)
    assert words in sentence(done, code=2) and len(done.stderr.splitlines()) <= 3


WRONG = """
    distilhubert --steps 0                              | --steps 0
    distilhubert --steps -1                             | --steps -1
    distilhubert --accumulate 0                         | --accumulate
    distilhubert --batch-seconds 0                      | --batch-seconds 0
    distilhubert --batch-seconds 0.01                   | --batch-seconds
    distilhubert --save-every 0                         | --save-every
    distilhubert --log-every -1                         | --log-every
    distilhubert --lr -1                                | --lr
    distilhubert --lr nan                               | --lr
    distilhubert --clip inf                             | --clip
    distilhubert --weight-decay -0.1                    | --weight-decay
    distilhubert --workers -1                           | --workers
    distilhubert --betas=-0.5,0.9                       | --betas
    distilhubert --betas nan,0.9                        | --betas
    distilhubert --dropout 1.0                          | --dropout
    distilhubert --warmup 1.5                           | --warmup
    distilhubert --seed 18446744073709551616            | --seed
    distilhubert --device cuda:77                       | --device cuda:77 cannot be used
    distilhubert --device toaster                       | try cpu
    distilhubert --data {tmp}/none                      | does not exist
    distilhubert --data {tmp}/empty                     | holds no .wav
    distilhubert --data {tmp}/texts                     | .txt
    distilhubert --data {tmp}/broken                    | 2 files looked at, 1 too short
    distilhubert --resume                               | holds no run
    distilhubert --out {tmp}/theirs                     | holds a run already
    distilhubert --out {tmp}/theirs --resume            | holds no run
    distilhubert --out {tmp}/texts/a.txt                | a.txt
    distilhubert --teacher hubert_bass                  | or one of toy, hubert_base
    distilhubert --teacher {tmp}/bad.pt                 | bad.pt is not a readable checkpoint
    distilhubert --teacher {tmp}/other.pt               | not a teacher
    distilhubert --evaluate {tmp}/none.pt               | does not exist
    distilhubert --evaluate {tmp}/bad.pt                | not a readable checkpoint
    distilhubert --evaluate {tmp}/plain.pt              | is no student of distilhubert.py
    distilhubert --evaluate {tmp}/other.pt              | written by another
    distilhubert --toy --data= --out /proc/none         | /proc/none
    distilhubert --target-layers 4,13                   | --target-layers
    distilhubert --student-layers 0                     | --student-layers
    distilhubert --student-layers 13                    | --no-init-from-teacher
    gendistiller --target-layers 4,4,8                  | --target-layers
    lstm_dkd --hidden 0                                 | --hidden
    lstm_dkd --describe --hidden 0                      | --hidden
    lstm_dkd --teacher hubert_base                      | has no cluster head
    skill --sparsity 0.999                              | --sparsity
    skill --groups 4/4                                  | --groups
    skill --clusters 13                                 | --clusters
    skill --clusters 0                                  | --clusters
    skill --calibration-utterances 0                    | --calibration-utterances
    skill --sparsity 1.0                                | --sparsity
    pad --student hubert_bass                           | hubert_base
    pad --teacher no_such                               | no_such
    pad --data {audio}                                  | transcripts are needed, *.trans.txt beside
    pad --widths 0,4,8                                  | --widths
    pad --widths 4,8                                    | --widths
    pad --hours 0                                       | --hours
    pad --longest-seconds 0.1                           | raise --longest-seconds
"""


@pytest.fixture(scope="module")
def others(tmp_path_factory, audio_folder):
    """Where to find what {names} stand for in the table."""
    tmp = tmp_path_factory.mktemp("others")
    for name in ("empty", "texts", "broken", "theirs"):
        (tmp / name).mkdir()
    (tmp / "texts" / "a.txt").write_text("no audio")
    (tmp / "broken" / "text.wav").write_text("no audio")
    soundfile.write(tmp / "broken" / "short.wav", 0.1 * np.ones(160), 16_000)
    (tmp / "theirs" / "student.pt").write_text("somebody's")
    (tmp / "bad.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    torch.save({"method": "another", "state_dict": {}}, tmp / "other.pt")
    torch.save({"weight": torch.ones(2)}, tmp / "plain.pt")
    return dict(tmp=tmp, audio=audio_folder)


@pytest.mark.parametrize("line", rows(WRONG))
def test_what_cannot_be_is_one_sentence_and_leaves_no_run(line, others, tiny_files, tmp_path):
    command, words = line.format(**others).split(" | ")
    script, *flags = command.split()
    told = sentence(inside(script, *small(script, tiny_files, tmp_path / "run"), *flags))
    assert words in told and told.startswith(f"{script}.py: ")
    assert not list(tmp_path.rglob("*.*t")) and not list(tmp_path.rglob("config.json"))
    assert (others["tmp"] / "theirs" / "student.pt").read_text() == "somebody's"


def test_a_toy_run_that_is_not_there_is_not_resumed(tmp_path):
    told = sentence(inside(ONE, "--toy", "--resume", "--out", tmp_path / "typo"))
    assert "typo holds no run to resume" in told and not list(tmp_path.iterdir())


def test_a_failed_start_leaves_nothing_in_the_way_and_bad_files_are_skipped(tiny_files, tmp_path):
    """8 kHz stereo among them is resampled."""
    data, out, rng = tmp_path / "data", tmp_path / "out", np.random.default_rng(0)
    data.mkdir()
    for i in range(4):
        soundfile.write(data / f"{i}.wav", 0.1 * rng.normal(size=(8_000, 2)), 8_000)
    (data / "text.wav").write_text("this is not audio")
    flags = small(ONE, tiny_files, out, steps=2)
    sentence(inside(ONE, *flags, "--teacher", "no_such"))
    assert not out.exists()
    done = inside(ONE, *flags, "--data", data)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "scan: 4 files" in done.stderr and "left out 1 (1 unreadable)" in done.stderr


def test_the_checkpoint_of_another_method_or_a_broken_one(tiny_files, tmp_path):
    flags = [*small(ONE, tiny_files, tmp_path), "--resume"]
    (tmp_path / "config.json").write_text("{}")
    for content, words in [
        ({"method": "skill", "config": {}}, "trained with other settings"),
        ({"config": {}}, "last.pt is damaged"),
        (None, "last.pt is not a readable checkpoint"),
    ]:
        torch.save(content, tmp_path / "last.pt")
        if content is None:
            (tmp_path / "last.pt").write_bytes(b"broken")
        assert words in sentence(inside(ONE, *flags))
    (tmp_path / "last.pt").unlink()  # killed before its first checkpoint
    other = '{"path": "gone.wav", "samples": 9000, "columns": {}}\n'  # of other audio
    (tmp_path / "scan.jsonl").write_text(2 * other)
    done = inside(ONE, *flags, "--steps", "1")
    assert done.returncode == 0


def test_a_bug_is_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "open_run", lambda *_: 1 / 0)
    done = inside(ONE, "--data", tmp_path, "--out", tmp_path / "o")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivision" in done.stderr


def test_the_toy_world_needs_the_folder_tests(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    common.toy.cache_clear()
    line = sentence(inside(ONE, "--toy", "--out", tmp_path / "o"))
    assert "toy.py is missing" in line


def test_a_torchaudio_that_does_not_fit_torch_is_one_sentence(tmp_path):
    (tmp_path / "torchaudio.py").write_text("raise OSError('undefined\\nsymbol')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    line = sentence(real(ROOT / "pad.py", "--toy", env=environment))
    assert f"with torch {torch.__version__} (undefined symbol): pip install" in line
