"""A new user's path: the commands of README.md, in its order, in what a fresh clone would hold.

The commands are taken from README.md letter by letter; DIR and MANIFEST become paths, and flags are
added that make runs short (4 updates, and a tiny teacher where HuBERT Base would be downloaded).
Training starts as a process; what is done with the student runs in this one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import distilhubert

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = "--steps 4 --batch-seconds 3 --crop-seconds 1 --workers 0 --device cpu"


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


def start(line, clone, more):
    """What a command prints as a process of its own; it must succeed."""
    words = [sys.executable if word == "python" else word for word in line.split()]
    done = subprocess.run(
        words + more.split(),
        cwd=clone,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_install_is_what_ci_does():
    line = command("Try it", "pip install -r requirements.txt")
    assert line.split()[-2:] == ["-r", "requirements.txt"]
    assert re.search(r"^pip install .*-r requirements.txt$", (ROOT / ".ci/run").read_text(), re.M)


@pytest.mark.slow
def test_toy_runs_in_a_fresh_clone(clone):
    """Four updates instead of 200; world, teacher and evaluation are complete."""
    printed = start(command("Try it", "python distilhubert.py --toy"), clone, "--steps 4")
    sizes = r"^\| (\w+) +\| +([\d,]+) \|"
    rows = re.findall(sizes, printed, re.M)
    assert [name for name, _ in rows] == ["teacher", "untrained", "initialised", "distilled"]
    assert rows == re.findall(sizes, README, re.M)[:4]
    columns = re.findall(r"^\| +\| parameters .*\|$", printed + README, re.M)[:2]
    assert columns[0].split() == columns[1].split()  # of the table printed, and of README.md's
    assert (clone / "runs/distilhubert-toy/student.pt").is_file()


@pytest.mark.slow
def test_own_folder_resume_load_evaluate_and_export(
    clone, audio_folder, tiny_teacher, tmp_path, monkeypatch, capsys
):
    """One test, because each step needs the one before."""
    run, audio = clone / "runs/distilhubert", content(audio_folder)
    more = f"{TINY} --teacher {tiny_teacher}"
    for line in ("python distilhubert.py --data DIR", "python distilhubert.py --data DIR --resume"):
        line = command("Train on your own audio", line).replace("DIR", str(audio_folder))
        table = start(line, clone, more)  # the second one finds all updates done, and evaluates
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4 and "heldout" in log[-1]
    assert "| distilled" in table and (run / "results.txt").read_text().startswith(table.strip())

    monkeypatch.chdir(clone)
    (block,) = [
        b for b in blocks("Use and evaluate a student") if "student(waveforms, lengths)" in b
    ]
    assert len([line for line in block.splitlines() if line]) == 3
    given = "import torch\nwaveforms, lengths = torch.randn(2, 16000), torch.tensor([16000, 8000])"
    names = {}
    exec(f"{given}\n{block}", names)
    assert [tuple(states.shape) for states in names["hidden_states"]] == [(2, 49, 16)] * 3
    assert names["lengths"].tolist() == [49, 24]

    def here(line, *flags):
        """What the command prints in this process."""
        monkeypatch.setattr(sys, "argv", line.split()[1:] + list(flags))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which main replaces
        distilhubert.main()
        return capsys.readouterr().out

    rows = ["path\tsplit\tlabel_pitch"]
    for number in range(12):
        part = "train" if number < 6 else "dev" if number < 9 else "test"
        rows.append(f"{audio_folder}/{number:02d}.wav\t{part}\t{'high low'.split()[number % 2]}")
    manifest = tmp_path / "labels.tsv"
    manifest.write_text("\n".join(rows) + "\n")
    line = "python distilhubert.py --evaluate runs/distilhubert/student.pt --data MANIFEST"
    line = command("Use and evaluate a student", line).replace("MANIFEST", str(manifest))
    assert "| pitch accuracy |" in here(line, "--device", "cpu")

    pytest.importorskip("transformers", reason="transformers is not installed")
    line = command("Use it elsewhere", "python distilhubert.py --export huggingface")
    assert here(line).strip() == "runs/distilhubert/huggingface"
    assert json.loads((run / "huggingface/config.json").read_text())["hidden_size"] == 16
    assert content(audio_folder) == audio
