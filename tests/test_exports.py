"""Students in other libraries; the recipes of README.md and recipes.md run as they stand there.

Only the paths in a recipe are replaced.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script, shake

import common
import distilhubert
from common import InputError

ROOT = Path(__file__).parent.parent
PAGES = [(ROOT / page).read_text() for page in ("README.md", ".github/recipes.md")]


def run_recipe(word, given=None, **paths):
    """Run the Python block of the pages that holds ``word``, its paths ".../NAME.xy" replaced."""
    blocks = re.findall(r"```python\n(.*?)```", "\n".join(PAGES), re.S)
    blocks = [block for block in blocks if word in block]
    assert len(blocks) == 1, f"{len(blocks)} blocks hold {word}"
    block = blocks[0]
    for old, new in paths.items():
        found = re.search(rf'"([^"]*/)?{old}(\.\w+)?"', block)
        assert found, f"the recipe for {word} names no {old}"
        block = block.replace(found[0], repr(str(new)))
    names = dict(given or {})
    exec(compile(block, f"recipe for {word}", "exec"), names)
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


def save_student(student, out):
    """A run folder ``out`` with the student."""
    config = distilhubert.Config(out=str(out))
    common.save_run(config, common.student_content("distilhubert", config, student), 0, [])
    return out


@pytest.fixture
def run_folder(student, tmp_path):
    return save_student(student, tmp_path / "run")


# ---- Hugging Face ------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def folder(transformers, student, tmp_path):
    return distilhubert.export_huggingface(student, tmp_path / "huggingface")


def states_of(model, waves, lengths=None):
    mask = None if lengths is None else torch.arange(waves.shape[1]) < lengths[:, None]
    with torch.no_grad():
        found = model(waves, attention_mask=mask, output_hidden_states=True)
    return found.hidden_states


def test_automodel_and_the_recipe_give_the_hidden_states(
    transformers, folder, student, padded_batch
):
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is transformers.HubertModel and not model.training
    assert not any(report.values()), report  # missing, unexpected, of another shape
    waves, lengths = padded_batch
    given = {"waves": [wave[:n].numpy() for wave, n in zip(waves, lengths)]}
    states = run_recipe("AutoModel", given, huggingface=folder)["hidden_states"]
    with torch.no_grad():
        padded, _ = student(waves, lengths)
        assert distance(student(waves)[0], states_of(model, waves)) < 1e-5
        assert distance(padded, states_of(model, waves, lengths)) < 1e-5
        assert distance(padded, states) < 1e-5
        without = (padded[-1] - states_of(model, waves)[-1])[1].abs().max()
    assert without > 1e-2  # the mask has to be handed over


def test_what_was_exported_is_read_back_bit_by_bit(folder, student):
    back = distilhubert.load_student(folder)
    assert not back.training and back.shape == student.shape
    before, after = student.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("form", ["safetensors", "old bin", "classifier"])
def test_a_published_folder_is_a_student(form, transformers, tmp_path, padded_batch):
    """As ntu-spml/distilhubert is published, but narrow, written by transformers."""
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
    model = shake(transformers.HubertModel(transformers.HubertConfig(**settings)))
    model.save_pretrained(tmp_path)
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
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    student = distilhubert.load_student(tmp_path)
    waves, lengths = padded_batch
    with torch.no_grad():
        assert distance(student(waves)[0], states_of(model, waves)) < 1e-5
        assert distance(student(waves, lengths)[0], states_of(model, waves, lengths)) < 1e-5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feat_proj_layer_norm", True),
        ("feat_proj_layer_norm", None),  # HuBERT Base is published without it: then it is True
        ("do_stable_layer_norm", True),
        ("feat_extract_norm", "layer"),
        ("conv_bias", True),
        ("model_type", "wavlm"),
        ("hidden_act", "relu"),
        ("conv_stride", [5, 2, 2, 2, 2, 2, 1]),
    ],
)
def test_a_folder_of_another_kind_is_refused_by_the_name_of_its_setting(name, value, folder):
    settings = json.loads((folder / "config.json").read_text()) | {name: value}
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=name):
        distilhubert.load_student(folder)


def test_a_broken_folder_is_one_sentence(folder):
    config = (folder / "config.json").read_text()
    broken = {
        "not JSON": config.rstrip()[:-1],
        "no layers": config.replace("num_hidden_layers", "x"),
        "no convolutions": re.sub(r'"conv_dim": \[.*?\]', '"conv_dim": []', config, flags=re.S),
        "no weights": config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'),
        "no config": None,
    }
    for what, content in broken.items():
        assert content != config, what
        (folder / "config.json").unlink()
        if content is not None:
            (folder / "config.json").write_text(content)
        with pytest.raises((InputError, OSError)):  # of both, common.py prints one line
            distilhubert.load_student(folder)
            pytest.fail(what)


def test_a_published_folder_goes_through_the_probes(folder, labelled):
    flags = ("--evaluate", folder, "--data", labelled, "--device", "cpu")
    table = run_script("distilhubert", *flags).stdout
    assert "colour accuracy" in table and f"| {folder} |" in table and "| parameters |" in table


def test_export_writes_below_out_alone_and_never_over_anything(
    transformers, run_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.rglob("*")}
    flags = ("--export", "huggingface", "--out", run_folder)
    target = Path(run_script("distilhubert", *flags).stdout.strip())
    added = {*tmp_path.rglob("*")} - before
    assert target == run_folder / "huggingface" and target in added
    assert all(path == target or target in path.parents for path in added)
    content = {path: path.read_bytes() for path in added if path.is_file()}
    assert "is there already" in run_script("distilhubert", *flags).stderr
    assert content == {path: path.read_bytes() for path in content}
    done = run_script("distilhubert", *flags[:2], "--out", tmp_path / "none")
    assert done.returncode == 1 and "student.pt" in done.stderr
    assert not (tmp_path / "none").exists()


def test_without_transformers_one_sentence_says_what_to_install(student, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="pip install transformers"):
        distilhubert.export_huggingface(student, tmp_path / "huggingface")
    with pytest.raises(InputError, match="pip install transformers"):
        distilhubert.load_student(tmp_path)


# ---- torchaudio, ONNX and s3prl ----------------------------------------------------------------


def test_the_recipe_for_torchaudio_gives_the_hidden_states(tmp_path, padded_batch):
    student = shake(distilhubert.Student(distilhubert.Shape(), 2, 0.1, 0.1))  # of paper size
    path = save_student(student, tmp_path / "run") / "student.pt"
    model = run_recipe("torchaudio", student=path)["model"]
    waves, lengths = padded_batch
    with torch.no_grad():
        assert distance(student(waves)[0][1:], model.extract_features(waves)[0]) < 1e-5
        padded = model.extract_features(waves, lengths)[0]
        assert distance(student(waves, lengths)[0][1:], padded) < 1e-5


def test_the_recipe_for_onnx_gives_the_hidden_states_for_any_length(
    student, run_folder, monkeypatch
):
    """Of torch's exported program, and where its packages are installed of ONNX Runtime."""
    installed = all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime")))
    path, write, programs = run_folder / "student.onnx", torch.onnx.export, []

    def export(program, f):
        assert f.endswith("/student.onnx")
        programs.append(program)
        if installed:
            write(program, f=str(path))

    monkeypatch.setattr(torch.onnx, "export", export)
    run_recipe("torch.onnx", student=run_folder / "student.pt")
    for batch, samples in ((1, 720), (3, 12_345)):
        waves = torch.randn(batch, samples)
        with torch.no_grad():
            states = student(waves)[0]
            assert distance(states, programs[0].module()(waves)[0]) < 1e-5
        if installed:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path))
            found = session.run(None, {session.get_inputs()[0].name: waves.numpy()})
            assert distance(states, [torch.from_numpy(state) for state in found[:3]]) < 1e-3


def test_the_upstream_for_s3prl_gives_the_hidden_states(student, run_folder, padded_batch):
    """s3prl calls it so: a checkpoint by keyword, a list of waves of their own lengths."""
    upstream = run_recipe("UpstreamExpert")["UpstreamExpert"]
    upstream = upstream(ckpt=run_folder / "student.pt", model_config=None, refresh=False).eval()
    assert upstream.get_downsample_rates("hidden_states") == 320
    waves, lengths = padded_batch
    with torch.no_grad():
        found = upstream([wave[:n] for wave, n in zip(waves, lengths)])["hidden_states"]
        assert distance(student(waves, lengths)[0], found) == 0


# ---- recipes that are not about students -------------------------------------------------------


def test_the_recipe_for_tensorboard_takes_the_lines_of_a_log(tmp_path):
    """Numbers, a list with a number for each layer, null where the number was not finite."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed",
    )
    log = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None, "heldout": {"L1": [0.25, 0.75], "KL": 3.0}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in log)
    (tmp_path / "log.jsonl").write_text(text)
    run_recipe("SummaryWriter", distilhubert=tmp_path)
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    found = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found["loss/value"][0] == (1, 2.0) and np.isnan(found["loss/value"][1][1])
    assert found["heldout/L1"] == [(2, 0.5)] and found["heldout/KL"] == [(2, 3.0)]


def test_the_recipe_for_deterministic_algorithms_starts_the_script(monkeypatch, capsys):
    line = r'^CUBLAS_WORKSPACE_CONFIG=\S+ python -c "(.*?)" --data DIR$'
    (code,) = re.findall(line, "\n".join(PAGES), re.M | re.S)
    monkeypatch.setattr(sys, "argv", ["-c", "--help"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        with pytest.raises(SystemExit, match="0"):
            exec(code, {})
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "DistilHuBERT" in capsys.readouterr().out


def test_links_of_the_pages_lead_somewhere():
    """To files of this repository, and to headings of README.md, results.md, recipes.md."""
    for page in (ROOT / "README.md", *(ROOT / ".github").glob("*.md")):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            file, _, heading = link.partition("#")
            target = page.parent / file if file else page
            assert target.is_file(), (page.name, link)
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading else []
            names = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in names, (page.name, link)


def test_the_recipe_for_an_old_manifest_writes_the_new_columns(tmp_path, monkeypatch):
    """Digits, and commands with slots; one slot has a value in test that is not in training."""
    old = [
        "path split speaker sid_split label label_kind text",
        "0.wav train a train one digit ONE",
        "1.wav test b dev two digit IT'S\u2028TWO",
        '2.wav train   order;drink=tea;milk="lots" intent_slots ',
        "3.wav dev   order;drink=tea intent_slots ",
        "4.wav test   pay;milk=soy intent_slots ",
        "5.wav train   pay intent_slots ",
        "6.wav train c   none ",
    ]
    lines = [line.replace(" ", "\t") for line in old]
    (tmp_path / "manifest.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run_recipe("slot_kinds")
    new = common.read_manifest(tmp_path / "manifest_labels.tsv")
    assert [Path(row.pop("path")).name for row in new] == [f"{i}.wav" for i in range(7)]
    names = ("split", "label_intent", "label_drink", "label_milk")
    commands = [
        ("train", "order", "tea", "yes"),
        ("dev", "order", "tea", "no"),
        ("test", "pay", "none", "yes"),
        ("train", "pay", "none", "no"),
    ]
    one, two, *slots, last = new
    assert one == dict(
        split="train", speaker="a", speaker_split="train", label_digit="one", text="ONE"
    )
    assert two.pop("text") == "IT'S\u2028TWO"
    assert two == dict(split="test", speaker="b", speaker_split="dev", label_digit="two")
    assert slots == [dict(zip(names, row)) for row in commands]
    assert last == dict(split="train", speaker="c")
