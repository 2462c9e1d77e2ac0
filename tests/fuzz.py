"""Damaged and hostile files for every loader: a result or one sentence, nothing else.

A forked process with bounded memory reads each damaged file with the functions that read users'
files. Clean is a result, or an InputError or OSError of one line. Unclean is any other exception,
memory beyond a bound, a file that was not there before, a process that dies or does not end.

    python tests/fuzz.py 300          # so many cases of each kind, and the table
"""

import collections
import copy
import ctypes
import faulthandler
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import conftest
import numpy as np
import soundfile
import torch

import common
import distilhubert
import skill

SECONDS = 15  # that one case may take
MEMORY = 2 << 30  # bytes of addresses that a case may take beyond what torch takes when idle

# ---- damage ------------------------------------------------------------------------------------

NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1]
SIZES = [2, 3, 100, 4096, 100_000, 10**6, 10**9, 2**31, 2**63]
LEAVES = [None, True, -1, 0, 1, 7, 10**30, 0.5, 1e308, math.nan, math.inf, "", "x", "9" * 400]
LEAVES += ["\0", "../../x", "\ud800", [], {}, [[]], [1, 2, 3], {"a": 1}]
FIELDS = ["", " ", "\0", "\r", "nan", "-1", "9" * 30, ".", "/", "/dev/null", "a" * 5000, '"']
FIELDS += ["K:5 K:3", "K", "K:x", ":::", "K:-7", f"SIL:{2**70}", "é\u2028x", "\ufeff"]


def damage_bytes(data, rng):
    """Bits flipped, bytes lost, added or repeated, special numbers; mostly in the header."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        end = len(data) if rng.random() < 0.3 else min(len(data), 96)
        at, size = rng.randrange(max(end, 1)), rng.choice([1, 2, 4, 8])
        if rng.random() < 0.15:
            del data[at:]
        old, value = data[at : at + size], rng.choice(NUMBERS) % (1 << 8 * size)
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in old)
        more, again = old + rng.randbytes(rng.choice([1, 100, 5000])), old * rng.choice([2, 1000])
        special = value.to_bytes(size, rng.choice(["little", "big"]))
        data[at : at + size] = rng.choice([flipped, special, b"", more, again])
    return bytes(data)


def damage_zip(data, rng):
    """The pickle of a checkpoint of torch is damaged; the zip around it is whole."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(file, "w") as damaged:
        for name in whole.namelist():
            part = whole.read(name)
            if name.endswith("data.pkl"):
                at = rng.randrange(len(part))
                part = part[:at] + damage_bytes(part[at:], rng)
            damaged.writestr(name, part)
    return file.getvalue()


def damage_values(tree, rng, leaves=LEAVES):
    """Some values of nested dicts and lists are replaced, lost, renamed, or of absurd size."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 5])):
        node, parent = tree, None
        while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.85):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            parent, key = node, rng.choice(keys)
            node = parent[key]
        how = rng.random()
        if parent is None:  # nothing is left
            break
        if type(node) is int and how < 0.5:
            parent[key] = rng.choice(SIZES)
        elif isinstance(node, tuple) and how < 0.5:
            parent[key] = node[:1] * rng.choice([0, 1, 100, 3000])
        elif how < 0.6:
            del parent[key]
        elif how < 0.7 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        else:
            parent[key] = copy.deepcopy(rng.choice(leaves))
    return tree


def damage_table(text, separator, rng):
    """Fields and lines of a table."""
    rows = [line.split(separator) for line in text.split("\n")]
    for _ in range(rng.choice([1, 1, 2, 5])):
        row = rng.choice(rows)
        how, at = rng.random(), rng.randrange(len(row) or 1)
        if how < 0.2:
            rows.insert(rng.randrange(len(rows)), list(row))
        elif how < 0.3:
            rng.shuffle(row)
        elif how < 0.6:
            del row[at:]
        else:
            row[at : at + rng.randrange(2)] = [rng.choice(FIELDS)]
    return "\n".join(map(separator.join, rows)).encode("utf-8", "surrogatepass")


# ---- real files, and the functions that read them -----------------------------------------------


def saved(content, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def small_students():
    """What is in the student.pt of two methods."""
    shape = dict(width=16, attention_heads=2, feed_forward=32, position_kernel=8, position_groups=2)
    kept = dict(conv_channels=(8,) * 7, kept_heads=((0,), (0, 1)), feed_forward=(5, 7))
    plain = distilhubert.Student(distilhubert.Shape(**shape, conv_channels=8), 2, 0.1, 0.1)
    pruned = skill.Student(skill.Shape(**shape | kept, position_buckets=0), 0.1)
    students = {}
    for module, student in ((distilhubert, plain), (skill, pruned)):
        content = module.common.student_content(module.__name__, module.Config(), student)
        sizes = {k: v for k, v in content["config"].items() if k in ("student_layers", "dropout")}
        students[module] = content | {"config": sizes}
    return students


def damaged_file(content, rng):
    if rng.random() < 0.5:
        return damage_zip(saved(content), rng)
    return damage_bytes(saved(content, legacy=rng.random() < 0.5), rng)


class Corpus:
    """Small real files; ``kinds``: name -> ``rng -> function`` that reads a damaged one."""

    def __init__(self, folder):
        self.folder, self.case = folder, folder / "case"
        wave = (0.3 * np.random.default_rng(0).standard_normal((4000, 2))).astype(np.float32)
        self.audio = {}
        for suffix in ("wav", "flac", "mp3"):
            soundfile.write(folder / f"whole.{suffix}", wave, 22_050)
            self.audio[suffix] = (folder / f"whole.{suffix}").read_bytes()
        rows = ["path dataset speaker split speaker_split label_a text phones alignment".split()]
        for i, split in enumerate(["train"] * 4 + ["dev", "test"]):
            soundfile.write(folder / f"{i}.wav", wave[: 1000 + 100 * i], 16_000)
            said = ["A WORD", "AH0 W D", "SIL:500 AH0:900"]
            rows.append([f"{i}.wav", "d", f"s{i % 2}", split, split, "xy"[i % 2], *said])
        self.manifest = "\n".join(map("\t".join, rows)) + "\n"
        config = conftest.encoder_config(encoder_embed_dim=64, encoder_num_heads=1)
        hubert = conftest.make_hubert(config)
        own = {"config": conftest.pretrain_config(config), "state_dict": hubert.state_dict()}
        self.teachers = [own, {"model": hubert.state_dict()}, dict(hubert.state_dict())]
        self.students = small_students()
        form = "safetensors" if importlib.util.find_spec("safetensors") else "bin"
        self.bert = conftest.write_bert(folder / "bert", kind=form)
        self.odd = LEAVES + [
            torch.zeros(16, 16, dtype=torch.complex64),
            torch.zeros(1).half().expand(1 << 10, 1 << 30),
            torch.full((16,), math.nan).half(),
            torch.zeros(16, device="meta"),
            torch.eye(3).to_sparse(),
        ]
        self.kinds = {suffix: partial(self.sound, suffix) for suffix in self.audio} | {
            "manifest": self.a_manifest,
            "transcripts": self.transcripts,
            "student.pt, bytes": partial(self.student, damaged_file),
            "student.pt, values": partial(self.student, self.damaged_values),
            "teacher, bytes": partial(self.teacher, damaged_file),
            "teacher, values": partial(self.teacher, self.damaged_values),
            "BERT folder": self.a_bert,
        }
        # All can be read while they are whole; what torch imports for that is in each process then.
        for name, load, content in (
            ("student.pt", distilhubert.load_student, self.students[distilhubert]),
            ("pruned.pt", skill.load_student, self.students[skill]),
            *((f"{i}.pt", common.load_teacher, form) for i, form in enumerate(self.teachers)),
        ):
            (folder / name).write_bytes(saved(content))
            load(folder / name)
        common.load_text_teacher(self.bert)

    def damaged_values(self, content, rng):
        return saved(damage_values(content, rng, self.odd))

    def write(self, name, content):
        (self.case / name).write_bytes(content)
        return self.case / name

    def sound(self, suffix, rng):
        path = self.write(f"x.{suffix}", damage_bytes(self.audio[suffix], rng))

        def read():
            _, problem = common.examine(str(path))
            for piece in ((0, 400), (700, 500), ()):
                wave = common.load_audio(path, *piece)
                assert wave.ndim == 1 and len(wave) < 1e8
            return problem

        return read

    def student(self, damaged, rng):
        module = rng.choice(list(self.students))
        path = self.write("student.pt", damaged(self.students[module], rng))
        return lambda: module.load_student(path)

    def teacher(self, damaged, rng):
        path = self.write("x.pt", damaged(rng.choice(self.teachers), rng))
        return lambda: common.load_teacher(str(path))

    def a_bert(self, rng):
        shutil.copytree(self.bert, self.case, dirs_exist_ok=True)
        path = rng.choice([self.case / "config.json", *sorted(self.case.iterdir())])
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(json.dumps(damage_values(json.loads(path.read_text()), rng)))
        else:
            path.write_bytes(damage_bytes(path.read_bytes(), rng))
        return lambda: common.load_text_teacher(self.case)

    def a_table(self, name, text, rng, separator):
        damage = partial(damage_table, text, separator)
        content = damage_bytes(text.encode(), rng) if rng.random() < 0.3 else damage(rng)
        self.write(name, content)
        for i in range(6):
            os.link(self.folder / f"{i}.wav", self.case / f"{i}.wav")

        def read():
            utterances = common.scan(self.case, self.case / "scan.jsonl", 1)
            assert utterances == common.scan(self.case, self.case / "scan.jsonl")
            common.find_tasks(utterances)
            common.train_and_heldout(utterances)

        return read

    def a_manifest(self, rng):
        return self.a_table("manifest.tsv", self.manifest, rng, "\t")

    def transcripts(self, rng):
        return self.a_table("x.trans.txt", "\n".join(f"{i} A WORD" for i in range(6)), rng, " ")


class Planted:
    """What the bounds and the watching process must notice."""

    def __init__(self, folder):
        self.kinds = {
            "exception": lambda rng: lambda: {}["x"],
            "memory": lambda rng: lambda: bytearray(MEMORY + (1 << 30)),
            "file": lambda rng: (folder / "written").touch,
            "crash": lambda rng: lambda: ctypes.string_at(0),
            "hang": lambda rng: lambda: time.sleep(1000),
        }


# ---- a process for each case --------------------------------------------------------------------


def one_sentence(error):
    return "\n" not in str(error) and len(str(error)) < 2000


def in_status(name):
    """A size of this process in bytes."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def read_in_bounds(pipe, kind, read):
    """Send the outcome of a case, and its largest memory (MiB) beyond that at its start."""
    faulthandler.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries complain of what they read
    limit, start = in_status("VmSize") + MEMORY, in_status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        problem, outcome = read(), "success"
        outcome = "unusable" if isinstance(problem, str) and problem else outcome
    except BaseException as error:  # what a user would see as a traceback
        clean = isinstance(error, common.InputError | OSError) and one_sentence(error)
        clean &= "values" not in kind or "t allocate memory" not in str(error)  # it is caught
        outcome = "error" if clean else f"UNCLEAN {type(error).__name__}: {error}"[:300]
    pipe.send((outcome, (in_status("VmHWM") - start) / 2**20))


def in_a_process(kind, read, seconds):
    context = multiprocessing.get_context("fork")
    pipe, end = context.Pipe(duplex=False)
    process = context.Process(target=read_in_bounds, args=(end, kind, read))
    process.start()
    end.close()
    try:
        result = pipe.recv() if pipe.poll(seconds) else (f"UNCLEAN: no end after {seconds} s", 0)
    except EOFError:
        process.join()
        result = (f"UNCLEAN: the process died, code {process.exitcode}", 0)
    process.kill()
    process.join()
    return result


def watch(cases, planted=False, seconds=SECONDS):
    """Outcomes {kind: Counter}, the unclean [(kind, seed, what)], and the peak memory in MiB."""
    outcomes, unclean, peak = collections.defaultdict(collections.Counter), [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = (Planted if planted else Corpus)(folder)
        for seed, kind in itertools.product(range(cases), corpus.kinds):
            shutil.rmtree(folder / "case", ignore_errors=True)
            (folder / "case").mkdir()
            read = corpus.kinds[kind](random.Random(f"{kind} {seed}"))
            before = set(folder.iterdir())
            outcome, memory = in_a_process(kind, read, seconds)
            if set(folder.iterdir()) != before:
                outcome = "UNCLEAN: a file was written"
            if "UNCLEAN" in outcome:
                unclean.append((kind, seed, outcome))
            outcomes[kind][outcome.partition(" ")[0].strip(":")] += 1
            peak = max(peak, memory)
    return outcomes, unclean, peak


def table(outcomes, unclean, peak):
    """A line for each kind: tried, outcomes."""
    lines = []
    for kind, counts in outcomes.items():
        parts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        lines.append(f"{kind:20} {counts.total():6}: {parts}")
    total = sum(counts.total() for counts in outcomes.values())
    lines.append(f"{'all':20} {total:6}: {len(unclean)} unclean; peak {peak:.0f} MiB")
    return "\n".join(lines + [f"{kind}, seed {seed}: {what}" for kind, seed, what in unclean])


if __name__ == "__main__":
    print(table(*watch(int(sys.argv[1]) if len(sys.argv) > 1 else 300)))
