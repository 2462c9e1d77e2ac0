"""Several processes train as one: same weights, one writer, no one left waiting.

Two processes are started once, for all five methods, because importing torch takes longer than
what they do; what they left is looked at below. On CPUs, with gloo.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import METHODS, tiny_run

import common

ROOT = Path(__file__).parent.parent


def train(name, config, resume=False):
    method = importlib.import_module(name)
    if name == "skill":  # each process and each part draws gates of its own
        gates = method.Gates
        gates.sample = lambda self: self.split(method.open_probability(self.log_alpha))
    return method.train(method.Config(**config), resume)


def one_of_two(number, port, files, folder):
    """All that the two processes do. At the end number 1 dies, and number 0 is left alone."""
    torch.set_num_threads(1)
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ |= dict(RANK=str(number), LOCAL_RANK=str(number), LOCAL_WORLD_SIZE="2")
    # As with torchrun, the one who started them keeps the port where they meet.
    os.environ |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    written = []

    def listen(event, arguments):
        if event == "open" and arguments[0] and str(folder) in str(arguments[0]):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                written.append(str(arguments[0]))

    sys.addaudithook(listen)
    for name in METHODS:
        train(name, tiny_run(name, files, folder / name / "two"))
        train(name, tiny_run(name, files, folder / name / "stopped"), resume=True)
    found = {"written": sorted(set(written))}
    train("distilhubert", tiny_run("distilhubert", files, folder / "few", batch_seconds=1.0))
    for _ in range(2):  # with dropout
        changes = dict(dropout=0.3, save_every=2, steps=4)
        out = folder / f"dropout-{_}"
        train("distilhubert", tiny_run("distilhubert", files, out, **changes))
    found["seed"] = torch.initial_seed()
    found["errors"] = []
    for changes in (dict(data=str(folder / "none")), dict(teacher="toaster"), dict(lr=-1.0)):
        try:
            train("distilhubert", tiny_run("distilhubert", files, folder / "wrong") | changes)
        except common.InputError as error:
            found["errors"].append((type(error).__name__, str(error)))
    step, count = torch.optim.AdamW.step, []

    def die(self, *arguments):
        count.append(1)
        if number == 1 and len(count) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    torch.optim.AdamW.step = die
    start = time.time()
    (folder / f"found-{number}.json").write_text(json.dumps(found))
    try:
        train("distilhubert", tiny_run("distilhubert", files, folder / "killed"))
    except common.InputError as error:
        found["alone"] = type(error).__name__, str(error), time.time() - start
    (folder / f"found-{number}.json").write_text(json.dumps(found))
    os._exit(0)  # gloo would wait for the other one


@pytest.fixture(scope="module")
def runs(tiny_files, tmp_path_factory):
    """Folder METHOD/{one,two,stopped}, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("parallel")
    patch = pytest.MonkeyPatch()
    skill = importlib.import_module("skill")
    patch.setattr(skill.Gates, "sample", skill.Gates.sample)  # put back at the end
    step, count = torch.optim.AdamW.step, [0]

    def stop(self, *arguments):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # this update has begun: the next is the last one
        return step(self, *arguments)

    for name in METHODS:
        train(name, tiny_run(name, tiny_files, folder / name / "one", accumulate=2))
        count[0] = 0
        with pytest.MonkeyPatch.context() as inner, pytest.raises(KeyboardInterrupt):
            inner.setattr(torch.optim.AdamW, "step", stop)
            train(name, tiny_run(name, tiny_files, folder / name / "stopped", accumulate=2))
        assert common.load_checkpoint(folder / name / "stopped" / "last.pt")["step"] == 4
    train(
        "distilhubert", tiny_run("distilhubert", tiny_files, folder / "few-one", batch_seconds=1.0)
    )
    patch.undo()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    make = torch.multiprocessing.get_context("spawn").Process
    two = [
        make(target=one_of_two, args=(number, store.port, tiny_files, folder))
        for number in range(2)
    ]
    for process in two:
        process.start()
    for process in two:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in two] == [0, -signal.SIGKILL]
    found = [json.loads((folder / f"found-{number}.json").read_text()) for number in range(2)]
    return folder, found


def difference(a, b):
    """Largest difference between the weights of two student.pt."""
    ours, theirs = (common.load_checkpoint(out / "student.pt")["state_dict"] for out in (a, b))
    assert ours.keys() == theirs.keys()
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def flat(line):
    return dict(common.scalars(line))


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one_with_twice_the_parts(name, runs):
    """8 updates of at most 0.001 a weight: what is left is the order of sums (measured: 1e-5)."""
    folder, _ = runs
    one, two = folder / name / "one", folder / name / "two"
    apart = difference(one, two)
    print(f"{name}: {apart:.1e}")
    assert apart < 1e-4
    for ours, theirs in zip(log_of(two), log_of(one), strict=True):
        assert flat(ours).keys() == flat(theirs).keys()
        for key, value in flat(theirs).items():  # of the whole batch, and of all held-out audio
            assert flat(ours)[key] == pytest.approx(value, rel=2e-3, abs=2e-4), key


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_one_process_goes_on_with_two(name, runs):
    folder, _ = runs
    assert difference(folder / name / "one", folder / name / "stopped") < 1e-4
    steps = [line["step"] for line in log_of(folder / name / "stopped")]
    assert steps == ([2, 4, 5, 6, 8] if name == "skill" else [2, 4, 6, 8])  # 5: act 3 ends


def test_one_writer(runs):
    _, (first, second) = runs
    assert any("log.jsonl" in path for path in first["written"])
    assert any("scan.jsonl" in path for path in first["written"])
    assert second["written"] == []


def test_a_batch_with_fewer_utterances_than_processes(runs):
    """Batches of one utterance: one process has nothing to add, and adds nothing."""
    folder, _ = runs
    assert difference(folder / "few", folder / "few-one") < 1e-4


def test_dropout_differs_between_processes_and_comes_again(runs):
    folder, (first, second) = runs
    assert first["seed"] == 0 != second["seed"]  # the first one has the stream of a run alone
    assert (folder / "dropout-0" / "log.jsonl").read_bytes() == (
        folder / "dropout-1" / "log.jsonl"
    ).read_bytes()


def test_an_error_of_the_first_process_ends_both_and_is_told_once(runs):
    _, (first, second) = runs
    assert [kind for kind, _ in first["errors"]] == ["InputError"] * 3
    kinds = [kind for kind, _ in second["errors"]]
    assert kinds == ["ElsewhereError", "InputError", "ElsewhereError"]  # a teacher is seen by both
    assert [text for _, text in first["errors"]] == [text for _, text in second["errors"]]


def test_a_killed_process_does_not_leave_the_other_waiting(runs):
    _, (first, _) = runs
    kind, text, seconds = first["alone"]
    assert kind == "ElsewhereError" and "--resume" in text and seconds < 20


def test_two_processes_of_which_one_was_killed_go_on_as_one(tiny_files, runs):
    """A real SIGKILL in update 6; the last checkpoint is of update 4."""
    folder, _ = runs
    out = folder / "killed"
    assert common.load_checkpoint(out / "last.pt")["step"] == 4
    train("distilhubert", tiny_run("distilhubert", tiny_files, out, accumulate=2), resume=True)
    assert difference(folder / "distilhubert" / "one", out) < 1e-4
    assert [line["step"] for line in log_of(out)] == [2, 4, 6, 8]


def test_torchrun_from_the_command_line(tiny_files, tmp_path):
    """Train and evaluate two seeds: one table, one bar, the workers of both at work."""
    config = tiny_run("distilhubert", tiny_files, tmp_path / "run", steps=4, workers=1)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in config.items()]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "distilhubert.py"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *flags, "--seeds=2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| distilled ") == 1 and "±" in done.stdout
    assert done.stderr.count("scan: 12 files") == 2  # once for each seed
    out = tmp_path / "run" / "seeds"
    assert {path.name for path in out.glob("distilled-seed-*")} == {
        "distilled-seed-0",
        "distilled-seed-1",
    }
    assert [line["step"] for line in log_of(out / "distilled-seed-1")] == [2, 4]
