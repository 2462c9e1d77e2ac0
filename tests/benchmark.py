"""Time the methods at paper size on a CPU: Base models with random weights, nothing to load.

    python tests/benchmark.py                              # 4 x 4 s: training steps and features
    python tests/benchmark.py --methods distilhubert       # one of them

The first table is about training: seconds of audio per second, the parts of an update, floating
point operations and their share of what a large matrix product reaches in the same run. The last
one is about what a user runs: one utterance, all hidden states; beside it the same two layers in
torchaudio and, where it is installed, transformers. Medians over interleaved rounds: machines are
shared and differ, so compare only what stands in one table. ``python tests/gpu.py OUT`` measures
the training loops themselves on a GPU.
"""

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import distilhubert
import gendistiller
import lstm_dkd
import pad
import skill

PARTS = ("teacher", "forward", "backward", "optimizer")


class Step(NamedTuple):
    """One method's training step, and what a user of its student runs."""

    targets: Callable[[Tensor], Any]  # the teacher's part: waves (B, S) -> targets
    loss: Callable[[Tensor, Any], Tensor]
    trained: nn.ModuleList  # the student and its heads
    features: Callable[[Tensor], Any] | None  # None: not another row of features
    student: nn.Module


def random_teacher(kind: str, device: torch.device) -> common.Teacher:
    """A paper-size teacher with random weights."""
    model = torchaudio.models.wavlm_base() if kind == "wavlm" else torchaudio.models.hubert_base()
    return common.Teacher(model, f"random {kind}", normalise=False).to(device)


def distilhubert_step(device: torch.device) -> Step:
    config, teacher = distilhubert.Config(), random_teacher("hubert", device)
    student, heads = distilhubert.build(config, teacher)

    def loss(waves: Tensor, targets: Tensor) -> Tensor:
        predicted = heads(student(waves)[0][-1])
        return distilhubert.distillation_loss(predicted, targets, config.cosine_weight)[0]

    return Step(
        lambda waves: distilhubert.target_states(teacher, waves, config.target_layers),
        loss,
        nn.ModuleList([student, heads]),
        student,
        student,
    )


def gendistiller_step(device: torch.device, variant: str, kind: str = "wavlm") -> Step:
    """With the history of the middle of training: one half the teacher's, one the student's own."""
    config = gendistiller.Config(variant=variant)
    teacher = random_teacher(kind, device)
    student = gendistiller.build(config, teacher)

    def loss(waves: Tensor, targets: Tensor) -> Tensor:
        given = torch.arange(len(waves), device=waves.device) % 2 == 0
        predicted = torch.stack(student(waves, None, targets, given)[0][1:])
        return gendistiller.distillation_loss(predicted, targets, config.cosine_weight)[0]

    return Step(
        lambda waves: gendistiller.target_states(teacher, waves, config.target_layers),
        loss,
        nn.ModuleList([student]),
        student,
        student,
    )


def lstm_dkd_step(device: torch.device) -> Step:
    """With HuBERT Base as the teacher, as the others have it, and a random cluster head."""
    config, teacher = lstm_dkd.Config(), random_teacher("hubert", device)
    teacher.final_proj = nn.Linear(768, 256).to(device)
    teacher.label_embeddings = torch.randn(500, 256, device=device)
    student, head = lstm_dkd.build(config, teacher)

    def targets(waves: Tensor) -> Tensor:
        hidden = teacher(waves)[-1]
        with torch.autocast(waves.device.type, enabled=False):
            return teacher.logits(hidden.float())

    def loss(waves: Tensor, targets: Tensor) -> Tensor:
        hidden = student(waves)[0][-1]
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
    )


def pruned_shape(shape: skill.Shape) -> skill.Shape:
    """A student of act 4, about as large as DistilHuBERT's; real gates leave different widths.

    Each layer is cut to the same width, and the convolutions to 384 of 512 channels, which leaves
    35 % of the operations as in DPHuBERT's pruned WavLM.
    """
    heads = tuple(range(max(1, shape.attention_heads // 4)))
    return replace(
        shape,
        conv_channels=tuple(channels * 3 // 4 for channels in shape.conv_channels),
        kept_heads=(heads,) * len(shape.kept_heads),
        feed_forward=tuple(round(0.1585 * units) for units in shape.feed_forward),  # 487 of 3072
    )


def skill_step(device: torch.device, act: int) -> Step:
    """Act 3, the whole WavLM with gates, or act 4, pruned."""
    config, teacher = skill.Config(), random_teacher("wavlm", device)
    student, projections, hard_concrete = skill.build(config, teacher)
    groups = [(0,), (1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]
    if act == 4:
        student = skill.Student(pruned_shape(student.shape), config.dropout).to(device)

    def loss(waves: Tensor, targets: Tensor) -> Tensor:
        gates = hard_concrete.sample() if act == 3 else None
        states, _ = student(waves, gates=gates)
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
    )


def pad_step(device: torch.device) -> Step:
    """PAD-SLocal with 2.7 words a second; the pass for P(S) is part of its targets.

    Its student has the shape of HuBERT Base, whose row of features is also PAD's.
    """
    config, student = pad.Config(), pad.Student(torchaudio.models.wav2vec2_base()).to(device)
    bert = common.TextTeacher().requires_grad_(False).to(device)

    def lengths(waves: Tensor) -> Tensor:
        return torch.full((len(waves),), waves.shape[1])

    def targets(waves: Tensor) -> tuple[pad.Units, Tensor, Tensor]:
        pieces = round(2.7 * waves.shape[1] / common.SAMPLE_RATE)
        text = pad.text_units(config, bert, [torch.arange(1000, 1002 + pieces)] * len(waves))
        return text, *student.prior(waves, lengths(waves))

    def loss(waves: Tensor, found: tuple[pad.Units, Tensor, Tensor]) -> Tensor:
        text, prior, frame_mask = found
        speech = pad.Units(student(waves, lengths(waves))[0][-1], prior, frame_mask)
        return pad.alignment_loss(speech, text, config.alignment, config.widths)[0]

    return Step(targets, loss, nn.ModuleList([student]), None, student)


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


def time_step(step: Step, optimizer: torch.optim.Optimizer, waves: Tensor) -> list[float]:
    """Seconds of each of PARTS in one update."""
    marks = [time.perf_counter()]
    optimizer.zero_grad(set_to_none=True)
    targets = step.targets(waves)
    marks.append(time.perf_counter())
    loss = step.loss(waves, targets)
    marks.append(time.perf_counter())
    loss.backward()
    marks.append(time.perf_counter())
    nn.utils.clip_grad_norm_(step.trained.parameters(), 5.0)
    optimizer.step()
    marks.append(time.perf_counter())
    return [end - start for start, end in zip(marks, marks[1:], strict=False)]


def make_optimizer(step: Step) -> torch.optim.Optimizer:
    return torch.optim.AdamW(step.trained.parameters(), lr=1e-4, fused=True)


class CountFlops(TorchDispatchMode):
    """Floating point operations of an update, from those of its forward passes.

    What is computed with gradients counts three times: its backward pass takes twice as many. The
    counter must not see a backward pass (torch's formula for a grouped convolution is wrong there)
    nor a fused attention, which has no formula on a CPU: sdpa_kernel(SDPBackend.MATH).
    """

    def __init__(self) -> None:
        super().__init__()
        lstms = (torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten._cudnn_rnn)
        self.formulas = flop_registry | dict.fromkeys(lstms, shape_wrapper(common.lstm_flops))
        self.flops = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        if formula := self.formulas.get(function.overloadpacket):
            passes = 3 if torch.is_grad_enabled() else 1
            self.flops += passes * formula(*args, **kwargs or {}, out_val=result)
        return result


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP per second of a product of two matrices of this size: the best of ten."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def count_flops(step: Step, waves: Tensor) -> float:
    """Floating point operations of an update."""
    with sdpa_kernel(SDPBackend.MATH), CountFlops() as counter:
        step.loss(waves[:1], step.targets(waves[:1]))
    return counter.flops * len(waves)


def training_table(steps: dict[str, Step], waves: Tensor, rounds: int) -> dict[str, dict]:
    """Rows of the methods' training steps, timed in turn."""
    optimizers = {name: make_optimizer(step) for name, step in steps.items()}
    parts: dict[str, list[list[float]]] = {}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            step.trained.train()
            spent = time_step(step, optimizers[name], waves)
            if turn:  # the first is a warm-up
                parts.setdefault(name, []).append(spent)
    peak = matmul_peak(waves.device, torch.float32, 2048)
    audio, rows = waves.numel() / common.SAMPLE_RATE, {}
    for name in parts:
        seconds = statistics.median(map(sum, parts[name]))
        flops = count_flops(steps[name], waves)
        row = {"audio s/s": audio / seconds, "ms": 1000 * seconds}
        for i, part in enumerate(PARTS):
            shares = [spent[i] / sum(spent) for spent in parts[name]]
            row[f"{part} %"] = 100 * statistics.median(shares)
        row |= {"GFLOP/audio s": flops / audio / 1e9, "TFLOP/s": flops / seconds / 1e12}
        rows[name] = row | {"peak %": 100 * flops / seconds / peak}
    return rows


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


def feature_table(steps: dict[str, Step], device: torch.device) -> dict:
    """Teachers and students on one utterance: size, operations, speed against HuBERT Base."""
    teachers = {
        f"{kind} Base": random_teacher(kind.lower(), device) for kind in ("HuBERT", "WavLM")
    }
    students = {name: step for name, step in steps.items() if step.features}
    modules = {name: teacher.model for name, teacher in teachers.items()}
    modules |= {name: step.student for name, step in students.items()}
    models = teachers | {name: step.features for name, step in students.items()}
    for name, module in other_libraries(device).items():
        modules[name], models[name] = module, lambda waves, module=module: module(waves)
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
    args = parser.parse_args()
    device, where = torch.device("cpu"), f"CPU, {torch.get_num_threads()} CPU threads"
    torch.manual_seed(0)
    steps = {name: STEPS[name](device) for name in args.methods.split(",")}
    waves = 0.1 * torch.randn(args.batch, int(args.seconds * common.SAMPLE_RATE))
    print(f"training, {args.batch} x {args.seconds:g} s, {where}, torch {torch.__version__}")
    print(common.format_table(training_table(steps, waves, args.rounds)))
    print("\nall hidden states of 1 x 10 s")
    print(common.format_table(feature_table(steps, device)))


if __name__ == "__main__":
    main()
