"""Damaged and hostile files for every loader: a result or one sentence, nothing else.

A worker process with bounded memory damages small real files, each by its seed, and hands them to
the functions that read users' files; this process watches it. Clean is a result, or an InputError
or OSError of one line. Unclean is any other exception, memory beyond a bound, a file that was not
there before, a worker that dies, a case that does not end.

    python tests/fuzz.py 300          # so many cases of each kind, and the table
"""

import collections
import copy
import importlib.util
import io
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
from pathlib import Path

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
        old, order = data[at : at + size], rng.choice(["little", "big"])
        choices = [
            bytes(byte ^ 1 << rng.randrange(8) for byte in old),
            (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, order),
            b"",
            old + rng.randbytes(rng.choice([1, 100, 5000])),
            old * rng.choice([2, 1000]),
        ]
        data[at : at + size] = rng.choice(choices)
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
        node, parent, key = tree, None, None
        while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.85):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            parent, key = node, rng.choice(keys)
            node = parent[key]
        if parent is None:
            continue
        how = rng.random()
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


def damage_table(text, rng, separator):
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


# ---- the worker: real files, and the functions that read them ----------------------------------


def saved(content, legacy=False):
    import torch

    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def small_students():
    """What is in the student.pt of two methods."""
    import distilhubert
    import skill

    shape = dict(width=16, attention_heads=2, feed_forward=32, position_kernel=8, position_groups=2)
    kept = dict(conv_channels=(8,) * 7, heads=((0,), (0, 1)), feed_forward=(5, 7))
    plain = distilhubert.Shape(**shape, conv_channels=8)
    pruned = skill.Shape(**shape | kept, position_buckets=0)
    students = {
        distilhubert: (distilhubert.Config(), distilhubert.Student(plain, 2, 0.1, 0.1)),
        skill: (skill.Config(), skill.Student(pruned, 0.1)),
    }
    common = distilhubert.common
    return {m: common.student_content(m.__name__, *given) for m, given in students.items()}


class Corpus:
    """Small real files; ``kinds``: name -> ``rng -> function`` that reads a damaged one."""

    def __init__(self, folder):
        import conftest
        import numpy as np
        import soundfile
        import torch

        import common

        self.folder, self.case, self.common = folder, folder / "case", common
        self.clean = (common.InputError, OSError)
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
        hubert = conftest.make_hubert(conftest.encoder_config())
        encoder = conftest.pretrain_config(conftest.encoder_config())
        own = {"config": encoder, "state_dict": hubert.state_dict()}
        self.teachers = [own, {"model": hubert.state_dict()}, dict(hubert.state_dict())]
        self.students = small_students()
        form = "safetensors" if importlib.util.find_spec("safetensors") else "bin"
        self.bert = conftest.write_bert(folder / "bert", kind=form)
        self.odd = LEAVES + [
            torch.zeros(0),
            torch.zeros(16, dtype=torch.long),
            torch.zeros(16, 16, dtype=torch.complex64),
            torch.zeros(1).expand(1 << 20, 1 << 20),
            torch.zeros(1).half().expand(1 << 20, 1 << 20),
            torch.full((16,), math.nan).half(),
            torch.zeros(16, device="meta"),
            torch.eye(3).to_sparse(),
        ]
        teacher, student = self.teacher, self.student
        self.kinds = {
            **{suffix: lambda rng, suffix=suffix: self.sound(rng, suffix) for suffix in self.audio},
            "manifest": self.a_manifest,
            "transcripts": self.transcripts,
            "student.pt, bytes": lambda rng: student(rng, self.damaged_file),
            "student.pt, values": lambda rng: student(rng, self.damaged_content),
            "teacher, bytes": lambda rng: teacher(rng, self.damaged_file),
            "teacher, values": lambda rng: teacher(rng, self.damaged_content),
            "BERT folder": self.a_bert,
        }

    def damaged_file(self, content, rng):
        if rng.random() < 0.5:
            return damage_zip(saved(content), rng)
        return damage_bytes(saved(content, legacy=rng.random() < 0.5), rng)

    def damaged_content(self, content, rng):
        return saved(damage_values(content, rng, self.odd))

    def write(self, name, content):
        (self.case / name).write_bytes(content)
        return self.case / name

    def sound(self, rng, suffix):
        path = self.write(f"x.{suffix}", damage_bytes(self.audio[suffix], rng))

        def read():
            _, problem = self.common.examine(str(path))
            for piece in ((0, 400), (700, 500), ()):
                wave = self.common.load_audio(path, *piece)
                assert wave.ndim == 1 and len(wave) < 1e8
            return problem

        return read

    def student(self, rng, damaged):
        module = rng.choice(list(self.students))
        path = self.write("student.pt", damaged(self.students[module], rng))
        return lambda: module.load_student(path)

    def teacher(self, rng, damaged):
        path = self.write("x.pt", damaged(rng.choice(self.teachers), rng))
        return lambda: self.common.load_teacher(str(path))

    def a_bert(self, rng):
        shutil.copytree(self.bert, self.case, dirs_exist_ok=True)
        path = rng.choice([self.case / "config.json", *sorted(self.case.iterdir())])
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(json.dumps(damage_values(json.loads(path.read_text()), rng)))
        else:
            path.write_bytes(damage_bytes(path.read_bytes(), rng))
        return lambda: self.common.load_text_teacher(self.case)

    def a_table(self, name, text, rng, separator):
        bytewise = rng.random() < 0.3
        content = damage_bytes(text.encode(), rng) if bytewise else None
        self.write(name, content or damage_table(text, rng, separator))
        for i in range(6):
            os.link(self.folder / f"{i}.wav", self.case / f"{i}.wav")

        def read():
            utterances = self.common.scan(self.case, self.case / "scan.jsonl", 1)
            assert utterances == self.common.scan(self.case, self.case / "scan.jsonl")
            self.common.find_tasks(utterances)
            self.common.train_and_heldout(utterances)

        return read

    def a_manifest(self, rng):
        return self.a_table("manifest.tsv", self.manifest, rng, "\t")

    def transcripts(self, rng):
        return self.a_table("x.trans.txt", "\n".join(f"{i} A WORD" for i in range(6)), rng, " ")


class Planted:
    """What the bounds and the watching process must notice."""

    clean = ()

    def __init__(self, _):
        import ctypes

        self.kinds = {
            "exception": lambda rng: lambda: {}["x"],
            "memory": lambda rng: lambda: bytearray(MEMORY + (1 << 30)),
            "file": lambda rng: lambda: Path("written").touch(),
            "crash": lambda rng: lambda: ctypes.string_at(0),
            "hang": lambda rng: lambda: time.sleep(1000),
        }


def one_sentence(error):
    return "\n" not in str(error) and len(str(error)) < 2000


def in_status(name):
    """A size of this process in bytes."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def work(pipe, folder, cases, first, planted):
    """The worker sends (kind, seed) before each case, the outcome behind it, its memory at last."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries complain of what they read
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    corpus = (Planted if planted else Corpus)(folder)
    limit = in_status("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    names = list(corpus.kinds)
    for number in range(first, cases * len(names)):
        seed, kind = divmod(number, len(names))
        kind = names[kind]
        shutil.rmtree(folder / "case", ignore_errors=True)
        (folder / "case").mkdir()
        run, before = corpus.kinds[kind](random.Random(f"{kind} {seed}")), set(folder.iterdir())
        pipe.send((number, kind, seed))
        try:
            problem, outcome = run(), "success"
            outcome = "called unusable" if isinstance(problem, str) and problem else outcome
        except BaseException as error:  # what a user would see as a traceback
            clean = isinstance(error, corpus.clean) and one_sentence(error)
            outcome = "error" if clean else f"UNCLEAN {type(error).__name__}: {error}"[:300]
            if kind not in ("wav", "flac", "mp3") and re.search("allocate|MemoryError", str(error)):
                outcome = f"UNCLEAN memory: {error}"[:300]  # beyond the bound, where it is caught
        if set(folder.iterdir()) != before:
            outcome = "UNCLEAN: a file was written"
        pipe.send(outcome)
    pipe.send(in_status("VmHWM"))


# ---- the watching process ----------------------------------------------------------------------


def watch(cases, planted=False, seconds=SECONDS):
    """Outcomes {kind: Counter}, the unclean [(kind, seed, what)], and the peak memory in MiB."""
    outcomes, unclean, peak, first = collections.defaultdict(collections.Counter), [], None, 0
    context = multiprocessing.get_context("spawn")
    while peak is None:
        with tempfile.TemporaryDirectory() as folder:
            pipe, end = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(end, Path(folder), cases, first, planted))
            worker.start()
            end.close()
            case, outcome = None, None
            try:
                while peak is None and outcome is None:
                    if not pipe.poll(seconds if case else 120):
                        outcome = f"UNCLEAN: no end after {seconds} s"
                        break
                    message = pipe.recv()
                    if isinstance(message, tuple):
                        case = message
                    elif isinstance(message, int):
                        peak = message / 2**20
                    else:
                        count(outcomes, unclean, case, message)
                        first, case = case[0] + 1, None
            except EOFError:
                worker.join()
                outcome = f"UNCLEAN: the process died, code {worker.exitcode}"
            worker.kill()
            worker.join()
            if outcome:
                assert case, f"the worker did not start: {outcome}"
                count(outcomes, unclean, case, outcome)
                first = case[0] + 1
    return outcomes, unclean, peak


def count(outcomes, unclean, case, outcome):
    _, kind, seed = case
    outcomes[kind][outcome.split()[0].strip(":") if "UNCLEAN" in outcome else outcome] += 1
    if "UNCLEAN" in outcome:
        unclean.append((kind, seed, outcome))


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
