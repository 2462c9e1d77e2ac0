"""No training loop waits for its device but to log: seen on a CPU from what it asks torch for."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import METHODS, tiny_run
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount")


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
            frame = sys._getframe()
            while frame and Path(frame.f_code.co_filename).parent != ROOT:
                frame = frame.f_back
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""
            self.found[name, where] += 1
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
