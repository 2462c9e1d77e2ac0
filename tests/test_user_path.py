"""A new user's path: the commands of README.md, in its order, in what a fresh clone would hold.

The commands are taken from README.md letter by letter; DIR becomes a folder, and flags are added
that make runs short (4 updates of --toy, and a tiny teacher where HuBERT Base would be downloaded).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = "--steps 60 --save-every 10 --batch-seconds 3 --crop-seconds 1 --workers 0 --device cpu"


def blocks(heading):
    """The fenced blocks below a heading, up to the next heading of the same or a higher rank."""
    start = re.search(rf"^(##+) {heading}.*\n", README, re.M)
    assert start, f"README.md has no section '{heading}'"
    rest = README[start.end() :]
    end = re.search(rf"^#{{2,{len(start[1])}}} ", rest, re.M)
    return re.findall(r"```\w*\n(.*?)```", rest[: end.start() if end else None], re.S)


def command(heading, words):
    """The one line of a block below the heading that is ``words``, without its comment."""
    lines = [
        line.split("  #")[0].strip() for block in blocks(heading) for line in block.split("\n")
    ]
    assert lines.count(words) == 1, f"README.md, {heading}: no line {words!r} in {lines}"
    return words


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files that a clone would hold: those git knows or would be told of, as they are now."""
    folder = tmp_path_factory.mktemp("user") / "clone"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\n")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
    else:
        skipped = shutil.ignore_patterns("runs", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=skipped)
    before = content(folder)
    yield folder
    assert content(folder) == before  # all that was written is below runs/


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    kept = [path for path in files if not {"runs", "__pycache__"} & {*path.parts}]
    return {path: path.read_bytes() for path in kept}


def start(line, clone, more="", **places):
    for name, path in places.items():
        line = line.replace(name, str(path))
    words = [sys.executable if word == "python" else word for word in line.split()]
    return subprocess.Popen(
        words + more.split(),
        cwd=clone,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(line, clone, more="", **places):
    """What a command prints; it must succeed."""
    process = start(line, clone, more, **places)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-2000:]
    return out


def test_install_is_what_ci_does():
    line = command("Try it", "pip install -r requirements.txt")
    assert line.split()[-2:] == ["-r", "requirements.txt"]
    assert re.search(r"^pip install .*-r requirements.txt$", (ROOT / ".ci/run").read_text(), re.M)


@pytest.mark.slow
def test_toy_runs_in_a_fresh_clone(clone):
    """Four updates instead of 200; world, teacher and evaluation are whole."""
    printed = run(command("Try it", "python distilhubert.py --toy"), clone, "--steps 4")
    sizes = re.findall(r"^\| (\w+) +\| +([\d,]+) \|", printed, re.M)
    assert [name for name, _ in sizes] == ["teacher", "untrained", "initialised", "distilled"]
    assert sizes == re.findall(r"^\| (\w+) +\| +([\d,]+) \|", README, re.M)[:4]
    assert (clone / "runs/distilhubert-toy/student.pt").is_file()


@pytest.mark.slow
def test_own_folder_resume_load_evaluate_and_export(clone, audio_folder, tiny_teacher):
    """One test, because each step needs the one before."""
    here, more = clone / "runs/distilhubert", f"{TINY} --teacher {tiny_teacher}"
    audio = content(audio_folder)

    first = start(
        command("Train for real", "python distilhubert.py --data DIR"),
        clone,
        more,
        DIR=audio_folder,
    )
    end = time.monotonic() + 100
    while not (here / "last.pt").exists() and first.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=100)
    assert first.returncode != 0 and "--resume" in err.splitlines()[-1], err[-2000:]
    stopped = len((here / "log.jsonl").read_text().splitlines())

    line = command("Train for real", "python distilhubert.py --data DIR --resume")
    table = run(line, clone, more, DIR=audio_folder)
    log = [json.loads(line) for line in (here / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 60 and stopped < len(log)
    assert "| distilled" in table and (here / "results.txt").read_text().startswith(table.strip())

    (block,) = [b for b in blocks("Use the student") if "student(waveforms, lengths)" in b]
    assert len([line for line in block.splitlines() if line]) == 3
    code = "import torch\nwaveforms, lengths = torch.randn(2, 16000), torch.tensor([16000, 8000])\n"
    code += block + "print(len(hidden_states), *hidden_states[-1].shape, *lengths.tolist())\n"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True
    )
    assert printed.stdout.split() == ["3", "2", "49", "16", "49", "24"], printed.stderr

    labelled = clone.parent / "labelled"
    shutil.copytree(audio_folder, labelled)
    rows = [
        f"{number:02d}.wav\t{'train' if number < 6 else 'dev' if number < 9 else 'test'}"
        f"\t{'ab'[number % 2]}\tkind"
        for number in range(12)
    ]
    header = "path\tsplit\tlabel\tlabel_kind"
    (labelled / "manifest.tsv").write_text("\n".join([header, *rows]) + "\n")
    line = "python distilhubert.py --evaluate runs/distilhubert/student.pt --task-data DIR"
    assert "kind" in run(command("Use the student", line), clone, "--device cpu", DIR=labelled)

    line = command("Use it elsewhere", "python distilhubert.py --export huggingface")
    assert run(line, clone).strip() == "runs/distilhubert/huggingface"
    assert json.loads((here / "huggingface/config.json").read_text())["hidden_size"] == 16
    assert content(audio_folder) == audio
