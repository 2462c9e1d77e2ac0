"""How a training step treats a GPU, seen without one: by what it asks torch for, and on tensors
without content that claim to be on a GPU.
"""

import importlib
import sys
from collections import Counter
from pathlib import Path

import benchmark
import pytest
import torch
from conftest import METHODS, tiny_run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
SAMPLES = 32_000
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount")


def caller():
    """file:line of the project that torch was called from."""
    frame = sys._getframe()
    while frame and Path(frame.f_code.co_filename).parent != ROOT:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""


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
def test_updates_that_are_not_logged_wait_for_nothing(name, tiny_files, tmp_path):
    method = importlib.import_module(name)

    def waits(steps, log_every):
        out = tmp_path / f"{steps}-{log_every}"
        changes = dict(steps=steps, save_every=100, log_every=log_every)
        changes |= {
            "gendistiller": dict(history="mixed"),
            "skill": dict(groups="1,2/3,4"),  # act 2 would wait, for a teacher measured once
        }.get(name, {})
        with Waits() as seen:
            method.train(method.Config(**tiny_run(name, tiny_files, out, **changes)))
        return seen.found

    once = waits(6, 100)  # the last update is logged in each run
    assert waits(12, 100) == once
    assert (waits(6, 1) - once).total() >= 5  # what is logged is read: the counter counts


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
            step = benchmark.STEPS[name](torch.device("cuda"), False)
            waves = torch.randn(3, SAMPLES)
        step.trained.train()
        with OnCpu() as seen:
            loss = step.loss(waves, step.targets(waves))
    assert loss.device.type == "cuda"
    assert not seen.found
