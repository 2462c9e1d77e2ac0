"""Keep all measured numbers in .github/results.json; write README.md's and results.md's tables.

    python tests/tables.py                 # write all tables into README.md and .github/results.md
    python tests/tables.py add NAME RUN    # take over a run folder's results.json as table NAME
    python tests/tables.py probes NAME DIR ROW=RUN ...    # every probe on the students of each RUN
    python tests/benchmark.py FLAGS | python tests/tables.py benchmark FLAGS    # its two tables
    python tests/tables.py gpu OUT         # the figures of tests/gpu.py
    python tests/tables.py pictures        # draw .github/figures (matplotlib)
    python tests/tables.py prior FOLDER    # print P(T), pad.py's Eq. 1, of an uncased BERT

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``. It is the result of a run with
``--seeds`` or ``--claim``: the numbers of every seed, the command, the date. ``probes`` scores the
distilled students of such runs, and the teacher of the first, on all tasks that DIR/manifest.tsv
has labels for (a run by itself takes one content task of each data set). Made of other tables are
those in SIDE_BY_SIDE, NAME-layers (the cosine of each layer, SKILL), size-and-speed (the benchmark
in short), claims and comparisons (the verdicts on CLAIMS, computed by ``compare``); describe is
what ``python distilhubert.py --describe`` prints.
"""

import importlib
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import common
import distilhubert
import pad

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".github" / "results.json"
FIGURES = ROOT / ".github" / "figures"
README, DETAILS = ROOT / "README.md", ROOT / ".github" / "results.md"
BLOCK = re.compile(r"(?<=<!-- table )([a-z-]+) -->\n.*?(?=<!-- end -->)", re.DOTALL)
LINES = re.compile(r"^(\| `(\w+\.py)` \|.*\| )\d+ \|$", re.MULTILINE)  # script -> its length
SIZE = ("parameters", "GMAC/s", "speed")

SIDE_BY_SIDE = {  # table: {row: (table, row) that it is taken from}
    "side-by-side-toy": {
        "teacher": ("distilhubert-toy", "teacher"),
        "DistilHuBERT": ("distilhubert-toy", "distilled"),
        "GenDistiller v1": ("gendistiller-toy", "distilled"),
        "GenDistiller v2": ("gendistiller-toy", "recurrent"),
        "LSTM + DKD": ("lstm-toy", "distilled"),
        "SKILL": ("skill-toy", "distilled"),
    },
    "side-by-side-real": {
        "teacher": ("distilhubert-real", "teacher"),
        "DistilHuBERT": ("distilhubert-real", "distilled"),
        "GenDistiller v1": ("gendistiller-real", "distilled"),
        "GenDistiller v2": ("gendistiller-real", "recurrent"),
        "LSTM + DKD": ("lstm-real", "distilled"),
        "SKILL": ("skill-even", "distilled"),
    },
    "gendistiller-longer-toy": {
        "distilled": ("gendistiller-2d-800", "distilled"),
        "parallel": ("gendistiller-parallel-800", "distilled"),
        "recurrent": ("gendistiller-recurrent-800", "distilled"),
        "recurrent, no skip": ("gendistiller-noskip-800", "distilled"),
    },
    "pad-bert-real": {
        "speech model": ("pad-bert-slocal", "speech model"),
        "mean + L1": ("pad-bert-mean", "distilled"),
        "PAD-Glob": ("pad-bert-glob", "distilled"),
        "PAD-SLocal": ("pad-bert-slocal", "distilled"),
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
BENCHMARK = {  # row of size-and-speed: rows of benchmark-features, benchmark-training, gpu-training
    "HuBERT Base (PAD's student has its size)": ("HuBERT Base", "pad", "pad"),
    "DistilHuBERT": ("distilhubert", "distilhubert", "distilhubert"),
    "GenDistiller v1": ("gendistiller 2d", "gendistiller 2d", "gendistiller"),
    "GenDistiller v2": ("gendistiller recurrent", "gendistiller recurrent", None),
    "LSTM + DKD": ("lstm_dkd", "lstm_dkd", "lstm_dkd"),
    "SKILL (pruned, even widths)": ("skill act 4", "skill act 4", None),
}

MEASURES = {  # of a claim: columns in the toy world and on real recordings; None: not testable here
    "phones": ("phone accuracy (toy)", "phone error rate (speechocean762)"),
    "speaker": ("speaker accuracy (toy)", "speaker accuracy (fsdd)"),
    "intents": ("intent accuracy (toy) 10 %", None),
    "slots": (None, "slot accuracy (barista_intents)"),
    "L1": ("L1", "L1"),
    "agreement": ("agreement", "agreement"),
    "cosine": ("cosine, other layers", "cosine, other layers"),
}
LOWER_IS_BETTER = ("L1", "phone error rate (speechocean762)")
CLAIMS = """
DistilHuBERT, speaker: layer 4 is better than 8, 12 | distilhubert/layer 4 | layer 8 | layer 12
DistilHuBERT, phones: layer 8 is better than 4, 12 | distilhubert/layer 8 | layer 4 | layer 12
DistilHuBERT, phones: three heads are better than layer 4 | distilhubert/distilled | layer 4
DistilHuBERT, speaker: three heads are better than layer 12 | distilhubert/distilled | layer 12
GenDistiller v1, L1: closer than the baseline | gendistiller/distilled | parallel
+ GenDistiller v1, L1: the same after 800 updates | gendistiller-2d-800/distilled | \
gendistiller-parallel-800/distilled
GenDistiller v1, phones: better than the baseline | gendistiller/distilled | parallel
+ GenDistiller v2, L1: closer than the baseline | gendistiller/recurrent | parallel
GenDistiller v2, phones: better than the baseline | gendistiller/recurrent | parallel
+ GenDistiller v2, phones: the same after 800 updates | gendistiller-recurrent-800/distilled | \
gendistiller-parallel-800/distilled
GenDistiller v2, L1: the skip connection helps | gendistiller/recurrent | recurrent, no skip
+ GenDistiller v2, L1: the same after 800 updates | gendistiller-recurrent-800/distilled | \
gendistiller-noskip-800/distilled
LSTM + DKD, agreement: DKD is better than KD | lstm/distilled | KD
LSTM + DKD, agreement: KD is better than cross-entropy | lstm/KD | cross-entropy
LSTM + DKD, phones: DKD is better than KD | lstm/distilled | KD
LSTM + DKD, phones: better than DistilHuBERT | lstm/distilled | distilhubert/distilled
LSTM + DKD, speaker: DistilHuBERT is better | distilhubert/distilled | lstm/distilled
SKILL, phones: similar groups are better than hand-picked | skill/distilled | hand-picked 0/4/8/12
+ SKILL, phones: the same with 85 % pruned | skill/similar, 85 % pruned | hand-picked, 85 % pruned
SKILL, cosine: similar groups are better than hand-picked | skill/distilled | hand-picked 0/4/8/12
SKILL, cosine: the same with 85 % pruned | skill/similar, 85 % pruned | hand-picked, 85 % pruned
PAD, intents: PAD-SLocal is better than no distillation | pad-claim/distilled | speech model
PAD, intents: PAD-Glob is better than PAD-SLocal | pad-claim/PAD-Glob | distilled
PAD, intents: PAD-SLocal is better than PAD-TLocal | pad-claim/distilled | PAD-TLocal
+ PAD, intents: priors improve PAD-Glob | pad-claim/PAD-Glob | mean + L1
+ PAD, intents: priors improve PAD-TLocal | pad-claim/PAD-TLocal | max cosine
PAD, intents: priors improve PAD-SLocal | pad-claim/distilled | no prior
PAD, intents: P(S) gives better anchors than even ones | pad-claim/distilled | even anchors
+ PAD, intents: three widths are better than one | pad-claim/distilled | one width
+ PAD, intents: PAD-Glob is better than joint training | pad-claim/PAD-Glob | joint
PAD, slots: PAD-SLocal is better than no distillation | pad-bert/PAD-SLocal | speech model
PAD, slots: PAD-SLocal is better than PAD-Glob | pad-bert/PAD-SLocal | PAD-Glob
+ PAD, slots: priors improve PAD-Glob | pad-bert/PAD-Glob | mean + L1
"""  # claim of a paper | TABLE/ROW | rows that it is better than, of the same table or TABLE/ROW
# +: in results.md alone
TABLES = ("distilhubert", "gendistiller", "lstm", "skill", "pad")  # what TABLE begins with


def load() -> dict[str, dict[str, Any]]:
    """name -> {"command", "date", "machine", "rows", "curve"}."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def public(command: str) -> str:
    """The command without this machine's paths."""
    command = re.sub(r" --out \S+", "", command)
    command = re.sub(r"(?<=--data )\S+", "DIR", command)
    return "python " + re.sub(r"(--teacher|--student) \S*/\S+", r"\1 FILE", command)


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
    rows = {title: mean_of_slots(row) for title, row in rows.items()}
    shared = [c for c in next(iter(rows.values())) if all(c in row for row in rows.values())]
    order = [column for column in SIZE if column in shared]
    order += [column for column in shared if column not in SIZE]
    return {title: {column: row[column] for column in order} for title, row in rows.items()}


def mean_of_slots(row: dict[str, list]) -> dict[str, list]:
    """The columns of the slots of barista_intents as one, for each share of the labels."""
    merged: dict[str, list] = {}
    for column, values in row.items():
        title = re.sub(
            r"^\w+ accuracy \(barista_intents\)", "slot accuracy (barista_intents)", column
        )
        merged.setdefault(title, []).append(values)
    return {
        title: values[0] if len(values) == 1 else np.mean(values, 0).tolist()
        for title, values in merged.items()
    }


def compare(tables: dict[str, dict], world: int, claim: list[str]) -> tuple[str, list[dict]]:
    """Verdict on a claim in the toy world (0) or on real recordings (1), and its comparisons.

    Reproduced: same sign in each seed, and means apart by more than two standard deviations, where
    the larger one of the two rows counts.
    """
    column = MEASURES[re.search(r", (\w+):", claim[0])[1]][world]
    if column is None:
        return "not testable here", []
    numbers, table = {}, ""
    for name in claim[1:]:
        if name.startswith(TABLES):
            table, name = name.split("/", 1)
        if (whole := table if table in tables else f"{table}-{('toy', 'real')[world]}") == table:
            if world:  # a table of the toy world
                return "", []
        rows = side_by_side(tables, whole) if whole in SIDE_BY_SIDE else tables[whole]["rows"]
        numbers[f"{whole}/{name}"] = np.array(rows[name][column])
    (first, best), *rivals = numbers.items()
    pairs = []
    for name, rival in rivals:
        gain = rival - best if column in LOWER_IS_BETTER else best - rival
        deviation = max(best.std(ddof=1), rival.std(ddof=1))
        found = dict(column=column, rows=(first, name), means=(best.mean(), rival.mean()))
        found |= dict(gain=gain, deviation=deviation)
        pairs.append(found | {"holds": (gain > 0).all() and gain.mean() > 2 * deviation})
    return ("" if all(pair["holds"] for pair in pairs) else "not ") + "reproduced", pairs


def claims(tables: dict[str, dict], details: bool) -> str:
    """A line for each claim: verdicts and means of its rows; or one for each comparison."""
    head = "claim | toy world | real recordings"
    if details:
        head = "column | row | better than | means | difference of each seed | deviation | verdict"
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for line in CLAIMS.replace("\\\n", "").strip().splitlines():
        claim, cells = line.split(" | "), []
        for world in (0, 1):
            verdict, pairs = compare(tables, world, claim)
            means = [pair["means"][0] for pair in pairs[:1]] + [pair["means"][1] for pair in pairs]
            figures = ", ".join(f"{mean:.3f}".removeprefix("0") for mean in means)
            cells.append(f"{verdict}: {figures}" if pairs else verdict)
            for pair in pairs if details else ():
                both = " / ".join(f"{mean:.3f}" for mean in pair["means"])
                seeds = " ".join(f"{value:+.3f}" for value in pair["gain"])
                holds = ("" if pair["holds"] else "not ") + "reproduced"
                cells = [pair["column"], *pair["rows"], both, seeds, f"{pair['deviation']:.4f}"]
                lines.append(f"| {' | '.join([*cells, holds])} |")
        if not details and not claim[0].startswith("+"):
            lines.append(f"| {' | '.join([claim[0], *cells])} |")
    return "\n".join(lines)


def size_and_speed(tables: dict[str, dict]) -> dict[str, dict]:
    """The benchmark in short: size, and seconds of audio per second in inference and training."""
    features, training = (tables[f"benchmark-{x}"]["rows"] for x in ("features", "training"))
    on_gpu, rows = tables["gpu-training"]["rows"], {}
    for title, (name, step, key) in BENCHMARK.items():
        row = {column: features[name][column] for column in SIZE[:2]}
        row |= {"training": training[step]["audio s/s"], "inference": features[name]["audio s/s"]}
        if key in on_gpu:
            row["training, GPU"] = on_gpu[key]["audio s/s"]
        rows[title] = row
    return rows


def render(name: str, tables: dict[str, dict]) -> str:
    """The Markdown of a table, with its command and date above it."""
    if name in SIDE_BY_SIDE:
        table = side_by_side(tables, name)
        if name == "side-by-side-real":  # sizes and speeds are about those of the toy world
            table = {t: {c: v for c, v in row.items() if c not in SIZE} for t, row in table.items()}
        text = common.format_table(table)
        return squeeze(text) if name.startswith("side-by-side") else text
    if name in ("claims", "comparisons"):
        return claims(tables, details=name == "comparisons")
    if name == "describe":
        with torch.device("meta"):  # counts without computing
            return common.format_table(distilhubert.describe(distilhubert.Config()))
    if name == "size-and-speed":
        return squeeze(common.format_table(size_and_speed(tables)))
    if name.endswith("-layers"):
        return common.format_table(tables[name.removesuffix("-layers")]["layers"])
    table = tables[name]
    seeds = max(len(v) for row in table["rows"].values() for v in row.values())
    spread = f"mean ± standard deviation over {seeds} seeds, " if seeds > 1 else ""
    stamp = f"`{table['command']}`, {spread}{table['machine']}, {table['date']}:"
    return f"{stamp}\n\n{common.format_table(table['rows'])}"


def fill(text: str, tables: dict[str, dict]) -> str:
    """README.md or results.md with the tables of the results file, and the lengths of scripts."""
    text = LINES.sub(lambda x: f"{x[1]}{len((ROOT / x[2]).read_text().splitlines())} |", text)
    return BLOCK.sub(lambda block: f"{block[1]} -->\n{render(block[1], tables)}\n", text)


def squeeze(table: str) -> str:
    """The table without the blanks that align its columns, for lines of 125 columns at most."""
    return re.sub("-{3,}", "---", re.sub(" {2,}", " ", table))


def benchmark(flags: Sequence[str], output: str) -> None:
    """Keep the two tables of tests/benchmark.py's output as benchmark-training, -features."""
    stamp = {"command": " ".join(["python tests/benchmark.py", *flags])}
    stamp |= {"date": time.strftime("%Y-%m-%d")}
    for text in output.split("\n\n"):
        title, *lines = text.strip().split("\n")
        if kind := {"training,": "training", "all hidde": "features"}.get(title[:9]):
            if kind == "training":  # whose title ends with the machine
                machine = title.split(", ", 2)[2]
            stamp["machine"] = title if kind == "training" else f"{title}, {machine}"
            cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
            rows = {
                line[0]: {c: [number(v)] for c, v in zip(cells[0][1:], line[1:]) if v}
                for line in cells[2:]
            }
            keep(f"benchmark-{kind}", stamp | {"rows": rows})


def gpu_tables(figures: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """training, inference, loop: the rows of those parts that have not failed."""
    good = {name: row for name, row in figures.items() if "error" not in row}
    good = {name: {c: v for c, v in row.items() if c != "part s"} for name, row in good.items()}
    training, loop = {}, {}
    for name, row in good.items():
        if name.startswith("training "):
            training[name.removeprefix("training ")] = row
        if name in ("loop", "torchrun"):
            loop |= {f"{name}, {half}": columns for half, columns in row.items()}
    inference = good.get("inference", {}).get("rows", {})
    return {"training": training, "inference": inference, "loop": loop}


def gpu(out: Path) -> None:
    """Keep the figures of ``tests/gpu.py OUT`` as gpu-training, gpu-inference and gpu-loop."""
    figures = json.loads((out / "gpu.json").read_text())
    machine, stamp = figures["machine"], {"command": "python tests/gpu.py OUT"}
    if machine["device"] == "CPU":
        sys.exit(f"{out}/gpu.json is not of a GPU")
    stamp |= {"machine": f"{machine['device']}, torch {machine['torch']}", "date": machine["date"]}
    for kind, rows in gpu_tables(figures).items():
        cells = {name: {c: [v] for c, v in row.items()} for name, row in rows.items()}
        keep(f"gpu-{kind}", stamp | {"rows": cells})


def number(text: str) -> float:
    return int(text.replace(",", "")) if text.replace(",", "").isdigit() else float(text)


SENTENCES = (
    "turn on the lights in the kitchen please",
    "please turn off the music in the bedroom",
    "could you make it a little bit warmer in here",
    "he hoped there would be stew for dinner, turnips and carrots",
    "I would like a large cappuccino with two sugars",
)


def text_prior(folder: str) -> str:
    """n times P(T), Eq. 1 of pad.py, of the n word pieces of each sentence: 1 is even."""
    bert, tokenizer = common.load_text_teacher(folder)
    names, lines = list(tokenizer.ids), ["| sentence, each word piece with n P(T) |", "|---|"]
    for sentence in SENTENCES:
        ids = torch.tensor(tokenizer(sentence))
        units = pad.text_units(pad.Config(), bert, [ids])
        weights = (units.prior * units.mask.sum())[0, 1:-1].tolist()
        pairs = [f"{names[i]} {w:.2f}" for i, w in zip(ids[1:-1].tolist(), weights, strict=True)]
        top = sorted(weights)[-2:]
        pairs = [f"**{p}**" if w in top else p for p, w in zip(pairs, weights, strict=True)]
        lines.append(f"| {', '.join(pairs)} |")
    return "\n".join(lines)


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
        axis.locator_params(axis="x", nbins=4)
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
        case ["benchmark", *flags]:
            benchmark(flags, sys.stdin.read())
        case ["gpu", out]:
            gpu(Path(out))
        case ["pictures"]:
            draw(load())
        case ["prior", folder]:
            return print(text_prior(folder))
        case [_, *_]:
            sys.exit(__doc__)
    for path in (README, DETAILS):
        common.write_text(path, fill(path.read_text(), load()))


if __name__ == "__main__":
    main()
