"""Time the methods at paper size: Base models with random weights, nothing to load.

    python tests/benchmark.py                              # 4 x 4 s: training steps and features
    python tests/benchmark.py --batch 24 --seconds 15.6    # a paper-size batch, for a GPU
    python tests/benchmark.py --methods distilhubert       # one of them
    python tests/benchmark.py --amp                        # on a CPU in bf16 as well
    python tests/benchmark.py --compile                    # with torch.compile as well
    python tests/benchmark.py --data DIR                   # and from DIR's files, decoded meanwhile
    python tests/benchmark.py --profile                    # and where the time of a step goes

The first table is about training: seconds of audio per second, the parts of an update, floating
point operations and their share of what a large matrix product reaches in the same run; FLOP/B is
their number per byte that goes in and out of torch's operations; "recipe h" are the hours that all
updates of the method's defaults would take. The last one is about what a user runs: one utterance,
all hidden states; beside it the same two layers in torchaudio and, where it is installed,
transformers. Medians over interleaved rounds: machines are shared and differ, so compare only what
stands in one table.
"""

import argparse
import importlib.util
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchaudio
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import distilhubert
import gendistiller
import lstm_dkd
import pad
import skill

PARTS = ("teacher", "forward", "backward", "optimizer")
COMPILED = " compiled"


class Step(NamedTuple):
    """One method's training step, and what a user of its student runs."""

    targets: Callable[[Tensor], Any]  # the teacher's part: waves (B, S) -> targets
    loss: Callable[[Tensor, Any], Tensor]
    trained: nn.ModuleList  # the student and its heads
    features: Callable[[Tensor], Any] | None  # None: not another row of features
    student: nn.Module
    recipe: float  # seconds of audio in all updates of the defaults
    frozen: Callable[[Tensor], Any] = lambda _: None  # what of the loss has no backward


def forward_of(student: nn.Module, compiled: bool) -> Callable:
    """What the training loop calls, as with --compile."""
    return torch.compile(student) if compiled else student


def random_teacher(kind: str, device: torch.device, compiled: bool = False) -> common.Teacher:
    """A paper-size teacher with random weights."""
    model = torchaudio.models.wavlm_base() if kind == "wavlm" else torchaudio.models.hubert_base()
    if compiled:  # as with --compile
        model.feature_extractor.compile()
    return common.Teacher(model, f"random {kind}", normalise=False).to(device)


def distilhubert_step(device: torch.device, compiled: bool = False) -> Step:
    config, teacher = distilhubert.Config(), random_teacher("hubert", device, compiled)
    student, heads = distilhubert.build(config, teacher)
    forward = forward_of(student, compiled)

    def loss(waves: Tensor, targets: Tensor) -> Tensor:
        predicted = heads(forward(waves)[0][-1])
        return distilhubert.distillation_loss(predicted, targets, config.cosine_weight)[0]

    return Step(
        lambda waves: distilhubert.target_states(teacher, waves, config.target_layers),
        loss,
        nn.ModuleList([student, heads]),
        student,
        student,
        config.steps * config.batch_seconds,
    )


def gendistiller_step(
    device: torch.device, compiled: bool, variant: str, kind: str = "wavlm"
) -> Step:
    """With the history of the middle of training: one half the teacher's, one the student's own."""
    config = gendistiller.Config(variant=variant)
    teacher = random_teacher(kind, device, compiled)
    student = gendistiller.build(config, teacher)
    forward = forward_of(student, compiled)

    def loss(waves: Tensor, targets: Tensor) -> Tensor:
        given = torch.arange(len(waves), device=waves.device) % 2 == 0
        predicted = torch.stack(forward(waves, None, targets, given)[0][1:])
        return gendistiller.distillation_loss(predicted, targets, config.cosine_weight)[0]

    return Step(
        lambda waves: gendistiller.target_states(teacher, waves, config.target_layers),
        loss,
        nn.ModuleList([student]),
        student,
        student,
        config.steps * config.batch_seconds,
    )


def lstm_dkd_step(device: torch.device, compiled: bool = False) -> Step:
    """With HuBERT Base as the teacher, as the others have it, and a random cluster head."""
    config, teacher = lstm_dkd.Config(), random_teacher("hubert", device, compiled)
    teacher.final_proj = nn.Linear(768, 256).to(device)
    teacher.label_embeddings = torch.randn(500, 256, device=device)
    student, head = lstm_dkd.build(config, teacher)
    forward = forward_of(student, compiled)

    def targets(waves: Tensor) -> Tensor:
        hidden = teacher(waves)[-1]
        with torch.autocast(waves.device.type, enabled=False):
            return teacher.logits(hidden.float())

    def loss(waves: Tensor, targets: Tensor) -> Tensor:
        hidden = forward(waves)[0][-1]
        with torch.autocast(waves.device.type, enabled=False):
            logits = head(hidden.float())
        target = targets.argmax(-1)
        return lstm_dkd.distillation_loss(logits, targets, target, config.loss, config.beta)[0]

    return Step(
        targets,
        loss,
        nn.ModuleList([student, head]),
        student,
        student,
        config.steps * config.batch_seconds,
    )


def skill_step(device: torch.device, compiled: bool, act: int) -> Step:
    """Act 3, the whole WavLM with gates, or act 4, pruned to DistilHuBERT's size.

    Each layer is cut to the same width, and the convolutions to 384 channels, which leaves 35 % of
    the operations as in DPHuBERT's pruned WavLM; real gates leave layers of different widths.
    """
    config, teacher = skill.Config(), random_teacher("wavlm", device, compiled)
    student, projections, hard_concrete = skill.build(config, teacher)
    groups = [(0,), (1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]
    if act == 4:
        left = dict(kept_heads=((0, 1, 2),) * 12, feed_forward=(487,) * 12)
        shape = replace(student.shape, conv_channels=(384,) * 7, **left)
        student = skill.Student(shape, config.dropout).to(device)
    forward = forward_of(student, compiled)
    steps = skill.pruning_steps(config)

    def loss(waves: Tensor, targets: Tensor) -> Tensor:
        gates = hard_concrete.sample() if act == 3 else None
        states, _ = forward(waves, gates=gates)
        predicted = projections(skill.group_means(states, groups), groups)
        loss = skill.distillation_loss(predicted, targets)[0]
        if act == 3:
            size = hard_concrete.expected_size(student.shape)
            sparsity = 1 - size / skill.full_size(student.shape)
            loss = loss + skill.sparsity_loss(sparsity, config.sparsity, hard_concrete.multipliers)
        return loss

    return Step(
        lambda waves: skill.group_means(skill.teacher_states(teacher, waves), groups),
        loss,
        nn.ModuleList([student, projections, *([hard_concrete] if act == 3 else [])]),
        student if act == 4 else None,
        student,
        (steps if act == 3 else config.steps - steps) * config.batch_seconds,
    )


def pad_step(device: torch.device, compiled: bool = False) -> Step:
    """PAD-SLocal with 2.7 words a second; the pass for P(S) is part of its targets.

    Its student has the shape of HuBERT Base, whose row of features is also PAD's.
    """
    config, student = pad.Config(), pad.Student(torchaudio.models.wav2vec2_base()).to(device)
    bert = common.TextTeacher().requires_grad_(False).to(device)
    forward = forward_of(student, compiled)

    def lengths(waves: Tensor) -> Tensor:
        return torch.full((len(waves),), waves.shape[1])

    def targets(waves: Tensor) -> tuple[pad.Units, Tensor, Tensor]:
        pieces = round(2.7 * waves.shape[1] / common.SAMPLE_RATE)
        text = pad.text_units(config, bert, [torch.arange(1000, 1002 + pieces)] * len(waves))
        return text, *student.prior(waves, lengths(waves))

    def loss(waves: Tensor, found: tuple[pad.Units, Tensor, Tensor]) -> Tensor:
        text, prior, frame_mask = found
        speech = pad.Units(forward(waves, lengths(waves))[0][-1], prior, frame_mask)
        return pad.alignment_loss(speech, text, config.alignment, config.widths)[0]

    def frozen(waves: Tensor) -> None:
        student.convolve(waves, lengths(waves))

    recipe = config.steps * config.batch_seconds
    return Step(targets, loss, nn.ModuleList([student]), None, student, recipe, frozen)


STEPS = {
    "distilhubert": distilhubert_step,
    "gendistiller 2d": partial(gendistiller_step, variant="2d"),
    "gendistiller recurrent": partial(gendistiller_step, variant="recurrent"),
    "gendistiller parallel": partial(gendistiller_step, variant="parallel"),
    "lstm_dkd": lstm_dkd_step,
    "skill act 3": partial(skill_step, act=3),
    "skill act 4": partial(skill_step, act=4),
    "pad": pad_step,
}


def time_step(
    step: Step, optimizer: torch.optim.Optimizer, waves: Tensor, amp: bool, wait: bool = True
) -> list[float]:
    """Seconds of each of PARTS in one update, with or without bf16 autocast.

    ``wait`` for a GPU to end each part.
    """

    def now() -> float:
        if waves.is_cuda and wait:
            torch.cuda.synchronize()
        return time.perf_counter()

    marks = [now()]
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(waves.device.type, torch.bfloat16, amp):
        targets = step.targets(waves)
        marks.append(now())
        loss = step.loss(waves, targets)
    marks.append(now())
    loss.backward()
    marks.append(now())
    nn.utils.clip_grad_norm_(step.trained.parameters(), 5.0)
    optimizer.step()
    marks.append(now())
    return [end - start for start, end in zip(marks, marks[1:], strict=False)]


def make_optimizer(step: Step) -> torch.optim.Optimizer:
    return torch.optim.AdamW(step.trained.parameters(), lr=1e-4, fused=True)


def make_step(amp: bool = False) -> Callable[[Tensor], object]:
    """DistilHuBERT's whole step on the CPU, to be timed beside other people's."""
    step = distilhubert_step(torch.device("cpu"))
    step.trained.train()
    optimizer = make_optimizer(step)
    return lambda waves: time_step(step, optimizer, waves, amp)


def make_step_bf16() -> Callable[[Tensor], object]:
    """The same as with --amp."""
    return make_step(amp=True)


class CountBytes(TorchDispatchMode):
    """Bytes of the tensors that go in and out of torch's operations; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        if not function.is_view:
            tensors = tree_leaves((args, kwargs, result))
            self.bytes += sum(x.nbytes for x in tensors if isinstance(x, Tensor))
        return result


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product: the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def profile(step: Step, waves: Tensor, amp: bool) -> str:
    """The dozen operations that take most of an update's time."""
    optimizer, kind = make_optimizer(step), waves.device.type
    time_step(step, optimizer, waves, amp)
    with torch.profiler.profile() as seen:
        time_step(step, optimizer, waves, amp)
    return seen.key_averages().table(f"self_{kind}_time_total", 12, max_name_column_width=40)


def count_flops(step: Step, waves: Tensor) -> float:
    """Floating point operations of an update; backward counts twice the forward.

    (torch's counter takes the gradient of a grouped convolution for that of a full one.)
    """
    one = waves[:1]
    targets = step.targets(one)
    parts = (lambda: step.targets(one), lambda: step.loss(one, targets), lambda: step.frozen(one))
    counts = []
    for part in parts:
        with common.count_flops() as counter, torch.no_grad():
            part()
        counts.append(counter.get_total_flops())
    teacher, student, frozen = counts
    return (teacher + 3 * student - 2 * frozen) * len(waves)


def time_updates(
    step: Step, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor], amp: bool
) -> tuple[float, float]:
    """Updates one after another, as in training: (seconds of audio, seconds that they took).

    Nothing waits for the device before the last of them is done.
    """
    device, samples, start = next(step.trained.parameters()).device, 0, time.perf_counter()
    for waves in batches:
        samples += waves.numel()
        time_step(step, optimizer, waves.to(device, non_blocking=True), amp, wait=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return samples / common.SAMPLE_RATE, time.perf_counter() - start


def training_table(
    steps: dict[str, Step], waves: Tensor, rounds: int, precisions: tuple[bool, ...]
) -> dict[str, dict]:
    """Rows of the methods' training steps, timed in turn; ``precisions``: with bf16 autocast?"""
    optimizers = {name: make_optimizer(step) for name, step in steps.items()}
    parts: dict[tuple[str, bool], list[list[float]]] = {}
    whole: dict[tuple[str, bool], list[float]] = {}
    memory: dict[tuple[str, bool], float] = {}
    for turn in range(rounds + 1):
        for name, amp in itertools.product(steps, precisions):
            step = steps[name]
            step.trained.train()
            if waves.is_cuda:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()  # all methods' weights
            spent = time_step(step, optimizers[name], waves, amp)
            seconds = sum(spent)
            if waves.is_cuda:
                memory[name, amp] = (torch.cuda.max_memory_allocated() - held) / 2**30
                seconds = time_updates(step, optimizers[name], [waves] * 5, amp)[1] / 5
            if turn:  # the first is a warm-up
                parts.setdefault((name, amp), []).append(spent)
                whole.setdefault((name, amp), []).append(seconds)
    dtypes = {amp: torch.bfloat16 if amp else torch.float32 for amp in precisions}
    peak = {amp: matmul_peak(waves.device, dtype) for amp, dtype in dtypes.items()}
    audio, rows = waves.numel() / common.SAMPLE_RATE, {}
    for name, amp in parts:
        seconds, eager = statistics.median(whole[name, amp]), name.removesuffix(COMPILED)
        flops = count_flops(steps[eager], waves)
        with CountBytes() as moved:
            time_step(steps[eager], optimizers[eager], waves, amp)
        row = {"audio s/s": audio / seconds, "ms": 1000 * seconds}
        for i, part in enumerate(PARTS):
            shares = [spent[i] / sum(spent) for spent in parts[name, amp]]
            row[f"{part} %"] = 100 * statistics.median(shares)
        row |= {"GFLOP/audio s": flops / audio / 1e9, "TFLOP/s": flops / seconds / 1e12}
        row |= {"peak %": 100 * flops / seconds / peak[amp], "FLOP/B": flops / moved.bytes}
        if waves.is_cuda:
            row["GiB beside weights"] = memory[name, amp]
        row["recipe h"] = steps[name].recipe / audio * seconds / 3600
        rows[f"{name} bf16" if amp else name] = row
    return rows


def file_table(
    steps: dict[str, Step], data: Path, batch_seconds: float, updates: int, workers: int, amp: bool
) -> dict[str, dict]:
    """The same from files: audio seconds per second, beside batches that are there already."""
    rows: dict[str, dict] = {}
    utterances = common.scan(data, None, workers)
    longest = distilhubert.Config().crop_seconds

    def batches(count: int) -> Iterable[Tensor]:
        loader = common.load_batches(utterances, batch_seconds, longest, 0, 0, count, workers)
        return iter(loader)

    for name, step in steps.items():
        step.trained.train()
        optimizer, kept = make_optimizer(step), list(batches(updates))
        time_updates(step, optimizer, kept, amp)  # a warm-up: every length once
        audio, seconds = time_updates(step, optimizer, kept, amp)
        decoded, its_seconds = time_updates(step, optimizer, batches(updates), amp)
        row = {"ready, audio s/s": audio / seconds, "files, audio s/s": decoded / its_seconds}
        rows[name] = row | {"ratio": row["files, audio s/s"] / row["ready, audio s/s"]}
    start = time.perf_counter()
    samples = sum(waves.numel() for waves in batches(updates))
    speed = samples / common.SAMPLE_RATE / (time.perf_counter() - start)
    return rows | {"loader alone": {"files, audio s/s": speed}}


def other_libraries(device: torch.device) -> dict[str, nn.Module]:
    """Two layers of HuBERT Base as other libraries run them; waves -> hidden states."""
    arguments = torchaudio.pipelines.HUBERT_BASE._params | {"encoder_num_layers": 2}
    model = torchaudio.models.wav2vec2_model(**arguments)
    models = {"torchaudio, 2 layers": model}
    if importlib.util.find_spec("transformers"):
        import transformers

        config = transformers.HubertConfig(num_hidden_layers=2, feat_proj_layer_norm=False)
        models["transformers, 2 layers"] = transformers.HubertModel(config)
    return {name: model.to(device) for name, model in models.items()}


def feature_table(steps: dict[str, Step], device: torch.device, amp: bool) -> dict:
    """Teachers and students on one utterance: size, operations, speed against HuBERT Base.

    ``amp``: the students once more with bf16 autocast.
    """
    teachers = {
        f"{kind} Base": random_teacher(kind.lower(), device) for kind in ("HuBERT", "WavLM")
    }
    students = {name: step for name, step in steps.items() if step.features}
    modules = {name: teacher.model for name, teacher in teachers.items()}
    modules |= {name: step.student for name, step in students.items()}
    models = teachers | {name: step.features for name, step in students.items()}
    for name, module in other_libraries(device).items():
        modules[name], models[name] = module, lambda waves, module=module: module(waves)
    if amp:
        for name, step in students.items():
            modules[f"{name} bf16"] = step.student
            autocast = torch.autocast(device.type, torch.bfloat16)
            models[f"{name} bf16"] = autocast(step.features)
    for module in modules.values():
        module.eval()
    speed = common.measure_speed(models, device)
    rows = {}
    for name, features in models.items():
        rows[name] = {
            "parameters": common.count_parameters(modules[name]),
            "GMAC/s": common.count_macs(features, device) / 1e9,
        }
        rows[name] |= {"audio s/s": speed[name], "ratio": speed[name] / speed["HuBERT Base"]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--methods", default=",".join(STEPS), help="comma separated [all]")
    add("--batch", type=int, default=4, help="utterances in a training step [4]")
    add("--seconds", type=float, default=4.0, help="length of each [4]")
    add("--rounds", type=int, default=7, help="repetitions that are timed [7]")
    add("--device", default="auto", help="auto, cpu, cuda [auto]")
    add("--amp", action="store_true", help="on a CPU: with bf16 autocast as well")
    add("--compile", action="store_true", help="with torch.compile as well: takes minutes")
    add("--data", type=Path, metavar="DIR", help="time training from DIR's files, too")
    add("--workers", type=int, default=4, help="with --data: processes that decode [4]")
    add("--profile", action="store_true", help="print where the time of each step goes")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    where += f", {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    torch.manual_seed(0)
    names = args.methods.split(",")
    steps = {name: STEPS[name](device, False) for name in names}
    students = dict(steps)
    if args.compile:
        steps |= {f"{name}{COMPILED}": STEPS[name](device, True) for name in names}
    waves = 0.1 * torch.randn(args.batch, int(args.seconds * common.SAMPLE_RATE), device=device)
    print(f"training, {args.batch} x {args.seconds:g} s, {where}")
    precisions = (True,) if waves.is_cuda else (False, True) if args.amp else (False,)
    print(common.format_table(training_table(steps, waves, args.rounds, precisions)))
    if args.data:
        data = args.data, args.batch * args.seconds, 3 * args.rounds, args.workers
        kind = "bf16" if precisions[-1] else "float32"
        print(f"\ntraining from {args.data} in {kind}, {args.workers} processes to decode")
        print(common.format_table(file_table(steps, *data, precisions[-1])))
    print("\nall hidden states of 1 x 10 s")
    print(common.format_table(feature_table(students, device, args.amp)))
    for name, step in students.items() if args.profile else ():
        print(f"\n{name}\n{profile(step, waves, precisions[-1])}")


if __name__ == "__main__":
    main()
