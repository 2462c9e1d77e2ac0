# SPDX-License-Identifier: MIT
"""Shared utilities of the five method files.

    1. Run folder    errors, several processes, files, signals, flags
    2. Audio         find, scan, load, cut and batch
    3. Teachers      a frozen HuBERT, WavLM or wav2vec 2.0, layers numbered as in the papers; BERT
    4. Evaluation    size, MACs, speed, distance to the teacher, probes on frozen features, tables

Letters: B batch, S samples, T frames, D width, L layers, K clusters.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import unicodedata
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

try:
    import torchaudio
    from torchaudio.models.wav2vec2.utils import import_fairseq, import_huggingface
except (ImportError, OSError, RuntimeError) as error:  # built for another torch
    raise SystemExit(
        f"torchaudio does not work with torch {torch.__version__} "
        f"({' '.join(str(error).split())[:200]}): pip install -r requirements.txt installs a pair "
        "that works"
    ) from error

SAMPLE_RATE = 16_000  # Hz, mono: the input of every model here
HOP = 320  # samples from one HuBERT frame to the next (20 ms)
CONVOLUTIONS = [(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]  # kernel and stride, in samples or frames
RECEPTIVE_FIELD = 400  # samples that one frame is computed from (25 ms): shorter audio has no frame

Device = torch.device | str
PathLike = Path | str
Values = dict[str, Any]  # settings, a line of the log, the content of a checkpoint
Weights = dict[str, Tensor]
Scores = dict[str, float]


# ------------------------------------------------------------------------------------------------
# 1. Run folder: errors, processes, files, signals, flags
# ------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """A user's mistake or a broken input, in one sentence that says what to do.

    From a DataLoader worker the sentence comes with a traceback before it, which is cut off.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("InputError: ", 1)[-1].strip())


def one_sentence(kind: type, error: BaseException, trace: Any) -> None:
    """``sys.excepthook`` of the scripts: a user's error is one line, a bug a traceback."""
    text = " ".join(str(error).split())
    on_cpu = re.search("can't allocate memory|could not create a primitive", text)
    if issubclass(kind, KeyboardInterrupt):
        text = "stopped; a training goes on with --resume"
    elif issubclass(kind, MemoryError | torch.OutOfMemoryError) or on_cpu:
        text = "out of memory: add --resume and --accumulate 2, 4, ... to compute in smaller parts"
    elif "DataLoader worker" in text:
        text = f"a process that loads audio has ended, add --resume and fewer --workers ({text})"
    elif issubclass(kind, RuntimeError) and re.search("gloo|nccl", text, re.IGNORECASE):
        text = f"this process has lost the others, whose errors stand above ({text[:200]})"
    elif not issubclass(kind, InputError | OSError):
        return sys.__excepthook__(kind, error, trace)
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)


def say(line: str) -> None:
    """Print a line on stderr, above the progress bar, in the first process."""
    if rank() == 0:
        tqdm.write(line, file=sys.stderr)


@cache
def toy() -> Any:
    """The module tests/toy.py: the toy world and its teachers, for --toy and the tests."""
    path = Path(__file__).resolve().with_name("tests") / "toy.py"
    if not path.is_file():
        raise InputError(f"{path} is missing: --toy needs the folder tests/ beside common.py")
    spec = importlib.util.spec_from_file_location("toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Several processes (torchrun). DistributedDataParallel does not fit these loops: a penalty outside
# of forward (SKILL), parameters that an update leaves unused, parts of unequal size and evaluation
# in one process would each need a rule of their own. So gradients are summed by one all_reduce.


def processes() -> int:
    """How many processes of torchrun train together; they meet at the first call. 1 without it."""
    if not dist.is_available():
        return 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # an evaluation may be long
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process. Process 0 alone writes, shows bars and evaluates."""
    return dist.get_rank() if processes() > 1 else 0


def wait_for_all() -> None:
    """Return when all processes have called this."""
    if processes() > 1:
        dist.all_reduce(torch.zeros(1))  # over gloo: no GPU waits


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The others run the block when process 0 has: they find what it has made or downloaded."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def average(terms: dict[Any, Tensor], count: int) -> dict[Any, Tensor]:
    """Means over all processes, each weighted by its ``count`` of utterances, in one all_reduce."""
    if processes() == 1:
        return terms
    flat = torch.cat([term.detach().flatten().float() for term in terms.values()])
    flat = count * torch.cat([flat, flat.new_ones(1)])
    dist.all_reduce(flat)
    parts = (flat[:-1] / flat[-1]).split([term.numel() for term in terms.values()])
    return {name: part.view_as(terms[name]) for name, part in zip(terms, parts, strict=True)}


def sum_gradients(parameters: Sequence[nn.Parameter], count: int) -> None:
    """Replace the gradients of ``count`` utterances by their weighted mean over all processes.

    A parameter must have a gradient in all processes or in none.
    """
    used = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
    for i, gradient in average(used, count).items():
        parameters[i].grad = gradient


def write_atomically(path: PathLike, write: Callable[[Any], object]) -> None:
    """Call ``write(file)`` on a binary file beside ``path``, then rename it. Process 0 only.

    The old file survives a crash, a kill and a full disk. A full disk is an InputError.
    """
    if rank() > 0:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):  # torch's writer hides a full disk in a RuntimeError
            raise
        raise InputError(
            f"cannot write {path} ({cause.strerror}): make room or choose another folder; "
            "what was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # no longer there, or in a folder that cannot be
            temporary.unlink()


def write_text(path: PathLike, text: str) -> None:
    """Write UTF-8 ``text`` to ``path``, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def check_settings(config: Any) -> None:
    """Refuse numbers that no run can have, by the name of their flag."""
    minimum = {"batch_seconds": 0.025, "crop_seconds": 0.025, "lr": 1e-12, "clip": 1e-12}
    minimum |= dict.fromkeys(("steps", "accumulate", "log_every", "save_every"), 1)
    for name, value in asdict(config).items():
        flag, low = "--" + name.replace("_", "-"), minimum.get(name, 0)
        if isinstance(value, int | float) and not low <= value < 2**63:
            raise InputError(f"{flag} {value}: must be at least {low}, and below 2^63")
        if (name == "dropout" or name.endswith("warmup")) and value >= 1:
            raise InputError(f"{flag} {value}: must be below 1")
        if name == "betas" and (len(value) != 2 or not all(0 <= beta < 1 for beta in value)):
            raise InputError("--betas: two numbers from 0 to 1 are needed, as in 0.9,0.98")
    for field in fields(config):
        value, choices = getattr(config, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in choices:
            raise InputError(f"{field.name} {value!r}: must be one of {', '.join(choices)}")


def settings_of(config: Any) -> Values:
    """The fields of a Config as plain values, paths as text."""
    values = asdict(config).items()
    return {name: str(value) if isinstance(value, Path) else value for name, value in values}


def changed_settings(before: Values, config: Any, free: Sequence[str] = ()) -> list[str]:
    """Flags whose values differ from an earlier Config, ``before``; ``free`` ones may differ."""
    free = {"device", "workers", "accumulate", "compile", "data", "out", *free}
    free |= {"log_every", "save_every"}
    now = {name: value for name, value in settings_of(config).items() if name not in free}
    changed = [name for name in now if json.dumps(now[name]) != json.dumps(before.get(name))]
    return ["--" + name.replace("_", "-") for name in changed]


def open_run(method: str, config: Any, resume: bool, free: Sequence[str] = ()) -> Values | None:
    """The checkpoint to go on from, or None where the run in ``config.out`` starts at update 0.

    Raises InputError where a run would be overwritten, or had other settings than ``free`` ones.
    """
    check_settings(config)
    if not config.data or not Path(config.data).exists():
        raise InputError(
            f"data {str(config.data)!r} does not exist: give a folder of audio or a manifest.tsv"
        )
    out = Path(config.out)
    found = [name for name in ("last.pt", "student.pt", "config.json") if (out / name).exists()]
    if rank() > 0:  # process 0 checks, and may be writing already
        return load_checkpoint(out / "last.pt") if resume and "last.pt" in found else None
    if found and not resume:
        raise InputError(f"{out} holds a run already: add --resume, or choose another --out")
    if "last.pt" not in found:
        if resume and found != ["config.json"]:
            raise InputError(f"{out} holds no run to resume (no last.pt): leave --resume out")
        for name in ("scan.jsonl", "left_out.tsv"):  # of a start that had no checkpoint yet
            (out / name).unlink(missing_ok=True)
        return None
    saved = load_checkpoint(out / "last.pt")
    with reading(out / "last.pt"):
        changed = changed_settings(saved["config"], config, free)
        if saved["method"] != method:
            changed = [f"{saved['method']}.py"]
    if changed:
        raise InputError(
            f"{out} was trained with other settings ({', '.join(changed)}): --resume needs the "
            "same, or choose another --out"
        )
    return saved


def start_run(config: Any, saved: Values | None, **parts: Any) -> tuple[int, list[Values]]:
    """Load modules, optimizer and random states from the checkpoint ``saved``, if there is one.

    Writes ``config.json``, and ``log.jsonl`` up to the checkpoint. Returns the number of updates
    done and the log. ``parts``: names in ``last.pt`` -> modules.
    """
    step, history = 0, []
    if saved is not None:
        with reading("last.pt"):
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            states = saved["random_state"]
            torch.set_rng_state(states["cpu"])
            torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
            step, history = saved["step"], saved["log"]
    write_text(Path(config.out) / "config.json", json.dumps(settings_of(config), indent=1))
    lines = "".join(json.dumps(line) + "\n" for line in history)
    write_text(Path(config.out) / "log.jsonl", lines)
    return step, history


def write_log(config: Any, history: list[Values], line: Values, skipped: Tensor) -> None:
    """Add a line to ``history`` and to ``log.jsonl``; NaN and infinity become null.

    ``skipped`` counts the updates since the last line whose gradient was not finite, and is set to
    0. Raises InputError at the second one within two lines.
    """
    count, before = int(skipped), history[-1].get("skipped", 0) if history else 0
    skipped.zero_()
    if count + before > 1:
        raise InputError(
            f"the gradient is not finite at update {line['step']} or shortly before, for the "
            "second time: start again in a new --out with a lower --lr"
        )
    line |= {"skipped": count} if count else {}
    history.append(json.loads(json.dumps(line), parse_constant=lambda _: None))
    if rank() == 0:
        with open(Path(config.out) / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(history[-1]) + "\n")


def student_content(method: str, config: Any, student: nn.Module, **more: Any) -> Values:
    """Content of ``student.pt``: plain values, and tensors that load on any machine."""
    weights = {name: value.cpu() for name, value in student.state_dict().items()}
    about = {"method": method, "config": settings_of(config), "shape": asdict(student.shape)}
    return about | more | {"state_dict": weights}


def save_run(
    config: Any,
    student: Values,
    step: int,
    history: list[Values],
    whole: bool = True,
    **parts: Any,
) -> None:
    """Write ``last.pt`` (everything --resume needs) and, if ``whole``, ``student.pt``.

    ``student``: content of ``student.pt``; ``parts``: the other modules and optimizers by name.
    """
    out = Path(config.out)
    states = {name: part.state_dict() for name, part in parts.items()}
    cuda = torch.cuda.get_rng_state_all()  # of no device where there is none
    states["random_state"] = {"cpu": torch.get_rng_state(), "cuda": cuda}
    last = student | states | {"step": step, "log": history}
    write_atomically(out / "last.pt", lambda file: torch.save(last, file))
    if whole:
        write_atomically(out / "student.pt", lambda file: torch.save(student, file))


def load_student(
    path: PathLike,
    method: str,
    build: Callable[[Values], nn.Module],
    device: Device = "cpu",
) -> nn.Module:
    """The student of a ``student.pt`` that ``method`` wrote, in float32 and eval mode.

    ``build(content of the file)`` runs on the meta device. Raises InputError for any other file.
    """
    saved = load_checkpoint(path)
    if saved.get("method") != method:
        writer = "s3prl" if "Distiller" in saved else saved.get("method", "another program")
        writer = " ".join(str(writer).split())[:40]
        raise InputError(
            f"{path} is no student of {method}.py, but was written by {writer}: give the "
            "student.pt of a run"
        )
    with reading(path):
        with torch.device("meta"):
            student = build(saved)
        weights = {name: own_copy(value) for name, value in saved["state_dict"].items()}
        if weights.keys() != student.state_dict().keys():
            raise ValueError(f"this version of {method}.py names its weights otherwise")
        student.load_state_dict(weights, assign=True)
    return student.to(device).eval()


@contextlib.contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """Turn what fails on the contents of a file into an InputError that names it."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:  # damaged values fail in any way
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged, or of another kind or version ({reason})") from error


def updates(batches: Any, step: int, bar: tqdm) -> Iterator[tuple[int, Any, bool]]:
    """Yield (update number, batch, stopping) for each batch, after ``step`` updates.

    After Ctrl-C or SIGTERM one more update comes, with ``stopping`` True: the caller saves it, and
    the program exits with code 130. A second Ctrl-C exits at once.
    """
    asked = []
    title, seed, seconds = getattr(bar, "desc", ""), batches.generator.initial_seed(), 0.0

    def ask(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT:
            bar.close()
            stop("stopped at once")
        if not asked:  # print may be in the middle of a line here
            os.write(2, b"\nstopping after the next update; Ctrl-C once more stops at once\n")
        asked.append(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
        if rank() > 0:
            end_later(20)  # process 0 decides, and needs the others to the end of its update
    iterator, begin = None, time.perf_counter()
    try:
        iterator = iter(batches)
        for batch in iterator:
            step += 1
            if rank() > 0:  # dropout of its own, and the same one when resumed
                torch.manual_seed(hash((seed, step, rank())))  # of ints: the same in every run
            stopping = bool(asked)
            yield step, batch, stopping
            waveforms = batch if isinstance(batch, Tensor) else batch[1]
            seconds += processes() * waveforms.numel() / SAMPLE_RATE
            speed = seconds / (time.perf_counter() - begin)
            bar.set_description(f"{title} ({speed:.0f} s of audio/s)", refresh=False)
            bar.update()
            # A signal may come late in the last update, which is saved in any case.
            if stopping or (asked and step == batches.batch_sampler.last):
                bar.close()
                stop(f"stopped and saved after update {step}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        bar.close()
        if hasattr(iterator, "_shutdown_workers"):  # after an error torch waits 5 s for each
            iterator._shutdown_workers()


def stop(reason: str) -> None:
    """End the program with exit code 130, and print the command that resumes the run."""
    words = shlex.join(word for word in sys.argv if word != "--resume")
    start = f"torchrun --nproc-per-node {processes()}" if processes() > 1 else "python"
    print(f"{reason}; to go on: {start} {words} --resume", file=sys.stderr)
    raise SystemExit(130)


def end_later(seconds: float, _: int = 0) -> None:
    """Ignore Ctrl-C, and end so many seconds after SIGTERM.

    For loading processes and all but the first training process: a signal often goes to the whole
    group, and the first process needs them until it has saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end(*_: Any) -> None:
        timer = threading.Timer(seconds, os._exit, [0])
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, end)


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where there is one. Each process takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here ({error}): try cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def bf16_pays(device: torch.device) -> bool:
    """Whether autocast to bf16 is the default: on GPUs that compute in it (Ampere and later)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def fourier_convolution(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """``conv`` (stride 1) of x, (B, C, T) -> (B, C', T'): in autocast by Fourier transforms.

    They stay in float32. In bf16 cuDNN is slow where there are groups and a wide kernel: HuBERT's
    positional convolution (128 frames, 16 groups) of 18 x 15.6 s took 19.6 ms forward and backward
    on an H200, this takes 2.6 ms.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return nn.Conv1d.forward(conv, x)
    padding, frames = conv.padding[0], x.shape[2] + 2 * conv.padding[0]
    size = 2 ** math.ceil(math.log2(frames))  # no frame meets another one around the end
    with torch.autocast(x.device.type, enabled=False):
        spectra = torch.fft.rfft(x.float(), size).unflatten(1, (conv.groups, -1))
        kernels = torch.fft.rfft(conv.weight, size).unflatten(0, (conv.groups, -1))
        product = torch.einsum("bgif,goif->bgof", spectra, kernels.conj())
        y = torch.fft.irfft(product, size).flatten(1, 2).roll(padding, -1)  # B x C' x size
        return y[..., : frames - conv.kernel_size[0] + 1] + conv.bias[:, None]


def speed_up(
    config: Any, device: torch.device, student: nn.Module, teacher: Teacher | None = None
) -> tuple[nn.Module, bool]:
    """What to call for the student, and whether in bf16 autocast: ``config.compile``, ``.amp``.

    A compiled student shares the weights. The teacher's convolutions are compiled with it: they
    cause most of its memory traffic. In autocast both models get ``fourier_convolution``.
    """
    amp = bf16_pays(device) if config.amp is None else config.amp
    convolve = fourier_convolution
    if config.compile:  # torch's compiler generates no code for complex numbers
        convolve = torch.compiler.disable(fourier_convolution)
    for module in itertools.chain(student.modules(), teacher.modules() if teacher else ()):
        if amp and isinstance(module, nn.Conv1d) and module.groups > 1:
            module.forward = partial(convolve, module)
    if config.compile:
        # With this analysis torch 2.11 fails on some models for GPUs where lengths vary.
        options = {"triton.coalesce_tiling_analysis": False}
        if teacher:
            teacher.model.feature_extractor.compile(options=options)
        student = torch.compile(student, options=options)
    return student, amp


def comma_separated(item: type) -> Callable[[str], tuple]:
    """Type of a flag like 4,8,12: text -> tuple of ``item``."""

    def numbers(text: str) -> tuple:  # argparse says "invalid numbers value"
        return tuple(item(part) for part in text.split(","))

    return numbers


def add_fields(flags: Any, config_type: type) -> None:
    """Add a flag for each field of a Config; its help is the comment behind the field."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_type), re.M))
    for field in fields(config_type):
        kind, default, options = type(field.default), field.default, {}
        if bool in (kind, *get_args(field.type)):
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is Literal:
            options["choices"] = get_args(field.type)
        elif kind is tuple:
            options |= dict(type=comma_separated(type(default[0])), metavar="A,B,...")
            default = ",".join(map(str, default))
        else:
            options["type"] = kind
        help = f"{notes[field.name]} [{default}]".replace("%", "%%")
        flag = "--" + field.name.replace("_", "-")
        flags.add_argument(flag, default=argparse.SUPPRESS, help=help, **options)


def parse_flags(
    config_type: type, toy: Values, doc: str, exports: Sequence[str] = ()
) -> tuple[Any, argparse.Namespace]:
    """Command line of a method file: (its Config, the flags that are the same in all five).

    A flag given by hand overrides ``toy``, the settings of --toy, and these override the defaults.
    """
    sys.excepthook = one_sentence
    if int(os.environ.get("RANK", 0)) > 0:  # process 0 prints the table
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end of the process
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0],
        usage="python %(prog)s (--toy | --data DIR) [flags], or --help for all of them",
        allow_abbrev=False,
    )
    add, switch = parser.add_argument, "store_true"
    add("--toy", action=switch, help="offline: toy world, toy teacher, minutes on a CPU")
    add("--resume", action=switch, help="go on exactly where the run in --out stopped")
    add("--claim", action=switch, help="set the method beside its ablations, over 3 seeds")
    add("--describe", action=switch, help="print the paper-size student as a table")
    add("--seeds", type=int, metavar="N", help="repeat with N seeds: mean ± deviation")
    add("--evaluate", metavar="STUDENT.PT", help="probe a student on --data's labels")
    if exports:
        add("--export", choices=exports, help="for another library: --out's student")
    add_fields(parser, config_type)
    args = parser.parse_args()
    if args.seeds is None:
        args.seeds = 3 if args.claim else 1
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    names = {field.name for field in fields(config_type)}
    given = {name: value for name, value in vars(args).items() if name in names}
    config = config_type(**((toy if args.toy else {}) | given))
    check_settings(config)
    own_data = args.describe or (args.toy and not args.evaluate)
    if not (own_data or config.data or vars(args).get("export")):
        parser.exit(2, "--data is missing: --data DIR takes your audio, and --toy runs offline\n")
    return config, args


# ------------------------------------------------------------------------------------------------
# 2. Audio
# ------------------------------------------------------------------------------------------------

AUDIO_SUFFIXES = {"." + name.lower() for name in soundfile.available_formats()} - {".raw"}
AUDIO_SUFFIXES |= set(  # other names of these formats
    ".8svx .aif .aifc .bwf .fap .iff .mat .mp1 .mp2 .mpga .oga .opus .sf .snd .sph .wave".split()
)
OTHER_SUFFIXES = set(  # audio and video that libsndfile does not read
    ".3g2 .3gp .aac .ac3 .amr .ape .asf .avi .awb .dsf .dts .flv .m4a .m4b .m4v .mka .mkv .mov "
    ".mp4 .mpc .mpeg .mpg .ogv .pcm .ra .raw .rm .shn .spx .tta .weba .webm .wma .wmv .wv".split()
)
PARTS = {"train": "train", "dev": "dev", "val": "dev", "test": "test", "eval": "test"}
LONGEST = 60 * SAMPLE_RATE  # samples: a longer utterance is cut into pieces
SILENCE = 1e-4  # peak amplitude below which a file counts as silent (-80 dBFS)
UNREADABLE = (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError)


@dataclass(frozen=True)
class Utterance:
    """A usable audio file: its length at 16 kHz, and the other columns of its manifest line.

    A piece of a file has the samples from ``start`` on.
    """

    path: str
    samples: int
    columns: dict[str, str]
    start: int = 0

    def get(self, column: str) -> str:
        """The value of a column; "" where there is none."""
        return self.columns.get(column, "")


def frame_count(samples: Any) -> Any:
    """Frames T of S >= 80 samples (int or tensor), as HuBERT's seven convolutions give them."""
    return (samples - RECEPTIVE_FIELD) // HOP + 1


def ratio_to_16k(rate: int) -> Fraction:
    """16 kHz over a sample rate; odd rates (44,099 Hz) are rounded, by less than a thousandth."""
    if not 1_000 <= rate <= 768_000:
        raise InputError(f"a sample rate of {rate} Hz is not speech: expected 1 kHz to 768 kHz")
    return Fraction(SAMPLE_RATE, rate).limit_denominator(1_000)  # else kernels of gigabytes


class Stream(soundfile.SoundFile):
    """A file that is only read forwards: soundfile seeks after each block of any other."""

    def seekable(self) -> bool:
        return False

    def blocks(self) -> Iterator[np.ndarray]:
        """All frames in blocks (frames, channels) of 4 MiB, whatever the header says."""
        size, left = max(1, (1 << 20) // self.channels), self.frames
        while len(block := self.read(min(size, left), dtype="float32", always_2d=True)):
            left -= len(block)
            yield block


def open_audio(path: PathLike, kind: type = soundfile.SoundFile) -> soundfile.SoundFile:
    """Open a file, also one whose name is not UTF-8 or of more than 1,024 bytes."""
    by_name = os.name == "nt" or str(path).lower().endswith(".sd2")  # which has a second file
    return kind(str(path) if by_name else os.open(path, os.O_RDONLY))


def reason(error: Exception) -> str:
    """What libsndfile, or the system, says of a file."""
    text = getattr(error, "error_string", "") or getattr(error, "strerror", "") or str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def printable(path: str) -> str:
    """A path as text of one line: bytes that are not UTF-8 and line breaks are escaped."""
    text = path.replace("\t", "\\t").replace("\n", "\\n")
    return text.encode(errors="backslashreplace").decode()


def read_forwards(path: PathLike, first: int, count: int | None) -> np.ndarray:
    """``count`` frames (None: all) from ``first`` on, without a seek: (frames, channels)."""
    kept, position = [], 0
    with open_audio(path, Stream) as file:
        kept.append(np.empty((0, file.channels), np.float32))
        for block in file.blocks():
            kept.append(block[max(first - position, 0) :])
            position += len(block)
            if count is not None and position >= first + count:
                break
    return np.concatenate(kept)[:count]


def load_audio(path: PathLike, start: int = 0, samples: int | None = None) -> Tensor:
    """Read ``samples`` 16 kHz samples (None: all) from ``start`` on, as mono float32 (S,).

    Raises InputError when the file cannot be read or is too short.
    """
    try:
        with open_audio(path) as file:
            ratio = ratio_to_16k(file.samplerate)
            first = int(start / ratio)
            wanted = None if samples is None else math.ceil(samples / ratio) + 1
            try:
                file.seek(first)
                frames = file.read(-1 if wanted is None else wanted, "float32", always_2d=True)
            except UNREADABLE:  # GSM does not seek, FLAC from a pipe has no length
                frames = read_forwards(path, first, wanted)
    except UNREADABLE as error:
        raise InputError(
            f"cannot read {path} ({reason(error)}): restore it and add --resume"
        ) from error
    waveform = torch.from_numpy(frames).mean(dim=1)
    if ratio != 1 and len(waveform):
        waveform = torchaudio.functional.resample(waveform, ratio.denominator, ratio.numerator)
    if samples is not None and len(waveform) < samples:
        raise InputError(
            f"{path} is shorter than when it was scanned: restore it and add --resume, or start "
            "again in a new --out"
        )
    return waveform[:samples]


def examine(path: str) -> tuple[int, str]:
    """Decode a whole file; returns (16 kHz samples, "" or "what is wrong with it: details")."""
    if not os.path.isfile(path):  # reading from a pipe would wait for ever
        return 0, "no file"
    try:
        with open_audio(path, Stream) as file:
            ratio, frames, peak = ratio_to_16k(file.samplerate), 0, 0.0
            for block in file.blocks():
                frames += len(block)
                peak = np.maximum(peak, np.abs(block.mean(axis=1)).max())  # keeps a NaN
    except UNREADABLE as error:
        return 0, f"unreadable: {reason(error)}"
    samples = math.ceil(frames * ratio)  # as the resampler rounds
    if not np.isfinite(peak):
        return samples, "NaN"
    if samples < RECEPTIVE_FIELD:
        return samples, "too short" if samples else "empty"
    return samples, "silent" if peak < SILENCE else ""


def part_named(name: str) -> str:
    """train, dev or test by the beginning of the name of a folder or split; "" for others."""
    beginnings = (word for word in PARTS if name.strip().lower().startswith(word))
    return PARTS.get(next(beginnings, ""), "")


def read_manifest(manifest: Path) -> list[dict[str, str]]:
    """Lines of a tab-separated manifest: its non-empty columns, with ``path`` made absolute.

    The words of ``split`` and ``X_split`` become train, dev and test.
    """
    with reading(manifest), open(manifest, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    entries, unknown = [], Counter()
    for number, row in enumerate(rows or [{}], start=2):
        if not row.get("path"):
            raise InputError(
                f"{manifest}, line {number}: no path; give the folder of the audio, or a manifest: "
                "a tab-separated header line with a column 'path', and a line for each file"
            )
        entry = {name: value for name, value in row.items() if name and value}
        for column in entry:
            if column == "split" or column.endswith("_split"):
                part = part_named(entry[column])
                unknown.update([] if part else [entry[column]])
                entry[column] = part or entry[column]
        entries.append(entry | {"path": str(manifest.parent / row["path"])})
    if words := [f"{word!r} ({count})" for word, count in unknown.most_common(9)]:
        say(f"{manifest}: splits other than train, dev and test are not used: {', '.join(words)}")
    return entries


def read_transcripts(files: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """LibriSpeech's ``*.trans.txt``: path of an audio file without its suffix -> text, speaker."""
    known = {}
    for file in files:
        with reading(file):
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        for name, _, text in (line.strip().partition(" ") for line in lines if line.strip()):
            known[file.parent / name] = {"text": text.strip(), "speaker": name.split("-")[0]}
    return known


def walk(data: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Files below a folder, sorted, and (path, problem) of what could not be entered.

    Links are followed, and each folder is entered once: by a path without links if there is one.
    """
    files, failed, seen, folders, links = [], [], set(), [data], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            known = (status.st_dev, status.st_ino) in seen
            entries = [] if known else sorted(os.scandir(folder), key=lambda entry: entry.name)
            seen.add((status.st_dev, status.st_ino))
        except OSError as error:
            failed.append((str(folder), f"folder not entered: {error.strerror}"))
            continue
        for entry in entries:
            if entry.is_symlink() and not os.path.exists(entry.path):
                failed.append((entry.path, "link to nothing"))
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(folder / entry.name)
            elif entry.is_file():
                files.append(folder / entry.name)
    return sorted(files), failed


def find_audio(data: Path) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """Entries with a ``path``, those of a manifest or a folder, and (path, problem) of others.

    In a folder ``folder_part`` is the part (train, dev, test) that the folder of a file is named
    after, the uppermost one below ``data``.
    """
    if not data.exists():
        raise InputError(f"{data} does not exist: --data takes a folder of audio or a manifest.tsv")
    if data.is_file() and data.suffix.lower() in AUDIO_SUFFIXES | OTHER_SUFFIXES:
        raise InputError(f"{data} is an audio file: give its folder, or a manifest.tsv")
    manifest = data if data.is_file() else data / "manifest.tsv"
    if manifest.exists():  # its splits keep test speakers out of training
        entries = read_manifest(manifest)
        if not any(os.path.isfile(entry["path"]) for entry in entries):
            raise InputError(
                f"none of the files of {manifest} exists, {entries[0]['path']} to begin with: give "
                "the folder of the audio (of Common Voice clips/), or correct the column 'path'"
            )
        return entries, []
    files, left_out = walk(data)
    known = read_transcripts([path for path in files if path.name.endswith(".trans.txt")])
    entries = []
    for path in files:
        if path.suffix.lower() in OTHER_SUFFIXES:
            left_out.append((str(path), "not a format of libsndfile"))
        if path.suffix.lower() in AUDIO_SUFFIXES:
            entry = {"path": str(path)} | known.get(path.with_suffix(""), {})
            parts = map(part_named, path.relative_to(data).parts[:-1])
            part = next(filter(None, parts), "")
            entries.append(entry | ({"folder_part": part} if part else {}))
    if not entries:
        suffixes = sorted({printable(path.suffix) for path in files})[:9]
        problems = sorted({problem for _, problem in left_out})[:9]
        raise InputError(
            f"{data} holds no .wav file or other audio that libsndfile reads, but: "
            f"{', '.join(suffixes + problems) or 'nothing'}"
        )
    return entries, left_out


def scan(data: PathLike, cache: PathLike | None, workers: int = 4) -> list[Utterance]:
    """Decode every file of a folder or manifest once, and list what is usable.

    Unreadable, empty, too short (< 400 samples), silent and NaN files are counted on stderr. The
    list is written to ``cache``, and read from there where that exists, also if ``data`` was moved;
    what was left out and why to ``left_out.tsv`` beside it. Raises InputError when nothing is
    usable.
    """
    root = Path(data) if Path(data).is_dir() else Path(data).parent
    if cache and Path(cache).exists():
        with reading(cache), open(cache, encoding="utf-8") as file:
            found = [Utterance(**json.loads(line)) for line in file]
        found = [replace(each, path=os.path.join(root, each.path)) for each in found]
        if not any(os.path.exists(each.path) for each in found[:100]):
            raise InputError(f"{data} does not hold the files of the run's scan, {cache}")
        return found
    entries, left_out = find_audio(Path(data))
    paths = [entry.pop("path") for entry in entries]
    with ThreadPoolExecutor(max(workers, 1)) as pool:  # libsndfile decodes outside Python's lock
        results = pool.map(examine, paths)
        results = list(tqdm(results, "scan", len(paths), unit="file", leave=False))
    usable, bad = [], []
    for path, columns, (samples, problem) in zip(paths, entries, results, strict=True):
        if problem:
            bad.append((path, problem))
        else:
            usable.append(Utterance(path, samples, columns))
    bad += left_out
    kinds = Counter(problem.partition(":")[0] for _, problem in bad)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    where = ""
    if cache and bad:
        file = Path(cache).with_name("left_out.tsv")
        write_text(file, "".join(f"{printable(path)}\t{problem}\n" for path, problem in bad))
        where = f"; all are in {file}"
    if not usable:
        raise InputError(f"{data} has no usable audio: {len(bad)} files looked at, {counts}{where}")
    minutes = sum(utterance.samples for utterance in usable) / SAMPLE_RATE / 60
    line = f"scan: {len(usable)} files, {minutes:.1f} min"
    parts = Counter(utterance.get("folder_part") for utterance in usable)
    if any(parts):
        line += "; by folder: " + ", ".join(f"{parts[part]} {part or 'other'}" for part in parts)
        line += "" if parts["train"] else "; no train, so all are used"
    if bad:
        names = ", ".join(f"{printable(path)} ({problem})" for path, problem in bad[:5])
        line += f"; left out {len(bad)} ({counts}): {names}{where}"
    say(line)
    if cache:
        inside = str(root / "_")[:-1]  # paths below it are written without it
        lines = [asdict(each) | {"path": each.path.removeprefix(inside)} for each in usable]
        write_text(cache, "".join(json.dumps(line) + "\n" for line in lines))
    return usable


def cut_long(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Utterances of more than a minute as consecutive pieces of one length, the others as is."""
    pieces = []
    for utterance in utterances:
        count = -(-utterance.samples // LONGEST)
        bounds = [utterance.samples * i // count for i in range(count + 1)]
        for start, end in itertools.pairwise(bounds):
            pieces.append(replace(utterance, start=start, samples=end - start))
    return pieces


def train_and_heldout(
    utterances: Sequence[Utterance], whole: bool = False
) -> tuple[list[Utterance], list[Utterance]]:
    """Split utterances into those to distil on and about ten minutes of held-out ones.

    By the column ``split``, else ``folder_part`` where there is a train: train and dev. Without dev
    1 % of train, at least one, is held out. Unless they stay ``whole`` long ones are cut first.
    """
    utterances = utterances if whole else cut_long(utterances)
    by_folder = any(utterance.get("folder_part") == "train" for utterance in utterances)
    parts = [u.get("split") or (u.get("folder_part") if by_folder else "") for u in utterances]
    pairs = list(zip(utterances, parts, strict=True))
    train = [utterance for utterance, part in pairs if part in ("train", "")]
    heldout = [utterance for utterance, part in pairs if part == "dev"]
    if len(train) < 2:
        splits = dict(Counter(parts))
        raise InputError(f"at least 2 files of split train are needed; the splits are {splits}")
    pool = heldout or train
    order = np.random.default_rng(0).permutation(len(pool))
    if not heldout:
        order = order[: max(1, len(train) // 100)]
    cumulative = np.cumsum([pool[i].samples for i in order])
    chosen = set(order[: 1 + int(np.searchsorted(cumulative, 600 * SAMPLE_RATE))].tolist())
    others = [utterance for i, utterance in enumerate(pool) if i not in chosen]
    return train if heldout else others, [pool[i] for i in sorted(chosen)]


def crop_lengths(longest: int, shortest: int) -> list[int]:
    """The few lengths (samples) of batches: ``longest`` and steps of 0.8 down to ``shortest``.

    Each is 320 n + 80 samples, which gives exactly n frames and leaves none over.
    """
    lengths, length = [], float(longest)
    while True:
        frames = max(1, frame_count(int(length)))
        lengths.append(HOP * frames + RECEPTIVE_FIELD - HOP)
        if lengths[-1] <= shortest or frames == 1:
            return sorted(set(lengths), reverse=True)
        length *= 0.8


def make_batches(
    samples: Sequence[int], batch_samples: int, longest: int, seed: int, epoch: int
) -> list[list[tuple[int, int, int]]]:
    """The batches of one epoch, each a list of crops (utterance number, start, samples).

    Every utterance is cropped at random to the largest crop length that it fills, so a batch has
    no padding. A batch holds ``batch_samples`` of audio. What is left over in a bucket joins the
    next shorter one if that makes a full batch, and else is a smaller batch of its own. The result
    depends on (seed, epoch) alone; the number of batches is the same in all epochs.
    """
    rng = np.random.default_rng((seed, epoch))
    lengths = crop_lengths(longest, min(samples))
    buckets = {length: [] for length in lengths}
    for i in rng.permutation(len(samples)):
        buckets[next(length for length in lengths if length <= samples[i])].append(int(i))
    batches, waiting, waiting_length = [], [], 0
    for length, members in buckets.items():
        size = max(1, batch_samples // length)
        if waiting and len(waiting) + len(members) < size:
            batches.append((waiting, waiting_length))
            waiting = []
        waiting, waiting_length = waiting + members, length
        while len(waiting) >= size:
            batches.append((waiting[:size], length))
            waiting = waiting[size:]
    if waiting:
        batches.append((waiting, waiting_length))
    crops = [
        [(i, int(rng.integers(samples[i] - length + 1)), length) for i in batch]
        for batch, length in batches
    ]
    return [crops[i] for i in rng.permutation(len(crops))]


def make_whole_batches(
    samples: Sequence[int], batch_samples: int, seed: int, epoch: int
) -> list[list[tuple[int, int, int]]]:
    """The batches of one epoch of whole utterances, in the same form as make_batches.

    A batch holds utterances of similar length, at most ``batch_samples`` of audio with its padding
    or one utterance. Lengths within a tenth of each other are mixed anew at each epoch.
    """
    rng, longest = np.random.default_rng((seed, epoch)), max(samples)
    step = [int(math.log(longest / n) / math.log(1 / 0.9)) for n in samples]  # 0: the longest
    batches = []
    size = 0
    for i in sorted(rng.permutation(len(samples)).tolist(), key=lambda i: step[i]):
        if not batches or len(batches[-1]) >= size:
            batches.append([])
            size = max(1, int(batch_samples / (longest * 0.9 ** step[i])))
        batches[-1].append((i, 0, samples[i]))
    return [batches[i] for i in rng.permutation(len(batches))]


@cache
def said() -> Tensor:
    """Flags of the unreadable files that were named, for all loading processes together."""
    return torch.zeros(65_521, dtype=torch.bool).share_memory_()


class Pieces(torch.utils.data.Dataset):
    """Pieces of utterances: (utterance number, start, samples) -> (number, waveform (S,)).

    A piece that can no longer be read is replaced by one of another file: of the same length, or an
    utterance of about its length where they are ``whole``.
    """

    def __init__(self, utterances: Sequence[Utterance], whole: bool) -> None:
        self.utterances, self.whole, self.said = utterances, whole, said()

    def substitutes(self, piece: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
        """Up to ten pieces of other files, which follow from the piece alone."""
        number, _, samples = piece
        bad, rng = self.utterances[number].path, np.random.default_rng(piece)
        draws = rng.random(len(self.utterances))

        def distance(i: int) -> tuple[float, float]:
            missing = samples - self.utterances[i].samples
            return abs(missing) if self.whole else max(missing, 0), draws[i]

        others = [i for i, utterance in enumerate(self.utterances) if utterance.path != bad]
        for i in sorted(others, key=distance)[:10]:
            there = self.utterances[i].samples
            length = there if self.whole else min(samples, there)
            yield i, int(rng.integers(there - length + 1)), length

    def __getitem__(self, piece: tuple[int, int, int]) -> tuple[int, Tensor]:
        errors = []
        for number, start, samples in itertools.chain([piece], self.substitutes(piece)):
            utterance = self.utterances[number]
            try:
                waveform = load_audio(utterance.path, utterance.start + start, samples)
            except InputError as error:
                errors.append(error)
                flag = int.from_bytes(os.fsencode(utterance.path), "big") % len(self.said)
                if not self.said[flag]:
                    self.said[flag] = True
                    text = str(error).partition(": restore")[0]
                    print(f"\n{printable(text)}: replaced by other audio", file=sys.stderr)
            else:
                if not self.whole and samples < piece[2]:  # no other file is as long
                    waveform = waveform.repeat(-(-piece[2] // samples))[: piece[2]]
                return number, waveform
        raise errors[0]


def pad_right(rows: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (B,), waveforms padded with zeros at their right (B, S), and valid samples (B,)."""
    numbers, waveforms = zip(*rows, strict=True)
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    return torch.tensor(numbers), padded, lengths


def stack_waveforms(rows: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Waveforms of one length as a batch (B, S)."""
    return pad_right(rows)[1]


class BatchOrder:
    """Batches ``first`` to ``last`` - 1 of endless epochs; ``make(epoch)`` gives those of one.

    With several processes each gets its share of a batch, at least one utterance. ``last`` None:
    one epoch, undivided, for evaluation.
    """

    def __init__(self, make: Callable[[int], list], first: int, last: int | None) -> None:
        self.make, self.first, self.last = make, first, len(make(0)) if last is None else last
        self.rank, self.processes = (0, 1) if last is None else (rank(), processes())

    def __iter__(self) -> Iterator[list]:
        per_epoch, number = len(self.make(0)), self.first
        while number < self.last:
            epoch, start = divmod(number, per_epoch)
            batches = self.make(epoch)[start : start + self.last - number]
            number += len(batches)
            for batch in batches:
                begin = -(-len(batch) * self.rank // self.processes)
                end = -(-len(batch) * (self.rank + 1) // self.processes)
                yield batch[begin:end] or batch[:1]


def load_batches(
    utterances: Sequence[Utterance],
    batch_seconds: float,
    crop_seconds: float | None,
    seed: int = 0,
    first: int = 0,
    last: int | None = None,
    workers: int = 0,
) -> torch.utils.data.DataLoader:
    """A loader of waveforms (B, S) for the updates ``first`` to ``last`` - 1 (None: one epoch).

    Without ``crop_seconds`` utterances are whole, and the loader gives (numbers (B,), waveforms
    (B, S), lengths (B,)).
    """
    samples = [utterance.samples for utterance in utterances]
    batch_samples = int(batch_seconds * SAMPLE_RATE)
    if crop_seconds is None:
        make = partial(make_whole_batches, samples, batch_samples, seed)
    else:
        longest = min(int(crop_seconds * SAMPLE_RATE), batch_samples)
        make = partial(make_batches, samples, batch_samples, longest, seed)
    return torch.utils.data.DataLoader(
        Pieces(utterances, whole=crop_seconds is None),
        batch_sampler=BatchOrder(make, first, last),
        collate_fn=pad_right if crop_seconds is None else stack_waveforms,
        num_workers=workers,
        worker_init_fn=partial(end_later, 5),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # else it draws from that of the dropout
    )


def heldout_batches(
    heldout: Sequence[Utterance], batch_seconds: float, crop_seconds: float, accumulate: int = 1
) -> Iterator[Tensor]:
    """Equal-length crops (B, S) of held-out utterances, the same ones at each pass, in parts."""
    for batch in load_batches(heldout, batch_seconds, crop_seconds):
        yield from batch.chunk(accumulate)


# ------------------------------------------------------------------------------------------------
# 3. Teachers
# ------------------------------------------------------------------------------------------------

BUNDLES = {
    name.lower(): bundle
    for name, bundle in vars(torchaudio.pipelines).items()
    if type(bundle) is torchaudio.pipelines.Wav2Vec2Bundle  # the ASR bundles are fine-tuned
}


class Teacher(nn.Module):
    """A frozen torchaudio Wav2Vec2Model (HuBERT, WavLM, wav2vec 2.0), and its cluster head if kept.

    Hidden state 0 is the input of the first Transformer layer (after the positional convolution,
    and its LayerNorm in post-norm models), state i = 1..L the output of layer i. Always in eval
    mode, whatever is called on it or on a module that holds it.
    """

    def __init__(
        self,
        model: torchaudio.models.Wav2Vec2Model,
        name: str,
        normalise: bool,
        final_proj: nn.Linear | None = None,
        label_embeddings: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.name, self.normalise = model, name, normalise
        self.final_proj = final_proj  # D -> E
        self.register_buffer("label_embeddings", label_embeddings)  # K x E
        self.arguments: Values = {}  # of torchaudio's function that builds the model
        transformer = model.encoder.transformer
        first, position = transformer.layers[0], transformer.pos_conv_embed
        self.num_layers, self.pre_norm = len(transformer.layers), first.layer_norm_first
        self.shape = {  # what a student needs to have to start from this teacher's weights
            "conv_channels": model.feature_extractor.conv_layers[0].conv.out_channels,
            "width": position.embed_dim,
            "attention_heads": first.attention.num_heads,
            "feed_forward": first.feed_forward.intermediate_dense.out_features,
            "position_kernel": position.conv.kernel_size[0],
            "position_groups": position.conv.groups,
        }
        self.position_buckets = getattr(first.attention, "num_buckets", 0)  # WavLM's bias, or none
        self.max_distance = getattr(first.attention, "max_distance", 0)  # frames
        convolutions = [layer.conv for layer in model.feature_extractor.conv_layers]
        if [(*conv.kernel_size, *conv.stride) for conv in convolutions] != CONVOLUTIONS:
            raise InputError(f"teacher {name}: its convolutions are not HuBERT's (20 ms a frame)")
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        return self

    @torch.no_grad()
    def forward(self, waveforms: Tensor, last_layer: int | None = None) -> list[Tensor]:
        """Hidden states 0 .. ``last_layer`` (None: all), each (B, T, D), of unpadded (B, S)."""
        if self.normalise:  # each utterance by itself; torchaudio's bundles take the whole batch
            waveforms = F.layer_norm(waveforms, waveforms.shape[-1:])
        x, _ = self.model.feature_extractor(waveforms, None)
        transformer = self.model.encoder.transformer
        x = transformer._preprocess(self.model.encoder.feature_projection(x))
        hidden_states, position_bias = [x], None
        with x.device:  # torchaudio would compute WavLM's position bias on the CPU
            for layer in transformer.layers[:last_layer]:
                x, position_bias = layer(x, None, position_bias, None)
                hidden_states.append(x)
        return hidden_states

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Cluster logits (B, T, K) of the last hidden state: cos(final_proj(h), e_k) / 0.1.

        HuBERT, arXiv 2106.07447, Eq. 3. Raises InputError where the teacher has no cluster head.
        """
        if self.final_proj is None:
            raise InputError(
                f"teacher {self.name} has no cluster head: use a fairseq or s3prl HuBERT "
                "checkpoint (hubert_base_ls960.pt), a torchaudio HuBERTPretrainModel, or toy"
            )
        if self.final_proj.out_features != self.label_embeddings.shape[1]:
            raise InputError(
                f"teacher {self.name} has several sets of clusters, one behind the other in its "
                "head: give a checkpoint with one"
            )
        if self.pre_norm:  # their last layer is followed by a LayerNorm
            hidden = self.model.encoder.transformer.layer_norm(hidden)
        projected = self.final_proj(hidden).float()  # B x T x E
        cosine = F.normalize(projected, dim=-1) @ F.normalize(self.label_embeddings, dim=-1).mT
        return cosine / 0.1

    def weights(self) -> Weights:
        """The weights under the module names of Hugging Face's HubertModel, without "encoder.".

        WavLM's position bias table is ``rel_attn_embed.weight``.
        """
        found = {}
        for name, value in self.model.state_dict().items():
            name = name.removeprefix("encoder.").removeprefix("transformer.")
            name = name.replace(".attention.attention.", ".attention.")
            if ".in_proj_" in name:
                for part, piece in zip("qkv", value.chunk(3), strict=True):
                    found[name.replace("in_proj_", f"{part}_proj.")] = piece
            elif "rel_attn_embed" in name:
                found["rel_attn_embed.weight"] = value
            else:
                found[name] = value
        return found


class Stub:
    """Stands for a class or function that a checkpoint names: an empty dict, and nothing runs."""

    def __new__(cls, *_: Any, **__: Any) -> OrderedDict:
        return OrderedDict()


class NumpyStub:
    """Stands for what comes from numpy, whose states no dict takes."""

    def __init__(self, *_: Any) -> None: ...
    def __setstate__(self, _: Any) -> None: ...


def load_checkpoint(path: PathLike) -> Values:
    """The content of a checkpoint file, on the CPU; no code in the file is executed.

    fairseq's files also hold argparse, omegaconf and numpy objects: torch's loader names the first
    class that it does not know, gets an empty stub for it, and starts again. Raises InputError.
    """
    path, stubs = Path(path), {}
    if not path.is_file():
        raise InputError(f"{path} does not exist, or is no file: give the path of a checkpoint")
    if path.suffix == ".safetensors":
        raise InputError(f"{path} holds the weights of a Hugging Face folder: give the folder")
    while True:
        try:
            with torch.serialization.safe_globals([(stub, name) for name, stub in stubs.items()]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            break
        except Exception as error:  # a broken file raises nearly anything
            unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if unknown is None or unknown[1] in stubs or len(stubs) > 400:
                raise InputError(
                    f"{path} is not a readable checkpoint ({type(error).__name__})"
                ) from error
            stub = NumpyStub if unknown[1].startswith("numpy") else Stub
            stubs |= {unknown[1]: stub, f"builtins.{unknown[1]}": stub}  # torch hides "builtins."
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


def own_copy(weight: Tensor) -> Tensor:
    """A float32 copy of a saved weight, which may be a view of another one."""
    size = weight.numel() * weight.element_size()
    if weight.is_meta or size > weight.untyped_storage().nbytes():  # small file, huge tensor
        raise ValueError("it asks for more values than it holds")
    return weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many layers there are among weights whose ``names`` are prefix + number + more."""
    names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return len({name.split(".")[0] for name in names})


MICROSOFT_NAMES = {  # of WavLM's position bias, and torchaudio's
    "relative_attention_bias": "rel_attn_embed",
    "grep_linear": "gru_rel_pos_linear",
    "grep_a": "gru_rel_pos_const",
}


def convert_fairseq_names(state: Weights) -> Weights:
    """Weights under torchaudio's names, from fairseq's or those of Microsoft's WavLM."""
    converted = {}
    for name, value in state.items():
        bias = re.fullmatch(r"encoder\.(layers\.\d+)\.self_attn\.(rel\w+|grep_\w+)(.*)", name)
        if bias:
            new = f"encoder.transformer.{bias[1]}.attention.{MICROSOFT_NAMES[bias[2]]}{bias[3]}"
        else:
            new = import_fairseq._map_key(name)
        if new in converted:
            raise ValueError(f"{name} and another weight have the same place, {new}")
        if new is not None:
            converted[new] = value
    return converted


def join_attention(weights: Weights) -> Weights:
    """WavLM's query, key and value projections in one matrix, as torchaudio has them."""
    prefix = "encoder.transformer."
    inner = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    if "layers.0.attention.rel_attn_embed.weight" in inner:
        if "layers.0.attention.q_proj.weight" in inner:
            layers = count_layers(inner, "layers.")
            import_huggingface.transform_wavlm_encoder_state(inner, layers)
    outer = {name: weight for name, weight in weights.items() if not name.startswith(prefix)}
    return outer | {prefix + name: weight for name, weight in inner.items()}


def split_head(state: Weights) -> tuple[Weights, nn.Linear | None, Any]:
    """Encoder weights in torchaudio's names, and the cluster head (Linear, embeddings) or Nones.

    ``state``: weights under the names of fairseq (s3prl has the same), Microsoft's WavLM, or
    torchaudio's HuBERTPretrainModel or Wav2Vec2Model, with any prefix.
    """
    first = re.compile(r"(.*?)feature_extractor\.conv_layers\.0\.(0|conv)\.")
    found = next(filter(None, map(first.match, state)), None)
    if found is None:
        raise ValueError("it has no feature_extractor.conv_layers.0")
    prefix, fairseq = found[1].removesuffix("wav2vec2."), found[2] == "0"
    state = {
        name.removeprefix(prefix): own_copy(value)
        for name, value in state.items()
        if isinstance(value, Tensor) and name.startswith(prefix)
    }
    head = "" if fairseq else "logit_generator."
    embeddings = state.pop("label_embs_concat" if fairseq else head + "label_embeddings", None)
    if fairseq:
        encoder = convert_fairseq_names(state)
    else:
        encoder = {name.removeprefix("wav2vec2."): value for name, value in state.items()}
    parts = ("feature_extractor.", "encoder.")
    encoder = {name: value for name, value in encoder.items() if name.startswith(parts)}
    encoder = join_attention(encoder)
    if embeddings is None or head + "final_proj.weight" not in state:
        return encoder, None, None
    weight, bias = (state[f"{head}final_proj.{kind}"] for kind in ("weight", "bias"))
    final_proj = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    final_proj.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    # fairseq's dictionary puts <s> <pad> </s> <unk> before the clusters, 500 in its releases.
    special = 4 if fairseq or len(embeddings) == 504 else 0
    return encoder, final_proj, embeddings[special:]


def find_setting(content: Any, name: str) -> Any:
    """The value of a setting in the configs of a checkpoint, however deep; None without it."""
    queue, seen = [content], set()
    for part in queue:  # grows on the way
        if not isinstance(part, dict) or id(part) in seen:  # configs point to their parents
            continue
        seen.add(id(part))
        values = {**part, **getattr(part, "__dict__", {})}  # a stub has its object's attributes
        if name in values:
            return getattr(values[name], "_val", values[name])  # omegaconf's node
        queue.extend(values.values())
    return None


def infer_arguments(weights: Weights) -> Values:
    """Arguments of torchaudio's wav2vec2_model or wavlm_model, read off the shapes of the weights.

    Not in the shapes, and set as published: strides, heads (width / 64, at most 16), pre-norm.
    """
    convs = []  # channels, kernel, stride
    for i, stride in enumerate((5, 2, 2, 2, 2, 2, 2)):
        channels, _, kernel = weights[f"feature_extractor.conv_layers.{i}.conv.weight"].shape
        convs.append((channels, kernel, stride))
    large = "feature_extractor.conv_layers.1.layer_norm.weight" in weights
    conv, layer = "encoder.transformer.pos_conv_embed.conv.", "encoder.transformer.layers."
    new, old = conv + "parametrizations.weight.original1", conv + "weight_v"
    width, group, kernel = weights[new if new in weights else old].shape
    rates = "projection_dropout attention_dropout ff_interm_dropout dropout layer_drop".split()
    arguments = {f"encoder_{rate}": 0.0 for rate in rates} | dict(
        extractor_mode="layer_norm" if large else "group_norm",
        extractor_conv_layer_config=convs,
        extractor_conv_bias="feature_extractor.conv_layers.0.conv.bias" in weights,
        encoder_embed_dim=width,
        encoder_pos_conv_kernel=kernel,
        encoder_pos_conv_groups=width // group,
        encoder_num_layers=count_layers(weights, layer),
        encoder_num_heads=min(width // 64, 16),
        encoder_ff_interm_features=len(weights[layer + "0.feed_forward.intermediate_dense.weight"]),
        encoder_layer_norm_first=large,
        aux_num_out=None,
    )
    table = weights.get(layer + "0.attention.rel_attn_embed.weight")
    if table is not None:  # WavLM
        arguments |= dict(encoder_num_buckets=len(table), encoder_num_heads=table.shape[1])
        arguments["encoder_max_distance"] = 800
    return arguments


def build_teacher(
    name: str,
    arguments: Values,
    weights: Weights,
    normalise: bool | None = None,
    final_proj: nn.Linear | None = None,
    label_embeddings: Tensor | None = None,
) -> Teacher:
    """A teacher from torchaudio's ``arguments`` and weights, which must all fit.

    ``normalise`` None: waveforms are normalised where every convolution has a LayerNorm.
    """
    if arguments["encoder_num_layers"] != count_layers(weights, "encoder.transformer.layers."):
        raise ValueError("it has another number of Transformer layers than its config")
    wavlm = "encoder_max_distance" in arguments
    build = torchaudio.models.wavlm_model if wavlm else torchaudio.models.wav2vec2_model
    with torch.device("meta"):
        model = build(**arguments)
    model.load_state_dict(weights, assign=True)  # a lenient load leaves random layers unseen
    if normalise is None:
        normalise = arguments["extractor_mode"] == "layer_norm"
    teacher = Teacher(model, name, normalise, final_proj, label_embeddings)
    teacher.arguments = arguments
    return teacher


def teacher_from_file(path: Path, name: str) -> Teacher:
    """A fairseq, s3prl or torchaudio checkpoint, or this project's own form."""
    checkpoint = load_checkpoint(path)
    if "method" in checkpoint:
        raise InputError(f"{path} is a student of this project, not a teacher")
    inner = next((k for k in ("state_dict", "model_weight", "model") if k in checkpoint), None)
    try:
        weights, final_proj, embeddings = split_head(checkpoint[inner] if inner else checkpoint)
        normalise = None
        if inner == "state_dict" and "config" in checkpoint:  # this project's own form
            config = checkpoint["config"].items()
            arguments = {k: v for k, v in config if k.startswith(("extractor_", "encoder_"))}
            arguments["aux_num_out"] = None
        else:
            arguments, settings = infer_arguments(weights), checkpoint | {inner: None}
            normalise = find_setting(settings, "normalize")
            heads = find_setting(settings, "encoder_attention_heads")
            arguments["encoder_num_heads"] = heads or arguments["encoder_num_heads"]
        return build_teacher(name, arguments, weights, normalise, final_proj, embeddings)
    except Exception as error:  # foreign weights fail in any way
        raise InputError(
            f"{path} is not a fairseq, s3prl or torchaudio HuBERT / WavLM / wav2vec 2.0 "
            f"checkpoint: {' '.join(str(error).split())[:300]}"
        ) from error


def teacher_from_bundle(name: str) -> Teacher:
    """A bundle of torchaudio, from torch's cache or the network."""
    bundle = BUNDLES[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub announces its download on stdout
            weights = bundle._get_state_dict({"weights_only": True})
        return build_teacher(name, bundle._params, weights)
    except Exception as error:  # no network, a full disk, a broken file in the cache
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"cannot load {name} ({reason}): it is downloaded to {folder / bundle._path} once, so "
            "delete that file if it is broken, or put it there by hand where there is no network"
        ) from error


def teacher_from_huggingface(name: str) -> Teacher:
    """A HuBERT, WavLM or wav2vec 2.0 of transformers: a folder, or a name on Hugging Face's hub."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"{name} needs the package transformers: pip install transformers"
        ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            load = transformers.AutoModel.from_pretrained
            model, report = load(name, output_loading_info=True)
        settings, missing = model.config, {*report["missing_keys"]} - {"masked_spec_embed"}
        if settings.model_type not in ("hubert", "wavlm", "wav2vec2"):
            raise ValueError(f"a {settings.model_type} is no hubert, wavlm or wav2vec2")
        if missing:
            raise ValueError(f"it has no {min(missing)}")
        wavlm = settings.model_type == "wavlm"
        kind = import_huggingface._get_config_wavlm if wavlm else import_huggingface._get_config
        weights = {}
        for key, value in model.state_dict().items():
            key = re.sub("^encoder", "encoder.transformer", key)
            weights[re.sub("^feature_projection", "encoder.feature_projection", key)] = value
        weights.pop("masked_spec_embed", None)
        normalise = None
        with contextlib.suppress(OSError):  # a folder without preprocessor_config.json
            normalise = transformers.AutoFeatureExtractor.from_pretrained(name).do_normalize
        arguments = kind(settings) | {"aux_num_out": None}
        return build_teacher(name, arguments, join_attention(weights), normalise).float()
    except Exception as error:  # no network, a broken folder, another kind of model
        raise InputError(
            f"cannot load {name} through transformers: {' '.join(str(error).split())[:300]}"
        ) from error


def load_teacher(name: PathLike, device: Device = "cpu") -> Teacher:
    """The teacher of a name: a bundle of torchaudio, ``toy``, a file, or one of Hugging Face.

    Bundles (``hubert_base``, ...) are downloaded on first use and have no cluster head. Files:
    fairseq or s3prl checkpoints, Microsoft's WavLM, torchaudio state dicts, or
    ``{"config": arguments of torchaudio.models.hubert_pretrain_model, "state_dict": ...}``.
    Hugging Face: a folder, or a name on the hub (``facebook/hubert-base-ls960``).
    """
    name = str(name)
    if name == "toy":
        teacher = teacher_from_file(toy().teacher(), "toy")
    elif name in BUNDLES:
        teacher = teacher_from_bundle(name)
    elif Path(name).suffix in (".safetensors", ".bin") and Path(name).exists():
        teacher = teacher_from_huggingface(str(Path(name).parent))
    elif os.path.isfile(name):
        teacher = teacher_from_file(Path(name), Path(name).name)
    elif os.path.isdir(name) or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.pt)(?<!\.ckpt)", name):
        teacher = teacher_from_huggingface(name)
    else:
        names = ", ".join(["toy", *BUNDLES])
        raise InputError(
            f"unknown teacher {name}: give a checkpoint file, a Hugging Face folder or its name "
            f"(facebook/hubert-base-ls960), or one of {names}"
        )
    return teacher.to(device)


# Ideographs; Japanese kana and Korean hangul are not among them.
CHINESE = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df"
CHINESE += "\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"


class Tokenizer:
    """Text -> ids of word pieces: [CLS], the longest known pieces of each word, [SEP].

    ``vocabulary`` lists the pieces in the order of their ids; a piece inside a word starts with ##.
    At most ``positions`` ids; what does not fit is cut off before the [SEP].
    """

    def __init__(self, vocabulary: Sequence[str], positions: int = 512) -> None:
        self.ids = {piece: i for i, piece in enumerate(vocabulary)}
        self.positions = positions

    def __call__(self, text: str) -> list[int]:
        pieces = [piece for word in self.words(text) for piece in self.pieces(word)]
        return [self.ids[piece] for piece in ("[CLS]", *pieces[: self.positions - 2], "[SEP]")]

    def words(self, text: str) -> list[str]:
        """Lower-case words without accents; each mark and each Chinese character by itself."""
        kind = unicodedata.category  # C: control characters, Mn: accents, P: punctuation
        text = "".join(c for c in text if c in "\t\n\r" or kind(c)[0] != "C" and c != "\ufffd")
        text = unicodedata.normalize("NFD", re.sub(CHINESE, r" \g<0> ", text).lower())
        letters = [char for char in text if kind(char) != "Mn"]
        marks = "$+<=>^`|~"  # of ASCII, what is neither punctuation nor letter nor digit
        spaced = [f" {c} " if kind(c)[0] == "P" or c in marks else c for c in letters]
        return "".join(spaced).split()

    def pieces(self, word: str) -> list[str]:
        """The longest known piece, then the longest of the rest, ...; one [UNK] if that fails."""
        pieces, start = [], 0
        while start < len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    break
            else:
                return ["[UNK]"]
            pieces.append(piece)
            start = end
        return pieces or ["[UNK]"]


class BertLayer(nn.Module):
    """Post-norm Transformer layer: (B, N, D) -> (B, N, D), and its attention map (B, N, N)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads

        def output(inputs: int) -> nn.ModuleDict:
            norm = nn.LayerNorm(width, eps=1e-12)
            return nn.ModuleDict({"dense": nn.Linear(inputs, width), "LayerNorm": norm})

        project = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        project = {"self": nn.ModuleDict(project)}
        self.attention = nn.ModuleDict({**project, "output": output(width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = output(inner)

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B x heads x N x d
            for project in self.attention["self"].values()
        )
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        maps = scores.masked_fill(~valid[:, None, None, :], -math.inf).softmax(-1)
        y = (maps @ value).transpose(1, 2).flatten(2)  # B x N x D
        dense, norm = self.attention["output"].values()
        x = norm(x + dense(y))
        dense, norm = self.output.values()
        return norm(x + dense(F.gelu(self.intermediate["dense"](x)))), maps.mean(1)


class TextTeacher(nn.Module):
    """BERT's encoder under its published module names, without dropout.

    Arguments: names of config.json; the defaults are those of bert-base-uncased.
    """

    def __init__(
        self,
        vocab_size: int = 30_522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 512,
    ) -> None:
        super().__init__()
        self.width = hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocab_size, hidden_size),
                "position_embeddings": nn.Embedding(max_position_embeddings, hidden_size),
                "token_type_embeddings": nn.Embedding(2, hidden_size),  # 0: first text of a pair
                "LayerNorm": nn.LayerNorm(hidden_size, eps=1e-12),
            }
        )
        layers = [
            BertLayer(hidden_size, num_attention_heads, intermediate_size)
            for _ in range(num_hidden_layers)
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, ids: Tensor, valid: Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden states [(B, N, D)], and attention maps (L, B, N, N) averaged over heads.

        ``ids`` (B, N) right-padded, ``valid`` (B, N) False at the padding. State 0 is the input of
        layer 1. Row n of a map is the attention that piece n pays, and sums to 1.
        """
        word, position, token_type, norm = self.embeddings.values()
        maps = []
        with torch.autocast(ids.device.type, enabled=False):  # bf16 would round the maps
            x = word(ids) + position.weight[: ids.shape[1]] + token_type.weight[0]
            hidden_states = [norm(x)]  # B x N x D
            for layer in self.encoder["layer"]:
                x, attention = layer(hidden_states[-1], valid)
                hidden_states.append(x)
                maps.append(attention)
        return hidden_states, torch.stack(maps)


def load_text_teacher(folder: PathLike) -> tuple[TextTeacher, Tokenizer]:
    """A frozen BERT on the CPU, and its tokenizer, from a folder as bert-base-uncased is published.

    ``folder`` may be ``toy``. Raises InputError for what is not an uncased BERT.
    """
    folder = toy().text_teacher(TextTeacher, Tokenizer) if folder == "toy" else Path(folder)
    safetensors = folder / "model.safetensors"
    weights = safetensors if safetensors.exists() else folder / "pytorch_model.bin"
    config, vocabulary = folder / "config.json", folder / "vocab.txt"
    for path in (config, vocabulary, weights):
        if not path.is_file():
            raise InputError(
                f"{folder} has no {path.name}: give a folder with config.json, vocab.txt and "
                "model.safetensors or pytorch_model.bin, as bert-base-uncased is published"
            )
    load = load_checkpoint
    if weights == safetensors:
        try:
            from safetensors.torch import load_file as load
        except ImportError as error:
            raise InputError(f"{weights} needs a package: pip install safetensors") from error
    with reading(weights):
        saved = load(weights)
    with reading(folder):
        pieces = vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        state = {}
        for name, value in saved.items():
            name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
            if name.startswith(("embeddings.", "encoder.")) and not name.endswith("position_ids"):
                state[name] = own_copy(value)
        settings = json.loads(config.read_text(encoding="utf-8"))
        needed = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "vocab_size": len(pieces)}
        needed["num_hidden_layers"] = count_layers(state, "encoder.layer.")
        needed["position_embedding_type"] = "absolute"
        for name, value in needed.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{name} is {settings[name]} and not {value}")
        if not {"[UNK]", "[CLS]", "[SEP]"} <= set(pieces):
            raise ValueError("vocab.txt lacks one of [UNK], [CLS], [SEP]")
        if any(re.search("[A-Z]", piece) for piece in pieces if piece[:1] != "["):
            raise ValueError("it is a cased model, and an uncased one is needed")
        sizes = {name: settings[name] for name in inspect.signature(TextTeacher).parameters}
        with torch.device("meta"):  # a config.json cannot ask for more memory than the weights
            model = TextTeacher(**sizes)
        model.load_state_dict(state, assign=True)
        tokenizer = Tokenizer(pieces, sizes["max_position_embeddings"])
    return model.requires_grad_(False).eval(), tokenizer


# ------------------------------------------------------------------------------------------------
# 4. Evaluation
# ------------------------------------------------------------------------------------------------

Features = Callable[[Tensor], list[Tensor]]  # waveforms (B, S) -> hidden states [(B, T, D)]
Rows = dict[str, Values]  # of a table: name of the row -> column -> value


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def lstm_flops(x: Sequence[int], *weights: Any, **_: Any) -> int:
    """FLOPs of an LSTM kernel: two for each weight of its matrices at each frame."""
    shapes = weights[0] if isinstance(weights[0][0], Sequence) else weights[:2]  # CUDA, CPU
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    return 2 * math.prod(x[:-1]) * matrices


@contextlib.contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of the block, without gradients.

    torch's counter misses LSTMs and fused attention: the former are added, the latter turned off.
    """
    lstms = dict.fromkeys([torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten._cudnn_rnn], lstm_flops)
    counter = FlopCounterMode(display=False, custom_mapping=lstms)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        yield counter


def count_macs(features: Features, device: Device) -> float:
    """Multiply-accumulates per second of audio, for one utterance of 10 s."""
    with count_flops() as counter:
        features(torch.zeros(1, 10 * SAMPLE_RATE, device=device))
    return counter.get_total_flops() / 2 / 10  # a MAC is two FLOPs


@torch.no_grad()
def measure_speed(models: dict[str, Features], device: Device) -> Scores:
    """Seconds of audio per second of each model, for one utterance of 10 s; median of 7 rounds.

    The models take turns, each round in another order. Compare only speeds of one call.
    """
    waveform = 0.1 * torch.randn(1, 10 * SAMPLE_RATE, device=device)
    times = {name: [] for name in models}
    for turn in range(8):
        for name in np.random.default_rng(turn).permutation([*models]).tolist():
            start = time.perf_counter()
            models[name](waveform)
            if waveform.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: 10 / np.median(spent[1:]) for name, spent in times.items()}  # 0: warm-up


def describe(modules: Sequence[nn.Module], run: Callable[[Tensor], object]) -> Rows:
    """Table rows for --describe: parameters and GMAC per second of ``modules`` and their parts.

    ``run(waveform)`` calls the modules. Parts without a matrix product are not shown.
    """
    with count_flops() as counter:
        run(torch.zeros(1, 10 * SAMPLE_RATE))
    counts, rows = counter.get_flop_counts(), {}
    for module in modules:
        for name, part in module.named_modules(prefix=type(module).__name__):
            if name in counts and re.fullmatch(r"\D*\d*", name):  # down to the entries of lists
                gmac = sum(counts[name].values()) / 2e10  # two FLOPs are one MAC; 10 s
                rows[name] = {"parameters": count_parameters(part), "GMAC/s": gmac}
    return rows


@torch.no_grad()
def layer_distance(
    predict: Features, target: Features, batches: Iterable[Tensor], device: Device
) -> dict[str, list[float]]:
    """Mean over all frames of the "L1" distance (averaged over D) and "cosine", for each layer."""
    l1, cosine, frames = 0.0, 0.0, 0
    for waveforms in batches:
        layers = (model(waveforms.to(device)) for model in (predict, target))
        p, h = (torch.stack([layer.float() for layer in each]) for each in layers)  # L x B x T x D
        l1 = l1 + (p - h).abs().mean(-1).sum((1, 2))
        cosine = cosine + F.cosine_similarity(p, h, dim=-1).sum((1, 2))
        frames += p[0, ..., 0].numel()
    return {"L1": (l1 / frames).tolist(), "cosine": (cosine / frames).tolist()}


@dataclass(frozen=True)
class Task:
    """A labelled task on frozen features: ``parts`` maps train / dev / test to (utterance, target).

    ``kind`` is "frame" (target: a label per frame), "utterance" (a label) or "ctc" (a sequence).
    """

    name: str
    kind: str
    parts: dict[str, list[tuple[Utterance, Any]]]


def frame_labels(utterance: Utterance) -> list[str]:
    """The aligned phone at the middle of each frame; frame t is samples 320 t .. 320 t + 400."""
    with reading(f"the alignment (phone:end pairs, in samples) of {utterance.path}"):
        pairs = [pair.rsplit(":", 1) for pair in utterance.get("alignment").split()]
        ends = np.array([int(end) for _, end in pairs])
        middles = HOP * np.arange(frame_count(utterance.samples)) + RECEPTIVE_FIELD // 2
        phones = np.searchsorted(ends, middles, side="right")
        return [pairs[min(i, len(pairs) - 1)][0] for i in phones]


SEQUENCES = {  # title, kind, target
    "alignment": ("phone accuracy", "frame", frame_labels),
    "phones": ("phone error rate", "ctc", lambda u: re.sub(r"\d", "", u.get("phones")).split()),
    "text": ("character error rate", "ctc", lambda u: list(u.get("text"))),
}


def column_task(rows: Sequence[Utterance], column: str) -> Task | None:
    """The task of a column in the ``rows`` of one data set; None where labels are missing.

    Classification needs two classes in train, and none in dev or test that train lacks.
    """
    title = f"{column.removeprefix('label_')} accuracy"
    title, kind, target = SEQUENCES.get(column, (title, "utterance", lambda u: u.get(column)))
    own_split = any(utterance.get(f"{column}_split") for utterance in rows)
    split = f"{column}_split" if own_split else "split"
    parts = {"train": [], "dev": [], "test": []}
    for utterance in rows:
        if utterance.get(column) and utterance.get(split) in parts:
            parts[utterance.get(split)].append((utterance, target(utterance)))
    if not all(parts.values()):
        return None
    if kind == "utterance":
        train, dev, test = ({label for _, label in part} for part in parts.values())
        if len(train) < 2 or not train >= dev | test:
            return None
    dataset = rows[0].get("dataset")
    return Task(f"{title} ({dataset})" if dataset else title, kind, parts)


def find_tasks(utterances: Sequence[Utterance], every: bool = False) -> list[Task]:
    """The tasks that the columns of a manifest define (README, "Labels"), for each ``dataset``.

    Unless ``every`` task is asked for, ``phones`` is left out where there is an alignment, and
    ``text`` where there is any task but the speaker's.
    """
    tasks = []
    for dataset in sorted({utterance.get("dataset") for utterance in utterances}):
        rows = [utterance for utterance in utterances if utterance.get("dataset") == dataset]
        columns = dict.fromkeys(column for utterance in rows for column in utterance.columns)
        labels = [c for c in columns if c.startswith("label_") and not c.endswith("_split")]
        found = []
        for column in ("alignment", "phones", *labels, "text", "speaker"):
            if every or not found or column not in ("phones", "text"):
                found += filter(None, [column_task(rows, column)])
        tasks += found
    return tasks


FEATURE_BYTES = 4_000_000_000  # of frames kept in memory; those of LibriSpeech are 400 GB


@torch.no_grad()
def utterance_features(features: Features, utterance: Utterance, device: Device) -> Tensor:
    """Hidden states (L, T, D) of one utterance alone: padding would change Base's GroupNorm."""
    frames = torch.cat(features(load_audio(utterance.path)[None].to(device))).float()
    if not frames.isfinite().all():
        raise InputError(f"the features of {utterance.path} are not finite: remove or replace it")
    return frames


def extract_features(
    features: Features, tasks: Sequence[Task], device: Device
) -> dict[str, tuple[Tensor, Any]]:
    """Path -> (mean over time (L, D), frames (L, T, D) in float16 or None if no task needs them).

    Beyond FEATURE_BYTES the frames for CTC tasks are a function that computes them again.
    """
    wanted = {}
    for task in tasks:
        for utterance, _ in itertools.chain(*task.parts.values()):
            wanted.setdefault(utterance.path, (utterance, set()))[1].add(task.kind)
    table, size = {}, 0
    for path, (utterance, kinds) in tqdm(wanted.items(), "probe features", leave=False):
        frames = utterance_features(features, utterance, device)
        kept = None
        if size >= FEATURE_BYTES and "ctc" in kinds and "frame" not in kinds:
            kept = partial(utterance_features, features, utterance, device)
        elif kinds != {"utterance"}:
            kept = frames.half().cpu()
            size += kept.nbytes
        table[path] = (frames.mean(dim=1).cpu(), kept)
    return table


def linear_probe(parts: dict[str, tuple[Tensor, list]], seed: int, updates: int = 400) -> float:
    """Test accuracy of a linear classifier on the learned weighted sum of standardised layers.

    ``parts`` maps train / dev / test to features (N, L, D) and N labels. Weight decay and number of
    updates are chosen on dev.
    """
    classes = sorted(set(parts["train"][1]))
    numbers = {label: number for number, label in enumerate(classes)}
    y = {
        part: torch.tensor([numbers.get(label, -1) for label in labels])
        for part, (_, labels) in parts.items()
    }
    x = parts["train"][0]
    mean = torch.stack([layer.float().mean(0) for layer in x.unbind(1)])  # L x D
    deviation = torch.stack([layer.float().std(0) for layer in x.unbind(1)])

    def train(decay: float) -> tuple[float, float]:
        """Best accuracy on dev, and the accuracy on test at the same update."""
        generator, best = torch.Generator().manual_seed(seed), (-1.0, -1.0)
        mix = nn.Parameter(torch.zeros(x.shape[1]))  # of layers, before a softmax
        weight = nn.Parameter(torch.zeros(len(classes), x.shape[2]))
        bias = nn.Parameter(torch.zeros(len(classes)))
        optimizer = torch.optim.AdamW([mix, weight, bias], lr=1e-2, weight_decay=decay)

        def logits(part: str, rows: Tensor | slice) -> Tensor:
            z = (parts[part][0][rows].float() - mean) / (deviation + 1e-5)
            return F.linear(torch.einsum("l,nld->nd", mix.softmax(0), z), weight, bias)

        @torch.no_grad()
        def accuracy(part: str) -> float:
            return (logits(part, slice(None)).argmax(1) == y[part]).double().mean().item()

        for update in tqdm(range(1, updates + 1), "linear probe", leave=False):
            rows = torch.randperm(len(x), generator=generator)[:1024]
            loss = F.cross_entropy(logits("train", rows), y["train"][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if update % 25 == 0 and (dev := accuracy("dev")) > best[0]:
                best = (dev, accuracy("test"))
        return best

    return max((train(decay) for decay in (0.01, 1.0)), key=lambda best: best[0])[1]


class CTCHead(nn.Module):
    """Weighted sum of layers and four convolutions: (B, T, L, D) -> log-probs (B, T / 2, C + 1).

    SUPERB's phone head is linear, which learns too little from minutes of speech.
    """

    def __init__(self, layers: int, width: int, classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))
        self.norm = nn.LayerNorm(width)
        self.halve = nn.Conv1d(width, hidden, 5, stride=2, padding=2)
        self.convs = nn.ModuleList(nn.Conv1d(hidden, hidden, 9, padding=4) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(hidden, classes + 1)  # entry 0 is the blank

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.einsum("l,btld->btd", self.weights.softmax(0), x))
        x = F.gelu(self.halve(x.transpose(1, 2))).transpose(1, 2)  # B x T/2 x hidden
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(x.transpose(1, 2)).transpose(1, 2))
            x = x + self.dropout(F.gelu(y))
        return self.out(x).log_softmax(-1)


def ctc_input(x: Tensor | Callable[[], Tensor], device: Device) -> Tensor:
    """Features (L, T, D), or the function that computes them, as input of CTCHead: (T, L, D)."""
    x = x if isinstance(x, Tensor) else x().half()
    return x.to(device).float().permute(1, 0, 2)


@torch.no_grad()
def ctc_error_rate(
    head: CTCHead, features: Sequence[Any], targets: Sequence[list[str]], symbols: Sequence[str]
) -> float:
    """Edits per symbol of greedy decoding; entry k of the head is ``symbols[k - 1]``."""
    head.eval()
    edits, device = 0, head.out.weight.device
    for x, target in zip(features, targets, strict=True):
        best = head(ctc_input(x, device)[None])[0].argmax(-1).unique_consecutive().tolist()
        decoded = [symbols[k - 1] for k in best if k]  # 0 is the blank
        edits += torchaudio.functional.edit_distance(decoded, target)
    return edits / sum(map(len, targets))


def ctc_probe(
    parts: dict[str, tuple[Sequence[Any], list[list[str]]]],
    seed: int,
    epochs: int = 16,
    device: Device = "cpu",
) -> float:
    """Test error rate (edits / symbols) of a CTCHead; the epoch is chosen on dev.

    ``parts`` maps train / dev / test to features [(L, T, D)], or functions that compute them, and
    target sequences, both sorted by length.
    """
    symbols = sorted({symbol for target in parts["train"][1] for symbol in target})
    numbers = {symbol: number for number, symbol in enumerate(symbols, 1)}
    features, targets = parts["train"]
    batches = [range(len(features))[i : i + 16] for i in range(0, len(features), 16)]
    cuda = torch.device(device).type == "cuda"
    device = device if cuda else "cpu"  # other devices may lack the CTC loss
    _, layers, width = ctc_input(features[0], device).shape
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.manual_seed(seed)
        head = CTCHead(layers, width, len(symbols)).to(device)
        optimizer = torch.optim.Adam(head.parameters(), lr=2e-3)
        best_dev, best_test = math.inf, math.inf
        for epoch in tqdm(range(epochs), "CTC probe", leave=False):
            head.train()
            for i in torch.randperm(len(batches)).tolist():
                x = [ctc_input(features[j], device) for j in batches[i]]
                y = [torch.tensor([numbers[symbol] for symbol in targets[j]]) for j in batches[i]]
                loss = F.ctc_loss(
                    head(nn.utils.rnn.pad_sequence(x, batch_first=True)).transpose(0, 1),
                    torch.cat(y).to(device),
                    torch.tensor([(len(frames) + 1) // 2 for frames in x]),
                    torch.tensor([len(target) for target in y]),
                    zero_infinity=True,
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                optimizer.step()
            if epoch >= epochs // 2:
                dev = ctc_error_rate(head, *parts["dev"], symbols)
                if dev < best_dev:
                    best_dev, best_test = dev, ctc_error_rate(head, *parts["test"], symbols)
    return best_test


def score_probes(
    table: dict[str, tuple[Tensor, Any]],
    tasks: Sequence[Task],
    seed: int,
    updates: int = 400,
    device: Device = "cpu",
) -> Scores:
    """Test accuracy, or error rate of CTC tasks, by name; tasks of one name are averaged.

    ``table`` comes from extract_features. A linear probe takes ``updates``, or 20 epochs if that is
    more; linear probes run on the CPU, CTC heads on ``device``.
    """
    scores = {}
    for task in tasks:
        parts = {}
        for part, rows in task.parts.items():
            if task.kind == "ctc":  # a batch holds neighbours
                rows = sorted(rows, key=lambda row: frame_count(row[0].samples))
            means, x = zip(*(table[utterance.path] for utterance, _ in rows), strict=True)
            targets = [target for _, target in rows]
            if task.kind == "utterance":
                x = torch.stack(means)
            elif task.kind == "frame":
                x = torch.cat([frames.transpose(0, 1) for frames in x])
                targets = list(itertools.chain(*targets))
            parts[part] = (x, targets)
        if task.kind == "ctc":
            score = ctc_probe(parts, seed, device=device)
        else:
            passes = 20 * len(task.parts["train"]) // 1024 if task.kind == "utterance" else 0
            score = linear_probe(parts, seed, max(updates, passes))
        scores.setdefault(task.name, []).append(score)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def score(
    module: nn.Module,
    features: Features,
    tasks: Sequence[Task],
    device: Device,
    seed: int,
    speed: float | None = None,
) -> Scores:
    """A table row: parameters of ``module``, GMAC per second, speed, probes of its ``features``."""
    row = {"parameters": count_parameters(module), "GMAC/s": count_macs(features, device) / 1e9}
    row |= {} if speed is None else {"speed": speed}
    table = extract_features(features, tasks, device)
    return row | score_probes(table, tasks, seed, device=device)


def score_file(
    load_student: Callable[..., nn.Module],
    score: Callable[..., Scores],
    config: Any,
    args: argparse.Namespace,
) -> str:
    """The table of --evaluate: ``score(student, tasks, device, seed)`` on the tasks of --data."""
    device = pick_device(config.device)
    student = load_student(args.evaluate, device)
    tasks = find_tasks(scan(config.data, None, config.workers))
    if not tasks:
        raise InputError(
            f"{config.data} has no labels to probe: the README lists the columns of a manifest; "
            "rows of train, dev and test are all needed"
        )
    return format_table({args.evaluate: score(student, tasks, device, config.seed)})


def make_table(
    train: Callable[..., tuple],
    evaluate: Callable[..., Rows],
    config: Any,
    args: argparse.Namespace,
    claim: dict[str, Values],
) -> str:
    """Train and evaluate once, over --seeds, or with the ablations of --claim; return the table.

    ``claim``: name of an ablation -> its changes of the Config; its row "distilled" takes its name.
    Each of several runs has a folder below ``config.out``; --resume skips the finished ones.
    """

    def run(config: Any, resume: bool, baselines: bool = True) -> Rows:
        *trained, _ = train(config, resume)
        return evaluate(config, *trained, baselines=baselines) if rank() == 0 else {}

    out = Path(config.out)
    if not config.data:
        if args.resume and not out.exists():
            raise InputError(f"{out} holds no run to resume: leave --resume out")
        with first_process_first():
            config = replace(config, data=str(toy().world(out / "toy_world")))
    if args.seeds == 1 and not args.claim:
        rows = run(config, args.resume)
    else:
        out, rows = out / ("claim" if args.claim else "seeds"), {}
        variants = {"distilled": {}} | (claim if args.claim else {})
        seeds = range(config.seed, config.seed + args.seeds)
        for seed, (name, changes) in itertools.product(seeds, variants.items()):
            folder = out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-seed-{seed}"
            one = replace(config, seed=seed, out=str(folder), **changes)
            results, settings = folder / "results.json", folder / "config.json"
            resume = args.resume and settings.exists()
            if resume and results.exists():  # a finished run
                if changed := changed_settings(json.loads(settings.read_text()), one):
                    raise InputError(f"{folder} had another {changed[0]}: give another --out")
                found = json.loads(results.read_text())["rows"]
            else:
                found = run(one, resume, baselines=not changes)
                write_results(folder, found)
            for row, columns in found.items():
                merged = rows.setdefault(name if row == "distilled" else row, {})
                for column, value in columns.items():
                    merged.setdefault(column, []).append(value)
    text = write_results(out, rows)
    if processes() > 1:
        wait_for_all()  # torchrun ends all processes when one ends
        dist.destroy_process_group()
    return text


def write_results(out: Path, rows: Rows) -> str:
    """Write the table as ``results.json`` and ``results.txt`` to a folder; return its text."""
    text = format_table(rows)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    stamp = f"{command} | torch {torch.__version__} | {time.strftime('%Y-%m-%d')}"
    write_text(out / "results.json", json.dumps({"command": command, "rows": rows}, indent=1))
    write_text(out / "results.txt", f"{text}\n\n{stamp}\n")
    return text


def format_table(rows: Rows) -> str:
    """A Markdown table; a list, with a value for each seed, is its mean ± standard deviation."""

    def cell(value: Any) -> str:
        values = value if isinstance(value, list) else [value]
        mean = float(np.mean(values))
        if all(isinstance(v, int) for v in values):
            return f"{mean:,.0f}"
        digits = 1 if abs(mean) >= 10 else 3
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{mean:.{digits}f}{spread}"

    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [["", *columns]]
    for name, row in rows.items():
        body.append([name, *(cell(row[column]) if column in row else "" for column in columns)])
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = []
    for line in body:
        name, *cells = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        lines.append(f"| {' | '.join([line[0].ljust(widths[0]), *cells])} |")
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
