"""Several processes train as one: same weights, one writer, no one left waiting.

torchrun starts this file once, with two processes on CPUs that do all that is looked at below,
because importing torch takes longer than that. The two that end in an error are forked.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import METHODS, encoder_config, same, write_teacher
from test_command_line import ONE, ROOT, flags_of, inside, real
from test_training import settings as four_layers

import common

RESUMED = (ONE, "skill")  # the latter with an act that ends
FEW = dict(batch_seconds=1.0)  # a batch is one utterance
DROPOUT = FEW | dict(dropout=0.3, log_every=1, save_every=2, steps=4)


def settings(name, files, out, **changes):
    return four_layers(name, files, out, **dict(batch_seconds=4.0) | changes)


def train(name, config, resume=False):
    method = importlib.import_module(name)
    if name == "skill":  # each process and each part draws gates of its own
        distributions = method.HardConcrete
        distributions.sample = lambda self: self.split(method.open_probability(self.log_alpha))
    if name == "gendistiller":  # each draws the utterances that have the teacher's history
        method.teacher_share = lambda step, config: 0.0
    return method.train(method.Config(**config), resume)


@contextlib.contextmanager
def copied(step, folder):
    """Runs leave a copy of their folder as if they had been stopped after this update."""
    save = common.save_run

    def keep(config, content, number, *rest, **parts):
        save(config, content, number, *rest, **parts)
        if number == step and common.rank() == 0:
            shutil.copytree(config.out, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_run", keep)
        yield


def main(folder):
    """All that each of the two processes does."""
    files = json.loads((folder / "files.json").read_text())
    files, written, found = {name: Path(path) for name, path in files.items()}, [], {}

    def listen(event, arguments):
        if event == "open" and arguments[0] and str(folder) in str(arguments[0]):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                written.append(Path(str(arguments[0])).name)

    sys.addaudithook(listen)
    for name in METHODS:
        with copied(4, folder / name / "two-stopped"):
            *_, history = train(name, settings(name, files, folder / name / "two"))
        found[name] = [{k: v for k, v in line.items() if "heldout" not in k} for line in history]
        if name in RESUMED:
            train(name, settings(name, files, folder / name / "one-stopped"), resume=True)
    train(ONE, settings(ONE, files, folder / "few", **FEW))
    train(ONE, settings(ONE, files, folder / "dropout-again", **DROPOUT))
    found["seed"] = torch.initial_seed()
    with copied(2, folder / "dropout-resumed"):
        train(ONE, settings(ONE, files, folder / "dropout", **DROPOUT))
    train(ONE, settings(ONE, files, folder / "dropout-resumed", **DROPOUT), resume=True)
    found["written"] = written
    (folder / f"found-{common.rank()}.json").write_text(json.dumps(found))
    flags = flags_of(settings(ONE, files, folder / "table", steps=2, workers=1))
    sys.argv = [f"{ONE}.py", *flags, "--seeds=2"]
    common.measure_speed = lambda models, _: dict.fromkeys(models, 1.0)  # which takes seconds
    importlib.import_module(ONE).main()


@pytest.fixture(scope="module")
def files(tiny_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "four.pt"
    return tiny_files | dict(teacher=write_teacher(path, encoder_config(0.0, encoder_num_layers=4)))


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """Folder METHOD/{one,two,...}, what each of two processes found, and what was printed."""
    folder, skill = tmp_path_factory.mktemp("parallel"), importlib.import_module("skill")
    gendistiller = importlib.import_module("gendistiller")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gendistiller, "teacher_share", gendistiller.teacher_share)  # put back later
        patch.setattr(skill.HardConcrete, "sample", skill.HardConcrete.sample)  # put back later
        for name in METHODS:
            with copied(4, folder / name / "one-stopped"):
                train(name, settings(name, files, folder / name / "one", accumulate=2))
    train(ONE, settings(ONE, files, folder / "few-one", **FEW))
    train(ONE, settings(ONE, files, folder / "dropout-one", **DROPOUT))
    paths = {name: str(path) for name, path in files.items()}
    (folder / "files.json").write_text(json.dumps(paths))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = real(*torchrun, __file__, folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((folder / f"found-{number}.json").read_text()) for number in range(2)]
    return folder, found, done


def difference(a, b):
    """Largest difference between the weights of two student.pt."""
    ours, theirs = (common.load_checkpoint(out / "student.pt")["state_dict"] for out in (a, b))
    assert ours.keys() == theirs.keys()
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def numbers(value):
    """All numbers of a log line, in their order."""
    if isinstance(value, dict | list):
        values = value.values() if isinstance(value, dict) else value
        return [number for each in values for number in numbers(each)]
    return [value]


LIMITS = dict.fromkeys(METHODS, 1e-5) | {"skill": 1e-4}  # of a weight; updates are of up to 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one(name, runs):
    """With twice the parts. What is left is the order of sums.

    The log is of the whole batch, and of all held-out audio.
    """
    folder, (first, second), _ = runs
    one, two = folder / name / "one", folder / name / "two"
    assert difference(one, two) < LIMITS[name]
    for ours, theirs in zip(log_of(two), log_of(one), strict=True):
        assert ours.keys() == theirs.keys()
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=2e-3, abs=2e-4)
    assert first[name] == second[name]  # both averaged


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_of_one_process_goes_on_with_two(name, runs):
    folder, _, _ = runs
    assert difference(folder / name / "one", folder / name / "one-stopped") < LIMITS[name]
    steps = [line["step"] for line in log_of(folder / name / "one-stopped")]
    assert steps == ([2, 4, 5, 6, 8] if name == "skill" else [2, 4, 6, 8])  # 5: act 3 ends


def test_a_run_of_two_processes_goes_on_with_one(files, runs):
    folder, _, _ = runs
    out = folder / ONE / "two-stopped"
    assert common.load_checkpoint(out / "last.pt")["step"] == 4
    train(ONE, settings(ONE, files, out, accumulate=2), resume=True)
    assert difference(folder / ONE / "one", out) < LIMITS[ONE]


def test_shares_are_unequal_and_at_times_there_is_one_utterance_for_two(files, runs):
    """Each process adds what it has, weighted by its number of utterances."""
    lengths = [u.samples for u in common.scan(files["audio"], None)]
    assert {len(b) % 2 for b in common.make_batches(lengths, 64_000, 16_000, 0, 0)} == {0, 1}
    assert {len(b) for b in common.make_batches(lengths, 16_000, 16_000, 0, 0)} == {1}
    assert difference(runs[0] / "few", runs[0] / "few-one") < 1e-5


def test_one_writer(runs):
    _, (first, second), _ = runs
    assert {"log.jsonl", "scan.jsonl", ".last.pt.tmp"} <= set(first["written"])
    assert second["written"] == []


def test_dropout_of_process_0_is_that_of_a_run_alone_and_of_the_others_their_own(runs):
    """Both have the same utterance in each batch, so that nothing but dropout is different."""
    folder, (first, second), _ = runs
    alone, two = (
        common.load_checkpoint(folder / name / "last.pt") for name in ("dropout-one", "dropout")
    )
    assert torch.equal(alone["random_state"]["cpu"], two["random_state"]["cpu"])
    assert first["seed"] == 0 != second["seed"]
    assert difference(folder / "dropout-one", folder / "dropout") > 1e-4
    for other in ("dropout-again", "dropout-resumed"):
        assert same(two, common.load_checkpoint(folder / other / "last.pt")), other
        assert log_of(folder / other) == log_of(folder / "dropout")


def test_one_table_from_the_command_line_and_one_process_speaks(runs):
    folder, _, done = runs
    assert done.stdout.count("| distilled ") == 1 and "±" in done.stdout
    assert len(list((folder / "table" / "seeds").glob("distilled-seed-*/student.pt"))) == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("scan: 12 files") == 10  # of so many new runs, by one process


def one_of_two(number, port, flags, folder):
    """A process that torchrun would start; its exit code and stderr go to a file."""
    os.environ |= dict(RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    done = inside(ONE, *flags)
    (folder / f"said-{number}").write_text(f"{done.returncode} {done.stderr}")


def test_an_error_of_the_first_process_ends_both_and_is_told_once(files, tmp_path):
    """It cannot save, and the other one waits for it in the update that follows."""
    (tmp_path / ".last.pt.tmp").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    flags = flags_of(settings(ONE, files, tmp_path, workers=1))
    fork = multiprocessing.get_context("fork").Process
    both = [fork(target=one_of_two, args=(n, port, flags, tmp_path)) for n in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        process.kill()
    first, second = ((tmp_path / f"said-{number}").read_text() for number in range(2))
    assert first.startswith("1 ") and second.startswith("1 ")
    assert first.count(f"{ONE}.py: cannot write {tmp_path}/last.pt (Is a directory)") == 1
    assert second.count(f"{ONE}.py: ") == second.count("has lost the others") == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
