"""Keep measured tables in one file, and write that file's tables into the README.

    python tests/tables.py                 # write all tables into the README
    python tests/tables.py add NAME RUN    # take over a run folder's results.json as table NAME
    python tests/tables.py probes NAME DIR ROW=RUN ...    # every probe on the students of each RUN
    python tests/tables.py pictures        # draw .github/figures (matplotlib)

The README holds a table between ``<!-- table NAME -->`` and ``<!-- end -->``. A table is the result
of a run with ``--seeds`` or ``--claim``: the numbers of every seed, the command, the date.
``probes`` scores the distilled students of such runs, and the teacher of the first, on all tasks
that DIR/manifest.tsv has labels for (a run by itself takes one content task of each data set).
The tables in SIDE_BY_SIDE are rows of others; NAME-layers is the cosine of each layer (SKILL).
"""

import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import common

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".github" / "results.json"
FIGURES = ROOT / ".github" / "figures"
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- table )([a-z-]+) -->\n.*?(?=<!-- end -->)", re.DOTALL)
SIZE = ("parameters", "GMAC/s", "speed")

SIDE_BY_SIDE = {  # table: {row: (table, row) that it is taken from}
    "side-by-side-toy": {
        "teacher": ("distilhubert-toy", "teacher"),
        "DistilHuBERT": ("distilhubert-toy", "distilled"),
        "GenDistiller": ("gendistiller-toy", "distilled"),
        "GenDistiller, recurrent": ("gendistiller-toy", "recurrent"),
        "LSTM + DKD": ("lstm-toy", "distilled"),
        "SKILL": ("skill-toy", "distilled"),
    },
    "side-by-side-real": {
        "teacher": ("distilhubert-real", "teacher"),
        "DistilHuBERT": ("distilhubert-real", "distilled"),
        "GenDistiller": ("gendistiller-real", "distilled"),
        "LSTM + DKD": ("lstm-real", "distilled"),
        "SKILL": ("skill-even", "distilled"),
    },
    "gendistiller-longer-toy": {
        "distilled": ("gendistiller-2d-800", "distilled"),
        "parallel": ("gendistiller-parallel-800", "distilled"),
    },
    "lstm-longer-toy": {
        "200 updates": ("lstm-toy", "distilled"),
        "800 updates": ("lstm-toy-800", "distilled"),
    },
    "lstm-longer-real": {
        "400 updates": ("lstm-real", "distilled"),
        "1600 updates": ("lstm-real-1600", "distilled"),
    },
}


def load() -> dict[str, dict[str, Any]]:
    """name -> {"command", "date", "machine", "rows", "curve"}."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def public(command: str) -> str:
    """The command without this machine's paths."""
    command = re.sub(r" --out \S+", "", command)
    command = re.sub(r"(?<=--data )\S+", "DIR", command)
    return "python " + re.sub(r"(?<=--teacher )\S*/\S+", "FILE", command)


def add(name: str, run: Path) -> None:
    """Take over the results of a run folder, and the losses of its first student."""
    saved = json.loads((run / "results.json").read_text())
    stamp = (run / "results.txt").read_text().splitlines()[-1].split(" | ")
    log = run / "distilled-seed-0" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    table = {
        "command": public(saved["command"]),
        "date": stamp[-1],
        "machine": stamp[-2],
        "rows": {row: shorten(columns) for row, columns in saved["rows"].items()},
        "layers": layer_cosines(run),
        "curve": [[x["step"], round(x["loss"], 4)] for x in lines if x["loss"] is not None],
    }
    keep(name, table)


def keep(name: str, table: dict[str, Any]) -> None:
    """Put a table into the results file, the numbers of a cell in one line."""
    text = json.dumps(dict(sorted((load() | {name: table}).items())), indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda cell: " ".join(cell[0].split()), text)
    common.write_text(RESULTS, text + "\n")


def score_student(path: Path, tasks: list) -> dict[str, float]:
    """Size and probes of a student.pt of any method."""
    cpu, saved = torch.device("cpu"), common.load_checkpoint(path)
    method, seed = importlib.import_module(saved["method"]), saved["config"]["seed"]
    student = method.load_student(path)
    if saved["method"] == "pad":  # its own score adds probes with few labels
        return common.score(student, lambda waves: student(waves)[0], tasks, cpu, seed)
    return method.score(student, tasks, cpu, seed)


def probes(name: str, data: Path, runs: dict[str, Path]) -> None:
    """Keep as table ``name`` all probes on the students in the run folders, a number per seed."""
    tasks = common.find_tasks(common.scan(data, None), every=True)
    rows: dict[str, dict[str, list]] = {}
    for title, run in runs.items():
        for path in sorted(run.glob("distilled-seed-*/student.pt")):
            found = {title: score_student(path, tasks)}
            if title == next(iter(runs)):
                config = common.load_checkpoint(path)["config"]
                teacher, cpu = common.load_teacher(config["teacher"]), torch.device("cpu")
                scores = common.score(teacher.model, teacher, tasks, cpu, config["seed"])
                found = {"teacher": scores} | found
            for row, scores in found.items():
                for column, value in scores.items():
                    rows.setdefault(row, {}).setdefault(column, []).append(value)
    command = f"python tests/tables.py probes {name} DIR " + " ".join(f'"{t}=RUN"' for t in runs)
    stamp = {"date": time.strftime("%Y-%m-%d"), "machine": f"torch {torch.__version__}"}
    keep(name, {"command": command, **stamp, "rows": {r: shorten(c) for r, c in rows.items()}})


def layer_cosines(run: Path) -> dict[str, dict[str, list[float]]]:
    """Cosine of student and teacher in each layer: a row for each kind of run, a column a layer."""
    rows: dict[str, dict[str, list[float]]] = {}
    for path in sorted(run.glob("*-seed-*/layers.json")):
        name = path.parent.name.rpartition("-seed-")[0].replace("-", " ")
        for layer, value in enumerate(json.loads(path.read_text())["distilled"]["cosine"]):
            rows.setdefault(name, {}).setdefault(str(layer), []).append(round(value, 4))
    return rows


def shorten(columns: dict[str, Any]) -> dict[str, Any]:
    """Six digits of each number are enough."""
    cut = {}
    for name, values in columns.items():
        values = values if isinstance(values, list) else [values]
        cut[name] = [v if isinstance(v, int | str) else float(f"{v:.6g}") for v in values]
    return cut


def side_by_side(tables: dict[str, dict], name: str) -> dict[str, dict]:
    """Rows of other tables: size, and the columns that all of them have."""
    rows = {row: tables[table]["rows"][its] for row, (table, its) in SIDE_BY_SIDE[name].items()}
    shared = [c for c in next(iter(rows.values())) if all(c in row for row in rows.values())]
    order = [*SIZE, *(column for column in shared if column not in SIZE)]
    return {title: {column: row[column] for column in order} for title, row in rows.items()}


def render(name: str, tables: dict[str, dict]) -> str:
    """The Markdown of a table, with its command and date above it."""
    if name in SIDE_BY_SIDE:
        return common.format_table(side_by_side(tables, name))
    if name.endswith("-layers"):
        return common.format_table(tables[name.removesuffix("-layers")]["layers"])
    table = tables[name]
    seeds = max(len(v) for row in table["rows"].values() for v in row.values())
    spread = f"mean ± standard deviation over {seeds} seeds, " if seeds > 1 else ""
    stamp = f"`{table['command']}`, {spread}{table['machine']}, {table['date']}:"
    return f"{stamp}\n\n{common.format_table(table['rows'])}"


def fill(readme: str, tables: dict[str, dict]) -> str:
    """The README with the tables of the results file."""
    return BLOCK.sub(lambda block: f"{block[1]} -->\n{render(block[1], tables)}\n", readme)


def draw(tables: dict[str, dict]) -> None:
    """``curves.png``: loss of each method; ``quality.png``: phone accuracy against size, speed."""
    from matplotlib.figure import Figure

    curves = {name: tables[name]["curve"] for name in tables if name.endswith("-toy")}
    figure = Figure((3 * len(curves), 2.6), layout="constrained")
    for axis, (name, curve) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        axis.plot(*zip(*curve, strict=True))
        axis.set(title=name.removesuffix("-toy"), xlabel="update", ylabel="loss")
        axis.grid(alpha=0.3)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "curves.png", dpi=110)

    figure, accuracy = Figure((10, 3.6), layout="constrained"), "phone accuracy (toy)"
    axes = figure.subplots(1, 3, sharey=True)
    for axis, column in zip(axes, SIZE, strict=True):
        for title, row in side_by_side(tables, "side-by-side-toy").items():
            x, y = (sum(row[c]) / len(row[c]) for c in (column, accuracy))
            axis.plot(x, y, "o", label=title)
        axis.set(xlabel=column + (" relative to the teacher" if column == "speed" else ""))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=accuracy)
    axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(FIGURES / "quality.png", dpi=110)


def main() -> None:
    match sys.argv[1:]:
        case ["add", name, run]:
            add(name, Path(run))
        case ["probes", name, data, *runs] if runs:
            pairs = (run.rpartition("=")[::2] for run in runs)
            probes(name, Path(data), {title: Path(run) for title, run in pairs})
        case ["pictures"]:
            draw(load())
        case [_, *_]:
            sys.exit(__doc__)
    common.write_text(README, fill(README.read_text(), load()))


if __name__ == "__main__":
    main()
