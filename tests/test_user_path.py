"""A new user's path: the commands of README.md, in its order, in what a fresh clone would hold.

The commands are taken from README.md letter by letter; DIR and MANIFEST become paths, and flags are
added that make runs short. The first one is a process of its own, the others run in this one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_script

import common

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

QUICK = """
import runpy, sys, common
common.toy().SPEAKERS = {"train": range(6), "dev": range(44, 46), "test": range(50, 52)}
common.toy().RECORDINGS |= {"dev": 1, "test": 17}
probe = common.linear_probe
common.linear_probe = lambda parts, seed, *_: probe(parts, seed, 4)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # as ``python SCRIPT.py``, with few speakers and probes of 4 updates


def blocks(heading):
    """The fenced blocks below a heading, up to the next heading of the same or a higher rank."""
    start = re.search(rf"^(##+) {heading}.*\n", README, re.M)
    assert start, f"README.md has no section '{heading}'"
    rest = README[start.end() :]
    end = re.search(rf"^#{{2,{len(start[1])}}} ", rest, re.M)
    return re.findall(r"```\w*\n(.*?)```", rest[: end.start() if end else None], re.S)


def command(heading, words, **places):
    """The words of the one line below the heading that is ``words``; places stand for names."""
    lines = [line.split("  #")[0].strip() for line in "".join(blocks(heading)).split("\n")]
    assert lines.count(words) == 1, f"README.md, {heading}: no line {words!r} in {lines}"
    return [str(places.get(word, word)) for word in words.split()]


@pytest.fixture
def clone(tmp_path):
    """The files that a clone would hold: those git knows or would be told of, as they are now."""
    folder = tmp_path / "clone"
    if (ROOT / ".git").exists():
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\n")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
    else:
        skipped = shutil.ignore_patterns("runs", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=skipped)
    return folder


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if "runs" not in path.parts}


def test_install_is_what_ci_does():
    line = command("Try it", "pip install -r requirements.txt")
    assert line[-2:] == ["-r", "requirements.txt"]
    assert re.search(r"^pip install .*-r requirements.txt$", (ROOT / ".ci/run").read_text(), re.M)


@pytest.mark.slow
def test_a_new_user_trains_resumes_loads_evaluates_and_exports(
    clone, audio_folder, tiny_teacher, labelled, monkeypatch
):
    """One test, because each step needs the one before: the student of --toy is used further."""
    monkeypatch.chdir(clone)
    before, audio = content(clone), content(audio_folder)

    def main(*arguments, **places):
        """What a command of README.md, and flags, print in this process."""
        heading, line, *flags = arguments
        _, script, *words = command(heading, line, **places)
        done = run_script(script.removesuffix(".py"), *words, *flags)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    _, *words = command("Try it", "python distilhubert.py --toy")
    process = dict(env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    process |= dict(capture_output=True, text=True, timeout=900)
    done = subprocess.run([sys.executable, "-c", QUICK, *words, "--steps", "4"], **process)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = r"^\| (\w+) +\| +([\d,]+) \|"
    rows = re.findall(sizes, done.stdout, re.M)
    assert [name for name, _ in rows] == ["teacher", "untrained", "initialised", "distilled"]
    assert rows == re.findall(sizes, README, re.M)[:4]
    columns = re.findall(r"^\| +\| parameters .*\|$", done.stdout + README, re.M)[:2]
    assert columns[0].split() == columns[1].split()  # of the table printed, and of README.md's
    assert (clone / "runs/distilhubert-toy/student.pt").is_file()

    probe = common.linear_probe
    monkeypatch.setattr(common, "linear_probe", lambda parts, seed, *_: probe(parts, seed, 4))
    monkeypatch.setattr(common, "measure_speed", lambda models, _: dict.fromkeys(models, 1.0))
    short = "--steps 4 --batch-seconds 3 --crop-seconds 1 --workers 0 --device cpu".split()
    short += ["--teacher", tiny_teacher]
    run, train = clone / "runs/distilhubert", "python distilhubert.py --data DIR"
    for line in (train, train + " --resume"):  # the second one finds all updates done
        table = main("Train on your own audio", line, *short, DIR=audio_folder)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4 and "heldout" in log[-1]
    assert "| distilled" in table and (run / "results.txt").read_text().startswith(table.strip())
    assert content(audio_folder) == audio

    shutil.rmtree(run)
    (clone / "runs/distilhubert-toy").rename(run)
    (block,) = [b for b in blocks("Use and evaluate") if "student(waveforms, lengths)" in b]
    assert len([line for line in block.splitlines() if line]) == 3
    given = "import torch\nwaveforms, lengths = torch.randn(2, 16000), torch.tensor([16000, 8000])"
    names = {}
    exec(f"{given}\n{block}", names)
    assert [tuple(states.shape) for states in names["hidden_states"]] == [(2, 49, 64)] * 3
    assert names["lengths"].tolist() == [49, 24]

    line = "python distilhubert.py --evaluate runs/distilhubert/student.pt --data MANIFEST"
    table = main("Use and evaluate", line, "--device", "cpu", MANIFEST=labelled)
    assert "| colour accuracy (tones) |" in table

    pytest.importorskip("transformers", reason="transformers is not installed")
    line = "python distilhubert.py --export huggingface"
    assert main("Use it elsewhere", line).strip() == "runs/distilhubert/huggingface"
    assert json.loads((run / "huggingface/config.json").read_text())["hidden_size"] == 64
    assert content(clone) == before  # all that was written is below runs/
