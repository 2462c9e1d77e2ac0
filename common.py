"""What the five method files share and no paper is about: audio, teachers, evaluation.

    1. Run folder         one sentence for the user; a file is written whole or not at all, by the
                          first of several processes
    2. Audio              find, load, scan, crop, batch; what may happen between two batches
    3. Toy world          a tiny spoken language made by code, with exact labels
    4. Teachers           a frozen HuBERT, WavLM or wav2vec 2.0, layers numbered as in the papers;
                          BERT's files and word pieces
    5. Evaluation         size, MACs, speed, distance to the teacher, probes on frozen features
    6. Export             the same weights under the names of other libraries

Students, losses, schedules and training loops are the method, and stand in its file.

Letters used below: B batch, S samples, T frames, D width, L layers, K clusters.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import csv
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import unicodedata
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchaudio import datasets
from torchaudio.models.wav2vec2.utils import import_fairseq
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz; every model here hears 16 kHz mono
HOP = 320  # samples between two frames of a HuBERT (20 ms)
FIELD = 400  # samples that one frame sees (25 ms): shorter audio gives no frame at all


# ------------------------------------------------------------------------------------------------
# 1. Run folder: errors, processes, files, flags
# ------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """A user's mistake or a broken input, told in one sentence that says what to do.

    A loader worker re-raises an error with its whole traceback as the message; only the sentence
    behind the last "InputError: " is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(str(message).rsplit("InputError: ", 1)[-1].strip())


class ElsewhereError(InputError):
    """What ended another process of this run, which has said it already."""


ALONE = contextvars.ContextVar("ALONE", default=False)  # whether the others wait, see on_first
TENSORBOARD = contextvars.ContextVar("TENSORBOARD", default=False)  # --tensorboard


def processes() -> int:
    """How many processes of torchrun train together; they meet at the first call. 1 without it."""
    if ALONE.get() or not dist.is_available():
        return 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(days=1))  # an evaluation may be long
        except ValueError as error:
            raise InputError(
                f"WORLD_SIZE is set, but the processes cannot meet ({error}): start them with "
                "torchrun --nproc-per-node N, or unset WORLD_SIZE"
            ) from error
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process. Process 0 alone writes, shows bars and evaluates."""
    return dist.get_rank() if processes() > 1 else 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what all processes do at once: where one of them has ended, the others do too."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # a signal, which may strike here as anywhere
            raise
        reason = " ".join(str(error).split())[:300]
        raise ElsewhereError(
            f"the processes have lost one another ({reason}): if another one has ended, its own "
            "words stand above; --resume goes on from the last checkpoint"
        ) from error


def on_first(work: Callable[..., Any], *arguments: Any) -> Any:
    """``work(*arguments)``, done by the first process while the others wait for its result.

    Whatever depends on files is decided here, so that all decide the same. Inside, there is one
    process only. An error there is an ElsewhereError in the others. The result must be small.
    """
    if processes() == 1:
        return work(*arguments)
    outcome: list[Any] = [None, "the first process has ended"]  # result, error
    if rank() > 0:
        with together():
            dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise ElsewhereError(outcome[1])
        return outcome[0]
    token = ALONE.set(True)
    try:
        outcome = [work(*arguments), None]
    except BaseException as error:
        outcome[1] = str(error)
        raise
    finally:
        ALONE.reset(token)
        with together():
            dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
    return outcome[0]


def write_atomically(path: Path | str, write: Callable[[Any], object]) -> None:
    """Call ``write(file)`` on a temporary binary file, then rename it to ``path``.

    A reader sees the old file or the new one, never a half: what stood at ``path`` survives a
    crash, a kill or a full disk. Raises InputError when the file cannot be written. Of several
    processes the first alone writes.
    """
    if rank() > 0:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        if "CUDA error" in str(error):  # of earlier work: it comes to light here
            raise
        cause: BaseException | None = error
        while cause and not getattr(cause, "strerror", None):  # what torch's writer stumbled over
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or " ".join(str(error).split()) or repr(error)
        raise InputError(
            f"cannot write {path} ({reason}): make room or choose another folder; "
            "what was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # not there, or under a path that cannot be
            temporary.unlink()


def scalars(line: dict[str, Any] | list, title: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a line of the log with their names: {"a": {"b": [1, 2]}} -> a/b/0, a/b/1."""
    for name, value in line.items() if isinstance(line, dict) else enumerate(line):
        if isinstance(value, dict | list):
            yield from scalars(value, f"{title}{name}/")
        else:
            yield f"{title}{name}", value


@cache
def scalar_writer(folder: Path) -> Any:
    """TensorBoard's writer for a folder. A resumed run repeats points, but with the same values."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def write_log(path: Path, line: dict[str, Any]) -> None:
    """Append a line to ``log.jsonl``, and with --tensorboard to the files of that beside it.

    In the first process alone; raises InputError when there is no room.
    """
    if rank() > 0:
        return
    strict = json.loads(json.dumps(line), parse_constant=lambda _: None)  # null for NaN, infinity
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(strict) + "\n")
    except OSError as error:
        reason = f"cannot write {path} ({error.strerror})"
        raise InputError(f"{reason}: make room, then --resume") from error
    if TENSORBOARD.get():
        writer = scalar_writer(path.parent / "tensorboard")
        for name, value in scalars(line):
            writer.add_scalar(name, value, line["step"])
        writer.flush()


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 ``text`` to ``path``, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse numbers that no run can have, by the name of their flag."""
    above_zero = {"steps", "batch_seconds", "crop_seconds", "accumulate", "lr", "clip"}
    above_zero |= {"log_every", "save_every", "student_layers", "hidden", "tau"}
    above_zero |= {"hours", "longest_seconds"}
    below_one = {"dropout", "warmup", "sparsity_warmup", "final_warmup", "sparsity"}
    for name, value in settings.items():
        if isinstance(value, (int, float)):
            flag = "--" + name.replace("_", "-")
            if not 0 <= value < 2**63:
                raise InputError(f"{flag} {value}: the number must not be negative or huge")
            if value == 0 and name in above_zero:
                raise InputError(f"{flag} {value}: the number must be above zero")
            if name in below_one and value >= 1:
                raise InputError(f"{flag} {value}: the number must be below one")
    betas = settings.get("betas", (0, 0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise InputError("--betas: two numbers from 0 to below 1 are needed, as in 0.9,0.98")


def open_run(out: Path | str, settings: dict[str, Any], resume: bool) -> Path:
    """Check that a run with these settings may start, or with ``resume`` go on, in the folder.

    A run is what has a ``config.json``; start_run writes it once data and teacher are there, so
    that a failed start is not in the way of the next one.
    """
    return on_first(_open_run, out, settings, resume)


def _open_run(out: Path | str, settings: dict[str, Any], resume: bool) -> Path:
    check_settings(settings)
    out, settings = Path(out), json.loads(json.dumps(settings))  # as JSON has it: lists, no tuples
    path = out / "config.json"
    found = [name for name in ("last.pt", "student.pt", "log.jsonl") if (out / name).exists()]
    if found and not path.exists():
        raise InputError(f"{out} holds a {found[0]} that is not of a run here: give another --out")
    if path.exists() and not resume:
        raise InputError(f"{out} holds a run already: add --resume to go on, or give another --out")
    if resume and not path.exists():
        raise InputError(f"{out} holds no run to go on with: leave --resume out, or mend --out")
    if resume:
        try:
            before = dict(json.loads(path.read_text()))
        except ValueError as error:
            raise InputError(f"{path} is damaged: start again in a new --out") from error
        # These may differ: they change nothing that is learned, but for roundings and dropout.
        free = ("device", "workers", "accumulate", "compile", "out", "stage", "tolerance")
        changed = [key for key in settings if settings[key] != before.get(key) and key not in free]
        if changed:
            flags = ", ".join("--" + key.replace("_", "-") for key in changed)
            raise InputError(
                f"{out} was started with another {flags}: --resume goes on with the same settings, "
                "a new --out starts afresh"
            )
    else:
        with contextlib.suppress(OSError):  # the scan of a start that failed
            (out / "scan.jsonl").unlink()
    for orphan in out.glob(".*.tmp"):  # of a process that was killed while it wrote
        orphan.unlink()
    return out


def load_last(out: Path) -> dict[str, Any] | None:
    """The checkpoint to go on from; None, said on stderr, if the run stopped before its first."""
    if (out / "last.pt").exists():
        return load_checkpoint(out / "last.pt", strict=True)
    if (out / "student.pt").exists():
        raise InputError(f"{out / 'last.pt'} is gone, so this run cannot go on: give a new --out")
    tqdm.write(f"{out} has no checkpoint yet: starting at update 0", file=sys.stderr)
    return None


@contextlib.contextmanager
def reading(path: Path | str, saved: dict[str, Any] | None = None) -> Iterator[None]:
    """Turn what fails on the contents of a checkpoint into an InputError that names the file.

    With ``saved``, what the file holds, a model that is built inside must not be larger.
    """
    try:
        with contextlib.nullcontext() if saved is None else no_larger(saved["state_dict"]):
            yield
    except OSError:
        raise
    except Exception as error:  # damaged values fail in any way
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged or of another version ({reason})") from error


@contextlib.contextmanager
def no_larger(weights: dict[str, Tensor]) -> Iterator[None]:
    """Stop a model that grows larger than these weights, before it takes the memory for it.

    A small file may ask for a model that fills the machine, or that is never done.
    """
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    left = sum(tensor.untyped_storage().nbytes() for tensor in tensors)  # twice what float16 needs
    names = 4 * len(tensors)  # a weight norm registers its weight thrice

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal left, names
        left, names = left - (0 if parameter is None else parameter.numel()), names - 1
        if left < 0 or names < 0:
            raise ValueError("its settings ask for more weights than it holds")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def save_run(
    out: Path | str,
    student: dict[str, Any],
    step: int,
    lines: int,
    whole: bool = True,
    **parts: Any,
) -> None:
    """Write ``last.pt``, all it takes to go on exactly, and ``student.pt``, what a user takes away.

    ``student`` is the content of the latter, which is not written unless the student is ``whole``;
    ``lines`` are in the log so far; ``parts``: modules and optimizers, or None, under their names.
    """
    states = {name: part.state_dict() if part is not None else None for name, part in parts.items()}
    numbers = {"step": step, "log_lines": lines, "random_state": get_random_state()}
    checkpoint = student | states | numbers
    write_atomically(Path(out) / "last.pt", lambda file: torch.save(checkpoint, file))
    if whole:
        write_atomically(Path(out) / "student.pt", lambda file: torch.save(student, file))


def student_content(method: str, config: Any, student: nn.Module, **more: Any) -> dict[str, Any]:
    """Content of ``student.pt``: plain values and tensors load with ``weights_only=True``."""
    about = {"method": method, "config": asdict(config), "shape": asdict(student.shape), **more}
    return about | {"state_dict": on_cpu(student.state_dict())}


def restore(out: Path, resume: bool, **parts: Any) -> tuple[int, list[dict[str, Any]]]:
    """Updates done and the log's lines up to then; modules and optimizers get their states back.

    ``parts`` are named as in ``last.pt``, where the student is "state_dict"; None is passed over.
    Without a checkpoint, or a wish to ``resume``, nothing happens.
    """
    checkpoint = load_last(out) if resume else None
    if checkpoint is None:
        return 0, []
    with reading(out / "last.pt"):
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(checkpoint[name])
        set_random_state(checkpoint["random_state"])
        lines = (out / "log.jsonl").read_text().splitlines()[: checkpoint["log_lines"]]
        return checkpoint["step"], [json.loads(line) for line in lines]  # later ones are dropped


def start_run(out: Path, settings: dict[str, Any], log: Sequence[dict[str, Any]]) -> None:
    """Write ``config.json`` and the lines of ``log.jsonl`` that stand so far."""
    write_text(out / "config.json", json.dumps(settings, indent=1))
    write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where there is one. Each process takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if processes() > 1 and name.startswith("cuda:"):
        raise InputError(f"--device {name} is one device: with several processes give cuda")
    try:
        if processes() > 1 and name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}): try cpu") from error


def bf16_pays(device: torch.device) -> bool:
    """Whether autocast to bf16 is the default: on GPUs that compute in it (Ampere and later)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that any machine can load, whatever device it comes from."""
    return {name: value.cpu() for name, value in state.items()}


def get_random_state() -> dict[str, Any]:
    """State of torch's random generators, the CPU's and those of all CUDA devices."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what get_random_state gave, as far as the devices are here."""
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def _add_fields(parser: argparse.ArgumentParser, config_type: type) -> None:
    """A flag for each field of a Config, whose help is the comment behind the field."""
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_type), re.M))
    for field in fields(config_type):
        kind, options = type(field.default), {}
        if bool in (kind, *get_args(field.type)):
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is Literal:
            options["choices"] = get_args(field.type)
        elif kind is tuple:
            item = type(field.default[0])
            options["type"] = lambda text, item=item: tuple(map(item, text.split(",")))
            options["type"].__name__ = "comma-separated list"  # for argparse's sentence
            options["metavar"] = "A,B,..."
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        default = ",".join(map(str, field.default)) if kind is tuple else field.default
        note = f"{notes[field.name]} [{default}]".replace("%", "%%")
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(
            flag, dest="." + field.name, default=argparse.SUPPRESS, help=note, **options
        )


def parse_flags(
    config_type: type, toy: dict[str, Any], doc: str, exports: Sequence[str] = ()
) -> tuple[Any, argparse.Namespace]:
    """Command line of a method file: (its Config, the flags that are the same in all five).

    Each field of the Config is a flag whose help is the comment behind the field; --toy replaces
    the defaults named in ``toy``, and what is given by hand counts above both. ``exports`` are the
    libraries that --export knows.
    """
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0],
        usage="python %(prog)s (--toy | --data DIR) [flags], or --help for all of them",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--toy", action="store_true", help="offline: toy world, toy teacher, minutes on a CPU")
    add("--resume", action="store_true", help="go on exactly where the run in --out stopped")
    add("--claim", action="store_true", help="set the method beside its ablations, over 3 seeds")
    add("--seeds", type=int, metavar="N", help="repeat with N seeds: mean ± deviation")
    add("--tensorboard", action="store_true", help="the log for TensorBoard too, where installed")
    add("--deterministic", action="store_true", help="bit-identical runs on CUDA (a CPU's are)")
    add("--describe", action="store_true", help="print the paper-size student as a table")
    add("--evaluate", metavar="STUDENT.PT", help="probe a finished student")
    add("--task", default="", help="with --evaluate, comma separated: " + ", ".join(TASKS))
    add("--task-data", default="", metavar="DIR", help="with --evaluate: where the task's data are")
    if exports:
        add("--export", choices=exports, help="write --out's student.pt for another library")
    _add_fields(parser, config_type)
    args = parser.parse_args()
    if args.seeds is None:
        args.seeds = 3 if args.claim else 1
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        tqdm.write("no files for TensorBoard: pip install tensorboard", file=sys.stderr)
        args.tensorboard = False
    TENSORBOARD.set(args.tensorboard)
    if args.deterministic:  # a warning names what cannot be so; it would be a pity to stop there
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch's manual asks
        torch.use_deterministic_algorithms(True, warn_only=True)
    given = {name[1:]: value for name, value in vars(args).items() if name.startswith(".")}
    config = config_type(**((toy if args.toy else {}) | given))
    check_settings(asdict(config))
    told = args.toy or config.data or args.describe or args.evaluate
    if not (told or vars(args).get("export")):
        parser.exit(2, "say what to distil on: --toy runs offline, --data DIR takes your audio\n")
    return config, args


def resume_command() -> str:
    """What to type to go on with this run."""
    words = [*sys.argv, *(["--resume"] if "--resume" not in sys.argv else [])]
    count = os.environ.get("LOCAL_WORLD_SIZE", processes())
    start = f"torchrun --nproc-per-node {count}" if processes() > 1 else "python"
    return f"{start} {shlex.join(words)}"


def explain(error: Exception) -> str:
    """One sentence on what a user can mend; an error of another kind is raised again."""
    text = " ".join(str(error).split())
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    words = "can't allocate memory", "could not create a primitive"  # of torch and oneDNN on a CPU
    if memory or any(part in text for part in words):
        return (
            "out of memory: --resume with a higher --accumulate, or start again in a new --out "
            "with fewer --batch-seconds"
        )
    if "DataLoader worker" in text or isinstance(error, (EOFError, ConnectionError)):
        reason = text.split(". ")[0] or type(error).__name__
        return (
            f"a process that loads audio has ended ({reason}): --resume goes on from the last "
            "checkpoint, with fewer --workers if memory was short"
        )
    if isinstance(error, (InputError, OSError, soundfile.SoundFileError)):
        return str(error)
    raise error


def run(main: Callable[[], None]) -> None:
    """Call ``main``; a user's mistake ends in one sentence on stderr and exit code 1.

    Of several processes the first one speaks, and another one only of what the first cannot know.
    """
    name, first = Path(sys.argv[0]).name, True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and int(os.environ.get("RANK", 0)) > 0:
        first = False
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, to the end of the process
    try:
        main()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt as stop:
        print(f"{name}: {stop or 'stopped'}; to go on: {resume_command()}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not first and not isinstance(error, ElsewhereError):
            sys.stderr = sys.__stderr__
        sys.exit(f"{name}: {explain(error)}")


# ------------------------------------------------------------------------------------------------
# 2. Audio
# ------------------------------------------------------------------------------------------------

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
SILENCE = 1e-4  # peak amplitude below which a file is called silent (-80 dBFS)


@dataclass(frozen=True)
class Utterance:
    """One usable audio file. Labels are empty strings where a plain folder gives none.

    ``samples`` counts 16 kHz samples. ``split`` is train / dev / test with disjoint speakers;
    ``sid_split`` a second one for speaker identification, the same speakers in all three parts.
    ``phones`` and ``text`` are space separated; ``alignment`` is ``phone:end`` pairs in samples.
    ``start`` is the first sample of a piece of ``samples``, and -1 for a whole file.
    """

    path: str
    samples: int
    dataset: str = ""
    speaker: str = ""
    split: str = ""
    sid_split: str = ""
    label: str = ""
    label_kind: str = ""
    text: str = ""
    phones: str = ""
    alignment: str = ""
    start: int = -1


def frame_count(samples: Any) -> Any:
    """Frames T of S samples (int or tensor): floor((S - k) / s) + 1 through the seven conv layers.

    For HuBERT's kernels and strides the seven floors collapse into floor((S - 400) / 320) + 1.
    """
    return (samples - FIELD) // HOP + 1


def _ratio_to_16k(rate: int) -> Fraction:
    # An odd rate (44,099 Hz) would need a resampling kernel of gigabytes; the nearest simple ratio
    # is off by less than a thousandth.
    if not 1_000 <= rate <= 768_000:
        raise InputError(f"a sample rate of {rate} Hz is not speech: expected 1 kHz to 768 kHz")
    return Fraction(SAMPLE_RATE, rate).limit_denominator(1_000)


def load_audio(path: Path | str, start: int = 0, samples: int | None = None) -> Tensor:
    """Read a file as 16 kHz mono float32, shape (S,); any sample rate, any number of channels.

    ``start`` and ``samples`` cut a piece, counted in 16 kHz samples; only that piece is decoded.
    Raises InputError, naming the file, when it cannot be read or holds less than was asked for.
    """
    try:
        with soundfile.SoundFile(str(path)) as file:
            ratio = _ratio_to_16k(file.samplerate)
            file.seek(int(start / ratio))
            wanted = -1 if samples is None else math.ceil(samples / ratio) + 1
            channels = torch.from_numpy(file.read(wanted, dtype="float32", always_2d=True))
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:  # a wrong header
        raise InputError(
            f"cannot read {path} ({error}): remove or replace it; a training goes on with --resume "
            "once it is back"
        ) from error
    wave = channels.mean(dim=1)
    if ratio != 1 and len(wave):
        wave = torchaudio.functional.resample(wave, ratio.denominator, ratio.numerator)
    if samples is not None and len(wave) < samples:
        raise InputError(
            f"{path} is shorter than when it was scanned: a training goes on with --resume once it "
            "is back as it was, or starts again in a new --out"
        )
    return wave[:samples]


def _examine(path: str) -> tuple[int, str]:
    """Decode a whole file; returns (16 kHz samples, what is wrong with it or "")."""
    if os.path.exists(path) and not os.path.isfile(path):  # one would wait for ever on a pipe
        return 0, "unreadable"
    try:
        with soundfile.SoundFile(path) as file:
            ratio, frames, peak = _ratio_to_16k(file.samplerate), 0, 0.0
            size = max(1, (1 << 20) // file.channels)  # 4 MiB, whatever the header says
            while len(block := file.read(size, dtype="float32")):
                frames += len(block)
                peak = np.maximum(peak, np.abs(block).max(initial=0.0))  # keeps a NaN
    except FileNotFoundError:
        return 0, "missing"
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError):  # a wrong header
        return 0, "unreadable" if os.path.exists(path) else "missing"
    samples = math.ceil(frames * ratio)  # as the resampler rounds
    if frames == 0:
        return 0, "empty"
    if not np.isfinite(peak):
        return samples, "NaN"
    if samples < FIELD:
        return samples, "too short"
    return samples, "silent" if peak < SILENCE else ""


def _read_manifest(manifest: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated manifest; paths become absolute, unknown columns are dropped."""
    known = {field.name for field in fields(Utterance)} - {"samples", "start"}
    try:
        with open(manifest, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{manifest} is not a tab-separated UTF-8 table ({error})") from error
    if not rows or not rows[0].get("path"):
        raise InputError(
            f"{manifest} needs a tab-separated header line with a column 'path' and a line per file"
        )
    entries = []
    for number, row in enumerate(rows, start=2):
        if not row.get("path"):
            raise InputError(f"{manifest}, line {number}: the column 'path' is empty")
        entry = {name: value or "" for name, value in row.items() if name in known}
        entries.append(entry | {"path": str(manifest.parent / row["path"])})
    return entries


def _read_transcripts(files: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """LibriSpeech's ``*.trans.txt``: path of an audio file without its ending -> text, speaker.

    A line is the name of a file beside it and its words; the name begins with the speaker's.
    """
    known = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text ({error})") from error
        for name, _, text in (line.strip().partition(" ") for line in lines if line.strip()):
            known[file.parent / name] = {"text": text.strip(), "speaker": name.split("-")[0]}
    return known


def _find_audio(data: Path) -> list[dict[str, str]]:
    if not data.exists():
        raise InputError(f"{data} does not exist: --data takes a folder of audio or a manifest.tsv")
    if data.is_file():
        return _read_manifest(data)
    if (data / "manifest.tsv").exists():  # its splits keep test speakers out of training
        return _read_manifest(data / "manifest.tsv")
    files = sorted(path for path in data.rglob("*") if path.is_file())
    known = _read_transcripts([path for path in files if path.name.endswith(".trans.txt")])
    entries = [
        {"path": str(path)} | known.get(path.with_suffix(""), {})
        for path in files
        if path.suffix.lower() in AUDIO_SUFFIXES
    ]
    if not entries:
        others = Counter(path.suffix or "no ending" for path in files).most_common(3)
        found = ", ".join(f"{count} x {suffix}" for suffix, count in others) or "it is empty"
        raise InputError(f"{data} holds no {' / '.join(AUDIO_SUFFIXES)} file ({found})")
    return entries


def scan(data: Path | str, cache: Path | str, workers: int = 4) -> list[Utterance]:
    """Decode every file of a folder or manifest once; list what is usable, by way of ``cache``.

    A folder that holds a ``manifest.tsv`` is read through it; otherwise LibriSpeech's
    ``*.trans.txt`` beside the audio give text and speaker, where they are there. Unreadable,
    empty, too short (< 400 samples), silent and NaN files are left out, counted and named in one
    line on stderr.
    A second call with the same ``cache`` only reads that file. Raises InputError when nothing is
    usable, saying what was found.
    """
    on_first(_scan, Path(data), Path(cache), workers)
    kinds = [{"str": str, "int": int}[field.type] for field in fields(Utterance)]
    with reading(cache):
        lines = Path(cache).read_text(encoding="utf-8").splitlines()
        utterances = [Utterance(**json.loads(line)) for line in lines]
        if any([type(value) for value in vars(u).values()] != kinds for u in utterances):
            raise ValueError("a value of another type")
    return utterances


def _scan(data: Path, cache: Path, workers: int) -> None:
    if cache.exists():
        return
    entries = _find_audio(data)
    paths = [entry["path"] for entry in entries]
    with ThreadPoolExecutor(max(workers, 1)) as pool:  # libsndfile decodes outside Python's lock
        results = pool.map(_examine, paths)
        results = list(tqdm(results, "scan", len(paths), unit="file", leave=False))
    usable, bad = [], []
    for entry, (samples, problem) in zip(entries, results, strict=True):
        if problem:
            bad.append((entry["path"], problem))
        else:
            usable.append(Utterance(samples=samples, **entry))
    counts = ", ".join(f"{n} {problem}" for problem, n in Counter(p for _, p in bad).items())
    if not usable:
        raise InputError(f"{data} has no usable audio: {len(paths)} files looked at, {counts}")
    minutes = sum(utterance.samples for utterance in usable) / SAMPLE_RATE / 60
    line = f"scan: {len(usable)} files, {minutes:.1f} min"
    if bad:
        names = ", ".join(f"{path} ({problem})" for path, problem in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        line += f"; skipped {len(bad)} ({counts}): {names}{more}"
    tqdm.write(line, file=sys.stderr)
    write_text(cache, "".join(json.dumps(asdict(utterance)) + "\n" for utterance in usable))


def train_and_heldout(utterances: Sequence[Utterance]) -> tuple[list[Utterance], list[Utterance]]:
    """Utterances to distil on, and at most ten minutes of others to watch the loss on.

    A manifest's ``split`` decides: train, dev, and test is never touched. (``sid_split`` is
    another matter: its test recordings may be heard here, but never with their label.) Where no
    row is called dev, every hundredth training file, at least one, is held out.
    """
    train = [utterance for utterance in utterances if utterance.split in ("train", "")]
    heldout = [utterance for utterance in utterances if utterance.split == "dev"]
    if len(train) < 2:
        splits = Counter(utterance.split or "none" for utterance in utterances)
        found = ", ".join(f"{count} x {split}" for split, count in splits.items()) or "none"
        raise InputError(f"at least 2 files of split train are needed; the splits are {found}")
    pool = heldout or train
    order = np.random.default_rng(0).permutation(len(pool))
    if not heldout:
        order = order[: max(1, len(train) // 100)]
    passed = np.cumsum([pool[i].samples for i in order])
    out = set(order[: 1 + int(np.searchsorted(passed, 600 * SAMPLE_RATE))].tolist())
    if not heldout:
        train = [utterance for i, utterance in enumerate(pool) if i not in out]
    return train, [utterance for i, utterance in enumerate(pool) if i in out]


def read_labels(path: str, utterances: Sequence[Utterance], clusters: int) -> list[Tensor]:
    """k-means labels (T,) of each utterance from a fairseq .km file and the .tsv beside it.

    Line n of the .km file belongs to the file named in line n of the .tsv, counted after its first
    line, which is the folder.
    """
    km, tsv = Path(path), Path(path).with_suffix(".tsv")
    for file in (km, tsv):
        if not file.is_file():
            raise InputError(f"{file} does not exist: --labels takes a .km with its .tsv beside it")
    lines = km.read_text(errors="replace").splitlines()
    root, *names = tsv.read_text(errors="replace").splitlines() or [""]
    if len(lines) != len(names):
        raise InputError(f"{km} has {len(lines)} lines, but {tsv} names {len(names)} files")
    where = {os.path.realpath(Path(root, n.split("\t")[0])): i for i, n in enumerate(names)}
    labels = []
    for utterance in utterances:
        i = where.get(os.path.realpath(utterance.path))
        if i is None:
            raise InputError(f"{tsv} does not name {utterance.path}, so it has no labels")
        row, frames = lines[i].split(), frame_count(utterance.samples)
        if len(row) != frames:
            problem = f"{len(row)} labels, but {utterance.path} has {frames} frames"
        elif wrong := [k for k in row if not (k.isdecimal() and int(k) < clusters)]:
            problem = f"label {wrong[0]}, but the teacher's clusters are 0 to {clusters - 1}"
        else:
            labels.append(torch.tensor([int(k) for k in row]))
            continue
        raise InputError(f"{km}, line {i + 1}: {problem}")
    return labels


def choose_hours(utterances: Sequence[Utterance], hours: float, seed: int) -> list[Utterance]:
    """Whole speakers in an order that follows from the seed, until the hours are full.

    An utterance without a speaker counts as a speaker of its own.
    """
    by_speaker: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        by_speaker.setdefault(utterance.speaker or utterance.path, []).append(utterance)
    speakers, chosen, samples = sorted(by_speaker), [], 0
    for i in np.random.default_rng(seed).permutation(len(speakers)):
        if samples < hours * 3600 * SAMPLE_RATE:
            chosen += by_speaker[speakers[i]]
            samples += sum(utterance.samples for utterance in by_speaker[speakers[i]])
    return chosen


def heldout_batches(
    heldout: Sequence[Utterance],
    batch_seconds: float,
    crop_seconds: float,
    accumulate: int = 1,
    labels: Sequence[Tensor] | None = None,
) -> Iterator[Any]:
    """Equal-length crops (B, S) of held-out utterances, the same ones at each pass.

    Batches come in ``accumulate`` parts; with ``labels`` each is (waves, labels of their frames).
    """
    epoch = dict(seed=0, first=0, last=None, workers=0)
    for batch in load_batches(heldout, batch_seconds, crop_seconds, labels=labels, **epoch):
        if labels:
            yield from zip(*(column.chunk(accumulate) for column in batch), strict=True)
        else:
            yield from batch.chunk(accumulate)


def crop_lengths(longest: int, shortest: int) -> list[int]:
    """The few lengths (samples) of batches: ``longest`` and steps of 0.8 down to ``shortest``.

    Each is 320 n + 80 samples, which gives exactly n frames and leaves none over.
    """
    lengths, length = [], float(longest)
    while True:
        frames = max(1, frame_count(int(length)))
        lengths.append(HOP * frames + FIELD - HOP)
        if lengths[-1] <= shortest or frames == 1:
            return sorted(set(lengths), reverse=True)
        length *= 0.8


def make_batches(
    samples: Sequence[int], batch_samples: int, longest: int, seed: int, epoch: int
) -> list[list[tuple[int, int, int]]]:
    """The batches of one epoch, each a list of crops (utterance number, start, samples).

    An utterance goes to the largest crop length that it fills and is cropped there at random, so
    a batch has no padding. A batch holds ``batch_samples`` of audio. What is left over in a bucket
    joins the next shorter one if that makes a full batch, and else is a smaller batch of its own.
    Every utterance occurs once. The result depends on (seed, epoch) alone, and the number of
    batches not even on these: resuming and several processes need no bookkeeping.
    """
    rng = np.random.default_rng((seed, epoch))
    lengths = crop_lengths(longest, min(samples))
    buckets: dict[int, list[int]] = {length: [] for length in lengths}
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


class Crops(torch.utils.data.Dataset):
    """Crops of utterances as a map-style data set: (number, start, samples) -> wave (S,).

    With ``labels``, one (T,) per utterance: -> wave (S,) and its labels. The crop then starts at
    the frame before ``start``, so that its frames are those of the whole utterance.
    """

    def __init__(self, utterances: Sequence[Utterance], labels: Sequence[Tensor] | None) -> None:
        self.paths, self.labels = [utterance.path for utterance in utterances], labels

    def __getitem__(self, crop: tuple[int, int, int]) -> Tensor | tuple[Tensor, Tensor]:
        number, start, samples = crop
        if self.labels is None:
            return load_audio(self.paths[number], start, samples)
        first = start // HOP
        wave = load_audio(self.paths[number], HOP * first, samples)
        return wave, self.labels[number][first : first + frame_count(samples)]


class BatchOrder(torch.utils.data.Sampler):
    """Batches ``first`` to ``last`` - 1 of an endless sequence of epochs.

    ``make(epoch)`` gives an epoch's batches, as many in each. Several processes cut each batch into
    as many runs of utterances, and this one gets its own; ``shares`` says how much of the batch it
    is. Where there are fewer utterances than processes, some get one of another with a share of 0.
    """

    def __init__(self, make: Callable[[int], list], first: int, last: int) -> None:
        self.make, self.first, self.last = make, first, last
        self.cuts, self.shares = (rank(), rank() + 1, processes()), deque[float]()

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list]:
        per_epoch, number = len(self.make(0)), self.first
        while number < self.last:
            epoch, start = divmod(number, per_epoch)
            batches = self.make(epoch)[start : start + self.last - number]
            number += len(batches)
            for batch in batches:
                begin, end = (-(-len(batch) * cut // self.cuts[2]) for cut in self.cuts[:2])
                self.shares.append((end - begin) / len(batch))
                yield batch[begin:end] or batch[:1]


def ignore_signals(_: int) -> None:
    """For a process that loads audio: Ctrl-C and SIGTERM often go to all, but the first decides.

    Python ends such processes by SIGTERM, too, when it exits: so this one obeys, 5 seconds later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


def load_batches(
    utterances: Sequence[Utterance],
    batch_seconds: float,
    crop_seconds: float,
    seed: int,
    first: int,
    last: int | None,
    workers: int,
    labels: Sequence[Tensor] | None = None,
) -> torch.utils.data.DataLoader:
    """A loader of waves (B, S) for the updates ``first`` to ``last`` - 1 (None: one epoch).

    The number of an update fixes its batch, whatever was loaded before. With ``labels``, one
    (T,) per utterance, it gives (waves, labels of their frames (B, T)).
    """
    samples = [utterance.samples for utterance in utterances]
    batch_samples = int(batch_seconds * SAMPLE_RATE)
    longest = min(int(crop_seconds * SAMPLE_RATE), batch_samples)
    if longest < FIELD:
        raise InputError("--batch-seconds and --crop-seconds must be at least 0.025 (one frame)")
    make = partial(make_batches, samples, batch_samples, longest, seed)
    return torch.utils.data.DataLoader(
        Crops(utterances, labels),
        batch_sampler=BatchOrder(make, first, len(make(0)) if last is None else last),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator the loader would draw from the global one, and a resumed run
        # would see other dropout masks than one never interrupted.
        generator=torch.Generator().manual_seed(seed),
    )


def make_whole_batches(
    samples: Sequence[int], batch_samples: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch of whole utterances, for what cannot be cropped: their numbers.

    Lengths within a tenth of each other count as one length, and are mixed anew at each epoch;
    a batch holds neighbours in length, ``batch_samples`` of audio with its padding at most, and
    at least one utterance. Every utterance occurs once. The result depends on (seed, epoch)
    alone, and the number of batches not even on these.
    """
    rng, longest = np.random.default_rng((seed, epoch)), max(samples)
    step = [int(math.log(longest / n) / math.log(1 / 0.9)) for n in samples]  # 0: the longest
    batches: list[list[int]] = []
    size = 0
    for i in sorted(rng.permutation(len(samples)).tolist(), key=lambda i: step[i]):
        if not batches or len(batches[-1]) >= size:
            batches.append([])
            size = max(1, int(batch_samples / (longest * 0.9 ** step[i])))
        batches[-1].append(i)
    return [batches[i] for i in rng.permutation(len(batches))]


class WholeUtterances(torch.utils.data.Dataset):
    """Utterances as a map-style data set: number -> (number, wave (S,))."""

    def __init__(self, utterances: Sequence[Utterance]) -> None:
        self.paths = [utterance.path for utterance in utterances]

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        return number, load_audio(self.paths[number])


def pad_waves(rows: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (B,), waves padded with zeros at their right (B, S), and valid samples (B,)."""
    numbers, waves = zip(*rows, strict=True)
    lengths = torch.tensor([len(wave) for wave in waves])
    return torch.tensor(numbers), nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths


def load_whole_batches(
    utterances: Sequence[Utterance],
    batch_seconds: float,
    seed: int,
    first: int,
    last: int | None,
    workers: int,
) -> torch.utils.data.DataLoader:
    """A loader of whole utterances for the updates ``first`` to ``last`` - 1 (None: one epoch).

    It gives (numbers (B,), waves (B, S), lengths (B,)). The number of an update fixes its batch.
    """
    samples = [utterance.samples for utterance in utterances]
    if batch_seconds * SAMPLE_RATE < FIELD:
        raise InputError("--batch-seconds must be at least 0.025 (one frame)")
    make = partial(make_whole_batches, samples, int(batch_seconds * SAMPLE_RATE), seed)
    return torch.utils.data.DataLoader(
        WholeUtterances(utterances),
        batch_sampler=BatchOrder(make, first, len(make(0)) if last is None else last),
        collate_fn=pad_waves,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # as in load_batches
    )


class Updates:
    """The batches of a training loop, and what may happen between two of them.

    A bar. Ctrl-C or SIGTERM: ``stopping`` is True in the update that is the last one, which is to
    be saved, and the loop ends behind it with KeyboardInterrupt. Gradients and terms that several
    processes add up. Gradients that are not finite. ``step`` is the number of updates already done
    of ``last``, of which the bar shows those from ``first`` on.
    """

    def __init__(
        self, batches: torch.utils.data.DataLoader, title: str, step: int, last: int, first: int = 0
    ) -> None:
        self.batches, self.step = batches, step
        self.asked = self.stopping = False
        self.share = 1.0  # of the batch that this process has
        self.heard, self.since = 0, time.perf_counter()  # samples since the bar said how many
        self.skips: Tensor | int = 0
        self.skips_before = 0
        count = dict(total=last - first, initial=step - first, unit="step")
        self.bar = tqdm(None, title, **count, disable=rank() > 0)

    def __iter__(self) -> Iterator[Any]:
        seed, handlers = self.batches.generator.initial_seed(), {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, self._ask) or signal.SIG_DFL
        batches = None
        try:
            batches = iter(self.batches)
            for batch in batches:
                self.step += 1
                self.share = self.batches.batch_sampler.shares.popleft()
                if rank() > 0:  # dropout of its own, and the same one when resumed
                    draw = np.random.SeedSequence((seed, self.step, rank()))
                    torch.manual_seed(int(draw.generate_state(1)[0]))
                yield batch
                self.bar.update()
                # A signal may come late in the last update, which is saved in any case.
                if self.stopping or (self.asked and self.step == self.batches.batch_sampler.last):
                    raise KeyboardInterrupt(f"stopped and saved after update {self.step}")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.bar.close()
            if hasattr(batches, "_shutdown_workers"):  # after an error torch waits 5 s for each
                batches._shutdown_workers()

    def _ask(self, number: int, _: Any) -> None:
        if self.asked and number == signal.SIGINT and processes() == 1:
            raise KeyboardInterrupt("stopped at once")
        if not self.asked and rank() == 0:  # print may be in the middle of a line here
            again = b"; once more stops at once" if processes() == 1 else b""
            os.write(2, b"\nstopping after this update" + again + b"\n")
        self.asked = True

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Turn the gradients of this process into those of the whole batch, equal in all processes.

        Each counts as it has utterances. A gradient that only some processes have is zero in the
        others. And all agree here whether to stop after this update.
        """
        self.stopping = self.asked
        if processes() == 1:
            return
        flags = [self.asked, *(p.grad is not None for p in parameters)]
        votes = torch.tensor(flags, dtype=torch.uint8)  # on the CPU: no device waits for it
        with together():
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        self.stopping, *used = votes.bool().tolist()
        learning = [p for p, is_used in zip(parameters, used, strict=True) if is_used]
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in learning]
        for p, gradient in zip(learning, self._add_up(gradients), strict=True):
            p.grad = gradient

    def whole(self, terms: dict[str, Any]) -> dict[str, Any]:
        """Terms of the loss, tensors or numbers, of the whole batch and not of this process."""
        if processes() == 1:
            return terms
        device = next(term.device for term in terms.values() if isinstance(term, Tensor))
        tensors = [torch.as_tensor(term, device=device).float() for term in terms.values()]
        return dict(zip(terms, self._add_up(tensors), strict=True))

    def _add_up(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        flat = flat.mul_(self.share) if self.share else flat.zero_()
        with together():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def not_finite(self, norm: Tensor) -> Tensor:
        """1.0 where the gradient has a NaN or inf, else 0.0, on its device: nothing waits for it.

        As ``optimizer.found_inf`` it makes a fused optimizer leave weights and moments as they are.
        """
        found = (~torch.isfinite(norm)).float()
        self.skips = self.skips + found
        return found

    def skipped(self) -> dict[str, int]:
        """{"skipped": updates without effect since the last call}, {} where there was none.

        Raises InputError when it is not the only one, the stretch before included.
        """
        skips, self.skips = int(self.skips), 0
        if skips + self.skips_before > 1:
            raise InputError(
                f"loss or gradient is not finite at update {self.step} or shortly before, and not "
                "for the first time: start again in a new --out with a lower --lr; the last "
                "checkpoint is untouched"
            )
        self.skips_before = skips
        return {"skipped": skips} if skips else {}

    def show(self, **values: str) -> None:
        """Put values behind the bar, with the seconds of audio per second since the last call."""
        now = time.perf_counter()
        speed = processes() * self.heard / SAMPLE_RATE / (now - self.since)
        self.heard, self.since = 0, now
        self.bar.set_postfix(values | {"audio": f"{speed:.0f} s/s"})


# ------------------------------------------------------------------------------------------------
# 3. Toy world
# ------------------------------------------------------------------------------------------------

# The scripts need speech, labels and a pre-trained HuBERT. This section makes a small version of
# all three, so that everything runs offline in minutes and every label is exact.
# F synthesis steps of 8 ms, T teacher frames of 20 ms, K units.

TOY_SEED = 0
TOY_STEP = 128  # samples between two states of the voice: 8 ms
TOY_SECONDS = (1.3, 3.0)  # shortest and longest utterance
TOY_SPEAKERS = {"train": range(0, 44), "dev": range(44, 50), "test": range(50, 60)}
TOY_RECORDINGS = {"train": 8, "dev": 7, "test": 20}  # per speaker: about 12, 1.5 and 7 minutes

# A phone is a length and one or two targets that the voice moves through: two for what changes
# within the phone (a diphthong glides, a stop is closed and then bursts). A target is
#   f1 f2 f3      resonances (formants) of an average voice in Hz
#   voice breath  how loud the vocal folds and the breath sound through these resonances
#   hiss hz       how loud the noise of a narrow place sounds, and the frequency of its peak
# 0 Hz means that the phone has no say in this, so that its neighbours decide.
# fmt: off
TOY_PHONES = {  # phone: (milliseconds, target, ...)
    "SIL": (200, (0, 0, 0, 0, 0, 0, 4000)),
    "IY": (105, (280, 2250, 2950, 1.4, 0, 0, 0)),
    "IH": (80, (400, 1950, 2550, 1.2, 0, 0, 0)),
    "EH": (95, (550, 1800, 2500, 1., 0, 0, 0)),
    "AE": (125, (690, 1680, 2450, 1., 0, 0, 0)),
    "AA": (125, (740, 1120, 2450, 1., 0, 0, 0)),
    "AO": (125, (570, 860, 2450, 1., 0, 0, 0)),
    "AH": (75, (600, 1230, 2400, .9, 0, 0, 0)),
    "UW": (105, (310, 930, 2250, 1.4, 0, 0, 0)),
    "ER": (115, (480, 1340, 1690, 1.2, 0, 0, 0)),
    "EY": (135, (500, 1850, 2500, 1., 0, 0, 0), (320, 2200, 2800, .8, 0, 0, 0)),
    "AY": (150, (740, 1180, 2450, 1., 0, 0, 0), (380, 2050, 2600, .8, 0, 0, 0)),
    "OW": (135, (540, 1000, 2400, 1., 0, 0, 0), (350, 780, 2300, .8, 0, 0, 0)),
    "AW": (150, (740, 1300, 2450, 1., 0, 0, 0), (400, 850, 2350, .8, 0, 0, 0)),
    "M": (75, (250, 1000, 2200, .6, 0, 0, 0)),
    "N": (70, (250, 1600, 2600, .6, 0, 0, 0)),
    "NG": (80, (250, 2150, 2600, .6, 0, 0, 0)),
    "L": (70, (350, 1050, 2750, .5, 0, 0, 0)),
    "R": (75, (340, 1150, 1560, .5, 0, 0, 0)),
    "W": (70, (300, 680, 2250, .5, 0, 0, 0)),
    "Y": (65, (270, 2300, 3050, .5, 0, 0, 0)),
    "HH": (70, (0, 0, 0, .05, .25, 0, 0)),
    "F": (100, (350, 1050, 2300, 0, 0, .12, 5500)),
    "V": (65, (350, 1050, 2300, .3, 0, .06, 5500)),
    "DH": (55, (350, 1450, 2550, .35, 0, .05, 6500)),
    "S": (110, (350, 1750, 2600, 0, 0, .7, 6200)),
    "Z": (80, (350, 1750, 2600, .25, 0, .4, 6200)),
    "SH": (110, (350, 1900, 2500, 0, .05, .8, 3100)),
    "P": (95, (320, 900, 2200, 0, 0, 0, 1200), (350, 950, 2250, 0, .12, .15, 1200)),
    "T": (95, (320, 1800, 2650, 0, 0, 0, 4500), (350, 1800, 2650, 0, .12, .4, 4500)),
    "K": (100, (320, 1900, 2350, 0, 0, 0, 2100), (350, 1900, 2350, 0, .12, .4, 2100)),
    "B": (75, (250, 900, 2200, .12, 0, 0, 1000), (320, 950, 2250, .4, 0, .1, 1000)),
    "D": (70, (250, 1750, 2650, .12, 0, 0, 0), (320, 1750, 2650, .4, 0, .2, 4000)),
    "G": (75, (250, 1950, 2350, .12, 0, 0, 1900), (320, 1950, 2350, .4, 0, .2, 1900)),
    "CH": (120, (320, 1800, 2600, 0, 0, 0, 3300), (350, 1900, 2500, 0, .05, .7, 3300)),
}

# No number words, so that spoken digits stay words that nobody in this world has ever heard.
TOY_LEXICON = {
    "A": "AH", "ACTIVATE": "AE K T IH V EY T", "ALL": "AO L", "BEDROOM": "B EH D R UW M",
    "CHILL": "CH IH L", "CLOSE": "K L OW Z", "COMPUTER": "K AH M P Y UW T ER", "COOL": "K UW L",
    "DARK": "D AA R K", "DOOR": "D AO R", "DOWN": "D AW N", "DROP": "D R AA P", "END": "EH N D",
    "FRONT": "F R AH N T", "GATE": "G EY T", "GIVE": "G IH V", "HALL": "HH AO L",
    "HALT": "HH AO L T", "HEAT": "HH IY T", "HEATING": "HH IY T IH NG", "HEY": "HH EY",
    "HOUSE": "HH AW S", "IN": "IH N", "IT": "IH T", "KILL": "K IH L", "KITCHEN": "K IH CH AH N",
    "LAMP": "L AE M P", "LIGHT": "L AY T", "LIGHTS": "L AY T S", "LOCK": "L AA K",
    "LOWER": "L OW ER", "MAKE": "M EY K", "ME": "M IY", "MUSIC": "M Y UW Z IH K", "MY": "M AY",
    "NOW": "N AW", "OFF": "AO F", "OKAY": "OW K EY", "ON": "AA N", "OPEN": "OW P AH N",
    "PAUSE": "P AO Z", "PLAY": "P L EY", "PLEASE": "P L IY Z", "RADIO": "R EY D IY OW",
    "RAISE": "R EY Z", "ROBOT": "R OW B AA T", "ROOM": "R UW M", "SHUT": "SH AH T",
    "SOME": "S AH M", "SONG": "S AO NG", "START": "S T AA R T", "STOP": "S T AA P",
    "SWITCH": "S W IH CH", "THE": "DH AH", "THIS": "DH IH S", "TUNE": "T UW N", "TURN": "T ER N",
    "UNLOCK": "AH N L AA K", "UP": "AH P", "VERY": "V EH R IY", "WARM": "W AO R M", "YOU": "Y UW",
}

# A pattern is a row of slots, a slot a choice of words ("_" joins words, "-" is nothing). Several
# words mean the same, which only someone who knows the language, not the sound, can tell.
_PLACE = "-|-|-|-|-|-|IN_THE_KITCHEN|IN_MY_ROOM|IN_THE_HALL|IN_THE_BEDROOM"
TOY_INTENTS = {
    "light_on": (f"TURN_ON|SWITCH_ON|ACTIVATE|START THE|MY|ALL_THE LIGHT|LIGHTS|LAMP {_PLACE}",),
    "light_off": (f"TURN_OFF|SWITCH_OFF|KILL|SHUT_OFF THE|MY|ALL_THE LIGHT|LIGHTS|LAMP {_PLACE}",
                  f"MAKE IT|THE_ROOM -|ALL|VERY DARK {_PLACE}"),
    "music_on": (f"PLAY|START|GIVE_ME|SWITCH_ON SOME|THE|A|MY MUSIC|SONG|TUNE|RADIO {_PLACE}",),
    "music_off": (f"STOP|PAUSE|HALT|END|SWITCH_OFF THE|THIS MUSIC|SONG|TUNE|RADIO {_PLACE}",),
    "heat_up": ("HEAT_UP|WARM_UP|WARM THE|MY ROOM|KITCHEN|BEDROOM|HOUSE|HALL",
                f"TURN_UP|RAISE THE HEAT|HEATING {_PLACE}",
                f"MAKE IT -|VERY WARM {_PLACE}"),
    "heat_down": ("COOL_DOWN|COOL|CHILL THE|MY ROOM|KITCHEN|BEDROOM|HOUSE|HALL",
                  f"TURN_DOWN|LOWER|DROP THE HEAT|HEATING {_PLACE}",
                  f"MAKE IT -|VERY COOL {_PLACE}"),
    "door_open": ("OPEN|OPEN_UP|UNLOCK THE|MY|THIS -|KITCHEN|BEDROOM|FRONT DOOR|GATE",),
    "door_close": ("CLOSE|SHUT|LOCK|LOCK_UP THE|MY|THIS -|KITCHEN|BEDROOM|FRONT DOOR|GATE",),
}
TOY_BEFORE = "-|-|-|-|-|-|PLEASE|HEY_ROBOT|OKAY_COMPUTER|HEY|YOU|NOW|ROBOT|COMPUTER"
TOY_AFTER = "-|-|-|-|-|-|PLEASE|NOW|OKAY|ROBOT|COMPUTER"


# fmt: on


class ToyUtterance(NamedTuple):
    """One recording with everything that is true about it."""

    wave: np.ndarray  # (S,) float32 in -1..1, 16 kHz
    alignment: list[tuple[str, int]]  # (phone, its end in samples); contiguous from 0, with SIL
    words: list[str]
    phones: list[str]  # without SIL
    intent: str


def toy_sentence(rng: np.random.Generator) -> tuple[list[str], str]:
    """Draw the words of one command, and its intent."""
    intent = rng.choice(list(TOY_INTENTS))
    pattern = rng.choice(TOY_INTENTS[intent])
    slots = [TOY_BEFORE, *pattern.split(), TOY_AFTER]
    words = "_".join(rng.choice(slot.split("|")) for slot in slots)
    return [word for word in words.split("_") if word != "-"], str(intent)


def toy_voice(speaker: int) -> dict[str, float]:
    """What stays the same in all recordings of a speaker. Even numbers speak low, odd ones high."""
    rng = np.random.default_rng([TOY_SEED, 1, speaker])
    high = speaker % 2
    return {
        "pitch": rng.uniform(165, 245) if high else rng.uniform(85, 145),  # Hz
        "melody": rng.uniform(0.05, 0.25),  # how far the pitch moves from its mean
        "tract": rng.uniform(1.02, 1.25) if high else rng.uniform(0.88, 1.08),  # on all formants
        "width": rng.uniform(0.8, 1.6),  # factor on the widths of the formants
        "tilt": rng.uniform(0.55, 0.95),  # low-pass of the vocal folds: higher = duller
        "breath": rng.uniform(0.0, 0.12),  # breath that accompanies the voice
        "hiss": rng.uniform(0.85, 1.15),  # factor on the peak of the hiss
        "tempo": rng.uniform(0.75, 1.1),  # factor on all lengths
    }


def toy_alignment(
    words: list[str], tempo: float, rng: np.random.Generator
) -> list[tuple[str, int]]:
    """Give each phone its end in samples, with silence at both ends and at times between words."""
    phones, lengths = ["SIL"], [rng.uniform(0.1, 0.35)]
    for number, word in enumerate(words):
        if number and rng.random() < 0.15:
            phones, lengths = [*phones, "SIL"], [*lengths, rng.uniform(0.04, 0.2)]
        for phone in TOY_LEXICON[word].split():
            phones.append(phone)
            lengths.append(TOY_PHONES[phone][0] / 1000 * tempo * rng.lognormal(0, 0.2))
    phones, lengths = [*phones, "SIL"], [*lengths, rng.uniform(0.1, 0.35)]
    # Tenths of a second: convolutions on a CPU cost extra for each length they have not met before.
    seconds = np.clip(sum(lengths), *TOY_SECONDS).round(1)
    ends = np.cumsum(lengths) * seconds / sum(lengths)
    return [(phone, round(end * SAMPLE_RATE)) for phone, end in zip(phones, ends, strict=True)]


def toy_tracks(alignment: list[tuple[str, int]], rng: np.random.Generator) -> np.ndarray:
    """Let the targets of the phones become curves over time: (F, 7), columns as in TOY_PHONES.

    The voice holds each target in the middle of its time and moves to the next on a straight line,
    which is what makes a sound depend on its neighbours. Loudness changes faster than places do.
    """
    times, targets, start = [], [], 0
    for phone, end in alignment:
        phone_targets = TOY_PHONES[phone][1:]
        edges = np.linspace(start, end, len(phone_targets) + 1) / TOY_STEP
        times += itertools.pairwise(edges)
        targets += phone_targets
        start = end
    left, right = np.array(times).T
    # Nobody says a sound the same way twice.
    targets = targets * np.exp(
        rng.normal(0, (0.04, 0.04, 0.03, 0.15, 0.2, 0.25, 0.06), (len(times), 7))
    )
    steps = np.arange(math.ceil(start / TOY_STEP) + 1)
    tracks = np.empty((len(steps), 7))
    for column, name in enumerate(("f1", "f2", "f3", "voice", "breath", "hiss", "hz")):
        loudness = name in ("voice", "breath", "hiss")
        margin = (0.12 if loudness else 0.3) * (right - left)
        knots = np.stack([left + margin, right - margin], axis=1)  # the target is held
        said = targets[:, column] >= (0 if loudness else 1)
        tracks[:, column] = np.interp(steps, knots[said].ravel(), targets[said, column].repeat(2))
    return tracks


def toy_pulses(voice: dict[str, float], samples: int, rng: np.random.Generator) -> np.ndarray:
    """The vocal folds: one pulse per period along a falling, wandering pitch. Returns (S,)."""
    time = np.linspace(0, 1, 50)  # 0 = begin, 1 = end
    waves = rng.normal(0, 0.5, 3) @ np.sin(np.pi * np.outer((1, 2, 3), time + rng.uniform()))
    pitch = (
        voice["pitch"] * rng.uniform(0.92, 1.08) * np.exp(voice["melody"] * (waves + 0.5 - time))
    )
    pitch = np.interp(np.linspace(0, 1, samples), time, pitch)
    period = np.floor(np.cumsum(pitch) / SAMPLE_RATE)
    starts = np.flatnonzero(np.diff(period, prepend=0))
    pulses = np.zeros(samples, np.float32)
    pulses[starts] = np.sqrt(SAMPLE_RATE / pitch[starts]) * rng.normal(1, 0.08, len(starts))
    return pulses


def toy_resonances(hz: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Response of resonances in a row, each with gain 1 at 0 Hz: hz, width (F, N) -> (F, 257).

    One resonance is the two-pole filter 1 / (1 - 2 r cos(w) z^-1 + r^2 z^-2), as in Klatt's
    synthesiser. The polynomials of a row are multiplied first, so that one transform is enough.
    """
    radius = np.exp(-np.pi * width / SAMPLE_RATE)
    linear, square = 2 * radius * np.cos(2 * np.pi * hz / SAMPLE_RATE), radius**2
    filters = np.zeros((len(hz), 2 * hz.shape[1] + 1))  # polynomials in z^-1
    filters[:, 0] = 1
    for a, b in zip(linear.T[:, :, None], square.T[:, :, None], strict=True):
        shorter = filters.copy()
        filters[:, 1:] -= a * shorter[:, :-1]
        filters[:, 2:] += b * shorter[:, :-2]
    filters /= filters.sum(axis=1, keepdims=True)
    return 1 / np.fft.rfft(filters.astype(np.float32), 4 * TOY_STEP)


def toy_speak(
    voice: dict[str, float], tracks: np.ndarray, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Source and filter: pulses and noise, cut into steps, shaped, overlapped and added: (S,)."""
    steps = len(tracks)
    noise = rng.standard_normal((steps + 1) * TOY_STEP, np.float32)
    pulses = np.zeros_like(noise)
    pulses[:samples] = toy_pulses(voice, samples, rng)
    window = np.hanning(2 * TOY_STEP + 1)[:-1].astype(np.float32)  # overlaps add to 1

    def spectrum(source: np.ndarray) -> np.ndarray:  # (F, 257)
        pieces = np.lib.stride_tricks.sliding_window_view(source, 2 * TOY_STEP)[::TOY_STEP]
        return np.fft.rfft(pieces * window, 4 * TOY_STEP)

    f1, f2, f3, loud, breath, hiss, hiss_hz = tracks.astype(np.float32).T[:, :, None]  # each (F, 1)
    fixed = np.full((steps, 2), (3500, 4500))
    formants = np.concatenate([f1, f2, f3, fixed], axis=1) * voice["tract"]
    widths = np.broadcast_to(np.array([60, 90, 130, 220, 350]) * voice["width"], formants.shape)
    delay = np.exp(-1j * np.pi * np.arange(257) / 256).astype(np.complex64)  # z^-1 at each bin
    folds = (1 - voice["tilt"]) / (1 - voice["tilt"] * delay)
    throat = toy_resonances(formants, widths) * folds
    place = toy_resonances(hiss_hz * voice["hiss"], 0.25 * hiss_hz) * (1 - delay)
    place /= np.abs(place).max(axis=1, keepdims=True)
    shaped = spectrum(pulses) * throat * loud
    shaped += spectrum(noise) * (throat * (breath + voice["breath"] * loud) + place * hiss)
    pieces = np.fft.irfft(shaped).reshape(steps, 4, TOY_STEP)  # 512, every 128
    wave = np.zeros((steps + 3, TOY_STEP), np.float32)
    for part in range(4):
        wave[part : part + steps] += pieces[:, part]
    return wave.ravel()[TOY_STEP : TOY_STEP + samples]


def toy_record(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Room, noise, microphone and level of one recording: (S,) -> (S,) float32.

    Light on purpose: of one teacher each, this one carried over best to real digits, before one
    with more noise and echo and one with none. All of it is filtering, done on the spectrum.
    """
    samples = len(wave)
    size = 4096 * math.ceil((samples + 4000) / 4096)  # quick to transform
    hz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
    echo = rng.standard_normal(4000, np.float32)
    echo *= np.exp(-np.arange(4000, dtype=np.float32) / (SAMPLE_RATE * rng.uniform(0.01, 0.06)))
    echo *= rng.uniform(0, 0.35) / np.sqrt(np.sum(echo**2))
    echo[0] += 1
    clean = np.fft.rfft(wave, size) * np.fft.rfft(echo, size)
    noise = rng.standard_normal(2 * len(hz), np.float32).view(np.complex64)
    noise *= (1 + hz / 100) ** -rng.uniform(0, 1)
    snr = 10 ** (rng.uniform(18, 45) / 20)
    both = clean + noise * np.linalg.norm(clean) / np.linalg.norm(noise) / snr
    both *= (1 + hz / 500) ** rng.uniform(-0.4, 0.3)  # dull to bright
    if rng.random() < 0.25:  # as by telephone
        both *= (1 + (hz / rng.uniform(3300, 4000)) ** 24) ** -0.5
    wave = np.fft.irfft(both)[:samples]
    wave *= 10 ** (rng.uniform(-32, -18) / 20) / np.sqrt(np.mean(wave**2))
    return (wave / max(1, np.abs(wave).max() / 0.98)).astype(np.float32)


def toy_utterance(speaker: int, index: int) -> ToyUtterance:
    """Recording number ``index`` of a speaker; a pure function of (TOY_SEED, speaker, index)."""
    rng = np.random.default_rng([TOY_SEED, 2, speaker, index])
    voice = toy_voice(speaker)
    words, intent = toy_sentence(rng)
    alignment = toy_alignment(words, voice["tempo"], rng)
    tracks = toy_tracks(alignment, rng)
    wave = toy_record(toy_speak(voice, tracks, alignment[-1][1], rng), rng)
    phones = [phone for phone, _ in alignment if phone != "SIL"]
    return ToyUtterance(wave, alignment, words, phones, intent)


def toy_recipe() -> str:
    """A short name that changes with any code or constant called toy: nothing stale is used."""
    parts = [value for name, value in sorted(globals().items()) if name.lower().startswith("toy_")]
    text = "".join(inspect.getsource(part) if callable(part) else repr(part) for part in parts)
    return hashlib.sha1(text.encode()).hexdigest()[:10]


def toy_manifest_line(path: str, split: str, speaker: int, index: int, said: ToyUtterance) -> str:
    """One line of manifest.tsv. Those to identify are the test speakers (12/3/5 files)."""
    sid_split = "" if split != "test" else ("train", "dev", "test")[(index >= 12) + (index >= 15)]
    alignment = " ".join(f"{phone}:{end}" for phone, end in said.alignment)
    return "\t".join(
        [
            path,
            "toy",
            f"{len(said.wave) / SAMPLE_RATE:.3f}",
            f"toy-{speaker:02d}",
            split,
            sid_split,
            said.intent,
            "intent",
            " ".join(said.words),
            " ".join(said.phones),
            alignment,
        ]
    )


def make_toy_world(folder: Path | str) -> Path:
    """Write the toy world's audio and manifest.tsv into ``folder``; return the manifest's path.

    A folder that already holds this very world is left as it is. The manifest comes last, so that
    an interrupted start is not taken for a whole one.
    """
    return on_first(_write_toy_world, Path(folder))


def _write_toy_world(folder: Path) -> Path:
    audio = f"toy_{toy_recipe()}"
    manifest = folder / "manifest.tsv"
    if manifest.exists() and f"\n{audio}/" in manifest.read_text(encoding="utf-8"):
        return manifest
    (folder / audio).mkdir(parents=True, exist_ok=True)
    recordings = [
        (split, speaker, index)
        for split, speakers in TOY_SPEAKERS.items()
        for speaker in speakers
        for index in range(TOY_RECORDINGS[split])
    ]

    def write(recording: tuple[str, int, int]) -> str:
        split, speaker, index = recording
        said, name = toy_utterance(speaker, index), f"{audio}/{speaker:02d}_{index:02d}.wav"
        soundfile.write(folder / name, said.wave, SAMPLE_RATE, subtype="PCM_16")
        return toy_manifest_line(name, split, speaker, index, said)

    with ThreadPoolExecutor(2) as pool:  # numpy's transforms free Python's lock
        bar = tqdm(pool.map(write, recordings), "toy world", len(recordings), leave=False)
        lines = list(bar)
    header = "path dataset seconds speaker split sid_split label label_kind text phones alignment"
    write_text(manifest, "\n".join([header.replace(" ", "\t"), *lines]) + "\n")
    return manifest


# fmt: off
TOY_TEACHER_CONFIG = {  # for torchaudio.models.hubert_pretrain_model: HuBERT Base, narrow
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
    "extractor_conv_bias": False,
    "encoder_embed_dim": 64, "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 32, "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 12, "encoder_num_heads": 4, "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 192, "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0,
    "mask_prob": 0.35, "mask_selection": "static", "mask_other": 0.0, "mask_length": 5,
    "no_mask_overlap": False, "mask_min_space": 1,
    "mask_channel_prob": 0.0, "mask_channel_selection": "static", "mask_channel_other": 0.0,
    "mask_channel_length": 10, "no_mask_channel_overlap": False, "mask_channel_min_space": 1,
    "skip_masked": False, "skip_nomask": False,
    "num_classes": 2 * len(TOY_PHONES), "final_dim": 64, "feature_grad_mult": None,
}
TOY_TEACHER_TRAINING = {
    "speakers": 700,  # one sentence each; none of them is in dev or test
    "updates": 750, "batch": 8,
    "frames": 64,  # 1.3 s, as long as the shortest utterance
    "lr": 5e-3,  # peak, after a tenth of the updates; then down to 0 on a straight line
}


# fmt: on


def toy_units(alignment: list[tuple[str, int]], frames: int) -> np.ndarray:
    """The unit at the middle of each teacher frame: (T,) integers below 2 * len(TOY_PHONES).

    A unit is the first or the second half of a phone: finer than phones, as HuBERT's clusters are.
    """
    names = list(TOY_PHONES)
    ends = np.array([end for _, end in alignment])
    starts = np.concatenate([[0], ends[:-1]])
    halves = np.stack([(starts + ends) // 2, ends], axis=1).ravel()  # end of each half
    units = np.array([2 * names.index(phone) + half for phone, _ in alignment for half in (0, 1)])
    middles = HOP * np.arange(frames) + FIELD // 2  # a frame sees 400
    return units[np.searchsorted(halves, middles, side="right")]


def toy_teacher_model() -> torchaudio.models.HuBERTPretrainModel:
    """The teacher before training.

    Twelve post-norm layers hardly learn at first, because every norm shrinks what comes through the
    layers below. Branches that start small leave more of it (DeepNet, Wang et al. 2022, gain
    (8 L)^-1/4); they take fewer updates to learn than the default start does.
    """
    model = torchaudio.models.hubert_pretrain_model(**TOY_TEACHER_CONFIG)
    layers = model.wav2vec2.encoder.transformer.layers
    for layer in layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        for linear in (
            attention.v_proj,
            attention.out_proj,
            feed_forward.intermediate_dense,
            feed_forward.output_dense,
        ):
            nn.init.xavier_normal_(linear.weight, gain=(8 * len(layers)) ** -0.25)
    return model


def toy_teacher_logits(
    model: torchaudio.models.HuBERTPretrainModel, waves: Tensor
) -> tuple[Tensor, Tensor]:
    """Mask some frames and score all units: waves B x S -> logits B x T x K, mask B x T (bool).

    The scores (cosine / 0.1) are those of the model's own forward, which however compares the units
    one by one and does not return which frames were masked.
    """
    features, _ = model.wav2vec2.feature_extractor(waves, None)
    hidden = model.wav2vec2.encoder.feature_projection(features)
    hidden, mask = model.mask_generator(hidden, None)
    hidden = model.wav2vec2.encoder.transformer(hidden)
    projected = F.normalize(model.logit_generator.final_proj(hidden), dim=-1)
    units = F.normalize(model.logit_generator.label_embeddings, dim=-1)
    return projected @ units.T / 0.1, mask


def toy_teacher_corpus() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Waves (S,) and units (T,) to learn from, one per speaker; no speaker is in any split."""
    count = TOY_TEACHER_TRAINING["speakers"]
    with ThreadPoolExecutor(2) as pool:
        speech = pool.map(lambda number: toy_utterance(1000 + number, 0), range(count))
        said = list(tqdm(speech, "toy teacher, speech", count, leave=False))
    return (
        [each.wave for each in said],
        [toy_units(each.alignment, frame_count(len(each.wave))) for each in said],
    )


def toy_teacher_training(
    waves: list[np.ndarray], units: list[np.ndarray]
) -> torchaudio.models.HuBERTPretrainModel:
    """Masked prediction of the units on random crops of one length, so that nothing is padded.

    Frames in sight count as much as masked ones. HuBERT does without them, but a model learns
    sooner from what it hears, and 750 updates are few.
    """
    training = TOY_TEACHER_TRAINING
    model, rng = toy_teacher_model(), np.random.default_rng(TOY_SEED)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    frames, updates = training["frames"], training["updates"]
    samples, warmup = HOP * (frames - 1) + FIELD, 0.1 * updates
    progress = tqdm(range(updates), "toy teacher", leave=False)
    for step in progress:
        crops = []
        for each in rng.integers(len(waves), size=training["batch"]):
            start = rng.integers(len(units[each]) - frames + 1)
            crops.append(
                (
                    waves[each][HOP * start : HOP * start + samples],
                    units[each][start : start + frames],
                )
            )
        batch, target = (torch.from_numpy(np.stack(column)) for column in zip(*crops, strict=True))
        logits, mask = toy_teacher_logits(model, batch)
        losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        loss = losses[mask].mean() + losses[~mask].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min((step + 1) / warmup, (updates - step) / (updates - warmup))
        optimizer.param_groups[0]["lr"] = training["lr"] * share
        optimizer.step()
        if step % 25 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")
    return model


def toy_teacher() -> Path:
    """Path of the trained toy teacher, made on first use and kept beside torch's downloads.

    The file holds {"config": arguments of torchaudio.models.hubert_pretrain_model, "state_dict"}.
    The caller's random state is left alone.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"toy_hubert_{toy_recipe()}.pt"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(TOY_SEED)  # the CPU's, no other
            model = toy_teacher_training(*toy_teacher_corpus())
        content = {"config": TOY_TEACHER_CONFIG, "state_dict": model.state_dict()}
        write_atomically(path, lambda file: torch.save(content, file))
    return path


# ------------------------------------------------------------------------------------------------
# 4. Teachers
# ------------------------------------------------------------------------------------------------

BUNDLES = {
    name.lower(): bundle
    for name, bundle in vars(torchaudio.pipelines).items()
    if type(bundle) is torchaudio.pipelines.Wav2Vec2Bundle  # the ASR bundles are fine-tuned
}
SPECIAL_ROWS = 4  # fairseq's dictionary puts <s> <pad> </s> <unk> before the clusters


class Teacher(nn.Module):
    """A frozen torchaudio Wav2Vec2Model (HuBERT, WavLM, wav2vec 2.0), and its cluster head if kept.

    Hidden states are numbered as in the papers: 0 is the input of the first Transformer layer
    (after the positional convolution, and its LayerNorm in post-norm models), i = 1..L is the
    output of layer i. torchaudio's own ``extract_features`` starts at 1 and has no 0.

    Always in eval mode, whatever is called on it or on a module that holds it: dropout in the
    teacher would make every target noisy.
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
        transformer = model.encoder.transformer
        first, position = transformer.layers[0], transformer.pos_conv_embed
        self.num_layers, self.pre_norm = len(transformer.layers), first.layer_norm_first
        self.position_bias = hasattr(first.attention, "rel_attn_embed")  # WavLM
        self.shape = {  # what a student needs to have to start from this teacher's weights
            "conv_channels": model.feature_extractor.conv_layers[0].conv.out_channels,
            "width": position.embed_dim,
            "attention_heads": first.attention.num_heads,
            "feed_forward": first.feed_forward.intermediate_dense.out_features,
            "position_kernel": position.conv.kernel_size[0],
            "position_groups": position.conv.groups,
        }
        self.position_buckets = getattr(first.attention, "num_buckets", 0)  # of WavLM's bias
        self.max_distance = getattr(first.attention, "max_distance", 0)  # frames
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        return self

    @torch.no_grad()
    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None, last_layer: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states 0 .. ``last_layer`` (None: all), each (B, T, D), and their lengths (B,).

        ``waveforms`` (B, S) at 16 kHz; ``lengths`` (B,) valid samples of a right-padded batch, or
        None where there is no padding. Layers behind ``last_layer`` are not computed.
        """
        if self.normalise:
            waveforms = normalise_waveforms(waveforms, lengths)
        x, frames = self.model.feature_extractor(waveforms, lengths)
        x = self.model.encoder.feature_projection(x)
        attention_mask = padding = None
        if frames is not None:
            valid = torch.arange(x.shape[1], device=x.device) < frames[:, None]  # B x T
            x = x * valid[:, :, None]
            # WavLM takes the padding itself, and raises if it is given a mask beside its bias.
            if self.position_bias:
                padding = torch.zeros_like(valid, dtype=x.dtype).masked_fill(~valid, -math.inf)
            else:
                attention_mask = valid[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        transformer = self.model.encoder.transformer
        x, position_bias = transformer._preprocess(x), None
        hidden_states = [x]
        with x.device:  # torchaudio would compute WavLM's position bias on the CPU
            for layer in transformer.layers[:last_layer]:
                x, position_bias = layer(x, attention_mask, position_bias, padding)
                hidden_states.append(x)
        return hidden_states, frames

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Cluster logits (B, T, K) of the last hidden state: cos(final_proj(h), e_k) / 0.1.

        (HuBERT, arXiv 2106.07447, Eq. 3, temperature 0.1.) Rows of fairseq's special symbols are
        left out, so entry k is cluster k. Pre-norm models pass the final LayerNorm first.
        """
        if self.final_proj is None:
            raise InputError(
                f"teacher {self.name} has no cluster head: use a fairseq or s3prl HuBERT "
                "checkpoint (hubert_base_ls960.pt), a torchaudio HuBERTPretrainModel, or toy"
            )
        if self.pre_norm:
            hidden = self.model.encoder.transformer.layer_norm(hidden)
        projected = self.final_proj(hidden).float()  # B x T x E
        cosine = F.normalize(projected, dim=-1) @ F.normalize(self.label_embeddings, dim=-1).mT
        return cosine / 0.1


def normalise_waveforms(waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Zero mean and unit variance for each utterance over its valid samples; padding becomes 0.

    (torchaudio's bundles normalise over the whole batch, so that one utterance changes another.)
    """
    if lengths is None:
        return F.layer_norm(waveforms, waveforms.shape[-1:])
    valid = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
    count = lengths[:, None].clamp(min=1)
    mean = (waveforms * valid).sum(1, keepdim=True) / count
    centred = (waveforms - mean) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / (variance + 1e-5).sqrt()


class _Stub:
    """Stands for any class or function that a checkpoint names and we do not want to run."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def __call__(self, *args: object, **kwargs: object) -> _Stub:
        return self

    def __setstate__(self, state: object) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...
    def append(self, item: object) -> None: ...
    def extend(self, items: object) -> None: ...
    def add(self, item: object) -> None: ...


class _TensorsOnly:
    """A stand-in for the pickle module: rebuilds tensors and containers, stubs everything else."""

    class Unpickler(pickle._Unpickler):  # Python's: the one in C trusts an index and fills memory
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
                rebuild = super().find_class(module, name)
                return lambda *args: rebuild(*args)  # a pickle can set attributes on what it gets
            return type("Stub", (_Stub,), {})

    @classmethod
    def load(cls, file: Any, **kwargs: Any) -> Any:
        return cls.Unpickler(file, **kwargs).load()


def load_checkpoint(path: Path | str, strict: bool = False) -> dict[str, Any]:
    """Load a checkpoint file on the CPU without ever running code that it brings along.

    Plain files go through torch's ``weights_only`` loader. Others (fairseq's hold argparse and
    omegaconf objects) are unpickled with every unknown class replaced by an inert stub; with
    ``strict``, for files of this project, they are refused.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the path of a checkpoint file")
    try:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if strict:
                raise
            checkpoint = torch.load(
                path, map_location="cpu", weights_only=False, pickle_module=_TensorsOnly
            )
    except Exception as error:  # a broken file raises nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"{path} is not a readable checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}")
    return checkpoint


SAFETENSORS = {f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)}
SAFETENSORS |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
SAFETENSORS |= {"BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, on the CPU.

    The file: length of the header (8 bytes, little-endian); the header, JSON, with type, shape and
    first and last byte of each tensor; the bytes. Nothing in it can be code.
    """
    path, tensors = Path(path), {}
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the path of a .safetensors file")
    with reading(path), open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if size < 8 or length > size - 8:
            raise ValueError("the file is shorter than its header says")
        header = dict(json.loads(file.read(length)))
        header.pop("__metadata__", None)
        content = torch.from_file(str(path), size=size, dtype=torch.uint8)  # read where it is used
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"{name} lies outside of the file")
            raw = content[8 + length + begin : 8 + length + end].clone()  # aligned, whatever begin
            tensors[name] = raw.view(SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def load_student_file(path: Path | str, method: str) -> dict[str, Any]:
    """A ``student.pt`` that ``method`` wrote; for any other file an InputError says what it is."""
    checkpoint = load_checkpoint(path, strict=True)
    writer = checkpoint.get("method")
    if not isinstance(writer, str):
        raise InputError(f"{path} is no student of this project: give the student.pt of a run")
    if writer != method:
        raise InputError(f"{path} was written by {writer}.py, not {method}.py: load it with that")
    return checkpoint


def _split_head(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], nn.Linear | None, Any]:
    """Part encoder weights in torchaudio's names from the cluster head, for all known spellings."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if "post_extract_proj.weight" in tensors:  # fairseq, and s3prl's copies of it
        embeddings = tensors.pop("label_embs_concat", None)
        embeddings = None if embeddings is None else embeddings[SPECIAL_ROWS:]
        prefix = "final_proj."
        encoder = import_fairseq._convert_state_dict(tensors)
    else:  # torchaudio: HuBERTPretrainModel, or the Wav2Vec2Model inside it
        prefix = "logit_generator.final_proj."
        embeddings = tensors.get("logit_generator.label_embeddings")
        if embeddings is not None and len(embeddings) == 500 + SPECIAL_ROWS:  # fairseq's weights
            embeddings = embeddings[SPECIAL_ROWS:]
        encoder = {key.removeprefix("wav2vec2."): value for key, value in tensors.items()}
        encoder = {k: v for k, v in encoder.items() if k.startswith(("feature_ext", "encoder."))}
    if embeddings is None or prefix + "weight" not in tensors:
        return encoder, None, None
    weight = tensors[prefix + "weight"]
    final_proj = nn.Linear(weight.shape[1], weight.shape[0])
    final_proj.load_state_dict({k: tensors[prefix + k].float() for k in ("weight", "bias")})
    return encoder, final_proj, embeddings.float()


def _infer_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``torchaudio.models.wav2vec2_model`` / ``wavlm_model``, read off the weights.

    What no weight tells is as in every published model: strides 5 2 2 2 2 2 2, 64 channels per
    attention head, pre-norm layers where all convolutions have a LayerNorm.
    """
    convs = [state[f"feature_extractor.conv_layers.{i}.conv.weight"] for i in range(7)]
    large = "feature_extractor.conv_layers.1.layer_norm.weight" in state
    position = "encoder.transformer.pos_conv_embed.conv."
    v = state.get(position + "weight_v", state.get(position + "parametrizations.weight.original1"))
    layers = {match[1] for key in state if (match := re.match(r".*\.layers\.(\d+)\.", key))}
    dense = "encoder.transformer.layers.0.feed_forward.intermediate_dense.weight"
    config = dict(
        extractor_mode="layer_norm" if large else "group_norm",
        extractor_conv_layer_config=[
            (conv.shape[0], conv.shape[2], stride)
            for conv, stride in zip(convs, (5, 2, 2, 2, 2, 2, 2), strict=True)
        ],
        extractor_conv_bias="feature_extractor.conv_layers.0.conv.bias" in state,
        encoder_embed_dim=v.shape[0],
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=v.shape[2],
        encoder_pos_conv_groups=v.shape[0] // v.shape[1],
        encoder_num_layers=len(layers),
        encoder_num_heads=min(v.shape[0] // 64, 16),
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=state[dense].shape[0],
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=large,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    bias = state.get("encoder.transformer.layers.0.attention.rel_attn_embed.weight")
    if bias is not None:  # WavLM
        config |= dict(encoder_num_heads=bias.shape[1], encoder_num_buckets=bias.shape[0])
        config |= dict(encoder_max_distance=800)
    return config


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of torchaudio.models.wav2vec2_model that build this very post-norm model."""
    projection, transformer = model.encoder.feature_projection, model.encoder.transformer
    layer = transformer.layers[0]
    return _infer_config(model.state_dict()) | dict(
        encoder_projection_dropout=projection.dropout.p,
        encoder_num_heads=layer.attention.num_heads,
        encoder_attention_dropout=layer.attention.dropout,
        encoder_ff_interm_dropout=layer.feed_forward.intermediate_dropout.p,
        encoder_dropout=transformer.dropout.p,
    )


def _teacher_from_file(path: Path) -> Teacher:
    checkpoint = load_checkpoint(path)
    if "method" in checkpoint:
        raise InputError(f"{path} is a student ({checkpoint['method']}.py), not a teacher")
    inner = next((k for k in ("state_dict", "model_weight", "model") if k in checkpoint), None)
    state = checkpoint[inner] if inner else checkpoint
    known = "a fairseq, s3prl or torchaudio HuBERT / WavLM / wav2vec 2.0 checkpoint"
    try:
        encoder, final_proj, embeddings = _split_head(state)
        own = inner == "state_dict" and "config" in checkpoint  # this project's form
        config, models = checkpoint["config"] if own else _infer_config(encoder), torchaudio.models
        build = models.wavlm_model if "encoder_max_distance" in config else models.wav2vec2_model
        with no_larger(state):
            model = models.hubert_pretrain_model(**config).wav2vec2 if own else build(**config)
        normalise = config["extractor_mode"] == "layer_norm"
        model.load_state_dict(encoder, strict=True)  # a lenient load leaves random layers unseen
    except Exception as error:  # foreign weights fail in any way
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} is not {known}: {reason}") from error
    return Teacher(model, path.name, normalise, final_proj, embeddings)


def _teacher_from_bundle(name: str) -> Teacher:
    bundle = BUNDLES[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub announces its download on stdout
            model = bundle.get_model(dl_kwargs={"weights_only": True})
    except Exception as error:  # no network, a full disk, a broken file in the cache
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(
            f"cannot load {name} ({reason}): it is downloaded to {folder / bundle._path} once, so "
            "delete that file if it is broken, or put it there by hand where there is no network"
        ) from error
    if bundle._normalize_waveform:
        model = model.model  # out of torchaudio's wrapper, which normalises over the whole batch
    return Teacher(model, name, bundle._normalize_waveform)


def load_teacher(name: str, device: torch.device | str = "cpu") -> Teacher:
    """The teacher of a name: a torchaudio bundle in lower case, ``toy``, or a checkpoint file.

    Bundles (``hubert_base``, ``wavlm_base_plus``, ...) are downloaded into torch's cache on first
    use and have no cluster head. ``toy`` is trained on the toy world on first use. Files: fairseq
    or s3prl HuBERT checkpoints, torchaudio state dicts, or this project's own form
    ``{"config": arguments of torchaudio.models.hubert_pretrain_model, "state_dict": ...}``.
    """
    if name == "toy":
        teacher = _teacher_from_file(on_first(toy_teacher))
        teacher.name = "toy"
    elif name in BUNDLES:
        if processes() > 1:
            on_first(lambda: _teacher_from_bundle(name) and None)  # one download
        teacher = _teacher_from_bundle(name)
    elif os.path.exists(name):
        teacher = _teacher_from_file(Path(name))
    else:
        names = ", ".join(["toy", *BUNDLES])
        raise InputError(
            f"unknown teacher {name}: there is no such file, and the names are {names}"
        )
    return teacher.to(device)


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
        kept = []
        for char in text:
            kind = unicodedata.category(char)
            if kind == "Zs" or char in "\t\n\r":
                kept.append(" ")
            elif kind[0] != "C" and char != "\ufffd":  # C: control characters and the like
                kept.append(f" {char} " if self.is_chinese(char) else char)
        kept, text = [], unicodedata.normalize("NFD", "".join(kept).lower())
        for char in text:
            kind = unicodedata.category(char)
            if kind[0] == "P" or char in "$+<=>^`|~":  # of ASCII, all but letters and digits
                kept.append(f" {char} ")
            elif kind != "Mn":  # the accent that NFD took off its letter
                kept.append(char)
        return "".join(kept).split()

    @staticmethod
    def is_chinese(char: str) -> bool:
        """Whether the character is a CJK ideograph; Japanese kana and Korean hangul are not."""
        blocks = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF))
        blocks += ((0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F))
        return any(first <= ord(char) <= last for first, last in blocks)

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


def read_text_model(folder: Path | str) -> tuple[dict[str, Any], list[str], dict[str, Tensor]]:
    """Settings, vocabulary and weights of a folder as bert-base-uncased is published.

    Reads config.json, vocab.txt, and model.safetensors or else pytorch_model.bin. Names of weights
    come without "bert." and with weight and bias for the old gamma and beta; pooler and heads are
    left out. Raises InputError for what is not an uncased BERT.
    """
    folder = Path(folder)
    weights = folder / "model.safetensors"
    weights = weights if weights.exists() else folder / "pytorch_model.bin"
    for path in (folder / "config.json", folder / "vocab.txt", weights):
        if not path.is_file():
            name = "model.safetensors" if path == weights else path.name
            raise InputError(
                f"{folder} has no {name}: the text model is a folder as bert-base-uncased is "
                "published, with config.json, vocab.txt and model.safetensors or pytorch_model.bin"
            )
    with reading(folder / "config.json"):
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = settings["vocab_size"]
    wanted = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"}
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise InputError(
                f"{folder / 'config.json'}: {name} is {settings[name]}, and only {value} is "
                "supported, as in bert-base-uncased"
            )
    with reading(folder / "vocab.txt"):
        text = (folder / "vocab.txt").read_text(encoding="utf-8")
        vocabulary = text.removesuffix("\n").split("\n")  # splitlines would split more
    if len(vocabulary) != size:
        raise InputError(
            f"{folder / 'vocab.txt'} has {len(vocabulary)} lines, but vocab_size in config.json is "
            f"{size}: they are not of the same model"
        )
    for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
        if piece not in vocabulary:
            raise InputError(f"{folder / 'vocab.txt'} has no {piece}: it is no vocabulary of BERT")
    if any("A" <= char <= "Z" for piece in vocabulary if piece[:1] != "[" for char in piece):
        raise InputError(f"{folder} is a cased model: give an uncased one (bert-base-uncased)")
    read = read_safetensors if weights.suffix == ".safetensors" else load_checkpoint
    found = {}
    for name, value in read(weights).items():
        name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.startswith(("embeddings.", "encoder.")) and not name.endswith("position_ids"):
            found[name] = value
    return settings, vocabulary, found


def bert_names(layers: int) -> dict[str, list[str]]:
    """Parameter of a text model -> its published name; torch keeps q, k, v in one piece."""
    names = {
        f"{ours}.weight": [f"embeddings.{theirs}_embeddings.weight"]
        for ours, theirs in (("word", "word"), ("position", "position"), ("segment", "token_type"))
    }
    modules = {"norm": "embeddings.LayerNorm"}
    for i in range(layers):
        for ours, theirs in (
            ("self_attn.out_proj", "attention.output.dense"),
            ("norm1", "attention.output.LayerNorm"),
            ("linear1", "intermediate.dense"),
            ("linear2", "output.dense"),
            ("norm2", "output.LayerNorm"),
        ):
            modules[f"layers.{i}.{ours}"] = f"encoder.layer.{i}.{theirs}"
        parts = [f"encoder.layer.{i}.attention.self.{part}" for part in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            names[f"layers.{i}.self_attn.in_proj_{kind}"] = [f"{part}.{kind}" for part in parts]
    for ours, theirs in modules.items():
        names |= {f"{ours}.{kind}": [f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return names


def bert_weights(
    folder: Path | str, found: dict[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """The weights that read_text_model ``found`` as the state of ``model``, whose names are ours.

    Its ``layers`` are torch's TransformerEncoderLayer. All must be there, and nothing else.
    """
    state, parameters = {}, dict(model.named_parameters())
    for ours, names in bert_names(len(model.layers)).items():
        expected = (parameters[ours].shape[0] // len(names), *parameters[ours].shape[1:])
        for name in names:
            if name not in found or tuple(found[name].shape) != expected:
                there = tuple(found[name].shape) if name in found else "missing"
                raise InputError(
                    f"{folder}: {name} is {there} where config.json asks for {expected}: weights "
                    "and config.json are not of the same model"
                )
        state[ours] = torch.cat([found.pop(name) for name in names]).float()
    if found:
        raise InputError(f"{folder} has a {min(found)} that BERT has not: it is another model")
    return state


# The text teacher of the toy world, a small BERT. Its paragraphs are one to eight commands of the
# same intent, as sentences that stand together in a text are about the same thing. Single commands
# would not do: "activate" and "kill" stand before the same words. So the intents enter here, as the
# company that sentences keep; no label does.
TEXT_MODEL = dict(width=64, layers=2, attention_heads=4, feed_forward=192, positions=128)
TEXT_TRAINING = dict(sentences=4000, paragraph=8, updates=700, batch=8, lr=3e-3, masked=0.6)
TEXT_IN_PIECES = ("LIGHTS", "HEATING")  # light ##s, heat ##ing


def text_vocabulary() -> list[str]:
    """Specials, letters (so that any English word can be spelled), and the words of the lexicon."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["'"]
    words = [word.lower() for word in TOY_LEXICON if word not in TEXT_IN_PIECES]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*specials, *letters, *(f"##{letter}" for letter in letters), "##ing", *words]
    return list(dict.fromkeys(pieces))


def text_paragraphs(tokenizer: Any, rng: np.random.Generator) -> list[list[int]]:
    """Texts to learn from, as ids: [CLS] sentence [SEP] sentence [SEP] ..., all of one intent."""
    by_intent: dict[str, list[list[int]]] = {}
    for _ in range(TEXT_TRAINING["sentences"]):
        words, intent = toy_sentence(rng)
        by_intent.setdefault(intent, []).append(tokenizer(" ".join(words)))
    paragraphs = []
    for sentences in by_intent.values():
        while sentences:
            count = int(rng.integers(1, TEXT_TRAINING["paragraph"] + 1))
            taken, sentences = sentences[:count], sentences[count:]
            paragraphs.append(taken[0] + [i for ids in taken[1:] for i in ids[1:]])
    return paragraphs


def text_training(model: nn.Module, tokenizer: Any) -> None:
    """Masked language modelling: a masked piece is [MASK] (80 %), any other (10 %), or itself.

    BERT masks 15 % of the pieces. Here it is 60 %, for what a short command lacks then has to come
    from the rest of the paragraph, that is from its intent. ``model(ids, valid)`` gives hidden
    states first; ``model.word`` are its embeddings, which predict the pieces too.
    """
    training, special = TEXT_TRAINING, tokenizer.ids
    rng = np.random.default_rng(TOY_SEED)
    paragraphs = text_paragraphs(tokenizer, rng)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(each) for each in paragraphs], batch_first=True)
    width = TEXT_MODEL["width"]
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
    bias = nn.Parameter(torch.zeros(len(tokenizer.ids)))
    for module in [*model.modules(), *head]:
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    parameters = [*model.parameters(), *head.parameters(), bias]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    updates, warmup = training["updates"], 0.1 * training["updates"]
    specials = torch.tensor([special["[PAD]"], special["[CLS]"], special["[SEP]"]])
    progress = tqdm(range(updates), "toy BERT", leave=False)
    for step in progress:
        target = ids[torch.from_numpy(rng.integers(len(ids), size=training["batch"]))]
        target = target[:, : int((target != special["[PAD]"]).sum(1).max())]
        draw = torch.from_numpy(rng.random(target.shape))
        masked = (draw < training["masked"]) & ~torch.isin(target, specials)
        other = rng.integers(special["[MASK]"] + 1, len(special), size=target.shape)
        seen = torch.where(
            masked & (draw < 0.9 * training["masked"]), torch.from_numpy(other), target
        )
        seen = seen.masked_fill(masked & (draw < 0.8 * training["masked"]), special["[MASK]"])
        hidden_states, _ = model(seen, target != special["[PAD]"])
        logits = head(hidden_states[-1][masked]) @ model.word.weight.T + bias
        loss = nn.functional.cross_entropy(logits, target[masked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        share = min((step + 1) / warmup, (updates - step) / (updates - warmup))
        optimizer.param_groups[0]["lr"] = training["lr"] * share
        optimizer.step()
        if step % 25 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")


def make_text_teacher(build: Callable[..., nn.Module], source: str) -> Path:
    """Folder of the toy world's text teacher, made on first use and kept beside torch's downloads.

    ``build(vocabulary=.., width=.., ...)`` makes the model, whose code is ``source``. The caller's
    random state is left alone.
    """
    parts = (text_vocabulary, text_paragraphs, text_training)
    recipe = toy_recipe() + repr((TEXT_MODEL, TEXT_TRAINING, TEXT_IN_PIECES)) + source
    recipe += "".join(map(inspect.getsource, parts))
    name = f"toy_bert_{hashlib.sha1(recipe.encode()).hexdigest()[:10]}"
    folder = Path(torch.hub.get_dir()) / "checkpoints" / name
    if folder.exists():
        return folder
    vocabulary = text_vocabulary()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(TOY_SEED)  # the CPU's, no other
        model = build(vocabulary=len(vocabulary), **TEXT_MODEL)
        text_training(model, Tokenizer(vocabulary))
    state = model.state_dict()
    settings = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "vocab_size": len(vocabulary),
        "hidden_size": TEXT_MODEL["width"],
        "num_hidden_layers": TEXT_MODEL["layers"],
        "num_attention_heads": TEXT_MODEL["attention_heads"],
        "intermediate_size": TEXT_MODEL["feed_forward"],
        "max_position_embeddings": TEXT_MODEL["positions"],
        "type_vocab_size": 2,
    }
    weights = {
        f"bert.{theirs}": tensor.clone()
        for ours, all_theirs in bert_names(TEXT_MODEL["layers"]).items()
        for theirs, tensor in zip(all_theirs, state[ours].chunk(len(all_theirs)), strict=True)
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".toy_bert") as temporary:
        half = Path(temporary) / name
        write_text(half / "vocab.txt", "\n".join(vocabulary) + "\n")
        write_text(half / "config.json", json.dumps(settings, indent=1))
        write_atomically(half / "pytorch_model.bin", lambda file: torch.save(weights, file))
        try:
            os.replace(half, folder)  # a folder is there whole or not at all
        except OSError:
            if not folder.exists():  # another process was not faster
                raise
    return folder


# ------------------------------------------------------------------------------------------------
# 5. Evaluation
# ------------------------------------------------------------------------------------------------

# What is evaluated: waves (B, S), lengths (B,) or None -> hidden states [(B, T, D)], frames (B,).
# A teacher is one, a student is one, and so is a function that picks some of their layers.
Features = Callable[[Tensor, Tensor | None], tuple[list[Tensor], Tensor | None]]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


def _lstm_flops(x: Sequence[int], *weights: Any, **_: Any) -> int:
    """Of one LSTM kernel: two operations for each weight of its matrices at each frame.

    (Where the kernel takes all layers at once, on CUDA, the matrices come as a list.)
    """
    shapes = weights[0] if isinstance(weights[0][0], Sequence) else weights[:2]
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    return 2 * math.prod(x[:-1]) * matrices


LSTM_FLOPS = {torch.ops.aten.mkldnn_rnn_layer: _lstm_flops, torch.ops.aten._cudnn_rnn: _lstm_flops}


@torch.no_grad()
def count_macs(features: Features, device: torch.device | str, seconds: float = 10.0) -> float:
    """Multiply-accumulates per second of audio, counted by torch on one utterance of ``seconds``.

    torch's counter knows neither the fused attention kernels of the CPU, so attention is spelled
    out for the count (HuBERT Base, 10 s, is 74.1 G and not 69.5 G), nor any LSTM, so it is told.
    """
    wave = torch.zeros(1, int(seconds * SAMPLE_RATE), device=device)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=LSTM_FLOPS) as counter,
    ):
        features(wave, None)
    return counter.get_total_flops() / 2 / seconds


@torch.no_grad()
def measure_speed(
    models: dict[str, Features], device: torch.device | str, seconds: float = 10.0, rounds: int = 7
) -> dict[str, float]:
    """Seconds of audio per second of each model, on one utterance, in turn; median of rounds.

    Each round has an order of its own, so that none always follows the same one. Machines differ
    and are shared: only the ratios within one call mean anything.
    """
    wave = 0.1 * torch.randn(1, int(seconds * SAMPLE_RATE), device=device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name in np.random.default_rng(turn).permutation([*models]).tolist():
            start = time.perf_counter()
            models[name](wave, None)
            if wave.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: seconds / float(np.median(spent)) for name, spent in times.items()}


def cost(module: nn.Module, features: Features, device: torch.device | str) -> dict[str, float]:
    """Parameters, and billions of multiply-accumulates per second of audio."""
    return {"parameters": count_parameters(module), "GMAC/s": count_macs(features, device) / 1e9}


def teacher_row(teacher: Teacher, tasks: list, device: torch.device, seed: int) -> dict[str, float]:
    """The teacher in the table of its students: size, its own speed as 1, probes on all layers."""
    row = cost(teacher.model, teacher, device) | {"speed": 1.0}
    return row | run_probes(teacher, tasks, device, seed)


def parts_of(student: nn.Module) -> dict[str, nn.Module]:
    """Its modules under their own names; those of a list one by one, "layers" as "layer 1", ..."""
    parts: dict[str, nn.Module] = {}
    for name, module in student.named_children():
        name = name.replace("_", " ")
        if isinstance(module, nn.ModuleList):
            one = name.removesuffix("s")
            parts |= {f"{one} {i + 1}": each for i, each in enumerate(module)}
        elif count_parameters(module):
            parts[name] = module
    return parts


def describe_modules(
    modules: dict[str, nn.Module], run: Callable[[Tensor], object], seconds: float = 10.0
) -> dict[str, dict[str, Any]]:
    """Table rows: output shape, parameters and MACs of each module while ``run`` hears one wave."""
    rows: dict[str, dict[str, Any]] = {}

    def watch(name: str, module: nn.Module) -> list[Any]:
        row = rows[name] = {"output": "", "parameters": count_parameters(module), "GMAC/s": 0}

        def before(*_: Any) -> None:
            row["GMAC/s"] -= counter.get_total_flops()

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            row["GMAC/s"] += counter.get_total_flops()
            output = output[0] if isinstance(output, tuple) else output
            output = output[-1] if isinstance(output, list) else output
            row["output"] = " x ".join(map(str, output.shape))

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    hooks = [hook for name, module in modules.items() for hook in watch(name, module)]
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=LSTM_FLOPS) as counter,
    ):
        run(torch.zeros(1, int(seconds * SAMPLE_RATE)))
    for hook in hooks:
        hook.remove()
    for row in rows.values():
        row["GMAC/s"] /= 2e9 * seconds  # two operations are one multiply-accumulate
    return rows


@torch.no_grad()
def layer_distance(
    predict: Callable[[Tensor], Sequence[Tensor]],
    target: Callable[[Tensor], Sequence[Tensor]],
    batches: Iterable[Tensor],
    device: torch.device | str,
) -> dict[str, list[float]]:
    """ "L1" (mean absolute difference) and "cosine" of each pair of layers, over all frames.

    ``predict`` and ``target`` map waves (B, S) to the same number of layers, each (B, T, D).
    """
    l1, cosine, frames = 0.0, 0.0, 0
    for waves in batches:
        waves = waves.to(device)
        p = torch.stack([layer.float() for layer in predict(waves)])  # layers x B x T x D
        h = torch.stack([layer.float() for layer in target(waves)])
        l1 = l1 + (p - h).abs().mean(-1).sum((1, 2))
        cosine = cosine + F.cosine_similarity(p, h, dim=-1).sum((1, 2))
        frames += p[0, ..., 0].numel()
    return {"L1": (l1 / frames).tolist(), "cosine": (cosine / frames).tolist()}


@dataclass(frozen=True)
class ProbeTask:
    """A labelled task on frozen features: ``parts`` maps train / dev / test to (utterance, target).

    ``kind`` is "frame" (target: a label per frame), "utterance" (a label, or a tuple of labels that
    must all be right), or "ctc" (a sequence). Tasks of the same name are folds: their mean counts.
    """

    name: str
    kind: str
    parts: dict[str, list[tuple[Utterance, Any]]]
    words: bool = False  # "ctc": errors are counted in words, the symbols between two spaces
    balanced: bool = False  # "utterance": rare classes are drawn as often as frequent ones
    note: str = ""  # a line below the table


def frame_labels(utterance: Utterance) -> list[str]:
    """The aligned phone at the middle of each frame: frame t hears samples 320 t .. 320 t + 400."""
    try:
        pairs = [pair.rsplit(":", 1) for pair in utterance.alignment.split()]
        names, ends = [name for name, _ in pairs], np.array([int(end) for _, end in pairs])
        middles = HOP * np.arange(frame_count(utterance.samples)) + FIELD // 2
        index = np.searchsorted(ends, middles, side="right")
        return [names[min(i, len(names) - 1)] for i in index]
    except (ValueError, IndexError) as error:
        raise InputError(
            f"the alignment of {utterance.path} must be phone:end pairs in samples, as in SIL:3200"
        ) from error


# name -> (kind, column that must be filled, column of the split, target of an utterance)
PROBES: dict[str, tuple[str, str, str, Callable[[Utterance], Any]]] = {
    "frames": ("frame", "alignment", "split", frame_labels),
    "phones": ("ctc", "phones", "split", lambda u: re.sub(r"\d", "", u.phones).split()),
    "label": ("utterance", "label", "split", lambda u: u.label),
    "characters": ("ctc", "text", "split", lambda u: list(u.text)),
    "speaker": ("utterance", "speaker", "sid_split", lambda u: u.speaker),
}


def slot_parts(parts: dict[str, list]) -> list[dict[str, list]]:
    """Labels "intent;slot=value;..." -> the ``parts`` of a task for the intent and for each slot.

    An utterance without the slot has the value "". Where dev or test have a value that train never
    shows, the target is whether the slot is there at all. What never changes is no task.
    """
    said = {
        label: dict(part.rpartition("=")[::2] for part in label.split(";"))  # intent: slot ""
        for rows in parts.values()
        for _, label in rows
    }
    tasks = []
    for slot in sorted({slot for values in said.values() for slot in values}):
        found = {
            part: [(u, said[label].get(slot, "")) for u, label in rows]
            for part, rows in parts.items()
        }
        known = {value for _, value in found["train"]}
        if any(value not in known for rows in found.values() for _, value in rows):
            found = {part: [(u, str(bool(v))) for u, v in rows] for part, rows in found.items()}
        if len(known) > 1:
            tasks.append(found)
    return tasks


def probe_tasks(utterances: Sequence[Utterance], only: Sequence[str] = ()) -> list[ProbeTask]:
    """The probes that the labels of these utterances allow, for each data set by itself.

    Phones and characters are taken only where nothing before them in PROBES is there, unless
    ``only`` names them. Labels with a class in dev or test that train never shows are left out.
    Labels "intent;slot=value;..." give several tasks of one name, "slots": their mean counts.
    """
    tasks = []
    for dataset in sorted({utterance.dataset for utterance in utterances}):
        content = False
        for name, (kind, column, split, target) in PROBES.items():
            parts: dict[str, list] = {"train": [], "dev": [], "test": []}
            for utterance in utterances:
                part = getattr(utterance, split)
                if utterance.dataset == dataset and getattr(utterance, column) and part in parts:
                    parts[part].append((utterance, target(utterance)))
            if not all(parts.values()) or (only and name not in only):
                continue
            if name == "label" and any("=" in label for _, label in parts["train"]):
                title = f"slots {dataset}".strip()
                tasks += [ProbeTask(title, kind, each) for each in slot_parts(parts)]
                content = True
                continue
            if kind == "utterance":
                classes = {part: {label for _, label in rows} for part, rows in parts.items()}
                if (
                    len(classes["train"]) < 2
                    or (classes["dev"] | classes["test"]) - classes["train"]
                ):
                    continue
            elif content and not only:
                continue
            content = content or name != "speaker"
            title = next(u.label_kind for u, _ in parts["test"]) if name == "label" else ""
            title = title or {"phones": "phone errors", "characters": "character errors"}.get(name)
            tasks.append(ProbeTask(" ".join([title or name, dataset]).strip(), kind, parts))
    return tasks


FEATURE_BYTES = 4_000_000_000  # of frames that CTC tasks keep; those of LibriSpeech are 400 GB
MANY_FILES = 20_000  # from here on means over time are kept in float16; VoxCeleb's are 6 GB else


def _key(utterance: Utterance) -> str:
    """The path of an utterance, with the first sample of a piece."""
    return utterance.path if utterance.start < 0 else f"{utterance.path}:{utterance.start}"


@torch.no_grad()
def utterance_features(
    features: Features, utterance: Utterance, device: torch.device | str
) -> Tensor:
    """Hidden states (L, T, D) of one utterance alone: padding would leak into Base's GroupNorm."""
    piece = () if utterance.start < 0 else (utterance.start, utterance.samples)
    hidden_states, _ = features(load_audio(utterance.path, *piece)[None].to(device), None)
    frames = torch.cat(hidden_states).float()
    if not frames.isfinite().all():
        raise InputError(f"the features of {utterance.path} are not finite: remove or replace it")
    return frames


def extract_features(
    features: Features, tasks: Sequence[ProbeTask], device: torch.device | str
) -> dict[str, tuple]:
    """_key(utterance) -> (mean over time (L, D), frames (L, T, D) in float16 or None if unneeded).

    Where the frames that CTC tasks need take more than FEATURE_BYTES, a function that computes
    them stands in their place, and None for a mean that nobody needs.
    """
    wanted: dict[str, tuple[Utterance, set[str]]] = {}
    for task in tasks:
        for utterance in (u for part in task.parts.values() for u, _ in part):
            wanted.setdefault(_key(utterance), (utterance, set()))[1].add(task.kind)
    table, size = {}, 0
    for key, (utterance, kinds) in tqdm(wanted.items(), "probe features", leave=False):
        again = partial(utterance_features, features, utterance, device)
        full = size >= FEATURE_BYTES and "frame" not in kinds
        if full and kinds == {"ctc"}:
            table[key] = (None, again)
            continue
        frames = again()
        mean = frames.mean(dim=1).cpu()
        kept = None if kinds == {"utterance"} else again if full else frames.half().cpu()
        size += kept.nbytes if isinstance(kept, Tensor) else 0
        table[key] = (mean.half() if len(wanted) > MANY_FILES else mean, kept)
    return table


def classification_probe(
    parts: dict[str, tuple[Tensor, list]], seed: int, updates: int = 400, balanced: bool = False
) -> float:
    """Test accuracy of a linear classifier on the learned weighted sum of layers.

    ``parts`` maps train / dev / test to features (N, L, D) and N labels; where a label is a tuple,
    losses are summed and all of it must be right. Features are standardised with train's mean and
    deviation. Weight decay and update are chosen on dev. ``balanced``: all classes count the same.
    """
    rows = {part: [t if isinstance(t, tuple) else (t,) for t in parts[part][1]] for part in parts}
    slots = [sorted(set(labels)) for labels in zip(*rows["train"], strict=True)]
    codes = [{label: k for k, label in enumerate(labels)} for labels in slots]
    x, y, weights = parts["train"][0], {}, {}
    for part, labels in rows.items():
        numbers = [[of.get(c, -1) for of, c in zip(codes, row, strict=True)] for row in labels]
        y[part] = torch.tensor(numbers)  # N x slots
        _, place, count = y[part].unique(dim=0, return_inverse=True, return_counts=True)
        even = not balanced or part == "test"
        weights[part] = (torch.ones(len(labels)) if even else 1 / count[place]).double()
    moments = [(z.mean(0), z.std(0)) for z in (layer.float() for layer in x.unbind(1))]
    mean, deviation = (torch.stack(moment) for moment in zip(*moments, strict=True))  # L x D

    def train(decay: float) -> tuple[float, float]:
        """Best accuracy on dev, and the accuracy on test at the same update."""
        generator, best = torch.Generator().manual_seed(seed), (-1.0, -1.0)
        sizes = [len(labels) for labels in slots]
        mix = nn.Parameter(torch.zeros(x.shape[1]))  # of layers, before a softmax
        linear = nn.utils.skip_init(nn.Linear, x.shape[2], sum(sizes))  # draws nothing
        nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
        parameters = [mix, *linear.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay)

        def logits(part: str, rows: Tensor | slice) -> tuple[Tensor, ...]:
            z = (parts[part][0][rows].float() - mean) / (deviation + 1e-5)
            return linear(torch.einsum("l,nld->nd", mix.softmax(0), z)).split(sizes, dim=1)

        @torch.no_grad()
        def accuracy(part: str) -> float:
            guesses = torch.stack([slot.argmax(1) for slot in logits(part, slice(None))], dim=1)
            right = (guesses == y[part]).all(1)
            return ((right * weights[part]).sum() / weights[part].sum()).item()

        for update in tqdm(range(1, updates + 1), "classification probe", leave=False):
            if balanced:
                rows = torch.multinomial(weights["train"], 1024, True, generator=generator)
            else:
                rows = torch.randperm(len(x), generator=generator)[:1024]
            pairs = zip(logits("train", rows), y["train"][rows].unbind(1), strict=True)
            loss = sum(F.cross_entropy(slot, label) for slot, label in pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if update % 25 == 0 and (dev := accuracy("dev")) > best[0]:
                best = (dev, accuracy("test"))
        return best

    return max((train(decay) for decay in (0.01, 1.0)), key=lambda best: best[0])[1]


class CTCHead(nn.Module):
    """Weighted sum of layers and a few convolutions: (N, T, L, D) -> log-probs (N, T / 2, C + 1).

    SUPERB's phone head is linear: on minutes of speech that learns too little to tell models apart.
    The first convolution halves the frame rate, 25 Hz are enough for phones.
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
        x = self.norm(torch.einsum("l,ntld->ntd", self.weights.softmax(0), x))
        x = F.gelu(self.halve(x.transpose(1, 2))).transpose(1, 2)  # N x T/2 x hidden
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(x.transpose(1, 2)).transpose(1, 2))
            x = x + self.dropout(F.gelu(y))
        return self.out(x).log_softmax(-1)


def greedy_decode(log_probs: Tensor) -> list[int]:
    """(T, C + 1) -> symbols: best entry per frame, repeats merged, blanks (0) dropped."""
    return [k for k in log_probs.argmax(-1).unique_consecutive().tolist() if k != 0]


def ctc_input(x: Tensor | Callable[[], Tensor], device: torch.device | str) -> Tensor:
    """Features (L, T, D), or what computes them, as a CTC head takes them: (T, L, D)."""
    x = x if isinstance(x, Tensor) else x().half()
    return x.to(device).float().permute(1, 0, 2)


@torch.no_grad()
def ctc_error_rate(
    head: CTCHead,
    features: Sequence[Any],
    targets: Sequence[list[str]],
    frames: Callable[[Any], Tensor],
    names: Sequence[str],
    words: bool,
) -> float:
    """Edits per symbol, or per word, of greedy decoding; entry k of the head is names[k - 1]."""
    head.eval()
    edits, total = 0, 0
    pairs = zip(features, targets, strict=True)
    for x, target in tqdm(pairs, "CTC probe, error rate", len(targets), leave=False):
        decoded = [names[k - 1] for k in greedy_decode(head(frames(x)[None])[0])]
        if words:
            decoded, target = "".join(decoded).split(), "".join(target).split()
        edits += torchaudio.functional.edit_distance(decoded, target)
        total += len(target)
    return edits / total


def ctc_probe(
    parts: dict[str, tuple[list[Any], list[list[str]]]],
    seed: int,
    epochs: int = 16,
    words: bool = False,
    device: torch.device | str = "cpu",
) -> float:
    """Test error rate (edits / symbols, greedy decoding) of a small convolutional CTC head.

    ``parts`` maps train / dev / test to features [(L, T, D)], or functions that compute them, and
    target sequences. The epoch is chosen on dev. A batch holds neighbours, which should be of
    similar length. With ``words`` edits are counted in words.
    """
    names = sorted({s for target in parts["train"][1] for s in target})
    symbols = {s: k for k, s in enumerate(names, 1)}
    features, targets = parts["train"]
    batches = [range(len(features))[i : i + 16] for i in range(0, len(features), 16)]

    cuda = torch.device(device).type == "cuda"  # elsewhere the CTC loss may not be there
    device = device if cuda else "cpu"
    frames = partial(ctc_input, device=device)
    error_rate = partial(ctc_error_rate, frames=frames, names=names, words=words)
    _, layers, width = frames(features[0]).shape
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.manual_seed(seed)
        head = CTCHead(layers, width, len(symbols)).to(device)
        optimizer = torch.optim.Adam(head.parameters(), lr=2e-3)
        best_dev, best_test = math.inf, math.inf
        for epoch in range(epochs):
            head.train()
            title = f"CTC probe, pass {epoch + 1} of {epochs}"
            for i in tqdm(torch.randperm(len(batches)).tolist(), title, leave=False):
                x = [frames(features[j]) for j in batches[i]]
                y = [[symbols[s] for s in targets[j]] for j in batches[i]]
                loss = F.ctc_loss(
                    head(nn.utils.rnn.pad_sequence(x, batch_first=True)).transpose(0, 1),
                    torch.tensor([k for symbols_of_one in y for k in symbols_of_one]).to(device),
                    torch.tensor([(len(one) + 1) // 2 for one in x]),
                    torch.tensor([len(symbols_of_one) for symbols_of_one in y]),
                    zero_infinity=True,
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                optimizer.step()
            if epoch >= epochs // 2 and (dev := error_rate(head, *parts["dev"])) < best_dev:
                best_dev, best_test = dev, error_rate(head, *parts["test"])
    return best_test


def run_probes(
    features: Features, tasks: Sequence[ProbeTask], device: torch.device | str, seed: int
) -> dict[str, float]:
    """Score of each task on the test part: accuracy, or error rate for CTC tasks.

    Probes are trained on train, chosen on dev and scored on test; the features stay frozen.
    """
    return score_probes(extract_features(features, tasks, device), tasks, seed, device=device)


def score_probes(
    table: dict[str, tuple],
    tasks: Sequence[ProbeTask],
    seed: int,
    updates: int = 400,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The same from features that are there already: ``table`` is extract_features's.

    ``updates`` are those of classification_probe, for many utterances at least 20 passes over
    them; CTC heads are trained on ``device``.
    """
    scores: dict[str, list[float]] = {}
    for task in tasks:
        parts = {}
        for part, rows in task.parts.items():
            if task.kind == "ctc":  # a batch holds neighbours
                rows = sorted(rows, key=lambda row: frame_count(row[0].samples))
            means, x = zip(*(table[_key(u)] for u, _ in rows), strict=True)
            targets = [target for _, target in rows]
            if task.kind == "utterance":
                x = torch.stack(means)
            elif task.kind == "frame":
                x = torch.cat([frames.transpose(0, 1) for frames in x])
                targets = list(itertools.chain(*targets))
            parts[part] = (x, targets)
        if task.kind == "ctc":
            score = ctc_probe(parts, seed, words=task.words, device=device)
        else:
            passes = 20 * len(task.parts["train"]) // 1024 if task.kind == "utterance" else 0
            score = classification_probe(parts, seed, max(updates, passes), task.balanced)
        scores.setdefault(task.name, []).append(score)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def few_labels(task: ProbeTask, share: float, seed: int) -> ProbeTask:
    """The task with a random ``share`` of its training labels, at least one of each class.

    A draw follows from the seed. dev and test stay whole.
    """
    rows = task.parts["train"]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    first = {rows[i][1]: i for i in reversed(order)}  # the first of each class in this order
    chosen = list(first.values())
    rest = [i for i in order if i not in set(chosen)]
    chosen += rest[: max(0, round(share * len(rows)) - len(chosen))]
    parts = task.parts | {"train": [rows[i] for i in sorted(chosen)]}
    return replace(task, name=f"{task.name} {100 * share:g} %", parts=parts)


LABEL_DRAWS = 5  # of a share of the labels; their scores are averaged
FEW_UPDATES = 50  # of a probe on few labels: more updates change nothing


def asks_what_was_said(task: ProbeTask) -> bool:
    """Whether the task has a label for an utterance, but not its speaker."""
    return task.kind == "utterance" and not task.name.startswith(("speaker", "sid "))


def score_budgets(
    table: dict[str, tuple],
    tasks: Sequence[ProbeTask],
    seed: int,
    shares: Sequence[float],
    device: torch.device | str,
) -> dict[str, float]:
    """score_probes, and for tasks that ask what was said also with ``shares`` of the labels.

    With one seed, every table gets the same draws of labels.
    """
    few = [
        few_labels(task, share, LABEL_DRAWS * seed + i)
        for task in filter(asks_what_was_said, tasks)
        for share in shares
        for i in range(LABEL_DRAWS)  # scores of one name are averaged
    ]
    scores = score_probes(table, tasks, seed, device=device)
    return scores | score_probes(table, few, seed, FEW_UPDATES)


# Six tasks of SUPERB (arXiv 2105.01051) on the splits of its code, s3prl. A reader below takes one
# data set through torchaudio's class, paths and labels only, and gives its folds.
Fold = dict[Any, list[tuple[Utterance, Any]]]


def _measured(path: Path) -> Utterance:
    """A whole file, its length from its header: decoding all of VoxCeleb would take hours."""
    try:
        info = soundfile.info(path)
        samples = math.ceil(info.frames * _ratio_to_16k(info.samplerate))
        if samples < FIELD:
            raise InputError(f"too short, {samples} samples at 16 kHz")
    except (soundfile.SoundFileError, OSError, InputError) as error:
        raise InputError(f"cannot use {path} ({error}): replace it") from error
    return Utterance(str(path), samples)


def listed(home: Path, data: dict[Any, Any], column: Any) -> Fold:
    """The files of each part of a torchaudio data set, with a column of their metadata."""
    fold = {}
    for part, files in data.items():
        rows = [files.get_metadata(n) for n in tqdm(range(len(files)), "labels", leave=False)]
        with ThreadPoolExecutor() as pool:
            found = pool.map(_measured, [home / row[0] for row in rows])
            found = tqdm(found, "headers", len(rows), unit="file", leave=False)
            fold[part] = [(u, row[column]) for u, row in zip(found, rows, strict=True)]
    return fold


def read_ks(root: Path) -> list[Fold]:
    """Ten words, "_unknown_" for any other, and "_silence_": the seconds of background noise.

    SUPERB cuts its silences from the same files at random; here every tenth second is for dev.
    """
    home, ten = root / "SpeechCommands", "yes no up down left right on off stop go".split()
    version = "v0.01" if (home / "speech_commands_v0.01").exists() else "v0.02"  # SUPERB has v0.01
    read = partial(datasets.SPEECHCOMMANDS, root, f"speech_commands_{version}")
    data = {"train": read(subset="training"), "dev": read(subset="validation")}
    fold = listed(home, data, 2)
    for rows in fold.values():
        rows[:] = [(u, word if word in ten else "_unknown_") for u, word in rows]
    for noise in sorted((home / f"speech_commands_{version}").glob("_background_noise_/*.wav")):
        for second in range(_measured(noise).samples // SAMPLE_RATE):
            piece = Utterance(str(noise), SAMPLE_RATE, start=second * SAMPLE_RATE)
            fold["dev" if second % 10 == 9 else "train"].append((piece, "_silence_"))
    test = sorted((home / f"speech_commands_test_set_{version}").glob("*/*.wav"))
    return [fold | {"test": [(_measured(path), path.parent.name) for path in test]}]


def read_ic(root: Path) -> list[Fold]:
    """Action, object and location of a command."""
    subsets = {"train": "train", "dev": "valid", "test": "test"}
    data = {part: datasets.FluentSpeechCommands(root, subset) for part, subset in subsets.items()}
    return [listed(root / "fluent_speech_commands_dataset", data, slice(-3, None))]


def read_sid(root: Path) -> list[Fold]:
    """1,251 speakers, the same in all parts."""
    if not (root / "iden_split.txt").is_file():  # torchaudio would download it
        raise FileNotFoundError(f"there is no {root / 'iden_split.txt'}")
    data = {part: datasets.VoxCeleb1Identification(root, part) for part in ("train", "dev", "test")}
    return [listed(root / "wav", data, 2)]


def read_er(root: Path) -> list[Fold]:
    """Neutral, happy (with excited), angry, sad: each session is once the test.

    A fifth of the others is dev; which one is drawn at random, so it is another than SUPERB's.
    """
    data = {number: datasets.IEMOCAP(root, sessions=(number,)) for number in range(1, 6)}
    sessions, folds = listed(root / "IEMOCAP", data, 3), []
    for rows in sessions.values():
        rows[:] = [(u, "hap" if label == "exc" else label) for u, label in rows if label != "fru"]
    for number, test in sessions.items():
        rest = [row for other, rows in sessions.items() if other != number for row in rows]
        rest = [rest[i] for i in np.random.default_rng(number).permutation(len(rest))]
        cut = int(0.8 * len(rest))
        folds.append({"train": rest[:cut], "dev": rest[cut:], "test": test})
    return folds


def read_asr(root: Path) -> list[Fold]:
    """Characters of the 100 clean hours: letters, apostrophe, space."""
    subsets = {"train": "train-clean-100", "dev": "dev-clean", "test": "test-clean"}
    data = {part: datasets.LIBRISPEECH(root, subset) for part, subset in subsets.items()}
    fold = listed(root / "LibriSpeech", data, 2)
    return [{part: [(u, list(text)) for u, text in rows] for part, rows in fold.items()}]


def read_pr(root: Path) -> list[Fold]:
    """Phones of the same, with stress: the first pronunciation in the CMU dictionary.

    Utterances with a word that it lacks are left out; SUPERB has a model guess their phones.
    """
    phones = dict(reversed(list(datasets.CMUDict(root))))  # the first of a word is kept
    (fold,), left_out = read_asr(root), 0
    for part, rows in fold.items():
        texts = [(u, "".join(characters).split()) for u, characters in rows]
        texts = [(u, words) for u, words in texts if phones.keys() >= set(words)]
        fold[part] = [(u, [p for word in words for p in phones[word]]) for u, words in texts]
        left_out += len(rows) - len(texts)
    tqdm.write(f"pr: {left_out} utterances left out, cmudict lacks a word", file=sys.stderr)
    return [fold]


# name -> (reader, metric, class in torchaudio.datasets, what must be there, SUPERB's head)
# fmt: off
_POOLED = "projection to 256, mean over time, linear; {} updates of 32"
_LIBRISPEECH = "LibriSpeech/ with train-clean-100/, dev-clean/, test-clean/ (www.openslr.org/12)"
SUPERB: dict[str, tuple[Callable[[Path], list[Fold]], str, str, str, str]] = {
    "ks": (read_ks, "accuracy", "SPEECHCOMMANDS",
           "SpeechCommands/ with speech_commands_v0.01/ and speech_commands_test_set_v0.01/, or "
           "both of v0.02 (download.tensorflow.org/data has a .tar.gz of each)",
           _POOLED.format("200,000")),
    "ic": (read_ic, "accuracy", "FluentSpeechCommands",
           "fluent_speech_commands_dataset/ with data/ and wavs/speakers/ (fluent.ai)",
           _POOLED.format("200,000")),
    "sid": (read_sid, "accuracy", "VoxCeleb1Identification",
            "wav/ with speakers' folders, and iden_split.txt (robots.ox.ac.uk/~vgg/data/voxceleb)",
            _POOLED.format("200,000")),
    "er": (read_er, "accuracy", "IEMOCAP",
           "IEMOCAP/ with Session1/ to Session5/, in each sentences/wav/ and dialog/EmoEvaluation/ "
           "(sail.usc.edu/iemocap)", _POOLED.format("30,000")),
    "asr": (read_asr, "WER", "LIBRISPEECH", _LIBRISPEECH,
            "two BLSTM layers of 1,024, SpecAugment; 200,000 updates of 32"),
    "pr": (read_pr, "PER", "LIBRISPEECH and CMUDict", _LIBRISPEECH
           + ", cmudict-0.7b and cmudict-0.7b.symbols (CMUDict(DIR, download=True) in Python)",
           "projection to 256, linear; 100,000 updates of 32"),
}
# fmt: on
TASKS = (*PROBES, "manifest", *SUPERB)


def superb_tasks(root: Path | str, name: str) -> list[ProbeTask]:
    """A task of SUPERB, read from the folder that is the root of torchaudio's data set."""
    read, metric, classes, needed, theirs = SUPERB[name]
    try:
        folds = read(Path(root))
        for part in ("train", "dev", "test"):
            if not all(fold[part] for fold in folds):
                raise LookupError(f"no file for {part} is there")
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split()).split(" Please ")[0].split(" Set `")[0]
        raise InputError(
            f"--task {name} reads torchaudio.datasets.{classes}, so --task-data {root} must hold "
            f"{needed}; {reason}"
        ) from error
    ours = "mean over time, linear; 400 updates of 1,024 or 20 passes"
    if metric != "accuracy":
        ours = "a small convolutional CTC head, 25 frames a second; 16 passes"
    return [
        ProbeTask(
            f"{name} {metric}",
            "utterance" if metric == "accuracy" else "ctc",
            fold,
            words=metric == "WER",
            balanced=name == "ks",  # as in SUPERB: two thirds of all are "_unknown_"
            note=f"{name}: {metric} as in SUPERB, not its head. Here: {ours}. SUPERB: {theirs}.",
        )
        for fold in folds
    ]


def labelled_tasks(manifest: Path | str, only: str) -> list[ProbeTask]:
    """Tasks for ``--evaluate``; ``only`` names some of TASKS, comma separated.

    SUPERB's are read from the folder ``manifest``; without a name: all that a manifest's columns
    allow.
    """
    names = [name for name in only.split(",") if name]
    if unknown := [name for name in names if name not in TASKS]:
        raise InputError(f"unknown --task {unknown[0]}: choose from {', '.join(TASKS)}")
    if not manifest:
        raise InputError("--evaluate needs --task-data: a manifest.tsv or the folder of a data set")
    known = [task for name in names if name in SUPERB for task in superb_tasks(manifest, name)]
    if known and set(names) <= SUPERB.keys():
        return known
    names = [name for name in names if name in PROBES]
    with tempfile.TemporaryDirectory() as folder:
        tasks = probe_tasks(scan(manifest, Path(folder) / "scan.jsonl"), names)
    if not tasks:
        raise InputError(
            f"{manifest} has no labels for {only or 'any task'}: the README lists the columns, and "
            "train, dev and test rows are all needed"
        )
    return known + tasks


def repeat(
    distil: Callable[[Any, bool, bool], dict[str, dict[str, float]]],
    config: Any,
    seeds: int,
    ablations: dict[str, dict[str, Any]],
    resume: bool,
) -> dict[str, dict[str, list[float]]]:
    """The table over several seeds; an ablation is the Config with some fields changed.

    ``distil(config, resume, baselines)`` trains and gives the rows of one run, those of its
    ``baselines`` only where the method itself runs. A row "distilled" of an ablation takes its
    name. Each run has its own folder below ``config.out``; ``resume`` does not redo finished ones.
    """
    table: dict[str, dict[str, list[float]]] = {}
    variants = {"distilled": {}, **ablations}
    for seed, (name, changes) in itertools.product(
        range(config.seed, config.seed + seeds), variants.items()
    ):
        out = Path(config.out) / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-seed-{seed}"
        run = replace(config, seed=seed, out=str(out), **changes)
        going_on = resume and on_first((out / "config.json").exists)
        if going_on and on_first((out / "results.json").exists):
            open_run(out, asdict(run), resume)  # the same settings?
        else:
            on_first(write_results, out, distil(run, going_on, not changes))
        for row, columns in on_first(read_results, out).items():
            title = row if not changes else row.replace("distilled", name)
            for column, value in columns.items():
                table.setdefault(title, {}).setdefault(column, []).append(value)
    return table


def compare(
    config: Any,
    teacher: Teacher,
    students: dict[str, Any],
    measure: Callable[..., dict[str, Any]],
    score: Callable[[nn.Module, list, torch.device, int], dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Rows of the table of a run: the teacher where there are several ``students``, and those.

    Each is a student, or one with its heads; "distilled" is there. ``measure(config, teacher,
    student, *heads, heldout)`` gives columns, of a list the mean; ``score`` gives size and probes.
    """
    models = {name: m if isinstance(m, tuple) else (m,) for name, m in students.items()}
    student = models["distilled"][0].eval()
    device = next(student.parameters()).device
    utterances = scan(config.data, Path(config.out) / "scan.jsonl", config.workers)
    _, heldout = train_and_heldout(utterances)
    tasks, rows = probe_tasks(utterances), {}
    speed = measure_speed({"teacher": teacher, "student": student}, device)
    if len(models) > 1:
        rows["teacher"] = teacher_row(teacher, tasks, device, config.seed)
    for name, model in models.items():
        found = measure(config, teacher, *model, heldout)
        means = {k: sum(v) / len(v) if isinstance(v, list) else v for k, v in found.items()}
        rows[name] = {"speed": speed["student"] / speed["teacher"], **means}
        rows[name] |= score(model[0], tasks, device, config.seed)
    return rows


def score_file(
    load_student: Callable[[str, torch.device], nn.Module],
    score: Callable[[nn.Module, list, torch.device, int], dict[str, float]],
    config: Any,
    args: argparse.Namespace,
) -> str:
    """The table of --evaluate: one student file on labelled audio."""
    device = pick_device(config.device)
    student = load_student(args.evaluate, device)
    tasks = labelled_tasks(args.task_data, args.task)
    return format_table({args.evaluate: score(student, tasks, device, config.seed)}, tasks)


def make_table(
    distil: Callable[[Any, bool, bool], dict[str, dict[str, float]]],
    config: Any,
    args: argparse.Namespace,
    claim: dict[str, dict[str, Any]],
    models: dict[str, dict[str, Any]] | None = None,
) -> str:
    """Train and evaluate as the flags say, and write the table: once, over several seeds, or beside
    the ablations of ``claim``, or with --toy beside ``models``.
    """
    out = Path(config.out)
    if not config.data:
        config = replace(config, data=str(make_toy_world(out / "toy_world")))
    ablations = claim if args.claim else models if args.toy and models else {}
    if ablations or args.seeds > 1:
        out = out / ("claim" if args.claim else "seeds" if args.seeds > 1 else "models")
        config = replace(config, out=str(out))
        rows = repeat(distil, config, args.seeds, ablations, args.resume)
    else:
        rows = distil(config, args.resume)
    return write_results(out, rows)


def draw_pruning(path: Path, found: dict[str, Any], kept: dict[str, list[float]]) -> None:
    """Picture of ``found`` (similarity "cka", "merges" and "groups" of layers) and shares ``kept``.

    Without matplotlib one line says so.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tqdm.write(f"no picture {path.name}: matplotlib is not installed", file=sys.stderr)
        return
    figure = Figure((13, 4), layout="constrained")
    tree, matrix, bars = figure.subplots(1, 3)
    places = {(i,): (i + 1.0, 0.0) for i in range(len(found["cka"]) - 1)}  # centre, height
    for height, first, second in found["merges"]:
        (x, low), (y, other) = places[tuple(first)], places[tuple(second)]
        tree.plot([x, x, y, y], [low, height, height, other], "k", lw=1)
        places[tuple(sorted(first + second))] = (x + y) / 2, height
    tree.set(title="merge tree", xlabel="layer", ylabel="1 - similarity")
    image = matrix.imshow(found["cka"], vmin=0, vmax=1, origin="lower")
    figure.colorbar(image, ax=matrix)
    names = " / ".join(",".join(map(str, group)) for group in found["groups"])
    matrix.set(title=f"similarity; groups {names}", xlabel="layer", ylabel="layer")
    for i, (name, shares) in enumerate(kept.items()):
        places_x = [n + 1 + 0.27 * (i - 1) for n in range(len(shares))]
        bars.bar(places_x, shares, 0.25, label=name.replace("_", " "))
    if kept:
        bars.set(title="kept", xlabel="convolution or Transformer layer", ylabel="share")
        bars.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def write_results(out: Path, rows: dict[str, dict[str, Any]]) -> str:
    """Keep the table as ``results.json`` and ``results.txt`` in the run folder; return the text."""
    text = format_table(rows)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    stamp = f"{command} | torch {torch.__version__} | {time.strftime('%Y-%m-%d')}"
    write_text(out / "results.json", json.dumps({"command": command, "rows": rows}, indent=1))
    write_text(out / "results.txt", f"{text}\n\n{stamp}\n")
    return text


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """The rows that write_results kept."""
    with reading(out / "results.json"):
        return json.loads((out / "results.json").read_text())["rows"]


def format_table(rows: dict[str, dict[str, Any]], tasks: Sequence[ProbeTask] = ()) -> str:
    """A Markdown table, lists (a number a seed) as mean ± deviation, and the notes of ``tasks``."""

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value
        values = value if isinstance(value, list) else [value]
        mean = float(np.mean(values))
        if all(isinstance(v, int) for v in values):
            return f"{mean:,.0f}"
        digits = 1 if abs(mean) >= 10 else 3
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{mean:.{digits}f}{spread}"

    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [["", *columns]] + [
        [name, *(cell(row[column]) if column in row else "" for column in columns)]
        for name, row in rows.items()
    ]
    widths = [max(len(line[i]) for line in body) for i in range(len(columns) + 1)]
    lines = []
    for name, *cells in body:
        cells = [text.rjust(width) for text, width in zip(cells, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([name.ljust(widths[0]), *cells])} |")
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    notes = dict.fromkeys(f"\n{task.note}" for task in tasks if task.note)
    return "\n".join([lines[0], rule, *lines[1:], *notes])


# ------------------------------------------------------------------------------------------------
# 6. Export: the same weights under the names of other libraries
# ------------------------------------------------------------------------------------------------

# A student's modules, and their names in Hugging Face's HubertModel. N is any number.
HUBERT_NAMES = {
    "feature_extractor.convs.N": "feature_extractor.conv_layers.N.conv",
    "feature_extractor.group_norm": "feature_extractor.conv_layers.0.layer_norm",
    "feature_norm": "feature_projection.layer_norm",
    "projection": "feature_projection.projection",
    "positional_conv.conv": "encoder.pos_conv_embed.conv",
    "norm": "encoder.layer_norm",
    "layers.N.q_proj": "encoder.layers.N.attention.q_proj",
    "layers.N.k_proj": "encoder.layers.N.attention.k_proj",
    "layers.N.v_proj": "encoder.layers.N.attention.v_proj",
    "layers.N.out_proj": "encoder.layers.N.attention.out_proj",
    "layers.N.attention_norm": "encoder.layers.N.layer_norm",
    "layers.N.up": "encoder.layers.N.feed_forward.intermediate_dense",
    "layers.N.down": "encoder.layers.N.feed_forward.output_dense",
    "layers.N.final_norm": "encoder.layers.N.final_layer_norm",
}
WEIGHT_NORM = {  # its two halves as torch names them, and as files on Hugging Face do
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
HUGGINGFACE = {  # what a HubertModel must be so that a student of ours computes the same
    "model_type": "hubert",
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": False,
    "conv_pos_batch_norm": False,
    "do_stable_layer_norm": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


def rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    """The name of a weight after the first line of the table, (old, new), that knows its module."""
    for old, new in table:
        if match := re.match(re.escape(old).replace("N", r"(\d+)") + r"(?=\.)", name):
            return (new.replace("N", match[1]) if "N" in old else new) + name[match.end() :]
    raise InputError(
        f"this student cannot be exported: the other library's model has no place for its {name}, "
        "so take student.pt and load_student"
    )


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A student's weights as HubertModel names their modules, on the CPU."""
    return {
        rename(name.replace(".attention.", "."), HUBERT_NAMES.items()): value.detach().cpu()
        for name, value in weights.items()
    }


def export_torchaudio(student: nn.Module, path: Path) -> None:
    """Write {"arguments" of torchaudio.models.wav2vec2_model, "state_dict"} to ``path``.

    A pruned student has "scale" (C,) as well, the factor behind its convolutions, and layers that
    are narrower than the arguments can say; one without any head gets a head of zeros, because
    torchaudio cannot do without.
    """
    weights, state = dict(student.state_dict()), {}
    scale = weights.pop("feature_extractor.scale", None)
    for name, value in renamed(weights).items():
        name = name.replace("encoder.", "encoder.transformer.")
        state[name.replace("feature_projection.", "encoder.feature_projection.")] = value
    width = student.shape.width // student.shape.attention_heads  # of a head
    for name, value in state.items():
        if "_proj." in name and not value.numel():
            state[name] = value.new_zeros([size or width for size in value.shape])
    arguments = _infer_config(state) | {"encoder_num_heads": student.shape.attention_heads}
    content = {"arguments": arguments, "state_dict": state}
    if scale is not None:
        content["scale"] = scale.cpu()
    write_atomically(path, lambda file: torch.save(content, file))


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """The file that read_safetensors reads."""
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), names[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are to be aligned

    def write(file: Any) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().tobytes())

    write_atomically(path, write)


def export_huggingface(student: nn.Module, folder: Path) -> None:
    """Write the folder that transformers.AutoModel.from_pretrained loads as a HubertModel.

    Dropout is left at 0: from_pretrained gives a model in eval mode, and who fine-tunes chooses.
    """
    shape, convs = student.shape, student.feature_extractor.convs
    state = renamed(student.state_dict())
    for ours, theirs in WEIGHT_NORM.items():
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    settings = HUGGINGFACE | {
        "architectures": ["HubertModel"],
        "conv_dim": [conv.out_channels for conv in convs],
        "num_feat_extract_layers": len(convs),
        "hidden_size": shape.width,
        "num_hidden_layers": len(student.layers),
        "num_attention_heads": shape.attention_heads,
        "intermediate_size": shape.feed_forward,
        "num_conv_pos_embeddings": shape.position_kernel,
        "num_conv_pos_embedding_groups": shape.position_groups,
        "mask_time_prob": 0.0,  # else there is a vector for masked frames to be learned
        **dict.fromkeys(("activation_dropout", "attention_dropout", "hidden_dropout"), 0.0),
        **dict.fromkeys(("feat_proj_dropout", "final_dropout", "layerdrop"), 0.0),
    }
    audio = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "do_normalize": False,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,  # the lengths of a padded batch
    }
    write_safetensors(folder / "model.safetensors", state)
    write_text(folder / "preprocessor_config.json", json.dumps(audio, indent=1))
    write_text(folder / "config.json", json.dumps(settings, indent=1))


def export(student: nn.Module, kind: str, out: Path | str) -> Path:
    """Write a student below ``out``, as ``torchaudio.pt`` or the folder ``huggingface``."""
    target = Path(out) / ("torchaudio.pt" if kind == "torchaudio" else kind)
    if target.is_file() or (target.exists() and any(target.iterdir())):
        raise InputError(f"{target} is there already: remove it, then export again")
    (export_torchaudio if kind == "torchaudio" else export_huggingface)(student, target)
    return target


def read_huggingface(folder: Path | str) -> dict[str, Any]:
    """A published folder (config.json, model.safetensors or pytorch_model.bin) as a student.pt.

    That is "config", "shape" and "state_dict" in our names. Raises InputError for what is not a
    HubertModel of HUGGINGFACE's kind.
    """
    folder = Path(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    weights = weights if weights.is_file() else folder / "pytorch_model.bin"
    if not (path.is_file() and weights.is_file()):
        raise InputError(
            f"{folder} needs config.json, and model.safetensors or pytorch_model.bin beside it"
        )
    with reading(path):
        settings = {"feat_proj_layer_norm": True}  # HubertModel's own default
        settings |= dict(json.loads(path.read_text(encoding="utf-8")))
    for name, value in HUGGINGFACE.items():
        if settings.get(name, value) != value:
            raise InputError(
                f"{path}: {name} is {settings[name]}, and only {value} is supported, as in "
                "ntu-spml/distilhubert"
            )
    with reading(path):
        shape = {
            "conv_channels": settings["conv_dim"][0],
            "width": settings["hidden_size"],
            "attention_heads": settings["num_attention_heads"],
            "feed_forward": settings["intermediate_size"],
            "position_kernel": settings["num_conv_pos_embeddings"],
            "position_groups": settings["num_conv_pos_embedding_groups"],
        }
        config = {"student_layers": settings["num_hidden_layers"]}
        if any(type(size) is not int or size < 1 for size in (*shape.values(), *config.values())):
            raise ValueError("a size is not a positive integer")
        if shape["width"] % shape["attention_heads"]:
            raise ValueError("hidden_size is not a multiple of num_attention_heads")
    found = (read_safetensors if weights.suffix == ".safetensors" else load_checkpoint)(weights)
    names, state = [(theirs, ours) for ours, theirs in HUBERT_NAMES.items()], {}
    for name, value in found.items():
        for new, old in WEIGHT_NORM.items():
            name = name.replace(f".{old}", f".{new}")
        with contextlib.suppress(InputError):  # what masks and what classifies is left out
            state[rename(name.removeprefix("hubert."), names)] = value
    return {"config": config, "shape": shape, "state_dict": state}
