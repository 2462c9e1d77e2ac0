"""--compile, --tensorboard and --deterministic change how a run is done, and not what it learns."""

import contextlib
import functools
import importlib
import io
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import METHODS

import common

SMALL = "--workers 0 --device cpu --steps 4 --save-every 4 --log-every 1 --lr 1e-3".split()


def shell(name, *flags):
    """The script as from the command line, in this process: exit code, stderr."""
    module, stderr, code = importlib.import_module(name), io.StringIO(), 0
    argv, sys.argv = sys.argv, [f"{name}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            common.run(module.main)
    except SystemExit as stop:
        code = 1 if isinstance(stop.code, str) else stop.code
        stderr.write(f"{stop.code}")
    finally:
        sys.argv = argv
    return code, stderr.getvalue()


@pytest.fixture
def flags(tiny_teacher, audio_folder, tmp_path, monkeypatch):
    """Of a run of seconds, without its evaluation."""
    monkeypatch.setattr(importlib.import_module("distilhubert"), "evaluate", lambda *_: {"a": {}})
    base = ["--data", audio_folder, "--teacher", tiny_teacher, "--batch-seconds", 3]
    return [*base, "--crop-seconds", 1, *SMALL]


def log_of(out):
    return (Path(out) / "log.jsonl").read_text()


class Recorder:
    """In place of a compiled module: counts its calls and passes everything on."""

    def __init__(self, module):
        self.module, self.calls = module, 0

    def __call__(self, *arguments, **more):
        self.calls += 1
        return self.module(*arguments, **more)

    def __getattr__(self, name):
        return getattr(self.module, name)


@pytest.mark.parametrize(
    "name, real",
    [
        *((name, False) for name in METHODS),
        ("lstm_dkd", True),
        pytest.param("distilhubert", True, marks=pytest.mark.slow),
    ],
)
def test_compile_learns_the_same(
    name, real, tiny_teacher, audio_folder, spoken, tmp_path, monkeypatch
):
    """``real``: the graph that torch.compile sees, run as it stands; C++ of it takes minutes."""
    compiler, calls, logs = torch.compile, [], []

    def compile(module):
        calls.append(compiler(module, backend="aot_eager") if real else Recorder(module))
        return calls[-1]

    monkeypatch.setattr(torch, "compile", compile)
    method, bert = importlib.import_module(name), Path(tiny_teacher).with_name("bert")
    own = dict(data=str(audio_folder), teacher=str(tiny_teacher), crop_seconds=0.5, dropout=0.0)
    own |= {
        "gendistiller": dict(history="student"),
        "lstm_dkd": dict(hidden=8),
        "skill": dict(tolerance=1.0, calibration_utterances=4),
    }.get(name, {})
    if name == "pad":
        own = dict(data=str(spoken), teacher=str(bert), student=str(tiny_teacher))
    for on in (False, True):
        out = tmp_path / str(on)
        config = dict(out=str(out), workers=0, device="cpu", steps=2, batch_seconds=2.0)
        config |= dict(log_every=1, compile=on) | own
        torch.manual_seed(0)
        method.train(method.Config(**config))
        logs.append([json.loads(line) for line in log_of(out).splitlines()])
    assert len(calls) == {"skill": 4, "pad": 1}.get(name, 2)  # with the teacher's front end
    assert real or all(module.calls for module in calls)
    names = [torch.load(tmp_path / f"{on}/student.pt", weights_only=True) for on in (False, True)]
    assert names[0]["state_dict"].keys() == names[1]["state_dict"].keys()
    for a, b in zip(*logs, strict=True):
        assert dict(common.scalars(b)) == pytest.approx(dict(common.scalars(a)), rel=1e-4, abs=1e-5)


def test_a_run_from_before_the_flag_goes_on_and_may_be_compiled(flags, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shell("distilhubert", *flags, "--out", out)
    before = log_of(out)
    config = json.loads((out / "config.json").read_text())
    del config["compile"]
    (out / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for more in ([], ["--compile"]):
        code, said = shell("distilhubert", *flags, "--out", out, "--resume", *more)
        assert code == 0, said
    assert log_of(out) == before


class Writer:
    points: dict = {}

    def __init__(self, folder):
        self.folder = folder

    def add_scalar(self, name, value, step):
        self.points[Path(self.folder).parent.name, name, step] = value

    def flush(self):
        pass


def test_tensorboard_gets_the_numbers_of_the_log(flags, tmp_path, monkeypatch):
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    find = importlib.util.find_spec
    own = lambda name, *more: object() if name == "tensorboard" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", own)
    monkeypatch.setattr(Writer, "points", {})
    shell("distilhubert", *flags, "--out", tmp_path / "with", "--tensorboard")
    shell("distilhubert", *flags, "--out", tmp_path / "without")
    assert log_of(tmp_path / "with") == log_of(tmp_path / "without")
    lines = [json.loads(line) for line in log_of(tmp_path / "with").splitlines()]
    wanted = {
        ("with", name, line["step"]): value
        for line in lines
        for name, value in common.scalars(line)
    }
    assert Writer.points == wanted
    assert Writer.points["with", "heldout/cosine/0", 4] == lines[-1]["heldout"]["cosine"][0]
    assert Writer.points["with", "loss", 2] == lines[1]["loss"]


def test_tensorboard_itself_where_it_is_installed(flags, tmp_path):
    pytest.importorskip("tensorboard", reason="not installed")
    shell("distilhubert", *flags, "--out", tmp_path / "run", "--tensorboard")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert events.stat().st_size > 100


def test_tensorboard_that_is_not_there_is_one_line(flags, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    own = lambda name, *more: None if name == "tensorboard" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", own)
    code, said = shell("distilhubert", *flags, "--out", tmp_path / "run", "--tensorboard")
    assert code == 0 and said.count("pip install tensorboard") == 1
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_deterministic_is_torchs_own_switch_and_changes_nothing_on_a_cpu(
    flags, tmp_path, monkeypatch
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    shell("distilhubert", *flags, "--out", tmp_path / "without")
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        code, said = shell("distilhubert", *flags, "--out", tmp_path / "with", "--deterministic")
        assert code == 0, said
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert log_of(tmp_path / "with") == log_of(tmp_path / "without")


def test_compile_makes_few_graphs_whatever_the_lengths(tiny_teacher, tiny_wavlm_file):
    """One of the first length and one for all others, not one for each of the recipe's lengths."""
    hubert, wavlm = (common.load_teacher(str(path)) for path in (tiny_teacher, tiny_wavlm_file))
    d, g = (importlib.import_module(n) for n in ("distilhubert", "gendistiller"))
    students = {
        "distilhubert": d.build(d.Config(), hubert)[0],
        "recurrent": g.build(g.Config(variant="recurrent"), wavlm),
        "teacher": hubert.model.feature_extractor,
    }
    graphs = {}

    def count(name, graph, inputs):
        graphs[name] = graphs.get(name, 0) + 1
        return graph.forward

    for name, student in students.items():
        torch._dynamo.reset()
        forward = torch.compile(student.train(), backend=functools.partial(count, name))
        for samples in (8080, 6480, 4880, 3280):
            forward(torch.zeros(2, samples), None)
    assert graphs == dict.fromkeys(students, 2)
