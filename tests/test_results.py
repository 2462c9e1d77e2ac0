"""Tables of README.md and results.md are the results file's; recordings can be rebuilt."""

import csv
import io
import json
import re
import runpy
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_run
from test_common_text import real_bert

sys.path.insert(0, str(Path(__file__).resolve().parent))

import recordings
import tables

import common
import distilhubert

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("path", [tables.README, tables.DETAILS], ids=lambda path: path.name)
def test_tables_are_those_of_the_results_file(path):
    """Outside the blocks are words, sizes that tests check, and one run's output."""
    text = path.read_text()
    assert tables.fill(text, tables.load()) == text
    assert not re.search(r"^\|.*± \d", tables.BLOCK.sub("", text), flags=re.MULTILINE)


def test_each_table_of_the_results_file_is_shown_somewhere():
    blocks = tables.BLOCK.findall(tables.README.read_text() + tables.DETAILS.read_text())
    shown = {row[0] for name in tables.SIDE_BY_SIDE for row in tables.SIDE_BY_SIDE[name].values()}
    assert set(tables.load()) <= shown | set(blocks) and len(blocks) == len(set(blocks))


def test_every_command_of_the_results_file_can_be_parsed(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which parse_flags replaces
    for name, table in tables.load().items():
        python, script, *flags = table["command"].split()
        assert python == "python" and (ROOT / script).exists(), name
        if script.startswith("tests/"):
            continue
        module = __import__(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *flags])
        common.parse_flags(module.Config, module.TOY, module.__doc__)


def finished_run(folder, values=(0.5, 0.7)):
    """A run folder as ``--seeds 2 --out`` leaves it."""
    rows = {"distilled": {"parameters": [7, 7], "phone accuracy (toy)": list(values)}}
    (folder / "distilled-seed-0").mkdir(parents=True)
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in log)
    (folder / "distilled-seed-0" / "log.jsonl").write_text(text)
    cosines = {"distilled": {"cosine": [0.9, 0.8]}}
    (folder / "distilled-seed-0" / "layers.json").write_text(json.dumps(cosines))
    command = "skill.py --toy --data /some/where --teacher /a/b.pt --out /x/y --seeds 2"
    (folder / "results.json").write_text(json.dumps({"command": command, "rows": rows}))
    (folder / "results.txt").write_text("table\n\nskill.py ... | torch 2.11.0 | 2026-11-21\n")
    return folder


def test_probes_take_all_students_of_a_run_and_their_teacher(own, tiny_files, monkeypatch):
    """Every task that the labels allow, a column each; a number for each seed."""
    out, rng = own / "run", np.random.default_rng(0)
    lines = ["path\tsplit\tspeaker_split\tspeaker\ttext\tphones\tlabel_size"]
    for i in range(12):
        soundfile.write(own / f"{i}.wav", rng.normal(0, 0.1, 8000), 16_000)
        part = ("train", "train", "dev", "test")[i // 3]
        lines.append(f"{i}.wav\t{part}\t{part}\t{i % 3}\tA B\tAH B\t{i % 2}")
    (own / "manifest.tsv").write_text("\n".join(lines) + "\n")
    files = tiny_files | dict(audio=own)
    for seed in range(2):
        changes = dict(seed=seed, steps=1, batch_seconds=2.0, crop_seconds=0.5)
        run = tiny_run("distilhubert", files, out / f"distilled-seed-{seed}", **changes)
        distilhubert.train(distilhubert.Config(**run))
    linear, ctc = common.linear_probe, common.ctc_probe
    monkeypatch.setattr(common, "linear_probe", lambda *given: linear(*given[:2], 4))
    monkeypatch.setattr(common, "ctc_probe", lambda *given, **more: ctc(*given, 2, **more))
    tables.README.write_text("<!-- table x-real -->\n<!-- end -->\n")
    tables.DETAILS.write_text("")
    monkeypatch.setattr(sys, "argv", ["tables.py", "probes", "x-real", str(own), f"One=x={out}"])
    tables.main()
    table = tables.load()["x-real"]
    assert table["command"] == 'python tests/tables.py probes x-real DIR "One=x=RUN"'
    assert list(table["rows"]) == ["teacher", "One=x"]
    for row in table["rows"].values():
        columns = {"parameters", "GMAC/s", "phone error rate", "character error rate"}
        assert row.keys() == columns | {"size accuracy", "speaker accuracy"}
        assert all(len(values) == 2 for values in row.values())
    assert table["rows"]["teacher"]["parameters"][0] > table["rows"]["One=x"]["parameters"][0]


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A results file, a README and a results.md to play with."""
    for name, file in (("RESULTS", "results.json"), ("README", "README.md"), ("DETAILS", "x.md")):
        monkeypatch.setattr(tables, name, tmp_path / file)
    tables.DETAILS.write_text("<!-- table x-toy -->\n<!-- end -->\n")
    tables.README.write_text("before\n<!-- table x-toy -->\nold\n<!-- end -->\nafter\n")
    return tmp_path


def test_add_takes_over_a_run_and_main_writes_the_readme(own, monkeypatch):
    run = finished_run(own / "run")
    monkeypatch.setattr(sys, "argv", ["tables.py", "add", "x-toy", str(run)])
    tables.main()
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    text = tables.README.read_text()
    assert text.startswith("before\n<!-- table x-toy -->\n") and text.endswith(
        "<!-- end -->\nafter\n"
    )
    assert "`python skill.py --toy --data DIR --teacher FILE --seeds 2`" in text
    assert "over 2 seeds" in text and "2026-11-21" in text and "0.600 ± 0.141" in text
    assert "/some" not in text + tables.RESULTS.read_text()
    assert tables.load()["x-toy"]["curve"] == [[1, 2.0], [2, 1.0]]
    tables.main()
    assert tables.README.read_text() == text  # a second time changes nothing
    assert tables.DETAILS.read_text() in text


def test_layers_become_a_table_and_a_number_changed_by_hand_is_found(own):
    tables.add("x-toy", finished_run(own / "run"))
    table = tables.render("x-toy-layers", tables.load())
    assert re.search(r"\| distilled +\| 0.900 \| 0.800 \|", table)
    filled = tables.fill(tables.README.read_text(), tables.load())
    assert "0.600" in filled
    assert tables.fill(filled.replace("0.600", "0.610"), tables.load()) == filled


def test_side_by_side_takes_rows_of_other_tables(monkeypatch):
    rows = {"a": {c: [1.0] for c in ("digit", "L1", *tables.SIZE)}}
    rows["b"] = {c: [2.0] for c in ("digit", *tables.SIZE)}
    monkeypatch.setitem(
        tables.SIDE_BY_SIDE, "side-by-side-x", {"teacher": ("t", "a"), "student": ("t", "b")}
    )
    found = tables.side_by_side({"t": {"rows": rows}}, "side-by-side-x")
    assert found["student"] == {c: [2.0] for c in (*tables.SIZE, "digit")}  # L1 is not shared
    assert list(found) == ["teacher", "student"] and list(found["teacher"])[:3] == [*tables.SIZE]


def test_slots_are_one_column_for_each_share_of_the_labels():
    row = {"parameters": [7, 7], "phone error rate (x)": [0.5, 0.7]}
    for slot, values in {"size": [0.2, 0.4], "roast": [0.6, 0.8]}.items():
        row[f"{slot} accuracy (barista_intents)"] = values
        row[f"{slot} accuracy (barista_intents) 10 %"] = [value / 2 for value in values]
    found = tables.mean_of_slots(row)
    assert list(found) == [
        *("parameters", "phone error rate (x)"),
        *("slot accuracy (barista_intents)", "slot accuracy (barista_intents) 10 %"),
    ]
    assert found["parameters"] == [7, 7] and found["phone error rate (x)"] == [0.5, 0.7]
    assert found["slot accuracy (barista_intents)"] == pytest.approx([0.4, 0.6])
    assert found["slot accuracy (barista_intents) 10 %"] == pytest.approx([0.2, 0.3])


@pytest.mark.parametrize(
    ("row", "rival", "verdict"),
    [
        ([0.6, 0.7, 0.8], [0.3, 0.4, 0.5], "reproduced"),  # 0.3 apart, deviations 0.1
        ([0.6, 0.7, 0.8], [0.41, 0.51, 0.61], "not reproduced"),  # 0.19 apart
        ([0.6, 0.7, 0.8], [0.4, 0.4, 0.4], "reproduced"),
        ([0.6, 0.6, 0.6], [0.2, 0.4, 0.5], "not reproduced"),  # 0.233 apart, the larger one 0.153
        ([0.59, 0.77, 0.77], [0.62, 0.44, 0.44], "not reproduced"),  # another sign in one seed
        ([0.3, 0.4, 0.5], [0.6, 0.7, 0.8], "not reproduced"),
    ],
)
def test_verdicts_by_hand(row, rival, verdict):
    """For an accuracy, and with the opposite sign for an error; on the worst of two rivals."""
    claim = ["LSTM, phones: better", "lstm/a", "b", "skill/c"]
    found = {}
    for world, column in enumerate(tables.MEASURES["phones"]):
        sign = (1, -1)[world]
        rows = {"a": row, "b": rival, "c": [0.0, 0.0, 0.0]}
        rows = {name: {column: [sign * x for x in values]} for name, values in rows.items()}
        kind = ("toy", "real")[world]
        found |= {f"lstm-{kind}": {"rows": rows}, f"skill-{kind}": {"rows": rows}}
    for world in (0, 1):
        assert tables.compare(found, world, claim)[0] == verdict
    claim = ["PAD, intents: better", "lstm/a", "b"]
    assert tables.compare(found, 1, claim) == ("not testable here", [])


def test_the_benchmarks_output_becomes_two_tables(own, monkeypatch, capsys):
    """As tests/benchmark.py prints it; a table of another kind in between is passed over."""
    rows = {"a": {"ms": 12.3, "parameters": 1_234_567}, "a bf16": {"ms": 0.125}}
    table = common.format_table(rows)
    output = f"training, 1 x 1 s, CPU\n{table}\n\nsomething else\n{table}\n\n"
    output += f"all hidden states of 1 x 10 s\n{table}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(output))
    monkeypatch.setattr(sys, "argv", ["tables.py", "benchmark", "--rounds", "5"])
    tables.README.write_text("<!-- table benchmark-training -->\n<!-- end -->\n")
    tables.DETAILS.write_text("<!-- table benchmark-features -->\n<!-- end -->\n")
    tables.main()
    titles = ("training, 1 x 1 s, CPU", "all hidden states of 1 x 10 s, CPU")
    for path, title in zip((tables.README, tables.DETAILS), titles, strict=True):
        text = path.read_text()
        assert table in text and f"`python tests/benchmark.py --rounds 5`, {title}" in text


def test_the_text_prior_of_a_real_bert_is_the_one_in_results_md(monkeypatch, capsys):
    folder = str(real_bert())
    monkeypatch.setattr(sys, "argv", ["tables.py", "prior", folder])
    tables.main()
    printed = capsys.readouterr().out
    assert "kitchen 1.42" in printed and printed in tables.DETAILS.read_text()
    bert, tokenizer = common.load_text_teacher(folder)
    ids = torch.tensor([tokenizer(tables.SENTENCES[0])])
    maps = bert(ids, ids > 0)[1][:, 0, 1:-1, 1:-1]  # L x N x N, without [CLS] and [SEP]
    received = maps.sum(1)
    prior = (received / received.sum(1, keepdim=True)).mean(0) * len(received[0])
    assert [f"{w:.2f}" for w in prior] == re.findall(r" ([\d.]+)\b", printed.split("\n")[2])


def test_pictures_are_drawn(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tables, "FIGURES", tmp_path / "figures")
    tables.draw(tables.load())
    for name in ("curves.png", "quality.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")


# ---- recordings ---------------------------------------------------------------------------------

COMMANDS = "speech-to-intent-benchmark/data/speech/clean/"


def test_recordings_are_rebuilt_from_their_origins(monkeypatch, tmp_path):
    clones, rng = tmp_path / "clones", np.random.default_rng(0)
    wave = rng.integers(-9000, 9000, 9000).astype("int16")
    files = {
        "free-spoken-digit-dataset/recordings/3_theo_7.wav": 8000,
        "speechocean762/WAVE/SPEAKER0036/000360013.WAV": 16000,
        "Resemblyzer/audio_data/librispeech_train-clean-100/103-1240-0000.flac": 16000,
    }
    files |= dict.fromkeys((COMMANDS + name + ".wav" for name in ("ab-1", "ab-2", "ab-3")), 16000)
    for name, rate in files.items():
        (clones / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(clones / name, wave, rate)
    corpus = clones / "speechocean762"
    for part, text in {"train": "000360013\tIT'S JUST\n", "test": "000000001\tNO\n"}.items():
        (corpus / part).mkdir()
        (corpus / part / "text").write_text(text)
    (corpus / "resource").mkdir()
    (corpus / "resource" / "text-phone").write_text(
        "000360013.0\tIH0_B T_I S_E\n000360013.1\tJH_B AH0_I S_I T_E\n"
    )
    slots = {
        "ab-1.wav": {"size": "small", "coffeeDrink": " tea"},
        "ab-2.wav": {"size": "small", "milkAmount": "a lot"},
        "ab-3.wav": {},
        "other.wav": {"coffeeDrink": "not in the list"},
    }
    slots = {name: {"intent": "orderDrink", "slots": row} for name, row in slots.items()}
    (clones / "speech-to-intent-benchmark" / "data" / "label").mkdir()
    (clones / "speech-to-intent-benchmark/data/label/label.json").write_text(json.dumps(slots))
    listed = tmp_path / "list.tsv"
    listed.write_text(
        "dataset\tname\tstart\tsamples\tsplit\tspeaker_split\n"
        "fsdd\t3_theo_7\t0\t18000\ttrain\tdev\n"
        "speechocean762\t000360013\t100\t5000\ttest\t\n"
        "librispeech\t103-1240-0000\t0\t9000\ttrain\t\n"
        "barista_intents\tab-1\t50\t8000\ttrain\t\n"
        "barista_intents\tab-2\t50\t8000\tdev\t\n"
        "barista_intents\tab-3\t50\t8000\ttrain\t\n"
    )
    monkeypatch.setattr(recordings, "LIST", listed)
    recordings.main(clones, tmp_path / "out")
    with open(tmp_path / "out" / "manifest.tsv") as file:
        digit, sentence, book, *orders = csv.DictReader(file, delimiter="\t")
    assert (digit["speaker"], digit["label_digit"]) == ("fsdd-theo", "three")
    assert (digit["split"], digit["speaker_split"], digit["text"]) == ("train", "dev", "THREE")
    assert sentence["phones"] == "IH0 T S JH AH0 S T" and sentence["text"] == "IT'S JUST"
    assert (sentence["speaker"], sentence["split"]) == ("so762-0036", "test")
    assert book["speaker"] == "libri-103" and orders[0]["speaker"] == ""
    found = [[row[f"label_{s}"] for s in ("coffeeDrink", "milkAmount", "size")] for row in orders]
    # "a lot" of milk is in dev alone, so that only whether there is milk can be learned
    assert found == [["tea", "no", "small"], ["none", "yes", "small"], ["none", "no", "none"]]
    assert {digit["label_size"], sentence["label_digit"], orders[0]["label_digit"]} == {""}
    cut, rate = soundfile.read(tmp_path / "out" / sentence["path"], dtype="int16")
    assert rate == 16000 and np.array_equal(cut, wave[100:5100])
    assert len(common.scan(tmp_path / "out", None)) == 6


def test_the_list_of_recordings_keeps_test_speakers_apart():
    with open(recordings.LIST) as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 1432
    known = dict.fromkeys(("text", "phones", "slots"), defaultdict(dict))
    speakers: dict[str, set] = {}
    for row in rows:
        speaker = recordings.labels(row["dataset"], row["name"], known).get("speaker", row["name"])
        speakers.setdefault(speaker, set()).add(row["split"])
    assert all(len(splits) == 1 for splits in speakers.values()) and len(speakers) > 230


def test_without_clones_the_script_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recordings.py"])
    with pytest.raises(SystemExit, match="git clone"):
        runpy.run_path(str(ROOT / "tests" / "recordings.py"), run_name="__main__")
