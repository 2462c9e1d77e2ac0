"""Students under the names of other libraries: their models give the student's hidden states.

The README's recipes are run as they stand there, with the paths replaced.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from conftest import encoder_config, shake

import common
import distilhubert
import pad
import skill
from common import InputError

ROOT = Path(__file__).parent.parent


def recipe(word, **paths):
    """The block of README.md's section "Use it elsewhere" that holds ``word``."""
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^##+ Use it elsewhere\n(.*?)^##+ Tests", readme, re.M | re.S)
    assert section, "README.md has no section 'Use it elsewhere' before 'Tests'"
    blocks = [b for b in re.findall(r"```python\n(.*?)```", section[1], re.S) if word in b]
    assert len(blocks) == 1, f"{len(blocks)} blocks hold {word}"
    block = blocks[0]
    for old, new in paths.items():
        found = re.search(rf'"[^"]*/{old}(\.\w+)?"', block)
        assert found, f"the recipe for {word} names no {old}"
        block = block.replace(found[0], repr(str(new)))
    return block


def run_recipe(word, names=None, **paths):
    names = names or {}
    exec(compile(recipe(word, **paths), "README.md", "exec"), names)
    return names


def distance(ours, theirs):
    """Largest difference between two lists of hidden states."""
    assert len(ours) == len(theirs)
    assert min(state.abs().max() for state in ours) > 0.5  # there is something to get wrong
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs))


@pytest.fixture
def student():
    torch.manual_seed(0)
    return shake(distilhubert.Student(distilhubert.Shape(24, 16, 4, 48, 16, 4), 2, 0.1, 0.1))


@pytest.fixture
def run_folder(student, tmp_path):
    config = distilhubert.Config(out=str(tmp_path / "run"))
    common.save_run(config.out, common.student_content("distilhubert", config, student), 0, 0)
    return tmp_path / "run"


def command(monkeypatch, capsys, module, *flags):
    """Exit code, stdout and stderr of a script's command line, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    code = 0
    try:
        common.run(module.main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int | None) else print(stop.code) or 1
    return code, capsys.readouterr().out


# ---- Hugging Face ------------------------------------------------------------------------------


def states_of(model, waves, lengths=None):
    mask = None if lengths is None else torch.arange(waves.shape[1]) < lengths[:, None]
    with torch.no_grad():
        found = model(waves, attention_mask=mask, output_hidden_states=True)
    return found.hidden_states


def test_automodel_loads_the_folder_and_gives_the_hidden_states(student, tmp_path, padded_batch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = common.export(student, "huggingface", tmp_path)
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is transformers.HubertModel and not model.training
    assert not any(report.values()), report  # missing, unexpected, of another shape
    waves, lengths = padded_batch
    with torch.no_grad():
        plain = distance(student(waves)[0], states_of(model, waves))
        padded = distance(student(waves, lengths)[0], states_of(model, waves, lengths))
        without = (student(waves, lengths)[0][-1] - states_of(model, waves)[-1])[1].abs().max()
    print(f"largest difference to HubertModel: {plain:.1e}, with padding {padded:.1e}")
    assert max(plain, padded) < 1e-5 and without > 1e-2  # the mask has to be handed over


def test_the_recipe_for_transformers_gives_the_padded_batch(student, tmp_path, padded_batch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = common.export(student, "huggingface", tmp_path)
    waves, lengths = padded_batch
    given = {"waves": [wave[:n].numpy() for wave, n in zip(waves, lengths)]}
    states = run_recipe("AutoModel", given, huggingface=folder)["hidden_states"]
    assert distance([s.detach() for s in student(waves, lengths)[0]], states) < 1e-5


def published(transformers, folder, **changes):
    """A folder as ntu-spml/distilhubert is published, but narrow, written by transformers."""
    settings = dict(
        conv_dim=[24] * 7,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_proj_layer_norm=False,
        mask_time_prob=0.05,
    )
    torch.manual_seed(1)
    model = shake(transformers.HubertModel(transformers.HubertConfig(**settings | changes)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("form", ["safetensors", "old bin", "classifier"])
def test_a_published_folder_is_a_student(form, tmp_path, padded_batch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, weights = published(transformers, tmp_path), tmp_path / "model.safetensors"
    if form != "safetensors":
        state = {
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): value
            for name, value in model.state_dict().items()
        }
        if form == "classifier":  # fine-tuned: a prefix, and a head
            state = {f"hubert.{name}": value for name, value in state.items()}
            state["projector.weight"] = torch.ones(3, 16)
        weights.unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    student = distilhubert.load_student(tmp_path)
    waves, lengths = padded_batch
    with torch.no_grad():
        assert distance(student(waves)[0], states_of(model, waves)) < 1e-5
        assert distance(student(waves, lengths)[0], states_of(model, waves, lengths)) < 1e-5


def test_a_published_folder_goes_through_the_probes(
    tmp_path, audio_folder, monkeypatch, capsys, student
):
    folder = common.export(student, "huggingface", tmp_path)
    rows = ["path\tsplit\tlabel\tlabel_kind"]
    for number in range(12):
        split = "train" if number < 6 else "dev" if number < 9 else "test"
        rows.append(f"{audio_folder / f'{number:02d}.wav'}\t{split}\t{'ab'[number % 2]}\tkind")
    (tmp_path / "manifest.tsv").write_text("\n".join(rows) + "\n")
    task = ("--task", "manifest", "--task-data", tmp_path / "manifest.tsv", "--device", "cpu")
    code, table = command(monkeypatch, capsys, distilhubert, "--evaluate", folder, *task)
    assert code == 0 and "kind" in table and str(folder) in table and "| parameters |" in table


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feat_proj_layer_norm", True),
        ("do_stable_layer_norm", True),
        ("feat_extract_norm", "layer"),
        ("conv_bias", True),
        ("model_type", "wavlm"),
        ("hidden_act", "relu"),
        ("conv_stride", [5, 2, 2, 2, 2, 2, 1]),
    ],
)
def test_a_folder_of_another_kind_is_refused_by_the_name_of_its_setting(
    name, value, student, tmp_path
):
    path = common.export(student, "huggingface", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(InputError, match=f"config.json: {name} is "):
        distilhubert.load_student(path.parent)


def test_hubert_base_which_is_published_without_that_setting_is_refused(student, tmp_path):
    path = common.export(student, "huggingface", tmp_path) / "config.json"
    settings = json.loads(path.read_text())
    del settings["feat_proj_layer_norm"]  # then HubertModel has the LayerNorm
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="feat_proj_layer_norm is True"):
        distilhubert.load_student(path.parent)


def test_a_broken_folder_is_one_sentence(student, tmp_path):
    folder = common.export(student, "huggingface", tmp_path)
    config = (folder / "config.json").read_text()
    broken = {
        "not JSON": config[:-1],
        "no object": "[1]",
        "no layers": config.replace("num_hidden_layers", "x"),
        "no Linear's width": config.replace('"hidden_size": 16', '"hidden_size": "16"'),
        "no convolutions": re.sub(r'"conv_dim": \[.*?\]', '"conv_dim": []', config, flags=re.S),
        "other weights": config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'),
        "no heads": config.replace('"num_attention_heads": 4', '"num_attention_heads": 0'),
    }
    for what, content in broken.items():
        assert content != config, what
        (folder / "config.json").write_text(content)
        with pytest.raises(InputError) as caught:
            with torch.no_grad():
                distilhubert.load_student(folder)(torch.zeros(1, 400))
        assert "\n" not in str(caught.value), what
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="needs config.json, and model.safetensors"):
        distilhubert.load_student(folder)


def test_written_safetensors_are_read_back_and_by_the_library(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).T,  # not contiguous
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(7),
        "half": torch.randn(3).half(),
    }
    common.write_safetensors(tmp_path / "x.safetensors", tensors)
    read = [common.read_safetensors]
    if importlib.util.find_spec("safetensors"):
        from safetensors.torch import load_file

        read.append(load_file)
    for function in read:
        found = function(tmp_path / "x.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    length = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0


# ---- torchaudio --------------------------------------------------------------------------------


def test_the_recipe_for_torchaudio_gives_the_hidden_states(student, tmp_path, padded_batch):
    path = common.export(student, "torchaudio", tmp_path)
    for lengths in (None, padded_batch[1]):
        given = {"waveforms": padded_batch[0], "lengths": lengths}
        found = run_recipe("Identity", given, torchaudio=path)
        ours, frames = student(padded_batch[0], lengths)
        largest = distance(ours[1:], found["hidden_states"])
        print(f"largest difference to torchaudio: {largest:.1e}")
        assert largest < 1e-5
        assert lengths is None or torch.equal(frames, found["lengths"])


PRUNED = dict(
    conv_channels=(5, 6, 7, 8, 9, 10, 11),
    width=24,
    attention_heads=4,
    heads=((0, 2), (), (1, 2, 3)),  # the second layer has no head left
    feed_forward=(7, 5, 0),
    position_kernel=16,
    position_groups=4,
    position_buckets=0,
)


def test_the_recipe_for_a_pruned_student_gives_the_hidden_states(tmp_path, padded_batch):
    torch.manual_seed(0)
    student = shake(skill.Student(skill.Shape(**PRUNED), 0.1))  # its scale is not 1 either
    path = common.export(student, "torchaudio", tmp_path)
    for lengths in (None, padded_batch[1]):
        given = {"waveforms": padded_batch[0], "lengths": lengths}
        found = run_recipe("num_heads", given, torchaudio=path)
        largest = distance(student(padded_batch[0], lengths)[0][1:], found["hidden_states"])
        print(f"largest difference of a pruned student to torchaudio: {largest:.1e}")
        assert largest < 1e-5


def test_what_was_pruned_from_a_wavlm_is_refused_in_one_sentence(tmp_path):
    student = skill.Student(skill.Shape(**PRUNED | {"position_buckets": 8}), 0.1)
    with pytest.raises(
        InputError, match="cannot be exported.*student.pt and load_student"
    ) as error:
        common.export(student, "torchaudio", tmp_path)
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


def test_pads_student_is_torchaudios_as_it_is(tmp_path):
    model = torchaudio.models.wav2vec2_model(**encoder_config(), aux_num_out=None)
    torch.save(pad.student_file(pad.Config(), pad.Student(model)), tmp_path / "student.pt")
    saved = torch.load(tmp_path / "student.pt")
    torchaudio.models.wav2vec2_model(**saved["arguments"]).load_state_dict(saved["state_dict"])


# ---- command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["huggingface", "torchaudio"])
def test_export_writes_below_out_alone_and_never_over_anything(
    kind, run_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*")}
    code, printed = command(
        monkeypatch, capsys, distilhubert, "--export", kind, "--out", run_folder
    )
    target = Path(printed.strip())
    assert code == 0 and target.parent == run_folder
    added = {path for path in tmp_path.rglob("*")} - before
    assert added and all(path == target or target in path.parents for path in added)
    content = {path: path.read_bytes() for path in added if path.is_file()}
    code, printed = command(
        monkeypatch, capsys, distilhubert, "--export", kind, "--out", run_folder
    )
    assert code == 1 and "is there already" in printed and len(printed.splitlines()) == 1
    assert content == {path: path.read_bytes() for path in content}


def test_export_without_a_student_or_to_an_unknown_library_is_refused(
    tmp_path, monkeypatch, capsys
):
    code, printed = command(
        monkeypatch, capsys, distilhubert, "--export", "huggingface", "--out", tmp_path
    )
    assert code == 1 and "student.pt does not exist" in printed
    assert not any(tmp_path.iterdir())
    for module, kind in ((distilhubert, "tensorflow"), (skill, "huggingface"), (pad, "torchaudio")):
        assert command(monkeypatch, capsys, module, "--export", kind, "--out", tmp_path)[0] == 2


# ---- ONNX and s3prl ----------------------------------------------------------------------------


def test_the_recipe_for_onnx_gives_a_program_for_any_length(
    student, run_folder, tmp_path, monkeypatch
):
    """As far as torch.export, for which nothing needs to be installed."""
    programs = []
    monkeypatch.setattr(torch.onnx, "export", lambda program, f: programs.append(program))
    run_recipe("torch.onnx", student=run_folder / "student.pt")
    for batch, samples in ((1, 720), (3, 12_345)):
        waves = torch.randn(batch, samples)
        with torch.no_grad():
            assert distance(student(waves)[0], programs[0].module()(waves)[0]) < 1e-5


def test_onnx_gives_the_hidden_states(student, run_folder):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    block = recipe("torch.onnx", student=run_folder / "student.pt")
    block = re.sub(r'"[^"]*\.onnx"', repr(str(run_folder / "student.onnx")), block)
    exec(compile(block, "README.md", "exec"), {})
    session = runtime.InferenceSession(str(run_folder / "student.onnx"))
    for batch, samples in ((1, 720), (3, 12_345)):
        waves = torch.randn(batch, samples)
        found = session.run(None, {session.get_inputs()[0].name: waves.numpy()})
        theirs = [torch.from_numpy(np.asarray(state)) for state in found[:3]]
        with torch.no_grad():
            assert distance(student(waves)[0], theirs) < 1e-3


def test_the_upstream_for_s3prl_gives_the_hidden_states(student, run_folder, padded_batch):
    """s3prl calls it so: a checkpoint by keyword, a list of waves of their own lengths."""
    upstream = run_recipe("UpstreamExpert")["UpstreamExpert"]
    upstream = upstream(ckpt=run_folder / "student.pt", model_config=None, refresh=False).eval()
    assert upstream.get_downsample_rates("hidden_states") == 320
    waves, lengths = padded_batch
    with torch.no_grad():
        found = upstream([wave[:n] for wave, n in zip(waves, lengths)])["hidden_states"]
        assert distance(student(waves, lengths)[0], found) == 0


def test_an_export_imports_no_other_library(run_folder):
    """transformers and safetensors are not needed to write for them."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('transformers', 'safetensors', 'onnx', 's3prl')))\n"
        "import common, distilhubert\n"
        f"student = distilhubert.load_student({str(run_folder / 'student.pt')!r})\n"
        "for kind in ('huggingface', 'torchaudio'):\n"
        f"    common.export(student, kind, {str(run_folder)!r})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
