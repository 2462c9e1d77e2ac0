"""--compile changes how a run is computed, and not what it learns."""

import functools
import importlib
import json
from pathlib import Path

import pytest
import torch
from conftest import METHODS

import common


def log_of(out):
    return (Path(out) / "log.jsonl").read_text()


def numbers(line):
    """The numbers of a line of the log, one after another."""
    if isinstance(line, dict | list):
        values = line.values() if isinstance(line, dict) else line
        return [number for value in values for number in numbers(value)]
    return [line]


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
        assert numbers(b) == pytest.approx(numbers(a), rel=1e-4, abs=1e-5)


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
