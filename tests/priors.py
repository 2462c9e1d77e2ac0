"""What the significance priors of PAD weigh: does the speech model's attention prefer speech?

    python tests/priors.py                                  # the toy world and its speech model
    python tests/priors.py --data DIR --student NAME        # your audio, another speech model

A row of numbers, means over utterances of at most ten seconds: the entropy of P(S) over that of a
uniform one; P(S) over its mean in quiet frames (25 dB below the loud ones) and in all others; the
share of frames that are quiet, of anchors that are, and of anchors with another one within three
frames.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

import common
import pad

XI = sorted(pad.Config().widths)[len(pad.Config().widths) // 2]


@torch.no_grad()
def look(student: pad.Student, wave: Tensor) -> dict[str, float]:
    """The row of one utterance, wave (S,)."""
    hidden_states, frames = student(wave[None], torch.tensor([len(wave)]))
    valid = torch.ones(1, int(frames), dtype=torch.bool)
    prior = pad.significance(student.received(hidden_states, frames), valid)
    units = pad.Units(hidden_states[-1], prior, valid)
    anchors, p = pad.choose_anchors(units, XI, False)[0][0], prior[0]
    level = 10 * wave.unfold(0, common.FIELD, common.HOP).square().mean(1).clamp(min=1e-12).log10()
    quiet = level[: len(p)] < level.quantile(0.9) - 25
    apart = (anchors[:, None] - anchors).abs() + len(p) * torch.eye(len(anchors))
    return {
        "entropy": float(-(p * p.log()).sum() / np.log(len(p))),
        "P quiet": float(p[quiet].mean() * len(p)),
        "P other": float(p[~quiet].mean() * len(p)),
        "frames quiet": float(quiet.float().mean()),
        "anchors quiet": float(quiet[anchors].float().mean()),
        "anchors crowded": float((apart.amin(1) <= 3).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default="", help="folder of audio or manifest.tsv; none: toy world"
    )
    parser.add_argument("--student", default="toy", help="as pad.py's --student")
    parser.add_argument("--utterances", type=int, default=100)
    args = parser.parse_args()
    student = pad.build(pad.Config(student=args.student))
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or common.make_toy_world(Path(folder) / "toy_world")
        rows = common.scan(data, Path(folder) / "scan.jsonl")
        rows = [row for row in rows if row.samples > 2 * common.SAMPLE_RATE][: args.utterances]
        waves = [common.load_audio(row.path)[: 10 * common.SAMPLE_RATE] for row in rows]
    found = [look(student, wave) for wave in waves]
    mean = {name: float(np.nanmean([row[name] for row in found])) for name in found[0]}
    print(common.format_table({f"{args.student}, {len(found)} utterances": mean}))


if __name__ == "__main__":
    common.run(main)
