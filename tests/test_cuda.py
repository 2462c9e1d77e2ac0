"""Training on a GPU: what it shares with a CPU, and what there is on a GPU only.

Without a GPU: with "cpu" for "cuda" in the fixture and no skip all but bf16 and the last test pass.
"""

import importlib
import json
import math
import os
import signal
import warnings

import pytest
import torch
from conftest import METHODS, tiny_run
from test_parallel import numbers

import common

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu


@pytest.fixture
def train(tiny_files, tiny_wavlm_file, tmp_path, monkeypatch):
    """A tiny run of a method on the GPU, always in a new folder; returns the lines of its log.

    The teacher is a WavLM where that is the method's default.
    """
    skill = importlib.import_module("skill")
    gates = lambda self: self.split(skill.open_probability(self.log_alpha))  # noqa: E731
    monkeypatch.setattr(skill.HardConcrete, "sample", gates)  # the devices draw different numbers
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def train(name, resume=None, **changes):
        out = resume or tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        method = importlib.import_module(name)
        settings = {"device": "cuda", "log_every": 1} | changes
        if name in ("gendistiller", "skill"):
            settings["teacher"] = str(tiny_wavlm_file)
        config = tiny_run(name, tiny_files, out, **settings)
        method.train(method.Config(**config), resume=resume is not None)
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

    return train


def agree(lines, others, relative, absolute):
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        assert numbers(line) == pytest.approx(numbers(other), rel=relative, abs=absolute)


@pytest.mark.parametrize("name", METHODS)
def test_float32_learns_what_a_cpu_learns(name, train):
    agree(train(name, amp=False), train(name, amp=False, device="cpu"), 2e-3, 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_bf16_is_what_is_used_and_learns_nearly_the_same(name, train):
    lines, exact = train(name), train(name, amp=False)
    assert lines[0]["loss"] != exact[0]["loss"]
    for line, other in zip(lines, exact, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05, abs=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_the_student_file_loads_where_there_is_no_gpu(name, train, tmp_path):
    train(name)
    saved = torch.load(tmp_path / "run-0" / "student.pt", weights_only=True)
    assert {value.device.type for value in saved["state_dict"].values()} == {"cpu"}


@pytest.mark.parametrize("name", METHODS)
def test_compiled_learns_the_same(name, train):
    for line, other in zip(train(name, compile=True), train(name), strict=True):  # in bf16
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05, abs=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_begun_on_a_cpu_goes_on(name, train, tmp_path):
    whole = train(name, amp=False)
    step, count = torch.optim.AdamW.step, []

    def stop(self, *arguments):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # this update has begun: the next is the last one
        return step(self, *arguments)

    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop)
        train(name, amp=False, device="cpu")
    out = tmp_path / "run-1"
    assert common.load_checkpoint(out / "last.pt")["step"] == 4
    agree(train(name, resume=out, amp=False), whole, 2e-3, 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_an_update_that_is_not_finite_is_skipped_on_the_device(name, train, monkeypatch):
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def spoil(parameters, *more):
        parameters = list(parameters)
        if len(norms) == 2:
            next(p for p in parameters if p.grad is not None).grad.fill_(math.nan)
        norms.append(clip(parameters, *more))
        return norms[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    lines = train(name)
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    assert lines[2]["grad_norm"] is None and math.isfinite(lines[-1]["loss"])  # no NaN in JSON


@pytest.mark.parametrize("name", METHODS)
def test_updates_that_are_not_logged_wait_for_nothing(name, train):
    """As tests/test_loop.py asks torch, here CUDA's own count."""

    def waits(steps):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                groups = {"groups": "1,2/3,4"} if name == "skill" else {}
                train(name, steps=steps, save_every=100, log_every=100, **groups)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in seen)

    once = waits(6)
    assert once > 0
    assert waits(12) == once
