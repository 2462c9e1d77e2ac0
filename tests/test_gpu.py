"""tests/gpu.py with tiny models on a CPU: every part runs, and its figures are what they say."""

import json
import math
import sys

import gpu
import pytest
import torch
from conftest import METHODS

import common
import distilhubert

SMALL_TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip
def test_skipped(): pass
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All parts but the tests of a GPU and one of two that are compiled, as test_loop.py has it.

    No process is started: torchrun's work is done here in its environment.
    """
    work = tmp_path_factory.mktemp("gpu") / "work"
    work.mkdir()
    alone = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

    def finish_here(command, log, limit):
        file, stop, *flags = command[command.index("--train") + 1 :]
        with pytest.MonkeyPatch.context() as patch:
            if command[0] == "-m":
                for name, value in (alone | {"TORCHELASTIC_RUN_ID": "gpu"}).items():
                    patch.setenv(name, value)
            file.write_text(json.dumps(gpu.train_distilhubert(flags, stop)))
        return 0

    def inference(run):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "SAMPLE_RATE", 800)  # half a second instead of ten
            return gpu.inference(run)

    run = gpu.Run(work, gpu.TINY, common.pick_device("auto"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "COMPILED", ("gendistiller",))
        parts = gpu.all_parts() | {"inference": inference}
    del parts["test_cuda"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "finish", finish_here)
        patch.setattr(sys, "excepthook", sys.excepthook)  # put back later
        gpu.measure(run, parts)
    assert json.loads((work.parent / "gpu.json").read_text()).keys() == parts.keys()
    return run


def test_no_part_fails_and_all_figures_are_finite(run):
    def check(value):
        if isinstance(value, dict):
            return all(key != "error" and check(each) for key, each in value.items())
        return isinstance(value, str | list | tuple) or math.isfinite(value)

    assert [name for name, figures in run.figures.items() if not check(figures)] == []


def test_training_of_each_method_and_compiled(run):
    names = [f"training {name}" for name in METHODS]
    names += ["training gendistiller, compiled"]
    columns = ("utterances", "s each", "audio s/s", "ms", "GFLOP/audio s", "TFLOP/s", "peak %")
    for name in names:
        assert all(run.figures[name][column] > 0 for column in columns), name
        if "compiled" not in name:
            file = name.removeprefix("training ") + ".profile.txt"
            assert "Self CPU" in (run.work.parent / file).read_text()
    figures = run.figures["training distilhubert"]
    speed = figures["utterances"] * figures["s each"] / figures["ms"] * 1000
    assert figures["audio s/s"] == pytest.approx(speed)


def test_operations_are_three_times_the_students_and_once_the_teachers(run):
    settings = gpu.settings(run, "distilhubert", "unused")
    config = distilhubert.Config(**settings)
    teacher = common.load_teacher(config.teacher)
    student, heads = distilhubert.build(config, teacher)
    figures = run.figures["training distilhubert"]
    samples = round(figures["s each"] * common.SAMPLE_RATE)
    waveforms, counts = torch.zeros(figures["utterances"], samples), []
    for forward in (teacher, lambda waveforms: heads(student(waveforms)[0][-1])):
        with common.count_flops() as counter:
            forward(waveforms)
        counts.append(counter.get_total_flops())
    audio = waveforms.numel() / common.SAMPLE_RATE
    expected = (counts[0] + 3 * counts[1]) / audio / 1e9
    assert figures["GFLOP/audio s"] == pytest.approx(expected, rel=1e-12)


def test_inference_of_each_student_and_in_transformers(run):
    figures, expected = run.figures["inference"], {"HuBERT Base", *METHODS}
    if figures["transformers"] != "not installed":
        expected.add("distilhubert in transformers")
    rows = figures["rows"]
    assert rows.keys() == expected
    assert all(row["1 x 10 s"] > 0 and row["2 x 10 s"] > 0 for row in rows.values())
    assert rows["skill"]["parameters"] < rows["HuBERT Base"]["parameters"] / 2


def test_the_loop_is_stopped_half_way_and_resumed(run):
    steps, every = gpu.TINY.steps, gpu.TINY.log_every
    first, resumed = run.figures["loop"]["first half"], run.figures["loop"]["resumed"]
    assert (first["first log line"], first["updates"], first["exit code"]) == (2, 6, 130)
    assert (resumed["first log line"], resumed["updates"]) == (8, steps)
    assert resumed["exit code"] == first["sums"] == resumed["sums"] == 0
    log = [json.loads(line) for line in (run.work / "loop" / "log.jsonl").open()]
    assert [line["step"] for line in log] == list(range(every, steps + 1, every))
    assert (run.work / "loop" / "results.json").exists()


def test_torchrun_sums_the_gradients_and_learns_the_same(run):
    first, alone = run.figures["torchrun"]["first half"], run.figures["loop"]["first half"]
    assert first["sums"] == 6 + 3  # of the updates, and of the log lines' losses
    assert first["updates"] == 6 and first["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_the_report_has_all_rows(run):
    text = gpu.report(run.figures)
    for row in ("pad ", "gendistiller, compiled ", "loop, resumed ", "torchrun, first half "):
        assert f"| {row}" in text
    assert "FAILED" not in text


def test_a_part_that_fails_and_tests_that_fail_are_told(tmp_path, monkeypatch):
    """The others go on; a failed test is counted and named."""
    (tmp_path / "test_small.py").write_text(SMALL_TESTS)
    monkeypatch.setattr(gpu, "CUDA_TESTS", tmp_path / "test_small.py")
    run = gpu.Run(tmp_path / "work", gpu.TINY, torch.device("cpu"))
    late = gpu.Run(tmp_path / "work", gpu.TINY, torch.device("cpu"), begin=-1e9)
    gpu.measure(run, {"broken": lambda run: 1 / 0, "test_cuda": gpu.cuda_tests})
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["broken"]["error"] == "ZeroDivisionError: division by zero"
    verdicts = {name: figures["test_cuda"][name] for name in ("PASSED", "FAILED", "SKIPPED")}
    assert set(verdicts.values()) == {1} and "test_fails" in figures["test_cuda"]["error"]
    assert gpu.report(figures).count("FAILED ") == 2
    gpu.measure(late, {"late": lambda run: {}})
    assert late.figures["late"]["error"].startswith("TimeoutError")
