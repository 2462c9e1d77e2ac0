"""Damaged and hostile files for every loader: one clean sentence or success, nothing else.

A worker process with bounded memory mutates small real files by a seed and hands them to the
functions that read users' files; this process watches it. Clean is: success, or an InputError of
one line; `scan` may call a file unusable. Unclean is any other exception, a case above its seconds,
a worker that dies, a file that was not there before.

    python tests/fuzz.py 500          # so many mutations of each kind, and the table
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import math
import os
import random
import re
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 15  # that one case may take
MEMORY = 3 << 30  # bytes of addresses that the worker may take beyond what torch takes when idle

# ---- mutations ---------------------------------------------------------------------------------

NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1]
LEAVES = [None, True, -1, 0, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf]
LEAVES += ["", "x", "9" * 400, "\0", "../../x", "\ud800", [], {}, [[]], [1, 2, 3], {"a": 1}]


def place(data, rng):
    """Where to change: mostly in the header."""
    end = len(data) if rng.random() < 0.3 else min(len(data), 96)
    return rng.randrange(max(end, 1))


def flip(data, rng):
    for _ in range(rng.randint(1, 8)):
        if data:
            data[place(data, rng)] ^= 1 << rng.randrange(8)
    return data


def cut(data, rng):
    return data[: place(data, rng)]


def insert(data, rng):
    at = place(data, rng)
    return data[:at] + rng.randbytes(rng.choice([1, 2, 4, 100, 5000])) + data[at:]


def remove(data, rng):
    at = place(data, rng)
    return data[:at] + data[at + rng.choice([1, 2, 4, 100]) :]


def number(data, rng):
    """A huge or otherwise special number over 1, 2, 4 or 8 bytes, in either order."""
    at, size = place(data, rng), rng.choice([1, 2, 4, 8])
    value = rng.choice(NUMBERS) % (1 << 8 * size)
    data[at : at + size] = value.to_bytes(size, rng.choice(["little", "big"]))
    return data


def swap(data, rng):
    """Two fields of four bytes change places."""
    a, b = sorted((place(data, rng) & ~3, place(data, rng) & ~3))
    if a + 4 <= b:
        data[a : a + 4], data[b : b + 4] = data[b : b + 4], data[a : a + 4]
    return data


def repeat(data, rng):
    at = place(data, rng)
    return data[:at] + data[at : at + rng.choice([4, 64, 1000])] * rng.choice([2, 50]) + data[at:]


BYTES = [flip, cut, insert, remove, number, swap, repeat]


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = rng.choice(BYTES)(data, rng)
    return bytes(data)


def mutate_tree(tree, rng, leaves):
    """A nested dict or list with a few of its values replaced, removed, renamed or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 5])):
        node, parent, key = tree, None, None
        while isinstance(node, dict | list | tuple) and node and rng.random() < 0.85:
            if isinstance(node, tuple):
                break
            parent, key = (
                node,
                rng.choice(list(node) if isinstance(node, dict) else range(len(node))),
            )
            node = parent[key]
        if parent is None:
            continue
        how = rng.random()
        if how < 0.15:
            del parent[key]
        elif how < 0.25 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        elif how < 0.35 and isinstance(parent, dict):
            parent[key] = parent[rng.choice(list(parent))]
        else:
            parent[key] = copy.deepcopy(rng.choice(leaves))
    return tree


def enlarge(content, rng):
    """A checkpoint that asks for a larger model than its weights are."""
    content = copy.deepcopy(content)
    found = next(content[name] for name in ("shape", "arguments", "config") if name in content)
    found = content["config"] if "shape" in content and rng.random() < 0.3 else found
    sizes = [name for name, value in found.items() if type(value) is int or "channels" in name]
    if "student_layers" in found and rng.random() < 0.5:
        sizes = ["student_layers"]
    value = rng.choice([2, 3, 100, 4096, 100_000, 10**6, 10**9, 2**31, 2**63])
    name = rng.choice(sizes)
    found[name] = (value,) * 7 if isinstance(found[name], tuple) else value
    return content


def mutate_text(text, rng):
    """Lines and tab-separated fields of a table."""
    rows = [line.split("\t") for line in text.split("\n")]
    for _ in range(rng.choice([1, 1, 2, 5])):
        row = rng.choice(rows)
        how, at = rng.random(), rng.randrange(len(row))
        if how < 0.1:
            rows.remove(row) if len(rows) > 1 else None
        elif how < 0.2:
            rows.insert(rng.randrange(len(rows)), [field for field in row])
        elif how < 0.3:
            row.insert(at, rng.choice(["", "x", "\x00", "\r"]))
        elif how < 0.4:
            rng.shuffle(row)
        elif how < 0.5:
            del row[at]
            row or row.append("")
        else:
            odd = ["", " ", "\0", "nan", "-1", "9" * 30, ".", "..", "/", "/dev/null", "a" * 5000]
            odd += ["K:5 K:3", "K", "K:x", ":::", "K:-7", f"SIL:{2**70}", "é\u2028x", "\ufeff", '"']
            row[at] = rng.choice(odd)
    return "\n".join("\t".join(row) for row in rows)


# ---- the worker: real files, and the functions that read them ----------------------------------


def saved(content, legacy=False):
    import torch

    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def small_students():
    """Module -> what is in its student.pt, for all five."""
    from dataclasses import asdict

    import torch
    import torchaudio
    from conftest import encoder_config

    import distilhubert
    import gendistiller
    import lstm_dkd
    import pad
    import skill

    torch.manual_seed(0)
    shape = dict(conv_channels=8, width=16, attention_heads=2, feed_forward=32)
    shape |= dict(position_kernel=8, position_groups=2)
    config = distilhubert.Config()
    gen_config = gendistiller.Config(target_layers=(1, 2))
    lstm_config = lstm_dkd.Config(student_layers=2)
    gen_shape = gendistiller.Shape(**shape, position_buckets=8)
    lstm_shape = lstm_dkd.Shape(**shape, clusters=10)
    kept = dict(conv_channels=(8,) * 7, heads=((0,), (0, 1)), feed_forward=(5, 7))
    skill_shape = skill.Shape(**shape | kept, position_buckets=0)
    encoder = encoder_config(encoder_num_layers=2) | {"aux_num_out": None}
    students = {
        distilhubert: (config, distilhubert.Student(distilhubert.Shape(**shape), 2, 0.1, 0.1)),
        gendistiller: (gen_config, gendistiller.make_student(gen_shape, gen_config)),
        lstm_dkd: (lstm_config, lstm_dkd.Student(lstm_shape, 2, 0.1, 0.1)),
        skill: (skill.Config(), skill.Student(skill_shape, 0.1)),
        pad: (pad.Config(), torchaudio.models.wav2vec2_model(**encoder)),
    }
    files = {}
    for module, (settings, student) in students.items():
        form = {"method": module.__name__, "config": asdict(settings)}
        form |= {"arguments": encoder} if module is pad else {"shape": asdict(student.shape)}
        files[module] = form | {"state_dict": student.state_dict()}
    return files


class Corpus:
    """Small real files, and for each kind a method ``(rng) -> function`` that damages one.

    The function is called with a time limit; what it returns is the outcome.
    """

    def __init__(self, folder):
        import numpy as np
        import soundfile
        import torch
        from conftest import encoder_config, make_hubert, pretrain_config, write_bert

        import common
        import distilhubert

        torch.set_num_threads(1)
        self.folder, self.common, self.torch = folder, common, torch
        self.error = common.InputError
        rng = np.random.default_rng(0)
        wave = (0.3 * rng.standard_normal((4000, 2))).astype(np.float32)
        self.audio = {}
        forms = {"wav": "PCM_16", "flac": None, "ogg": None, "mp3": None, "float.wav": "FLOAT"}
        for name, subtype in forms.items():
            path = folder / f"whole.{name}"
            soundfile.write(path, wave, 22_050, subtype=subtype)
            self.audio[name] = path.read_bytes()
        hubert, encoder = make_hubert(encoder_config()), pretrain_config(encoder_config())
        own = {"config": encoder, "state_dict": hubert.state_dict()}
        foreign = {"args": argparse.Namespace(a=1), "model": hubert.state_dict()}
        self.teachers = [own, foreign, hubert.state_dict()]
        self.students = small_students()
        student = distilhubert.Student(
            distilhubert.Shape(**self.students[distilhubert]["shape"]), 2, 0.1, 0.1
        )
        self.student, self.distilhubert = student, distilhubert
        optimizer = torch.optim.AdamW(student.parameters())
        sum(p.sum() for p in student.parameters()).backward()
        optimizer.step()
        self.last = self.students[distilhubert] | {
            "optimizer": optimizer.state_dict(),
            "random_state": common.get_random_state(),
            "step": 3,
            "log_lines": 1,
        }
        self.huggingface = common.export(student, "huggingface", folder)
        self.bert = write_bert(folder / "bert", kind="safetensors")
        header = "path dataset speaker split sid_split label label_kind text phones alignment"
        rows = [header.replace(" ", "\t")]
        for i in range(6):
            soundfile.write(folder / f"{i}.wav", wave[: 1000 + 100 * i], 16_000)
            split = ("train", "train", "train", "train", "dev", "test")[i]
            label = f"{'ab'[i % 2]};slot=x"
            said = ("A WORD", "AH0 W D", "SIL:500 AH0:900")
            rows.append("\t".join([f"{i}.wav", "d", "s", split, split, label, "kind", *said]))
        self.rows = "\n".join(rows) + "\n"
        self.scan = [
            {"path": str(folder / f"{i}.wav"), "samples": 1000 + 100 * i, "split": "train"}
            for i in range(3)
        ]
        self.odd = [
            *LEAVES,
            torch.zeros(0),
            torch.zeros(3, 3),
            torch.zeros(16, dtype=torch.long),
            torch.zeros(16, 16, dtype=torch.complex64),
            torch.zeros(1).expand(1 << 20, 1 << 20),
            torch.full((16,), math.nan).half(),
            torch.eye(3).to_sparse(),
        ]
        self.kinds = {
            **{name: lambda rng, name=name: self.sound(rng, name) for name in self.audio},
            "teacher, zip": lambda rng: self.teacher(rng, "bytes"),
            "teacher, legacy": lambda rng: self.teacher(rng, "legacy"),
            "teacher, pickle in the zip": lambda rng: self.teacher(rng, "inner"),
            "teacher, values": lambda rng: self.teacher(rng, "values"),
            "student.pt, bytes": lambda rng: self.a_student(rng, "bytes"),
            "student.pt, pickle in the zip": lambda rng: self.a_student(rng, "inner"),
            "student.pt, values": lambda rng: self.a_student(rng, "values"),
            "student.pt, sizes": lambda rng: self.a_student(rng, "sizes"),
            "teacher, sizes": lambda rng: self.teacher(rng, "sizes"),
            "last.pt, pickle in the zip": lambda rng: self.a_last(rng, "inner"),
            "last.pt, values": lambda rng: self.a_last(rng, "values"),
            "safetensors, bytes": self.safetensors,
            "safetensors, header": self.safetensors_header,
            "BERT folder": self.a_bert,
            "Hugging Face folder": self.a_hubert,
            "manifest, bytes": lambda rng: self.a_manifest(rng, mutate_bytes),
            "manifest, fields": lambda rng: self.a_manifest(rng, None),
            "transcripts": self.transcripts,
            "scan.jsonl": self.a_scan,
            "config.json of a run": self.a_run,
        }

    def write(self, name, content):
        path = self.folder / "case" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
        return path

    def damaged(self, content, rng, how):
        """The bytes of a checkpoint whose content, pickle or file is damaged."""
        if how == "sizes":
            return saved(enlarge(content, rng))
        if how == "values":
            return saved(mutate_tree(content, rng, self.odd), rng.random() < 0.3)
        if how == "inner":
            whole, file = zipfile.ZipFile(io.BytesIO(saved(content))), io.BytesIO()
            with zipfile.ZipFile(file, "w") as damaged:
                for name in whole.namelist():
                    part = whole.read(name)
                    if name.endswith("data.pkl") or rng.random() < 0.02:
                        part, at = bytearray(part), rng.randrange(len(part) or 1)
                        if rng.random() < 0.5 and part:  # anywhere: it is all structure
                            part[at] ^= 1 << rng.randrange(8)
                        else:
                            part[at:] = rng.choice(BYTES)(part[at:], rng)
                    damaged.writestr(name, bytes(part))
            return file.getvalue()
        return mutate_bytes(saved(content, how == "legacy"), rng)

    def sound(self, rng, name):
        path = self.write(f"x.{name}", mutate_bytes(self.audio[name], rng))

        def read():
            _, problem = self.common._examine(str(path))
            for piece in ((), (0, 400), (700, 500)):
                try:
                    wave = self.common.load_audio(path, *piece)
                    assert wave.ndim == 1 and wave.numel() < 1e8
                except self.common.InputError as error:
                    one_sentence(error)
                    problem = problem or "error in a piece"
            return f"called {problem}" if problem else "success"

        return read

    def teacher(self, rng, how):
        content = self.teachers[0] if how == "sizes" else rng.choice(self.teachers)
        path = self.write("x.pt", self.damaged(content, rng, how))
        return lambda: self.common.load_teacher(str(path))

    def a_student(self, rng, how):
        module = rng.choice(list(self.students))
        path = self.write("student.pt", self.damaged(self.students[module], rng, how))
        return lambda: module.load_student(path)

    def a_last(self, rng, how):
        path = self.write("last.pt", self.damaged(self.last, rng, how))
        student = self.student

        def resume():  # as `train` of distilhubert.py
            checkpoint = self.common.load_last(path.parent)
            optimizer = self.torch.optim.AdamW(student.parameters())
            with self.common.reading(path):
                student.load_state_dict(checkpoint["state_dict"])
                optimizer.load_state_dict(checkpoint["optimizer"])
                self.common.set_random_state(checkpoint["random_state"])
                "x".splitlines()[: checkpoint["log_lines"]]

        return resume

    def safetensors(self, rng):
        content = (self.huggingface / "model.safetensors").read_bytes()
        path = self.write("x.safetensors", mutate_bytes(content, rng))
        return lambda: self.common.read_safetensors(path)

    def safetensors_header(self, rng):
        content = (self.huggingface / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = mutate_tree(json.loads(content[8 : 8 + length]), rng, LEAVES)
        text = json.dumps(header).encode()
        body = len(text).to_bytes(8, "little") + text + content[8 + length :]
        path = self.write("x.safetensors", body)
        return lambda: self.common.read_safetensors(path)

    def a_bert(self, rng):
        import pad

        shutil.copytree(self.bert, self.folder / "case")
        name = rng.choice(["config.json", "config.json", "vocab.txt", "model.safetensors"])
        self.spoil(self.folder / "case" / name, rng)
        return lambda: pad.load_bert(self.folder / "case")

    def a_hubert(self, rng):
        shutil.copytree(self.huggingface, self.folder / "case")
        self.spoil(
            self.folder / "case" / rng.choice(["config.json"] * 3 + ["model.safetensors"]), rng
        )
        return lambda: self.distilhubert.load_student(self.folder / "case")

    def spoil(self, path, rng):
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(json.dumps(mutate_tree(json.loads(path.read_text()), rng, LEAVES)))
        else:
            path.write_bytes(mutate_bytes(path.read_bytes(), rng))

    def probe(self, data):
        utterances = self.common.scan(data, self.folder / "case" / "scan.jsonl", 1)
        with contextlib.suppress(self.common.InputError):
            self.common.train_and_heldout(utterances)
        self.common.probe_tasks(utterances)

    def a_manifest(self, rng, mutate):
        content = self.rows.encode()
        content = mutate(content, rng) if mutate else mutate_text(self.rows, rng).encode()
        path = self.write("manifest.tsv", content)
        for i in range(6):
            os.link(self.folder / f"{i}.wav", path.with_name(f"{i}.wav"))
        return lambda: self.probe(path)

    def transcripts(self, rng):
        lines = b"".join(b"%d SAID A WORD\n" % i for i in range(6))
        path = self.write("x.trans.txt", mutate_bytes(lines, rng))
        for i in range(6):
            os.link(self.folder / f"{i}.wav", path.with_name(f"{i}.wav"))
        return lambda: self.probe(path.parent)

    def a_scan(self, rng):
        content = "".join(json.dumps(row) + "\n" for row in self.scan).encode()
        if rng.random() < 0.5:
            content = mutate_bytes(content, rng)
        else:
            rows = mutate_tree(self.scan, rng, LEAVES)
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.write("scan.jsonl", content)
        return lambda: self.probe(self.folder)

    def a_run(self, rng):
        from dataclasses import asdict

        settings = asdict(self.distilhubert.Config(out=str(self.folder / "case")))
        path = self.write("config.json", json.dumps(settings).encode())
        self.spoil(path, rng)
        return lambda: self.common.open_run(path.parent, settings, True)


def one_sentence(error):
    assert "\n" not in str(error) and len(str(error)) < 2000, f"not one sentence: {error!r}"


def virtual_memory():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def work(folder, kinds, first, cases, planted):
    """The worker: a line of JSON before and after each case. ``planted``: faults to be noticed."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    say, sys.stdout = sys.stdout, sys.stderr
    corpus = Planted() if planted else Corpus(folder)
    limit = virtual_memory() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    names = kinds or list(corpus.kinds)
    for number in range(first, cases * len(names)):
        kind, seed = names[number % len(names)], number // len(names)
        shutil.rmtree(folder / "case", ignore_errors=True)
        run = corpus.kinds[kind](random.Random(f"{kind} {seed}"))
        before = {path for path in folder.rglob("*") if "case" not in path.parts}
        print(json.dumps([number, kind, seed]), file=say, flush=True)
        outcome, clean = "success", True
        try:
            found = run()
            outcome = found if isinstance(found, str) else "success"
        except corpus.error as error:
            outcome = "InputError"
            try:
                one_sentence(error)
            except AssertionError as unclear:
                outcome, clean = str(unclear)[:300], False
        except BaseException as error:  # what a user would see as a traceback
            outcome, clean = f"{type(error).__name__}: {error}"[:300], False
        if {path for path in folder.rglob("*") if "case" not in path.parts} != before:
            outcome, clean = "a file was written", False
        print(json.dumps([number, kind, seed, outcome, clean]), file=say, flush=True)
    status = Path("/proc/self/status").read_text()  # rusage would count what was before exec, too
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
    print(json.dumps(["peak", peak]), file=say, flush=True)


class Planted:
    """What the limits and the watching process must notice."""

    error = ()

    def __init__(self):
        import ctypes

        self.kinds = {
            "planted exception": lambda rng: lambda: {}["x"],
            "planted memory": lambda rng: lambda: bytearray(MEMORY + (1 << 30)),
            "planted file": lambda rng: lambda: Path("written").touch(),
            "planted crash": lambda rng: lambda: ctypes.string_at(0),
            "planted hang": lambda rng: lambda: time.sleep(1000),
        }


# ---- the watching process ----------------------------------------------------------------------


def watch(cases, kinds=(), planted=False, seconds=SECONDS):
    """Outcomes {kind: Counter}, the unclean [(kind, seed, what)], and the peak memory in MiB."""
    outcomes, unclean, peak, first, done = {}, [], 0.0, 0, False
    while not done:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--worker", folder, "--first", str(first)]
            command += ["--cases", str(cases), "--kinds", *kinds] + ["--planted"] * planted
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, text=True
            ) as worker:
                case, ended = None, None
                lines = Lines(worker)
                while True:
                    try:
                        line = lines.next(seconds if case else 120)
                    except TimeoutError:
                        worker.kill()
                        ended = f"no end after {seconds} s"
                        break
                    if line is None:
                        break
                    message = json.loads(line)
                    if message[0] == "peak":
                        peak, done = max(peak, message[1]), True
                    elif len(message) == 3:
                        case = message
                    else:
                        _, kind, seed, outcome, clean = message
                        outcomes.setdefault(kind, collections.Counter())[
                            outcome if clean else "UNCLEAN"
                        ] += 1
                        if not clean:
                            unclean.append((kind, seed, outcome))
                        case = None
                code = worker.wait()
            if not done:
                assert case, f"the worker did not start: {lines.errors()[-2000:]}"
                number, kind, seed = case
                unclean.append((kind, seed, ended or f"the process died, code {code}"))
                outcomes.setdefault(kind, collections.Counter())["UNCLEAN"] += 1
                first = number + 1
    return outcomes, unclean, peak


class Lines:
    """The lines of a process's stdout, each within some seconds; its stderr is kept aside."""

    def __init__(self, process):
        self.process, self.buffer, self.err = process, b"", b""
        self.selector = selectors.DefaultSelector()
        for pipe in (process.stdout, process.stderr):
            os.set_blocking(pipe.fileno(), False)
            self.selector.register(pipe.fileno(), selectors.EVENT_READ)

    def next(self, seconds):
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            ready = self.selector.select(max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if key.fd == self.process.stdout.fileno():
                    if not chunk:
                        return None
                    self.buffer += chunk
                else:
                    self.err = (self.err + chunk)[-10_000:]
                    if not chunk:
                        self.selector.unregister(key.fd)
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line

    def errors(self):
        return self.err.decode(errors="replace")


def table(outcomes, unclean, peak):
    """A line for each kind: tried, outcomes."""
    lines = []
    for kind, counts in outcomes.items():
        names = {"success": 0, "InputError": 0, "called unusable": 0, "UNCLEAN": 0}
        for outcome, count in counts.items():
            names[outcome if outcome in names else "called unusable"] += count
        parts = ", ".join(f"{count} {name}" for name, count in names.items() if count)
        lines.append(f"{kind:30} {sum(counts.values()):6}: {parts}")
    total = sum(sum(counts.values()) for counts in outcomes.values())
    lines.append(f"{'all':30} {total:6}: {len(unclean)} unclean; peak {peak:.0f} MiB")
    lines += [f"UNCLEAN {kind}, seed {seed}: {what}" for kind, seed, what in unclean]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cases_", metavar="CASES", nargs="?", type=int, default=300)
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--planted", action="store_true")
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.kinds, args.first, args.cases, args.planted)
    else:
        print(table(*watch(args.cases_, args.kinds)))
