"""Check and time the five methods on a GPU, in one command: six minutes on an H200.

    python tests/gpu.py OUT           # at paper size; without a GPU as with --tiny
    python tests/gpu.py OUT --tiny    # tiny models, one minute

It installs nothing and needs no network: teachers have the paper's size and random weights, audio
is noise with the lengths of read speech. OUT/gpu.json is written after each part. Where a part
fails, its error stands there, and the others go on. OUT/NAME.log: what a process has printed;
OUT/NAME.profile.txt: what one update of a method spends its time on.
``python tests/tables.py gpu OUT`` takes the figures over into README.md and results.md.

    training     ``train`` of a script with its own batch size, losses, autocast, optimizer, ...;
                 but one batch of its loader again and again
    inference    all hidden states of the students, of HuBERT Base and, where it is installed, of
                 DistilHuBERT's student in transformers: seconds of audio per second
    loop         ``distilhubert.py`` with loading processes: stopped half-way by a signal, resumed.
                 Speed from its first log line to the last one before the held-out distance
    torchrun     the first half again, as the only process of torchrun. Its gradients are summed
                 over this one process, which the scripts would leave out, so that NCCL runs
    test_cuda    tests/test_cuda.py, one process for each method
    compiled     training with --compile, for two of the methods

TFLOP/s: operations of all matrix products, convolutions, attention and LSTMs in the forward passes
of an update, times three where a backward pass follows, times one for frozen teachers; counted by
benchmark.CountFlops in a separate update without fused attention. "peak %": their share of a large
matrix product's in bf16 (float32 where autocast is off). "GiB": peak of torch's memory.
"""

import argparse
import contextlib
import gc
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import benchmark
import numpy as np
import soundfile
import torch
import torchaudio
from conftest import BERT_SETTINGS, METHODS, encoder_config, tiny_run, write_bert
from tables import gpu_tables
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import common
import distilhubert
import skill

CUDA_TESTS = Path(__file__).resolve().with_name("test_cuda.py")
COMPILED = ("distilhubert", "gendistiller")
LIMIT = 420  # seconds: no part begins later, and a process that a part has started ends then
TEST_LIMIT = 150  # seconds for test_cuda


class Size(NamedTuple):
    utterances: int
    longest: float  # seconds
    warm_up: int  # updates of training
    timed: int
    batch: int  # utterances of 10 s in inference
    steps: int  # of the loop
    log_every: int
    rows: int  # of the matrices whose product is the peak


PAPER = Size(240, 16.0, warm_up=3, timed=15, batch=16, steps=300, log_every=10, rows=8192)
TINY = Size(16, 1.2, warm_up=1, timed=2, batch=2, steps=12, log_every=2, rows=256)


@dataclass
class Run:
    """What the parts share."""

    work: Path  # teachers, audio and run folders; removed at the end
    size: Size
    device: torch.device
    figures: dict[str, Any] = field(default_factory=dict)  # the content of gpu.json
    students: dict[str, nn.Module] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    def seconds_left(self) -> float:
        left = self.begin + LIMIT - time.monotonic()
        if left < 1:
            raise TimeoutError(f"{LIMIT} s are over")
        return left


# ---- models, audio, settings --------------------------------------------------------------------


def write_teacher(path: Path, bundle: Any, size: Size) -> None:
    """A speech model of this bundle's shape with random weights and a cluster head."""
    arguments = bundle._params | (encoder_config() if size is TINY else {})
    wavlm = "encoder_max_distance" in arguments
    build = torchaudio.models.wavlm_model if wavlm else torchaudio.models.wav2vec2_model
    weights, head = build(**arguments).state_dict(), nn.Linear(arguments["encoder_embed_dim"], 256)
    for name, value in head.state_dict().items():
        weights[f"logit_generator.final_proj.{name}"] = value
    weights["logit_generator.label_embeddings"] = torch.randn(500, 256)
    torch.save({"config": arguments, "state_dict": weights}, path)


def write_text_teacher(folder: Path, size: Size) -> list[str]:
    """A BERT with random weights; returns the words that it knows."""
    arguments = inspect.signature(common.TextTeacher).parameters.values()
    settings = {argument.name: argument.default for argument in arguments}  # of BERT Base
    if size is TINY:
        settings = {name: BERT_SETTINGS[name] for name in settings} | {"hidden_size": 16}
    words = [f"w{number}" for number in range(settings["vocab_size"] - 5)]
    weights = common.TextTeacher(**settings).state_dict()
    write_bert(folder, weights, settings, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    return words


def write_audio(folder: Path, size: Size, words: list[str]) -> None:
    """FLAC files and their manifest; half of them are about as long as the longest."""
    rng, lines = np.random.default_rng(0), ["path\ttext"]
    folder.mkdir()
    for number in range(size.utterances):
        seconds = size.longest * rng.uniform(0.98 if number % 2 else 0.25, 1)
        noise = 0.05 * rng.standard_normal(int(seconds * common.SAMPLE_RATE))
        soundfile.write(folder / f"{number}.flac", noise, common.SAMPLE_RATE)
        text = rng.choice(words, max(1, round(2.7 * seconds)))  # words a second
        lines.append(f"{number}.flac\t{' '.join(text)}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")


def prepare(run: Run) -> dict:
    """Write what the other parts read."""
    torch.manual_seed(0)
    write_teacher(run.work / "hubert.pt", torchaudio.pipelines.HUBERT_BASE, run.size)
    write_teacher(run.work / "wavlm.pt", torchaudio.pipelines.WAVLM_BASE, run.size)
    words = write_text_teacher(run.work / "bert", run.size)
    write_audio(run.work / "audio", run.size, words)
    return {"utterances": run.size.utterances}


def settings(run: Run, name: str, out: str, **changes: Any) -> dict[str, Any]:
    """Of a method's Config; at paper size those that are not named are the defaults."""
    speech = "wavlm.pt" if name in ("gendistiller", "skill") else "hubert.pt"
    files = dict(audio="audio", spoken="audio", bert="bert", teacher=speech)
    files = {key: str(run.work / file) for key, file in files.items()}
    if run.size is TINY:
        return tiny_run(name, files, run.work / out, device="auto", workers=1, **changes)
    values = dict(data=files["audio"], teacher=files["teacher"], out=str(run.work / out))
    if name == "pad":
        values |= dict(teacher=files["bert"], student=files["teacher"])
    return values | changes


# ---- parts in this process ----------------------------------------------------------------------


def machine(run: Run) -> dict:
    """What it is, and the speed of a large matrix product on it."""
    dtype = torch.bfloat16 if common.bf16_pays(run.device) else torch.float32
    speed = benchmark.matmul_peak(run.device, dtype, run.size.rows)
    figures = {"peak TFLOP/s": speed / 1e12, "in": str(dtype), "size": run.size._asdict()}
    figures |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "device": "CPU"}
    if run.device.type == "cuda":
        query = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
        figures |= {"device": torch.cuda.get_device_name(), "driver": subprocess.getoutput(query)}
        figures |= {"cuDNN": torch.backends.cudnn.version(), "NCCL": torch.cuda.nccl.version()}
    return figures


def training(run: Run, name: str, compiled: bool = False) -> dict:
    """Updates of the script's loop on one batch."""
    method, figures = importlib.import_module(name), {}
    changes = dict(compile=compiled, steps=100_000, log_every=50_000, save_every=50_000)
    config = method.Config(**settings(run, name, f"{name}-{compiled}", **changes))

    def now() -> float:
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def waveforms(batch: Any) -> Tensor:
        return batch if isinstance(batch, Tensor) else batch[1]  # pad.py: with numbers and lengths

    def updates(batches: Any, done: int, bar: Any) -> Iterator[tuple[int, Any, bool]]:
        """In place of common.updates: an update happens at each yield."""
        bar.close()
        # Of the first eight: the longest utterances, and of these batches the largest.
        batch = max(itertools.islice(batches, 8), key=lambda batch: waveforms(batch).shape[::-1])
        utterances, audio = len(waveforms(batch)), waveforms(batch).numel() / common.SAMPLE_RATE
        steps = itertools.count(1)
        for _ in range(run.size.warm_up):
            yield next(steps), batch, False
        start = now()
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(run.size.timed):
            yield next(steps), batch, False
        seconds = (now() - start) / run.size.timed
        figures.update({"utterances": utterances, "s each": audio / utterances})
        figures.update({"audio s/s": audio / seconds, "ms": 1000 * seconds})
        if run.device.type == "cuda":
            figures["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        if not compiled:
            cuda = run.device.type == "cuda"
            kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
            with profile(activities=[kind], acc_events=True) as profiler:
                yield next(steps), batch, False
                now()
            order = f"self_{'device' if cuda else 'cpu'}_time_total"
            table = profiler.key_averages().table(order, 20, max_name_column_width=80)
            common.write_text(run.work.with_name(f"{name}.profile.txt"), table)
            no_backward = mock.patch.object(Tensor, "backward", lambda self: None)
            with sdpa_kernel(SDPBackend.MATH), benchmark.CountFlops() as counter, no_backward:
                yield next(steps), batch, False
            figures["GFLOP/audio s"] = counter.flops / audio / 1e9

    # The C++ compiler of a CPU takes minutes for each method: tiny graphs run as they are.
    compiler = partial(torch.compile, backend="eager") if run.size is TINY else torch.compile
    with mock.patch.object(common, "updates", updates), mock.patch("torch.compile", compiler):
        student, *_ = method.train(config)
    if compiled:  # computes the same
        figures["GFLOP/audio s"] = run.figures[f"training {name}"]["GFLOP/audio s"]
    figures["TFLOP/s"] = figures["GFLOP/audio s"] * figures["audio s/s"] / 1000
    figures["peak %"] = 100 * figures["TFLOP/s"] / run.figures["machine"]["peak TFLOP/s"]
    run.students[name] = student.cpu()
    return figures


def inference(run: Run) -> dict:
    """The students of the parts above, HuBERT Base, and a student in transformers."""
    teacher = common.load_teacher(run.work / "hubert.pt")
    teacher.final_proj = None  # only lstm_dkd.py needs the cluster head
    models = {"HuBERT Base": teacher, **run.students}
    for module in itertools.chain(*(student.modules() for student in run.students.values())):
        module.__dict__.pop("forward", None)  # as a student from its file, without speed_up's
    if "skill" in models:  # after so few updates of act 3 it still has all heads
        shape = benchmark.pruned_shape(models["skill"].shape)
        models["skill"] = skill.Student(shape, dropout=0.0)
    version = "not installed"
    if importlib.util.find_spec("transformers") and "distilhubert" in models:
        import transformers

        folder = distilhubert.export_huggingface(models["distilhubert"], run.work / "huggingface")
        load = partial(transformers.AutoModel.from_pretrained, output_hidden_states=True)
        models["distilhubert in transformers"] = load(folder)
        version = transformers.__version__
    models = {name: model.to(run.device).eval() for name, model in models.items()}
    amp, batch = common.bf16_pays(run.device), run.size.batch

    def in_batches(model: nn.Module, waveform: Tensor) -> None:
        with torch.autocast(run.device.type, torch.bfloat16, amp):
            model(waveform.expand(batch, -1))

    single = common.measure_speed(models, run.device)
    batched = {name: partial(in_batches, model) for name, model in models.items()}
    batched = common.measure_speed(batched, run.device)
    column, rows = f"{batch} x 10 s{', bf16' if amp else ''}", {}
    for name, model in models.items():
        rows[name] = {"parameters": common.count_parameters(model), "1 x 10 s": single[name]}
        rows[name][column] = batch * batched[name]
    return {"rows": rows, "transformers": version}


# ---- parts in processes of their own ------------------------------------------------------------


def finish(command: list[Any], log: Path, limit: float) -> int | str:
    """Run a command to its end, or end it with its children; returns the exit code."""
    command = [sys.executable, *map(str, command)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun kills its process, which is of another group, in 30 s
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return "out of time"


def train_distilhubert(flags: list[str], stop: int) -> dict:
    """distilhubert.py with these flags in this process, stopped by a signal after update ``stop``.

    The time is taken at its log lines, where it has waited for the device.
    """
    lines, audio, sums, code = [], 0.0, 0, 0
    common_updates, common_log, common_average = common.updates, common.write_log, common.average

    def updates(*arguments: Any) -> Iterator[tuple[int, Tensor, bool]]:
        nonlocal audio
        for step, waveforms, stopping in common_updates(*arguments):
            audio += waveforms.numel() / common.SAMPLE_RATE
            if step == stop - 1:  # one more update follows
                os.kill(os.getpid(), signal.SIGTERM)
            yield step, waveforms, stopping

    def write_log(config: Any, history: list, line: dict, skipped: Tensor) -> None:
        lines.append({"audio": audio, "time": time.perf_counter(), **line})
        common_log(config, history, line, skipped)

    def average(terms: dict, count: int) -> dict:
        nonlocal sums
        if not distributed.is_initialized():
            return common_average(terms, count)
        sums += 1
        with mock.patch.object(common, "processes", lambda: 2):  # one process would sum nothing
            return common_average(terms, count)

    if distributed.is_torchelastic_launched():
        cuda = torch.cuda.is_available()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    start, arguments = time.perf_counter(), ["distilhubert.py", *flags]
    patches = mock.patch.multiple(common, updates=updates, write_log=write_log, average=average)
    with patches, mock.patch.object(sys, "argv", arguments):
        try:
            distilhubert.main()
        except SystemExit as end:
            code = end.code
    seconds = time.perf_counter() - start
    if distributed.is_initialized():
        distributed.destroy_process_group()
    timed = [line for line in lines if "heldout" not in line]
    first, last = timed[0], timed[-1]
    speed = (last["audio"] - first["audio"]) / (last["time"] - first["time"])
    figures = {"first log line": first["step"], "updates": lines[-1]["step"], "exit code": code}
    return figures | {"audio s/s": speed, "s": seconds, "loss": lines[-1]["loss"], "sums": sums}


def loop(run: Run, out: str, launcher: tuple[str, ...] = ()) -> dict:
    """The first half of a run, and without a ``launcher`` the other half, each in a process."""
    steps, figures = run.size.steps, {}
    changes = dict(steps=steps, log_every=run.size.log_every, save_every=steps)
    values = settings(run, "distilhubert", out, **changes).items()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values]
    halves = {"first half": (steps // 2, flags)}
    halves |= {} if launcher else {"resumed": (0, [*flags, "--resume"])}
    for half, (stop, flags) in halves.items():
        file, log = run.work / "figures.json", run.work.with_name(f"{out} {half}.log")
        command = [*launcher, __file__, "--train", file, stop, *flags]
        code = finish(command, log, run.seconds_left())
        if code != 0:
            raise RuntimeError(f"{code}: {log.read_text()[-1500:]}")
        figures[half] = json.loads(file.read_text())
    return figures


def cuda_tests(run: Run) -> dict:
    """How many have passed; of a process that was out of time, those that it had finished."""
    names = ("test",) if run.size is TINY else METHODS
    logs = [run.work.with_name(f"test_cuda {name}.log") for name in names]
    limit = min(TEST_LIMIT, run.seconds_left())
    commands = [["-m", "pytest", "-v", "-k", name, CUDA_TESTS] for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        codes = list(pool.map(finish, commands, logs, itertools.repeat(limit)))
    output = "\n".join(log.read_text() for log in logs)
    verdicts = re.findall(r"^(\S+::.*) (PASSED|FAILED|SKIPPED|ERROR)\b", output, re.M)
    counts = dict(Counter(verdict for _, verdict in verdicts))
    if not verdicts and run.device.type != "cuda":
        return counts | {"note": "not run: no CUDA device"}
    bad = [test for test, verdict in verdicts if verdict in ("FAILED", "ERROR")]
    return counts | ({"error": f"exit codes {codes} {bad}"} if any(codes) else {})


# ---- all parts ----------------------------------------------------------------------------------


def all_parts() -> dict[str, Callable[[Run], dict]]:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    parts = {"machine": machine, "prepare": prepare}
    parts |= {f"training {name}": partial(training, name=name) for name in METHODS}
    parts |= {"inference": inference, "loop": partial(loop, out="loop")}
    parts |= {"torchrun": partial(loop, out="torchrun", launcher=torchrun)}
    parts["test_cuda"] = cuda_tests
    for name in COMPILED:  # last: nothing ends a compiler that takes too long
        parts[f"training {name}, compiled"] = partial(training, name=name, compiled=True)
    return parts


def measure(run: Run, parts: dict[str, Callable[[Run], dict]]) -> None:
    """Run the parts one after another, and write gpu.json after each."""
    for name, part in parts.items():
        start = time.monotonic()
        try:
            run.seconds_left()
            figures = part(run)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {error}"}
        run.figures[name] = figures | {"part s": round(time.monotonic() - start, 1)}
        common.write_text(run.work.with_name("gpu.json"), json.dumps(run.figures, indent=1))
        gc.collect()
        torch.compiler.reset()
        with contextlib.suppress(RuntimeError):  # CUDA repeats an earlier error
            torch.cuda.empty_cache()


def report(figures: dict[str, dict]) -> str:
    """The figures as tables, then what has failed."""
    texts = [common.format_table(rows) for rows in gpu_tables(figures).values() if rows]
    texts += [f"{name}: {figures.get(name)}" for name in ("machine", "test_cuda")]
    bad = {name: row["error"] for name, row in figures.items() if "error" in row}
    return "\n\n".join(texts + [f"FAILED {name}: {error}" for name, error in bad.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for gpu.json")
    parser.add_argument("--tiny", action="store_true", help="tiny models, as on a CPU")
    args = parser.parse_args()
    device, work = common.pick_device("auto"), args.out.resolve() / "work"
    run = Run(work, TINY if args.tiny or device.type != "cuda" else PAPER, device)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        measure(run, all_parts())
    finally:
        shutil.rmtree(work)
    print(report(run.figures))
    sys.exit(any("error" in row for row in run.figures.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:  # see loop
        file, stop, *flags = sys.argv[2:]
        Path(file).write_text(json.dumps(train_distilhubert(flags, int(stop))))
    else:
        main()
