"""How a training step treats a GPU, seen without one: by what it asks torch for, and on tensors
without content that claim to be on a GPU; and --compile, with compilers that only look.
"""

import importlib
import sys
from collections import Counter
from pathlib import Path

import benchmark
import pytest
import torch
from conftest import METHODS, encoder_config, write_teacher
from test_training import settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

ROOT = Path(__file__).parent.parent
SAMPLES = 32_000
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount")


def caller():
    """file:line of the project that torch was called from."""
    frame = sys._getframe()
    while frame and Path(frame.f_code.co_filename).parent != ROOT:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""


@pytest.fixture(scope="module")
def files(tiny_files, tmp_path_factory):
    """With a teacher of four layers, as the settings say."""
    path = tmp_path_factory.mktemp("teacher") / "four.pt"
    return tiny_files | dict(teacher=write_teacher(path, encoder_config(0.0, encoder_num_layers=4)))


class Waits(TorchDispatchMode):
    """Counts what a GPU's results would have to be there for: (operator, file:line) -> times.

    A number that Python reads, as in ``item()`` or ``if``, and what has a shape that depends on
    values, as an index by a mask.
    """

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        if name in WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found[name, caller()] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_updates_that_are_not_logged_wait_for_nothing(name, files, tmp_path, monkeypatch):
    """From one step of the optimizer to the next one. SKILL's act 3 ends with update 6."""
    method, seen, marks = importlib.import_module(name), Waits(), []
    step = torch.optim.AdamW.step

    def mark(self, *arguments):
        marks.append(Counter(seen.found))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", mark)
    changes = dict(steps=4, save_every=100, log_every=100)  # the last update is logged
    changes |= {"skill": dict(steps=9)}.get(name, {})
    with seen:
        method.train(method.Config(**settings(name, files, tmp_path / "run", **changes)))
    waits = [after - before for before, after in zip(marks, marks[1:])]
    silent = [*waits[:4], waits[6]] if name == "skill" else waits[:2]
    assert silent == [Counter()] * len(silent)
    assert (seen.found - marks[-1]).total() >= 5  # what is logged is read: the counter counts


class OnCpu(TorchDispatchMode):
    """Lists what was computed on the CPU: (operator, file:line), but not a batch's few ids."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.device.type == "cpu":
                if result.numel() > 100:
                    self.found.add((str(operator), caller()))
        return results


@pytest.mark.skipif(
    torch.__version__ < "2.11" and not torch.cuda.is_available(),
    reason="before torch 2.11 tensors without content need a CUDA driver, too",
)
@pytest.mark.parametrize("name", benchmark.STEPS)
def test_a_step_on_a_gpu_is_computed_there(name, monkeypatch):
    """At paper size; torch refuses what would mix devices. Not cuDNN's LSTM, nor any backward."""

    def lstm(self, x, state=None):
        widths = self.hidden_size * (1 + self.bidirectional)
        return x.new_zeros(*x.shape[:2], widths) + self.weight_ih_l0.sum(), None

    monkeypatch.setattr(nn.LSTM, "forward", lstm)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)  # they are where they belong
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [SAMPLES] * len(self))
    with FakeTensorMode():
        with torch.device("cuda"):
            step = benchmark.STEPS[name](torch.device("cuda"))
            waves = torch.randn(3, SAMPLES)
        step.trained.train()
        with OnCpu() as seen:
            loss = step.loss(waves, step.targets(waves))
    assert loss.device.type == "cuda"
    assert not seen.found


class Recorder:
    """In place of a compiled module: counts its calls and passes everything on."""

    def __init__(self, module):
        self.module, self.calls = module, 0

    def __call__(self, *arguments, **more):
        self.calls += 1
        return self.module(*arguments, **more)

    def __getattr__(self, name):
        return getattr(self.module, name)


@pytest.mark.parametrize("name", METHODS)
def test_compile_is_used_in_each_update_and_learns_the_same(name, files, tmp_path, monkeypatch):
    """For one method it is torch's own, whose graphs run as they stand: C++ of them takes minutes.

    It makes few, whatever the lengths: for each module one of the first and one of all others.
    """
    compiler, real, calls, graphs = torch.compile, name == "distilhubert", [], []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def compile(module, options):
        calls.append(compiler(module, backend=count) if real else Recorder(module))
        return calls[-1]

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    method, logs, names = importlib.import_module(name), [], []
    for on in (False, True):
        changes = dict(steps=6, log_every=1, save_every=6, batch_seconds=1.0, compile=on)
        torch.manual_seed(0)
        config = method.Config(**settings(name, files, tmp_path / str(on), **changes))
        logs.append(method.train(config)[-1])
        content = torch.load(tmp_path / str(on) / "student.pt", weights_only=True)
        names.append(content["state_dict"].keys())
    assert len(calls) == {"skill": 3, "pad": 1}.get(name, 2)  # with the teacher's front end
    if real:
        batches = common.load_batches(common.scan(config.data, None), 1.0, 1.0, 0, 0, 6, 0)
        assert len(graphs) == 4 and len({tuple(waves.shape) for waves in batches}) > 2
    else:
        assert sum(each.calls for each in calls if isinstance(each.module, nn.Module)) == 6
        assert all(each.calls for each in calls)
    assert names[0] == names[1]
    for line, other in zip(*logs, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"heldout"}:
            assert line[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
