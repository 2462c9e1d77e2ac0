"""What may go wrong in the middle of a training, injected for real.

fault                      what happens                                          test
-------------------------  ----------------------------------------------------  -----------
NaN or inf in a batch      update skipped and counted; a second stops the run    not_finite
Ctrl-C, SIGTERM            saved after the update, says how to go on, code 130   signal
the same to the group      the same, loading processes go on                     group
Ctrl-C twice               ends at once, nothing saved                           twice
Ctrl-C in the evaluation   says how to go on, 130                                evaluation
SIGKILL at any moment      --resume: the same weights                            killed
a loader process dies      one sentence, --resume                                loading
a file vanishes            other audio takes its place                           goes_on
all vanish, or are cut     one sentence with a name                              files
full disk                  the old checkpoint stays                              disk
out of memory              one sentence: --accumulate, --batch-seconds           memory
an error in one of two     one sentence, both end                                (parallel)

The last one is tested in tests/test_parallel.py. After each fault but the second NaN --resume goes
on to the same bits as an unbroken run, which is looked at once for each way to stop.
"""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import METHODS, encoder_config, same, write_teacher
from test_command_line import ONE, flags_of, inside, sentence
from test_training import settings as four_layers
from tqdm import tqdm

import common

SPOILT = ("audio", "spoken")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "four.pt"
    return write_teacher(path, encoder_config(encoder_num_layers=4))


@pytest.fixture
def files(tiny_files, teacher, tmp_path):
    """The audio may be spoilt."""
    copies = {name: shutil.copytree(tiny_files[name], tmp_path / name) for name in SPOILT}
    return tiny_files | copies | dict(teacher=teacher)


def settings(name, files, out, **changes):
    """A run of 8 updates with dropout (PAD's is its speech model's), beside the audio."""
    dropout = {} if name == "pad" else dict(dropout=0.1)
    return four_layers(name, files, files["audio"].with_name(out), **dropout | changes)


def train(name, config, resume=False):
    method = importlib.import_module(name)
    return method.train(method.Config(**config), resume)


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
        zeros = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like(p))
        zeros["step"] = torch.zeros(())
        moments += [optimizer.state[p].get(key, zero).clone() for key, zero in zeros.items()]
    return [p.detach().clone() for p in parameters], moments


def sends(*numbers):
    """A function that sends this process these signals."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def log_of(config):
    with open(f"{config['out']}/log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def saved(config):
    return common.load_checkpoint(f"{config['out']}/last.pt")


def equal_runs(a, b):
    """Whether two runs agree bit for bit, in log and last.pt."""
    return log_of(a) == log_of(b) and same(saved(a), saved(b))


# ---- NaN and inf --------------------------------------------------------------------------------


def spoil(files, value):
    """Every sample of every file becomes ``value``; returns what puts the files back."""
    paths = [path for name in SPOILT for path in files[name].rglob("*.[wf][al]*[vc]")]
    kept = {path: path.read_bytes() for path in paths}
    for path in paths:
        wave = np.full(soundfile.info(path).frames, value, np.float32)
        soundfile.write(path, wave, 16_000, subtype="FLOAT", format="WAV")
    return lambda: [path.write_bytes(content) for path, content in kept.items()]


@pytest.mark.parametrize("name, value, number", [(ONE, np.nan, 1), ("pad", np.inf, 3)])
def test_update_that_is_not_finite_is_skipped_and_counted(name, value, number, files, monkeypatch):
    """Weights and moments stay, bit by bit, those of a first update zeros; the run goes on."""
    back, start = [], common.start_run

    def spoilt_first(*arguments, **parts):
        back.append(spoil(files, value))
        return start(*arguments, **parts)

    if number == 1:
        monkeypatch.setattr(common, "start_run", spoilt_first)
    spoilt = {number - 1: lambda: back.append(spoil(files, value)), number: lambda: back[0]()}
    config = settings(name, files, "run", log_every=1)
    with at(spoilt) as changed:
        train(name, config)
    assert [n for n, change in enumerate(changed, 1) if not change] == [number]
    lines = log_of(config)
    assert [(n, line["skipped"]) for n, line in enumerate(lines, 1) if "skipped" in line] == [
        (number, 1)
    ]
    assert lines[number - 1]["loss"] is None  # JSON has no NaN
    assert len(lines) == 8 and np.isfinite(lines[-1]["loss"])
    checkpoint = saved(config)
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    assert {value["step"].item() for value in checkpoint["optimizer"]["state"].values()} == {7}


def test_two_updates_that_are_not_finite_before_one_log_line_stop_the_run(files):
    config = settings(ONE, files, "run", save_every=4, log_every=4, steps=12)
    with at({5: lambda: spoil(files, np.nan)}) as changed:
        line = sentence(inside(ONE, *flags_of(config)))
    assert "not finite at update" in line and "lower --lr" in line
    assert changed == [True] * 5 + [False] * 3  # at the line of update 8
    checkpoint = saved(config)
    assert all(torch.isfinite(v).all() for v in checkpoint["state_dict"].values())
    assert checkpoint["step"] == 4


# ---- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_signal_saves_and_the_resumed_run_equals_an_unbroken_one(name, files):
    """Loading processes that are forked; those that are spawned below. The second signal comes
    late in the last update, and stops the run before what follows.
    """
    whole, broken = (settings(name, files, out, workers=1) for out in ("whole", "broken"))
    number = signal.SIGTERM if name == "pad" else signal.SIGINT
    before = signal.getsignal(number)
    train(name, whole)
    with at({2: sends(number)}), pytest.raises(SystemExit) as stop:
        train(name, broken)
    assert stop.value.code == 130 and signal.getsignal(number) == before
    assert saved(broken)["step"] == 3  # the second update was past the question
    with at({5: sends(number)}), pytest.raises(SystemExit):
        train(name, broken, resume=True)
    assert saved(broken)["step"] == 8 and same(saved(whole), saved(broken))
    train(name, broken, resume=True)
    assert equal_runs(whole, broken)


def test_windows_lacks_none_of_the_signals(files, monkeypatch):
    """The training process and a loading process do with what Windows has."""
    for name in ("SIGALRM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "setitimer"):
        monkeypatch.delattr(signal, name)
    config = settings(ONE, files, "run", workers=1)
    with at({2: sends(signal.SIGINT)}), pytest.raises(SystemExit) as stop:
        train(ONE, config)
    assert stop.value.code == 130 and saved(config)["step"] == 3


def test_signal_on_the_command_line_says_how_to_go_on(files):
    config = settings(ONE, files, "run", target_layers=(2, 4))
    with at({2: sends(signal.SIGINT)}):
        line = sentence(inside(ONE, *flags_of(config)), code=130)
    assert "saved after update 3; to go on: python distilhubert.py --data=" in line
    assert line.endswith("--resume")
    with at({2: sends(signal.SIGTERM)}):
        again = sentence(inside(ONE, *line.split()[line.split().index("python") + 2 :]), code=130)
    assert again.replace("update 6", "update 3") == line  # --resume is there once


def test_ctrl_c_twice_does_not_wait(files):
    config = settings(ONE, files, "run")
    with at({6: sends(signal.SIGINT, signal.SIGINT)}) as changed:
        line = sentence(inside(ONE, *flags_of(config)), code=130)
    assert "stopped at once" in line and len(changed) == 5 and saved(config)["step"] == 4


def test_ctrl_c_in_the_evaluation_says_how_to_go_on(files, monkeypatch):
    monkeypatch.setattr(common, "score_probes", lambda *_, **__: sends(signal.SIGINT)())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's &
    try:
        line = sentence(inside(ONE, *flags_of(settings(ONE, files, "run", steps=1))), code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped" in line and line.endswith("--resume")


def test_an_error_in_an_update_puts_the_handlers_back(files, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(common, "write_log", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:  # as a notebook keeps it
        train(ONE, settings(ONE, files, "run", workers=1))
    assert signal.getsignal(signal.SIGINT) == before and kept
    assert not [p for p in multiprocessing.active_children() if "Worker" in p.name]


def test_training_in_a_thread_leaves_signals_alone(files):
    config = settings(ONE, files, "run", steps=1)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(train, ONE, config).result()
    assert saved(config)["step"] == 1


def killed_at_last(out, flags):
    """What a process with a group of its own does: runs that get signals, and then SIGKILL."""
    os.setsid()
    sys.stdout = sys.stderr = open(out / "said", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    method, codes = importlib.import_module(ONE), {}
    method.evaluate = lambda *_, **__: {}

    def run(name, update, fault):
        sys.argv = [f"{ONE}.py", *flags, f"--out={out}/{name}"]
        with at({update: fault}), pytest.raises(SystemExit) as stop:
            method.main()
        codes[name] = stop.value.code

    def send(number):
        os.killpg(0, number)
        time.sleep(0.3)  # for what the loading process does about it

    for start, number in (
        ("fork", signal.SIGINT),
        ("fork", signal.SIGTERM),
        ("spawn", signal.SIGTERM),
    ):
        torch.multiprocessing.set_start_method(start, force=True)
        run(f"{start}-{number.name}", 2, partial(send, number))
    common.write_text(out / "codes.json", json.dumps(codes))
    torch.multiprocessing.set_start_method("fork", force=True)
    run("killed", 9, sends(signal.SIGKILL))


@pytest.fixture(scope="module")
def driven(tiny_files, teacher, tmp_path_factory):
    """Folder of the runs of killed_at_last, and the settings of them all."""
    out, files = tmp_path_factory.mktemp("driven"), tiny_files | dict(teacher=teacher)
    changes = dict(dropout=0.1, workers=1, log_every=1, steps=12, save_every=6)
    config = four_layers(ONE, files, out / "whole", **changes)
    process = multiprocessing.get_context("fork").Process(
        target=killed_at_last, args=(out, flags_of(config))
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (out / "said").read_text()[-2000:]
    train(ONE, config)
    return out, config


def test_group_of_processes_that_gets_a_signal_saves_and_exits_with_130(driven):
    """Loading processes get the signals too, and go on."""
    out, whole = driven
    codes = json.loads((out / "codes.json").read_text())
    assert len(codes) == 3 and codes == dict.fromkeys(codes, 130)
    said = (out / "said").read_text()
    assert "Traceback" not in said and said.count("stopped and saved after update 3") == 3
    for name in codes:
        broken = whole | dict(out=str(out / name))
        assert saved(broken)["step"] == 3 and len(log_of(broken)) == 3
    train(ONE, broken, resume=True)  # whose loading process was spawned
    assert equal_runs(whole, broken)


def test_killed_run_goes_on_to_the_same_bits(driven):
    """Between two checkpoints, with a loading process and dropout."""
    out, whole = driven
    broken = whole | dict(out=str(out / "killed"))
    assert saved(broken)["step"] == 6 and len(log_of(broken)) == 8
    train(ONE, broken, resume=True)
    assert equal_runs(whole, broken) and len(log_of(whole)) == 12


# ---- loading processes and files ----------------------------------------------------------------


def test_loading_process_that_dies_is_one_sentence(files):
    config = settings(ONE, files, "run", workers=1)

    def kill():
        (loader,) = multiprocessing.active_children()
        os.kill(loader.pid, signal.SIGKILL)
        time.sleep(0.5)

    with at({5: kill}):
        line = sentence(inside(ONE, *flags_of(config)))
    assert "a process that loads audio has ended" in line and "--workers" in line
    assert saved(config)["step"] == 4


def test_loading_process_ends_some_time_after_sigterm_and_ignores_ctrl_c(files):
    """Python sends SIGTERM as it exits, and waits: a process that is left over must end."""
    loader = common.load_batches(common.scan(files["audio"], None), 3.0, 1.0, 0, 0, 20, 1)
    assert loader.worker_init_fn.args == (5,)
    loader.worker_init_fn = partial(common.end_later, 0.5)
    batches = iter(loader)
    next(batches)
    (process,) = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert len(list(itertools.islice(batches, 10))) == 10
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.2)
    assert process.is_alive()
    process.join(10)
    assert process.exitcode == 0
    batches._shutdown_workers()


def test_loading_processes_end_at_once_after_an_error(files):
    """torch would wait 5 s for each of them."""
    rows = [common.Utterance(f"{i}gone.wav", 16_000, {}) for i in range(3)]
    batches, start = common.load_batches(rows, 3.0, 1.0, 0, 0, 40, 2), time.time()
    with pytest.raises(common.InputError, match="gone.wav"):
        list(common.updates(batches, 0, tqdm(None, "distil", 40)))
    assert time.time() - start < 4 and not multiprocessing.active_children()


@pytest.mark.parametrize("name", [ONE, "pad"])
def test_run_goes_on_without_a_file_that_vanishes(name, files, capfd):
    """Interrupted afterwards, it goes on to the same bits."""
    rows = common.scan(files["spoken" if name == "pad" else "audio"], None)
    kept = {Path(u.path): Path(u.path).read_bytes() for u in common.train_and_heldout(rows)[0][:2]}
    whole, broken = (settings(name, files, out) for out in ("whole", "broken"))
    for config, more in ((whole, {}), (broken, {5: sends(signal.SIGINT)})):
        for path, content in kept.items():
            path.write_bytes(content)
        with at({2: lambda: [path.unlink() for path in kept], **more}):
            with pytest.raises(SystemExit) if more else contextlib.nullcontext():
                train(name, config)
    train(name, broken, resume=True)
    assert equal_runs(whole, broken) and saved(broken)["step"] == 8
    assert "(No such file or directory): replaced by other audio" in capfd.readouterr().err


@pytest.mark.parametrize("fault, workers", [("vanishes", 0), ("is cut", 0), ("vanishes", 1)])
def test_files_that_all_vanish_or_are_cut_are_named(fault, workers, files):
    def damage():
        for path in files["audio"].iterdir():
            path.unlink() if fault == "vanishes" else os.truncate(path, 3_000)

    config = settings(ONE, files, "run", workers=workers, steps=40 if workers else 8)
    with at({5: damage}):  # loading processes are ahead, so that it goes on for a while
        line = sentence(inside(ONE, *flags_of(config)))
    assert ".wav" in line and "add --resume" in line and saved(config)["step"] >= 4


# ---- disk and memory ----------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size):
    """The kernel refuses to write beyond a size, as a full disk does, in the middle of a save."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_while_saving_keeps_the_old_checkpoint(files):
    config = settings(ONE, files, "run")
    with at({1: sends(signal.SIGINT)}), pytest.raises(SystemExit):
        train(ONE, config)
    kept = Path(f"{config['out']}/last.pt").read_bytes()
    with largest_file(len(kept) // 2):
        line = sentence(inside(ONE, *flags_of(config), "--resume"))
    assert "cannot write" in line and "last.pt (File too large)" in line and "untouched" in line
    assert Path(f"{config['out']}/last.pt").read_bytes() == kept
    assert not [name for name in os.listdir(config["out"]) if name.endswith(".tmp")]


def test_full_disk_while_logging_is_one_sentence(files):
    config = settings(ONE, files, "run", log_every=1, steps=100, save_every=100)
    with largest_file(2_500):  # enough for config.json, scan.jsonl and some lines
        line = sentence(inside(ONE, *flags_of(config)))
    assert "File too large" in line and os.listdir(config["out"]).count("last.pt") == 0
    assert inside(ONE, *flags_of(config | dict(steps=1)), "--resume").returncode == 0


@pytest.mark.parametrize("who", ["torch", "oneDNN"])
def test_memory_that_the_kernel_refuses_names_the_flags(who, files):
    config = settings(ONE, files, "run")

    def refuse():
        if who == "torch":
            torch.empty(1 << 50, dtype=torch.uint8)
        raise RuntimeError("could not create a primitive")

    with at({5: refuse}):
        line = sentence(inside(ONE, *flags_of(config)))
    assert "out of memory: add --resume and --accumulate" in line
    changed = importlib.import_module(ONE).Config(**config | dict(accumulate=3))
    assert common.changed_settings(saved(config)["config"], changed) == []
