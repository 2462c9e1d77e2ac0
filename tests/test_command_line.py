"""The scripts as a user runs them: right use, wrong use, broken input. One clear sentence each."""

import contextlib
import importlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile
import torch
from conftest import same

import common

ROOT = Path(__file__).parent.parent
SMALL = (
    "--steps 4 --save-every 2 --log-every 1 --batch-seconds 3 --workers 0 --device cpu --lr 1e-3"
).split()
CROP = ("--crop-seconds", "1")


@dataclass(frozen=True)
class Script:
    """What differs between the method files for a user at the command line."""

    counts: tuple[str, ...]  # parameters that --describe must show
    rows: tuple[str, ...] = ("teacher", "untrained", "initialised", "distilled")
    small: tuple[str, ...] = CROP  # more flags for a run of seconds on the tiny teacher
    wrong: tuple[tuple[str, str], ...] = ()  # flags that cannot be, and a word of the sentence
    speech: str = "--teacher"  # flag of the speech model; another one: --teacher reads texts
    data: str = "audio_folder"  # fixture


SCRIPTS = {
    "distilhubert.py": Script(
        counts=("23,491,200", "27,034,752"),
        wrong=(
            ("--target-layers 4,13", "--target-layers"),
            ("--target-layers 0", "--target-layers"),
            ("--student-layers 0", "--student-layers"),
            ("--student-layers 13", "--no-init-from-teacher"),
        ),
    ),
    "gendistiller.py": Script(
        counts=("24,090,024", "7,088,404"),
        wrong=(
            ("--target-layers 4,13", "--target-layers"),
            ("--target-layers 4,4,8", "--target-layers"),
            ("--skip residual", "--skip"),
            ("--variant recurrent --no-layer-mask", "--layer-mask"),
            ("--variant recurrent --student-layers 3", "--student-layers"),
            ("--variant parallel --history teacher", "--history"),
            ("--student-layers 0", "--student-layers"),
            ("--student-layers 13", "--no-init-from-teacher"),
        ),
    ),
    "lstm_dkd.py": Script(
        counts=("18,775,808", "18,781,952", "384,500"),
        small=(*CROP, "--hidden", "8"),
        wrong=(
            ("--tau 0", "--tau"),
            ("--hidden 0", "--hidden"),
            ("--unidirectional --student transformer", "--unidirectional"),
            ("--hidden 13 --student transformer", "--hidden"),
            ("--ce-weight 0 --loss ce", "--ce-weight"),
            ("--labels none.km", "none.km"),
            ("--teacher hubert_base", "cluster head"),
            ("--teacher hubert_large_ll60k.pt", "does not exist"),
            ("--teacher no_such_name", "does not exist"),
        ),
    ),
    "skill.py": Script(
        counts=("94,381,680", "23,595,420"),
        rows=("teacher", "untrained", "pruned", "distilled"),
        small=(*CROP, "--tolerance", "1", "--calibration-utterances", "4"),
        wrong=(
            ("--sparsity 0.999", "--sparsity"),
            ("--groups 0/4/13", "--groups"),
            ("--groups 4/4", "--groups"),
            ("--groups x", "--groups"),
            ("--clusters 13", "--clusters"),
            ("--seeds 2 --stage prune", "leave --stage out"),
        ),
    ),
    "pad.py": Script(
        counts=("94,370,944", "108,891,648", "7,087,872"),
        rows=("text teacher", "speech model", "distilled"),
        small=("--longest-seconds", "2", "--widths", "2,4,8"),
        wrong=(
            ("--prior uniform", "--anchors even"),
            ("--widths 0,4", "--widths"),
            ("--label-shares 0", "--label-shares"),
            ("--hours 0", "--hours"),
            ("--longest-seconds 0.1", "raise --longest-seconds"),
            ("--teacher no_such", "no_such has no config.json"),
        ),
        speech="--student",
        data="spoken",
    ),
}
ONE = "distilhubert.py"  # what common.py alone does is tried through one script


def small(script, data, teacher, out):
    """Flags of a run of seconds. A text model stands beside the tiny speech model; if that is
    the --teacher, the last one named counts.
    """
    models = ["--teacher", Path(teacher).with_name("bert"), SCRIPTS[script].speech, teacher]
    return ["--data", data, *models, "--out", out, *SMALL, *SCRIPTS[script].small]


def run(script, *flags, cwd=None, **settings):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    environment |= settings.pop("environment", {})
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
        **settings,
    )


def inside(script, *flags):
    """The same without a new process, which would spend seconds on importing torch."""
    module = importlib.import_module(script.removesuffix(".py"))
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [script, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            common.run(module.main)
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):  # as the interpreter does at its end
            stderr.write(code + "\n")
            code = 1
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(flags, code, stdout.getvalue(), stderr.getvalue())


def sentence(done, code=1):
    """The single line of a user's mistake on stderr; progress bars aside, nothing else is there."""
    assert done.returncode == code, done.stderr[-1500:]
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().replace("\r", "\n").splitlines()[-1]
    assert done.stdout == ""
    return line


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def data(script, request):
    """Audio to distil on, with transcripts where the method needs them."""
    return request.getfixturevalue(SCRIPTS[script].data)


@pytest.fixture(scope="module")
def finished(script, tiny_teacher, data, tmp_path_factory):
    """A finished small run."""
    out = tmp_path_factory.mktemp("run") / "run"
    done = run(script, *small(script, data, tiny_teacher, out))
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done


def test_help_works_offline_and_shows_every_default(script):
    done = inside(script, "--help")
    assert done.returncode == 0
    for flag in (
        "--toy",
        "--data",
        "--resume",
        "--claim",
        "--describe",
        "--evaluate",
        "--task-data",
    ):
        assert flag in done.stdout
    default = importlib.import_module(script.removesuffix(".py")).Config().lr
    assert f"[{default}]" in done.stdout and "--no-amp" in done.stdout


def test_describe_prints_the_paper_size_student(script):
    done = inside(script, "--describe")
    assert done.returncode == 0
    for count in SCRIPTS[script].counts:
        assert count in done.stdout


def test_run_folder_is_complete_and_the_table_is_printed(script, finished):
    out, done = finished
    for name in (
        "config.json",
        "log.jsonl",
        "last.pt",
        "student.pt",
        "results.json",
        "results.txt",
    ):
        assert (out / name).stat().st_size > 0, name
    for row in SCRIPTS[script].rows:
        assert f"| {row} " in done.stdout
    assert done.stdout.strip() in (out / "results.txt").read_text()
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").open()] == [1, 2, 3, 4]
    assert json.loads((out / "config.json").read_text())["steps"] == 4
    assert not list(out.glob(".*.tmp"))


def test_resume_of_a_finished_run_changes_nothing_and_prints_the_table(
    script, finished, tiny_teacher, data
):
    out, _ = finished
    before = (out / "student.pt").read_bytes()
    done = inside(script, *small(script, data, tiny_teacher, out), "--resume")
    assert done.returncode == 0 and "distilled" in done.stdout
    assert torch.load(out / "student.pt", weights_only=True)["config"]["steps"] == 4
    assert (out / "student.pt").read_bytes() == before


def test_importing_the_scripts_does_nothing(tmp_path):
    names = ", ".join(script[:-3] for script in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_evaluate_probes_a_student_file(script, finished, tmp_path):
    manifest = labelled_manifest(tmp_path)
    out, _ = finished
    done = inside(script, "--evaluate", out / "student.pt", "--task-data", manifest)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "speaker" in done.stdout and "colour" in done.stdout
    done = inside(
        script, "--evaluate", out / "student.pt", "--task-data", manifest, "--task", "speaker"
    )
    assert "speaker" in done.stdout and "colour" not in done.stdout


def labelled_manifest(folder):
    lines, rng = ["path\tspeaker\tsplit\tsid_split\tlabel\tlabel_kind"], np.random.default_rng(0)
    for i in range(24):
        pitch, part = (200, 900)[i % 2], ("train", "train", "dev", "test")[i // 2 % 4]
        wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(8000) / 16000) + 0.01 * rng.normal(
            size=8000
        )
        soundfile.write(folder / f"{i}.wav", wave, 16000)
        lines.append(f"{i}.wav\ts{i % 2}\t{part}\t{part}\tred{i % 2}\tcolour")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.tsv"


def test_seeds_and_claim_print_means_and_keep_apart(script, tiny_teacher, data, tmp_path):
    base = small(script, data, tiny_teacher, tmp_path / "o")
    done = inside(script, *base, "--seeds", "2")
    assert done.returncode == 0, done.stderr[-1000:]
    assert ("±" in done.stdout) == (script != "pad.py")  # whose table is of probes: no label here
    assert "distilled" in done.stdout
    assert len(list((tmp_path / "o" / "seeds").glob("distilled-seed-*"))) == 2
    done = inside(script, *base, "--claim", "--seeds", "1")
    assert done.returncode == 0, done.stderr[-1000:]
    claim = importlib.import_module(script.removesuffix(".py")).CLAIM
    assert claim
    for row in (*SCRIPTS[script].rows, *claim):
        assert f"| {row} " in done.stdout
    again = inside(script, *base, "--claim", "--seeds", "1", "--resume")
    assert again.stdout == done.stdout and "distil:" not in again.stderr  # nothing is done twice
    line = sentence(inside(script, *base, "--claim", "--seeds", "1", "--resume", "--clip", "0.5"))
    assert "--clip" in line
    assert inside(script, *base, "--seeds", "0").returncode == 2


@pytest.mark.parametrize("script", [ONE, "skill.py"], scope="module")
def test_sigkill_and_resume_give_the_weights_and_log_of_an_unbroken_run(
    script, tiny_teacher, data, tmp_path
):
    """A real SIGKILL between two checkpoints, twice, with loader workers and dropout on.

    One training and several; that each method resumes to the same bits stands in its own tests.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["--steps", 48, "--save-every", 8, "--workers", 1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(out, *flags):
        flags = [*small(script, data, tiny_teacher, out), *more, *flags]
        return [sys.executable, str(ROOT / script), *map(str, flags)]

    unbroken = subprocess.Popen(
        command(whole), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    )
    for kill_after in (8, 24):
        resume = ["--resume"] if (broken / "last.pt").exists() else []
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        process = subprocess.Popen(command(broken, *resume), **quiet)
        log, deadline = broken / "log.jsonl", time.time() + 120
        while time.time() < deadline and process.poll() is None:
            lines = log.read_text().splitlines() if log.exists() else []
            steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
            if steps and steps[-1] > kill_after:  # past a checkpoint, inside the next stretch
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        assert common.load_checkpoint(broken / "last.pt")["step"] >= kill_after
    done = run(script, *command(broken, "--resume")[2:])
    assert done.returncode == 0, done.stderr[-2000:]
    said, _ = unbroken.communicate(timeout=300)
    assert unbroken.returncode == 0, said[-2000:]

    assert (broken / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    ours, theirs = (common.load_checkpoint(out / "last.pt") for out in (broken, whole))
    assert ours["step"] == 48 and same(ours, theirs)


@pytest.mark.parametrize(
    "script", [name for name in SCRIPTS if name != "skill.py"], scope="module"
)  # two trainings with rates of their own: tests/test_skill.py
def test_the_flags_of_the_optimizer_reach_it(script, tiny_teacher, data, tmp_path, monkeypatch):
    rates, clips, groups = [], [], []
    clip = torch.nn.utils.clip_grad_norm_

    class Spy(torch.optim.AdamW):
        def step(self, *args, **settings):
            rates.append(self.param_groups[0]["lr"])
            groups[:] = self.param_groups
            return super().step(*args, **settings)

    def clip_spy(parameters, norm):
        clips.append(norm)
        return clip(parameters, norm)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_spy)
    flags = "--betas 0.8,0.95 --eps 1e-5 --clip 0.7 --weight-decay 0.03 --warmup 0.5"
    base = small(script, data, tiny_teacher, tmp_path / "run")
    done = inside(script, *base, *flags.split(), "--lr", 1e-3)
    assert done.returncode == 0, done.stderr[-1000:]
    assert rates[:4] == pytest.approx([5e-4, 1e-3, 5e-4, 0.0])
    assert clips and set(clips) == {0.7}
    assert groups[0]["betas"] == (0.8, 0.95) and groups[0]["eps"] == 1e-5
    assert groups[0]["weight_decay"] == 0.03 and groups[1]["weight_decay"] == 0.0


# ---- wrong use ----------------------------------------------------------------------------------


def test_no_flags_names_both_ways_on_and_exits_with_2(script):
    line = sentence(run(script) if script == ONE else inside(script), code=2)
    assert "--toy" in line and "--data" in line


def test_unknown_flag_and_bad_values_exit_with_2(script):
    for flags in (["--toy", "--no-such-flag"], ["--toy", "--steps", "many"], ["--toy", "--amp=1"]):
        done = inside(script, *flags)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) <= 3


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--steps", "0"], "--steps"),
        (["--accumulate", "0"], "--accumulate"),
        (["--batch-seconds", "0.01"], "--batch-seconds"),
        (["--device", "cuda:77"], "--device"),
        (["--device", "toaster"], "--device"),
        (["--save-every", "0"], "--save-every"),
        (["--log-every", "-1"], "--log-every"),
        (["--lr", "-1"], "--lr"),
        (["--workers", "-1"], "--workers"),
        (["--dropout", "1.5"], "--dropout"),
        (["--betas", "0.9"], "--betas"),
        (["--seed", str(2**64)], "--seed"),
    ],
)
def test_impossible_settings_are_named(flags, words, tiny_teacher, audio_folder, tmp_path):
    base = small(ONE, audio_folder, tiny_teacher, tmp_path / "r")
    assert words in sentence(inside(ONE, *base, *flags))


@pytest.mark.parametrize(
    "name, flags, words",
    [(name, *case) for name, script in SCRIPTS.items() for case in script.wrong],
)
def test_impossible_settings_of_a_method_are_named(
    name, flags, words, tiny_teacher, request, tmp_path
):
    data = request.getfixturevalue(SCRIPTS[name].data)
    base = small(name, data, tiny_teacher, tmp_path / "r")
    assert words in sentence(inside(name, *base, *flags.split()))
    assert not (tmp_path / "r" / "config.json").exists()


def test_missing_folder_empty_folder_and_folder_without_audio(script, tmp_path):
    out = tmp_path / "o"
    line = sentence(inside(script, "--data", tmp_path / "none", "--out", out))
    assert "does not exist" in line and not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    line = sentence(inside(script, "--data", tmp_path / "empty", "--out", out))
    assert "holds no .wav" in line
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no audio")
    line = sentence(inside(script, "--data", tmp_path / "texts", "--out", tmp_path / "p"))
    assert "1 x .txt" in line


def test_only_broken_audio_says_what_was_found(script, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "text.wav").write_text("this is not audio")
    soundfile.write(data / "short.wav", 0.1 * np.ones(160), 16000)
    noise = np.random.default_rng(0).normal(size=32000) * 0.1
    soundfile.write(data / "cut.flac", noise, 16000)
    whole = (data / "cut.flac").read_bytes()
    (data / "cut.flac").write_bytes(whole[: len(whole) // 2])
    line = sentence(inside(script, "--data", data, "--out", tmp_path / "out"))
    assert "3 files looked at" in line and "unreadable" in line and "too short" in line


def test_a_failed_start_leaves_no_run_folder_in_the_way(script, tiny_teacher, data, tmp_path):
    out = tmp_path / "out"
    sentence(inside(script, "--data", tmp_path / "none", "--out", out))
    sentence(inside(script, "--data", data, SCRIPTS[script].speech, "no_such", "--out", out))
    done = inside(script, *small(script, data, tiny_teacher, out))
    assert done.returncode == 0, done.stderr[-1000:]


def test_mixed_folder_skips_the_bad_and_takes_8_khz_stereo(script, tiny_teacher, tmp_path):
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    for i in range(4):
        soundfile.write(data / f"{i}.wav", 0.1 * rng.normal(size=(8000, 2)), 8000)
    (data / "text.wav").write_text("this is not audio")
    soundfile.write(data / "ten_ms.wav", 0.1 * np.ones(160), 16000)
    (data / "all.trans.txt").write_text("0 STOP\n1 LIGHTS ON\n2 STOP\n3 LIGHTS ON\n")
    done = inside(script, *small(script, data, tiny_teacher, tmp_path / "o"))
    assert done.returncode == 0, done.stderr[-1000:]
    assert "scan: 4 files" in done.stderr
    assert "skipped 2" in done.stderr and "ten_ms.wav (too short)" in done.stderr


def test_unknown_teacher_and_broken_teacher_files(script, data, tmp_path):
    speech = SCRIPTS[script].speech
    line = sentence(inside(script, "--data", data, speech, "hubert_bass", "--out", tmp_path / "a"))
    assert "hubert_bass" in line and "hubert_base" in line
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    line = sentence(
        inside(
            script,
            "--data",
            data,
            speech,
            tmp_path / "bad.pt",
            "--out",
            tmp_path / "b",
        )
    )
    assert "not a readable checkpoint" in line


def test_student_files_that_are_none(script, finished, tmp_path):
    manifest = labelled_manifest(tmp_path)
    out, _ = finished
    cases = {
        "missing.pt": "does not exist",
        "other.pt": "another.py",
        "plain.pt": "no student",
    }
    torch.save({"method": "another", "state_dict": {}}, tmp_path / "other.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pt")
    cut = (out / "student.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(cut[: len(cut) // 2])
    for name, words in (cases | {"cut.pt": "not a readable checkpoint"}).items():
        line = sentence(inside(script, "--evaluate", tmp_path / name, "--task-data", manifest))
        assert words in line
    student = out / "student.pt"
    assert "--task-data" in sentence(inside(script, "--evaluate", student))
    line = sentence(
        inside(script, "--evaluate", student, "--task-data", manifest, "--task", "cats")
    )
    assert "cats" in line and "speaker" in line


def test_out_folder_of_another_run_is_not_touched(script, finished, tiny_teacher, data):
    out, _ = finished
    base = small(script, data, tiny_teacher, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "--resume" in sentence(inside(script, *base))
    line = sentence(inside(script, *base, "--resume", "--seed", "5", "--clip", "0.5"))
    assert "--seed" in line and "--clip" in line
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_audio_without_transcripts_has_nothing_to_align(tiny_teacher, audio_folder, tmp_path):
    base = small("pad.py", audio_folder, tiny_teacher, tmp_path / "run")
    line = sentence(inside("pad.py", *base))
    assert "transcripts are needed, *.trans.txt beside the audio" in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_resume_without_a_run(script, audio_folder, tmp_path):
    line = sentence(inside(script, "--data", audio_folder, "--resume", "--out", tmp_path / "none"))
    assert "no run" in line


def test_files_of_others_are_not_overwritten(script, tiny_teacher, data, tmp_path):
    (tmp_path / "student.pt").write_text("somebody's")
    line = sentence(inside(script, *small(script, data, tiny_teacher, tmp_path)))
    assert "student.pt" in line and (tmp_path / "student.pt").read_text() == "somebody's"


def test_a_world_of_processes_that_torchrun_did_not_make(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in sentence(inside(ONE, "--data", tmp_path, "--out", tmp_path / "o"))


def test_toy_where_nothing_can_be_written(script):
    assert "/proc/none" in sentence(inside(script, "--toy", "--out", "/proc/none"))


def test_broken_checkpoint_in_the_run_folder(script, tiny_teacher, data, tmp_path):
    base = small(script, data, tiny_teacher, tmp_path / "run")
    assert inside(script, *base).returncode == 0
    (tmp_path / "run" / "last.pt").write_bytes(b"broken")
    assert "last.pt is not a readable checkpoint" in sentence(inside(script, *base, "--resume"))


@pytest.mark.parametrize("script", [ONE], scope="module")  # all of them save in the same words
def test_full_disk_while_saving_keeps_the_old_checkpoint(script, tiny_teacher, data, tmp_path):
    """The kernel refuses to write beyond a size, as a full disk does, in the middle of a save."""
    out = tmp_path / "run"
    base = small(script, data, tiny_teacher, out)
    done = inside(script, *base, "--steps", "2")
    assert done.returncode == 0
    kept = (out / "last.pt").read_bytes()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"steps": 4}))
    limit = len(kept) // 2

    def tighten():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    line = sentence(run(script, *base, "--resume", preexec_fn=tighten))
    assert "cannot write" in line and "File too large" in line and "untouched" in line
    assert (out / "last.pt").read_bytes() == kept
    assert not list(out.glob(".*.tmp"))
    assert inside(script, *base, "--resume").returncode == 0  # room again: it goes on to the end


def test_benchmark_times_training_steps_and_features(audio_folder):
    """One of the methods: each is a paper-size model, and all of them take a minute."""
    small = "--methods distilhubert --batch 1 --seconds 0.5 --rounds 1 --utterance 1".split()
    done = run("tests/benchmark.py", *small, "--data", audio_folder, "--workers", "1")
    assert done.returncode == 0, done.stderr[-1000:]
    for part in ("teacher %", "backward %", "TFLOP/s", "all hidden states", "HuBERT Base"):
        assert part in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| distilhubert ")]
    cells = [[float(x.replace(",", "")) for x in row.split("|")[2:-1]] for row in rows]
    whole, from_files, _ = cells
    assert whole[-1] == pytest.approx(200_000 * 290 / whole[0] / 3600, rel=1e-3)  # recipe h
    ready, files, ratio = from_files
    assert ratio == pytest.approx(files / ready, rel=0.01)


def test_benchmark_indexes_a_tree_of_links(audio_folder):
    done = run("tests/benchmark.py", "--index", audio_folder, "--hours", "0.1", "--rounds", "1")
    assert done.returncode == 0, done.stderr[-1000:]
    files = re.search(r"\| 0\.1 h \| +(\d+) \|", done.stdout)
    assert 200 < int(files[1]) < 720  # of 0.5 to 1.5 s


@dataclass
class Choices:
    data: str = ""  # folder
    loss: Literal["kd", "ce"] = "kd"  # which (ours)


def test_flags_with_choices_take_these_and_no_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--data", "d", "--loss", "ce"])
    assert common.parse_flags(Choices, {}, "doc")[0].loss == "ce"
    monkeypatch.setattr(sys, "argv", ["x.py", "--data", "d", "--loss", "mse"])
    with pytest.raises(SystemExit) as stop:
        common.parse_flags(Choices, {}, "doc")
    assert stop.value.code == 2 and "'kd', 'ce'" in capsys.readouterr().err
