"""What may go wrong in the middle of a training, injected for real.

fault                      injected how                    what happens                  test
-------------------------  ------------------------------  ----------------------------  -----------
NaN or inf in a batch      the audio files are rewritten   update skipped and counted;   skipped,
                           for one update, or for two      a second one stops the run    stops
Ctrl-C, SIGTERM            the signal, to itself           saved after the update, says  signal
                                                           how to go on, exit code 130
Ctrl-C in a terminal, or   SIGINT and SIGTERM to the       the same                      terminal
the end of a batch job     process group, with loaders
Ctrl-C twice               SIGINT twice in one update      ends at once, nothing saved   twice
Ctrl-C in the evaluation   SIGINT                          says how to go on, 130        evaluation
a loader process dies      SIGKILL to it                   one sentence, --resume        loader
a file vanishes            it is deleted                   one sentence with its name,   file
a file is cut short        half of it is left              --resume once it is back      file
out of memory              RLIMIT_AS: the kernel refuses   one sentence that names       memory
                           to give more                    --accumulate, --batch-seconds
killed at any moment       SIGKILL                         --resume: the same weights    (below)
full disk                  RLIMIT_FSIZE                    the old checkpoint stays      (below)
one of several processes   SIGKILL                         the others end                (below)
an error in one of them    wrong settings                  one sentence, all end         (below)

The last four are tested in tests/test_command_line.py and tests/test_parallel.py.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import METHODS, same

import common

ROOT = Path(__file__).parent.parent
ONE = "distilhubert"  # what common.py alone does is tried through one method


@pytest.fixture
def files(audio_folder, spoken, tmp_path):
    """Copies, which may be spoilt."""
    shutil.copytree(audio_folder, tmp_path / "audio")
    shutil.copytree(spoken, tmp_path / "spoken")
    return tmp_path


def settings(name, files, teacher, out, **changes):
    """A run of seconds, with dropout."""
    bert = Path(teacher).with_name("bert")
    small = dict(data=files / "audio", teacher=teacher, out=files / out, device="cpu", workers=0)
    small |= dict(steps=8, batch_seconds=3.0, lr=1e-3, log_every=2, save_every=4)
    own = {
        "lstm_dkd": dict(hidden=8),
        "skill": dict(tolerance=1.0, gate_lr=0.1, calibration_utterances=4),
        "pad": dict(data=files / "spoken", teacher=bert, student=teacher, longest_seconds=2.0),
    }.get(name, {})
    own |= {} if name == "pad" else dict(crop_seconds=1.0)
    settings = small | own | changes
    return {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}


def train(name, settings, resume=False):
    method = importlib.import_module(name)
    return method.train(method.Config(**settings), resume)


def command(settings, *more):
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()] + [*more]


def shell(settings, *more):
    """The script as from the command line, in this process: exit code and what it says last."""
    module, stderr, code = importlib.import_module(ONE), io.StringIO(), 0
    argv, sys.argv = sys.argv, [f"{ONE}.py", *command(settings, *more)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            common.run(module.main)
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            stderr.write(code + "\n")
            code = 1
    finally:
        sys.argv = argv
    return code, stderr.getvalue().strip().replace("\r", "\n").splitlines()[-1]


@contextlib.contextmanager
def at(updates):
    """Call ``updates[n]`` in the optimizer's n-th update of the run, before it does anything."""
    step, count = torch.optim.AdamW.step, []

    def spy(self, *arguments):
        count.append(1)
        before = state(self)
        updates.get(len(count), lambda: None)()
        result = step(self, *arguments)
        spy.changed.append(not same(before, state(self)))
        return result

    spy.changed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        yield spy.changed


def state(optimizer):
    """Copies of all weights and moments of an optimizer, zeros where it has none so far."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = []
    for p in parameters:
        zeros = dict(
            exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=torch.zeros(())
        )
        moments += [optimizer.state[p].get(key, zero).clone() for key, zero in zeros.items()]
    return [p.detach().clone() for p in parameters], moments


def spoil(files, value):
    """Every sample of every file becomes ``value``; returns what puts the files back."""
    paths = [*files.rglob("*.wav"), *files.rglob("*.flac")]
    kept = {path: path.read_bytes() for path in paths}
    for path in paths:
        samples = soundfile.info(path).frames
        wave = np.full(samples, value, np.float32)
        soundfile.write(path, wave, 16_000, subtype="FLOAT", format="WAV")
    return lambda: [path.write_bytes(content) for path, content in kept.items()]


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def equal_runs(a, b):
    """Whether two finished runs agree bit for bit, in log and last.pt."""
    ours, theirs = (common.load_checkpoint(Path(out) / "last.pt") for out in (a, b))
    return log_of(a) == log_of(b) and same(ours, theirs)


# ---- NaN and inf --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_skipped_is_an_update_with_a_gradient_that_is_not_finite(name, files, tiny_teacher):
    """The third one: weights and moments stay, bit by bit; the log counts it; the run goes on."""
    config = settings(name, files, tiny_teacher, "run")
    back = []
    value = np.inf if name == "lstm_dkd" else np.nan
    spoilt = {2: lambda: back.append(spoil(files, value)), 3: lambda: back[0]()}
    with at(spoilt) as changed:
        train(name, config)
    assert [n for n, change in enumerate(changed, 1) if not change] == [3]
    lines = log_of(files / "run")
    assert [line["step"] for line in lines if "skipped" in line] == [4]
    assert [line["skipped"] for line in lines if "skipped" in line] == [1]
    assert lines[-1]["step"] == 8 and np.isfinite(lines[-1]["loss"])
    weights = torch.load(files / "run" / "student.pt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_skipped_update_leaves_the_statistics_of_a_causal_student(files, tiny_teacher):
    config = settings("lstm_dkd", files, tiny_teacher, "run", unidirectional=True)
    back = []
    with at({2: lambda: back.append(spoil(files, np.inf)), 3: lambda: back[0]()}):
        train("lstm_dkd", config)
    state = torch.load(files / "run" / "student.pt", weights_only=True)["state_dict"]
    assert any(name.endswith("running_mean") for name in state)  # of BatchNorm
    assert all(torch.isfinite(value).all() for value in state.values())


def test_skipped_first_update_starts_as_if_it_had_not_been(files, tiny_teacher):
    """The moments are made by the first update, and must be zeros if that one is skipped."""
    back = []
    load = common.load_teacher

    def spoil_first(*arguments):
        back.append(spoil(files, np.nan))
        return load(*arguments)

    with pytest.MonkeyPatch.context() as patch, at({1: lambda: back[0]()}) as changed:
        patch.setattr(common, "load_teacher", spoil_first)
        train(ONE, settings(ONE, files, tiny_teacher, "run", steps=2, log_every=1))
    assert changed == [False, True]
    log = log_of(files / "run")
    assert [line.get("skipped") for line in log] == [1, None]
    assert log[0]["loss"] is None and np.isfinite(log[1]["loss"])  # JSON has no NaN
    moments = common.load_checkpoint(files / "run" / "last.pt")["optimizer"]["state"]
    assert all(value["step"] == 1 for value in moments.values())


@pytest.mark.parametrize("log_every", [1, 4])
def test_stops_when_a_second_update_is_not_finite(log_every, files, tiny_teacher):
    config = settings(ONE, files, tiny_teacher, "run", save_every=2, log_every=log_every, steps=12)
    kept, saved = files / "run" / "last.pt", []

    def wrong():
        spoil(files, np.nan)
        saved.append(kept.read_bytes())

    with at({5: wrong}) as changed, pytest.raises(common.InputError, match="not finite at update"):
        train(ONE, config)
    assert changed[5:] == [False] * len(changed[5:]) and 7 <= len(changed) <= 8
    checkpoint = common.load_checkpoint(kept)
    assert all(torch.isfinite(v).all() for v in checkpoint["state_dict"].values())
    assert common.load_checkpoint(kept)["step"] <= 6


# ---- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_signal_saves_and_the_resumed_run_equals_an_unbroken_one(name, files, tiny_teacher):
    whole, broken = (settings(name, files, tiny_teacher, out) for out in ("whole", "broken"))
    train(name, whole)
    number = signal.SIGTERM if name == "pad" else signal.SIGINT
    before = signal.getsignal(number)
    with at({2: lambda: os.kill(os.getpid(), number)}), pytest.raises(KeyboardInterrupt) as stop:
        train(name, broken)
    assert "after update 3" in str(stop.value)  # the second one was past the question
    assert signal.getsignal(number) == before
    assert common.load_checkpoint(files / "broken" / "last.pt")["step"] == 3
    train(name, broken, resume=True)
    assert equal_runs(files / "whole", files / "broken")


@pytest.mark.parametrize("name, last", [("pad", 8), ("skill", 5)])  # SKILL's act 3 ends with 5
def test_signal_late_in_the_last_update_stops_before_what_follows(name, last, files, tiny_teacher):
    whole, broken = (settings(name, files, tiny_teacher, out) for out in ("whole", "broken"))
    train(name, whole)
    with at({last: lambda: os.kill(os.getpid(), signal.SIGINT)}):
        with pytest.raises(KeyboardInterrupt, match=f"saved after update {last}"):
            train(name, broken)
    assert common.load_checkpoint(files / "broken" / "last.pt")["step"] == last
    train(name, broken, resume=True)
    assert equal_runs(files / "whole", files / "broken")


def test_signal_on_the_command_line_says_how_to_go_on(files, tiny_teacher):
    config = settings(ONE, files, tiny_teacher, "run", workers=1)
    with at({2: lambda: os.kill(os.getpid(), signal.SIGINT)}):
        code, line = shell(config)
    assert code == 130 and "update 3" in line and "go on: python distilhubert.py --data" in line
    assert line.endswith("--resume")
    code, line = shell(config, "--resume")
    assert code == 0
    assert common.load_checkpoint(files / "run" / "last.pt")["step"] == 8


def test_twice_does_not_wait(files, tiny_teacher):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with at({6: twice}) as changed:
        code, line = shell(settings(ONE, files, tiny_teacher, "run"))
    assert code == 130 and "at once" in line and len(changed) == 5
    assert common.load_checkpoint(files / "run" / "last.pt")["step"] == 4


def test_evaluation_stops_as_usual(files, tiny_teacher, monkeypatch):
    monkeypatch.setattr(common, "run_probes", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &
    try:
        code, line = shell(settings(ONE, files, tiny_teacher, "run", steps=2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and line.endswith("--resume")


def test_terminal_sends_the_signal_to_all_its_processes(files, tiny_teacher):
    """Real processes in a group of their own; the loaders get the signals too, and go on.

    Under torchrun both arrive, the one of the terminal and the one that torchrun sends.
    """
    whole, broken = (
        settings(ONE, files, tiny_teacher, out, steps=200, workers=2, save_every=100, log_every=1)
        for out in ("whole", "broken")
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{ONE}.py"), *command(broken)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
    )
    log, deadline = files / "broken" / "log.jsonl", time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") > 5:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said[-2000:]
    assert "Traceback" not in said and "stopped and saved after update" in said
    stopped = common.load_checkpoint(files / "broken" / "last.pt")["step"]
    assert 5 < stopped < 100 and len(log_of(files / "broken")) == stopped
    with at({100 - stopped: lambda: os.kill(os.getpid(), signal.SIGTERM)}):
        with pytest.raises(KeyboardInterrupt):
            train(ONE, broken, resume=True)
    with at({100: lambda: os.kill(os.getpid(), signal.SIGTERM)}), pytest.raises(KeyboardInterrupt):
        train(ONE, whole)
    assert equal_runs(files / "whole", files / "broken")


# ---- loader, files, memory ----------------------------------------------------------------------


def test_loader_process_that_dies_is_one_sentence(files, tiny_teacher):
    whole, broken = (settings(ONE, files, tiny_teacher, out) for out in ("whole", "broken"))
    train(ONE, whole)
    others = set(multiprocessing.active_children())  # of other tests

    def kill():
        (loader,) = set(multiprocessing.active_children()) - others
        os.kill(loader.pid, signal.SIGKILL)
        time.sleep(0.5)

    with at({5: kill}):
        code, line = shell(broken | dict(workers=1, steps=8, batch_seconds=3.0))
    assert code == 1 and "loads audio" in line and "--resume" in line and "--workers" in line
    assert common.load_checkpoint(files / "broken" / "last.pt")["step"] == 4
    train(ONE, broken, resume=True)
    ours, theirs = (log_of(files / out) for out in ("broken", "whole"))
    assert ours == theirs


def test_loaders_that_are_left_over_do_not_keep_the_program_from_ending(files):
    """Python sends them SIGTERM as it exits, and waits for them."""
    code = (
        "import sys, common; rows = common.scan(sys.argv[1], sys.argv[2], 0)\n"
        "kept = iter(common.load_batches(rows, 3.0, 1.0, 0, 0, None, 2)); next(kept)\n"
        "sys.kept = kept\n"
    )
    command = [sys.executable, "-c", code, str(files / "audio"), str(files / "left.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]


def test_loaders_end_at_once_after_an_error(files):
    """torch would wait 5 s for each of them."""
    code = (
        "import sys, common; rows = common.scan(sys.argv[1], sys.argv[2], 0)\n"
        "rows.append(common.Utterance('gone.wav', 16_000))\n"
        "loader = common.load_batches(rows, 3.0, 1.0, 0, 0, 40, 3)\n"
        "try: list(common.Updates(loader, 'distil', 0, 40))\n"
        "except common.InputError as error: sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", code, str(files / "audio"), str(files / "error.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append((line, time.time()))
        process.wait(timeout=60)
    assert process.returncode == 1 and "gone.wav" in said[-1][0]
    assert time.time() - said[-1][1] < 4


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["vanishes", "is cut"])
def test_file_that_vanishes_or_is_cut_is_named(fault, workers, files, tiny_teacher):
    whole, broken = (settings(ONE, files, tiny_teacher, out) for out in ("whole", "broken"))
    train(ONE, whole)
    kept = {path: path.read_bytes() for path in (files / "audio").iterdir()}

    def damage():
        for path, content in kept.items():
            path.unlink() if fault == "vanishes" else path.write_bytes(content[:3_000])

    with at({3: damage}):
        code, line = shell(broken | dict(workers=workers), *(["--steps=40"] if workers else []))
    assert code == 1 and ".wav" in line and "goes on with --resume" in line
    for path, content in kept.items():
        path.write_bytes(content)
    if not workers:  # loaders are ahead, so that it goes on for a while
        train(ONE, broken, resume=True)
        assert equal_runs(files / "whole", files / "broken")


TIGHT = """
import resource, sys
sys.path.insert(0, {root!r})
import common, distilhubert

targets = distilhubert.target_states


def tighten(*arguments):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (4 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return targets(*arguments)


distilhubert.target_states = tighten
common.run(distilhubert.main)
"""


def test_memory_that_the_kernel_refuses_names_the_flags(files, tiny_teacher):
    """A process of its own, because torch and oneDNN do not forget that there was none."""
    long = files / "long"
    long.mkdir()
    for i in range(4):
        wave = np.random.default_rng(i).standard_normal(15 * 16_000) * 0.1
        soundfile.write(long / f"{i}.wav", wave, 16_000)
    config = settings(ONE, files, tiny_teacher, "run", steps=2, save_every=1)
    config |= dict(data=str(long), batch_seconds=45.0, crop_seconds=15.0)
    stop = {2: lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]}  # at once
    with at(stop), pytest.raises(KeyboardInterrupt):
        train(ONE, config)
    code = TIGHT.format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code, *command(config, "--resume")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    line = done.stderr.strip().replace("\r", "\n").splitlines()[-1]
    assert done.returncode == 1 and "--accumulate" in line and "--batch-seconds" in line, line
    assert common.load_checkpoint(files / "run" / "last.pt")["step"] == 1
    train(ONE, config | dict(accumulate=3), resume=True)  # as the sentence says
    assert common.load_checkpoint(files / "run" / "last.pt")["step"] == 2
