"""Time one paper-size DistilHuBERT training step: HuBERT Base shapes, random weights.

    python tests/benchmark.py                             # 4 x 4 s on this machine
    python tests/benchmark.py --batch 24 --seconds 15.6   # a paper-size batch, for a GPU

Prints, for each part of the step, seconds of audio per second and its share of the step; on CUDA
also the achieved TFLOP/s and the peak memory. Medians over rounds. Machines are shared and differ:
compare only what stands in one table.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchaudio
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import distilhubert

PARTS = ("teacher forward", "student forward", "backward", "clip and optimizer")


def make_parts(device: torch.device) -> Callable[[Tensor], list[float]]:
    """The step of distilhubert.train as a function: waves (B, S) -> seconds of each part."""
    config = distilhubert.Config()
    teacher = common.Teacher(torchaudio.models.hubert_base(), "random", normalise=False).to(device)
    student, heads = distilhubert.build(config, teacher)
    student.train(), heads.train()
    parameters = [*student.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, config.lr, config.betas, config.eps, fused=device.type == "cuda"
    )

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(waves: Tensor) -> list[float]:
        marks = [now()]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, config.amp and device.type == "cuda"):
            targets = distilhubert.target_states(teacher, waves, config.target_layers)
            marks.append(now())
            predicted = heads(student(waves)[0][-1])
            loss, _ = distilhubert.distillation_loss(predicted, targets, config.cosine_weight)
        marks.append(now())
        loss.backward()
        marks.append(now())
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        marks.append(now())
        return [end - start for start, end in zip(marks, marks[1:], strict=False)]

    return step


def make_step() -> Callable[[Tensor], object]:
    """The whole step on the CPU, to be timed beside others."""
    return make_parts(torch.device("cpu"))


def count_flops(seconds: float, device: torch.device) -> float:
    """Floating point operations of a step on one utterance; backward counts twice the forward.

    (torch's counter takes the gradient of a grouped convolution for that of a full one.)
    """
    config = distilhubert.Config()
    teacher = common.Teacher(torchaudio.models.hubert_base(), "random", normalise=False).to(device)
    student, heads = distilhubert.build(config, teacher)
    trained = common.count_macs(lambda w, n: heads(student(w)[0][-1]), device, seconds)
    return 2 * seconds * (common.count_macs(teacher, device, seconds) + 3 * trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="utterances [4]")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each [4]")
    parser.add_argument("--rounds", type=int, default=7, help="steps that are timed [7]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda [auto]")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    torch.manual_seed(0)
    waves = 0.1 * torch.randn(args.batch, int(args.seconds * common.SAMPLE_RATE), device=device)
    step = make_parts(device)
    flops = count_flops(args.seconds, device) * args.batch
    step(waves)  # warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [step(waves) for _ in range(args.rounds)]
    whole = statistics.median(sum(parts) for parts in times)
    audio = waves.numel() / common.SAMPLE_RATE
    rows = {}
    for i, name in enumerate(PARTS):
        spent = statistics.median(parts[i] for parts in times)
        rows[name] = {
            "audio s/s": audio / spent,
            "ms": 1000 * spent,
            "share %": 100 * spent / whole,
        }
    rows["whole step"] = {"audio s/s": audio / whole, "ms": 1000 * whole, "share %": 100.0}
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{args.batch} x {args.seconds:g} s, {where}, {torch.get_num_threads()} CPU threads")
    print(common.format_table(rows))
    print(
        f"{flops / audio / 1e9:.1f} GFLOP per second of audio, {flops / whole / 1e12:.2f} TFLOP/s"
    )
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
