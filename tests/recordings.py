"""Rebuild the real recordings that the README's tables were measured on, from their origins.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset      CLONES/...
    git clone https://github.com/jimbozhang/speechocean762
    git clone https://github.com/resemble-ai/Resemblyzer
    git clone https://github.com/Picovoice/speech-to-intent-benchmark
    python tests/recordings.py CLONES OUT

``.github/recordings.tsv`` names every file with its cut (16 kHz samples: silence before and after
speech is left out) and its splits; labels come from the clones. OUT gets FLAC files and the
``manifest.tsv`` that ``--data`` reads, with a column ``label_X`` for the digit and for each slot of
the commands. The measured files had the same samples, except for the digits: another tool had
resampled them from 8 kHz, here common.load_audio does.
"""

import csv
import json
import re
import sys
from pathlib import Path

import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

LIST = Path(__file__).resolve().parent.parent / ".github" / "recordings.tsv"
ORIGINS = {  # data set: folder of the clone, path of a recording in it
    "fsdd": ("free-spoken-digit-dataset", "recordings/{name}.wav"),
    "speechocean762": ("speechocean762", "WAVE/SPEAKER{speaker}/{name}.WAV"),
    "librispeech": ("Resemblyzer", "audio_data/librispeech_train-clean-100/{name}.flac"),
    "barista_intents": ("speech-to-intent-benchmark", "data/speech/clean/{name}.wav"),
}
DIGITS = "zero one two three four five six seven eight nine".split()


def read_texts(clone: Path) -> dict[str, str]:
    """speechocean762: name -> transcript."""
    lines = [line for part in ("train", "test") for line in open(clone / part / "text")]
    return dict(line.rstrip("\n").split("\t", 1) for line in lines)


def read_phones(clone: Path) -> dict[str, str]:
    """speechocean762: name -> phones of all words, without the marks of their place in a word."""
    phones: dict[str, list[str]] = {}
    for line in open(clone / "resource" / "text-phone"):
        word, _, sounds = line.strip().partition("\t")
        phones.setdefault(word.split(".")[0], []).append(re.sub(r"_[BIES]\b", "", sounds))
    return {name: " ".join(words) for name, words in phones.items()}


def read_slots(clone: Path) -> dict[str, dict[str, str]]:
    """The commands to a coffee machine: name -> slot -> value."""
    found = json.loads((clone / "data" / "label" / "label.json").read_text())
    return {
        name.removesuffix(".wav"): {slot: value.strip() for slot, value in row["slots"].items()}
        for name, row in found.items()
    }


def slot_labels(slots: dict[str, dict[str, str]], splits: dict[str, str]) -> dict[str, dict]:
    """Name -> the label of each slot: its value, or ``none`` where the command has no such slot.

    The label is ``yes`` or ``no`` where dev or test have a value that is not in training.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in splits}
    for slot in sorted({slot for name in splits for slot in slots[name]}):
        values = {name: slots[name].get(slot, "none") for name in splits}
        known = {value for name, value in values.items() if splits[name] == "train"}
        if not known.issuperset(values.values()):
            values = {name: "no" if value == "none" else "yes" for name, value in values.items()}
        for name, value in values.items():
            found[name][f"label_{slot}"] = value
    return found


def labels(dataset: str, name: str, tables: dict[str, dict]) -> dict[str, str]:
    """Columns of the manifest that follow from a recording's name and its origin's tables."""
    if dataset == "fsdd":
        digit, speaker, _ = name.split("_")
        word = DIGITS[int(digit)]
        return {"speaker": f"fsdd-{speaker}", "label_digit": word, "text": word.upper()}
    if dataset == "speechocean762":
        text, phones = tables["text"][name], tables["phones"][name]
        return {"speaker": f"so762-{name[1:5]}", "text": text, "phones": phones}
    if dataset == "librispeech":
        return {"speaker": f"libri-{name.split('-')[0]}"}
    return tables["slots"][name]


def main(clones: Path, out: Path) -> None:
    with open(LIST) as file:
        listed = list(csv.DictReader(file, delimiter="\t"))
    splits = {row["name"]: row["split"] for row in listed if row["dataset"] == "barista_intents"}
    tables = {
        "text": read_texts(clones / "speechocean762"),
        "phones": read_phones(clones / "speechocean762"),
        "slots": slot_labels(read_slots(clones / "speech-to-intent-benchmark"), splits),
    }
    rows = []
    for row in listed:
        dataset, name, start, samples = (row[c] for c in ("dataset", "name", "start", "samples"))
        known = labels(dataset, name, tables)
        clone, pattern = ORIGINS[dataset]
        path = clones / clone / pattern.format(name=name, speaker=known.get("speaker", "")[-4:])
        wave = common.load_audio(path, int(start), int(samples))
        target = out / dataset / f"{name}.flac"
        target.parent.mkdir(parents=True, exist_ok=True)
        pcm = (wave * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
        soundfile.write(target, pcm.numpy(), common.SAMPLE_RATE)
        rows.append({"path": f"{dataset}/{name}.flac"} | row | known)
    found = sorted({column for row in rows for column in row if column.startswith("label_")})
    columns = ["path", "dataset", "speaker", "split", "speaker_split", *found, "text", "phones"]
    lines = ["\t".join(row.get(column, "") for column in columns) for row in rows]
    common.write_text(out / "manifest.tsv", "\n".join(["\t".join(columns), *lines]) + "\n")
    print(f"{len(rows)} recordings in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
