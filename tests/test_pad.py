"""pad.py: text model, tokenizer, priors, losses, student, training, exact resume, evaluation."""

import copy
import math
from dataclasses import replace

import numpy as np
import priors
import pytest
import soundfile
import torch
import torchaudio
from conftest import BERT_PIECES as VOCABULARY
from conftest import BERT_SETTINGS as SETTINGS
from conftest import (
    KNOWN,
    SAID,
    encoder_config,
    large,
    make_hubert,
    pretrain_config,
    published_weights,
    write_bert,
)

import common
import pad
from common import InputError

# ------------------------------------------------------------------------------------------------
# BERT
# ------------------------------------------------------------------------------------------------

IDS = torch.tensor([[2, 5, 6, 7, 8, 9, 10, 3], [2, 7, 5, 3, 0, 0, 0, 0]])
VALID = IDS != 0


EXTRA = {  # what the published file holds beside the encoder
    "bert.pooler.dense.weight": torch.zeros(8, 8),
    "bert.embeddings.position_ids": torch.arange(16)[None],
    "cls.predictions.bias": torch.zeros(12),
    "cls.seq_relationship.weight": torch.zeros(2, 8),
}


def old_names(weights):
    """As in the files of 2018: a prefix, gamma and beta."""
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    return renamed | EXTRA


def loop_bert(weights, ids, settings=SETTINGS):
    """Hidden states and maps of one sentence from the paper's formulas, a head and a row at a time.

    ``ids`` is a list without padding; returns [(N, D)] and [layer][head] -> (N, N), in float64.
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
        out, per_head = torch.zeros_like(x), []
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            a = torch.zeros(len(ids), len(ids), dtype=torch.float64)
            for row in range(len(ids)):
                e = [math.exp(q[row, cut] @ key / math.sqrt(size)) for key in k[:, cut]]
                a[row] = torch.tensor(e, dtype=torch.float64) / sum(e)
            out[:, cut] = a @ v[:, cut]
            per_head.append(a)
        maps.append(per_head)
        x = norm(x + linear(out, f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
        y = linear(x, f"{at}intermediate.dense")
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = norm(x + linear(y, f"{at}output.dense"), f"{at}output.LayerNorm")
        states.append(x)
    return states, maps


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("names", ["as saved today", "with the prefix", "of 2018"])
def test_bert_equals_a_loop_over_heads_and_rows_whatever_the_file(kind, names, tmp_path):
    plain = published_weights()
    weights = {
        "as saved today": plain,
        "with the prefix": {f"bert.{k}": v for k, v in plain.items()} | EXTRA,
        "of 2018": old_names(plain),
    }[names]
    model, _ = pad.load_bert(write_bert(tmp_path, weights, kind=kind))
    hidden_states, received = model.double()(IDS, VALID)
    assert len(hidden_states) == 4 and received.shape == (3, 2, 8)
    for row, count in enumerate(VALID.sum(1).tolist()):
        states, maps = loop_bert(plain, IDS[row, :count].tolist())
        for ours, expected in zip(hidden_states, states):
            torch.testing.assert_close(ours[row, :count], expected, rtol=1e-5, atol=1e-5)
        for layer, per_head in enumerate(maps):
            expected = torch.zeros(8, dtype=torch.float64)
            for a in per_head:
                for i in range(1, count - 1):  # without [CLS] and [SEP]
                    for j in range(1, count - 1):
                        expected[j] += a[i, j] / len(per_head)
            torch.testing.assert_close(received[layer, row], expected, rtol=1e-5, atol=1e-5)
            assert (received[layer, row, [0, *range(count - 1, 8)]] == 0).all()


def test_weights_in_half_precision_are_widened(tmp_path):
    halves = {name: tensor.half() for name, tensor in published_weights().items()}
    model, _ = pad.load_bert(write_bert(tmp_path, halves, kind="safetensors"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.word.weight, halves["embeddings.word_embeddings.weight"].float())


def test_norms_add_1e12_to_the_variance(tmp_path):
    weights = {name: 1e-3 * tensor for name, tensor in published_weights().items()}
    model, _ = pad.load_bert(write_bert(tmp_path, weights))  # all variances are below 1e-5
    states, _ = loop_bert(weights, IDS[0].tolist())
    hidden_states, _ = model.double()(IDS[:1], VALID[:1])
    for ours, expected in zip(hidden_states, states):
        torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=1e-10)


def test_bert_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = SETTINGS | {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3}
    config = transformers.BertConfig(**settings, attn_implementation="eager")
    reference = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    vocabulary = VOCABULARY[:5] + [f"word{i}" for i in range(45)]
    model, _ = pad.load_bert(write_bert(tmp_path, reference.state_dict(), settings, vocabulary))
    ids = torch.randint(5, 50, (3, 11), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(11) < torch.tensor([11, 6, 3])[:, None]
    with torch.no_grad():
        expected = reference(
            ids, valid.long(), output_hidden_states=True, output_attentions=True, return_dict=True
        )
    hidden_states, received = model(ids, valid)
    for ours, theirs in zip(hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-4, atol=1e-4)
    pieces = pad.word_pieces(valid)[:, None]
    for ours, maps in zip(received, expected.attentions, strict=True):
        theirs = (maps * pieces[..., None]).mean(1).sum(1) * pieces[:, 0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_and_the_mode_does_not_matter(tmp_path):
    model, _ = pad.load_bert(write_bert(tmp_path))
    together, received = model(IDS, VALID)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    alone, received_alone = model(IDS[1:, :4], VALID[1:, :4])
    for a, b in zip(together, alone):
        torch.testing.assert_close(a[1:, :4], b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(received[:, 1:, :4], received_alone)
    model.train()
    for a, b in zip(together, model(IDS, VALID)[0]):
        torch.testing.assert_close(a[VALID], b[VALID], rtol=1e-4, atol=1e-5)


def test_word_pieces_are_all_but_the_first_and_last_valid_one_and_padding():
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    expected = [[False, True, True, False], [False, True, False, False], [False] * 4]
    assert pad.word_pieces(valid).tolist() == expected


def test_attention_received_against_loops():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 5, 4, generator=generator, dtype=torch.float64)  # B H N d
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    counted = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 1, 0, 0]]).bool()
    for rows in (valid, counted):
        expected = torch.zeros(2, 5, dtype=torch.float64)
        for b in range(2):
            for i in range(5):
                for h in range(3):
                    e = [
                        math.exp(query[b, h, i] @ key[b, h, j] / 2) if valid[b, j] else 0.0
                        for j in range(5)
                    ]
                    for j in range(5):
                        if rows[b, i] and rows[b, j]:
                            expected[b, j] += e[j] / sum(e) / 3
        given = pad.attention_received(query, key, valid, None if rows is valid else rows)
        torch.testing.assert_close(given, expected)
        assert (given[~rows] == 0).all()
        single = pad.attention_received(query.float(), key.float(), valid, rows)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)
    q = query.clone().requires_grad_()
    assert not pad.attention_received(q, key, valid).requires_grad
    with torch.autocast("cpu", torch.bfloat16):  # bf16 would keep three digits
        rough = pad.attention_received(query.float(), key.float(), valid, counted)
    torch.testing.assert_close(rough, single, rtol=1e-6, atol=1e-7)
    halves = query.bfloat16(), key.bfloat16()  # what the projections give there
    exact = pad.attention_received(*(half.float() for half in halves), valid, counted)
    assert torch.equal(pad.attention_received(*halves, valid, counted), exact)


@pytest.mark.parametrize(
    "what, word",
    [
        ("no weights", "has no model.safetensors"),
        ("no vocab", "has no vocab.txt"),
        ("no config", "has no config.json"),
        ("a key is missing", "encoder.layer.1.output.dense.bias is missing"),
        ("a key too many", "has a encoder.layer.3.output.dense.bias"),
        ("relu", "hidden_act is relu"),
        ("eps", "layer_norm_eps is 1e-05"),
        ("another width", "is (24, 8) where config.json asks for (20, 8)"),
        ("another vocabulary", "has 11 lines"),
        ("no unknown", "has no [UNK]"),
        ("cased", "is a cased model"),
        ("no entry", "config.json is damaged or of another version ('hidden_size')"),
        ("no json", "config.json is damaged"),
        ("heads", "3 heads do not share a width 8"),
        ("latin", "vocab.txt is damaged"),
        ("damaged", "is not a readable checkpoint"),
    ],
)
def test_what_is_not_bert_is_one_sentence(what, word, tmp_path):
    weights, settings, vocabulary = published_weights(), dict(SETTINGS), list(VOCABULARY)
    if what == "a key is missing":
        del weights["encoder.layer.1.output.dense.bias"]
    if what == "a key too many":
        weights["encoder.layer.3.output.dense.bias"] = torch.zeros(8)
    if what == "another width":
        weights["encoder.layer.2.intermediate.dense.weight"] = torch.zeros(24, 8)
    settings |= {"relu": {"hidden_act": "relu"}, "eps": {"layer_norm_eps": 1e-5}}.get(what, {})
    settings |= {"num_attention_heads": 3} if what == "heads" else {}
    if what == "no entry":
        del settings["hidden_size"]
    vocabulary = {
        "another vocabulary": vocabulary[:-1],
        "no unknown": ["unknown" if piece == "[UNK]" else piece for piece in vocabulary],
        "cased": [*vocabulary[:-1], "Light"],
    }.get(what, vocabulary)
    # The random weights fit SETTINGS whatever the settings say.
    folder = write_bert(tmp_path / "bert", weights, settings, vocabulary)
    gone = {"no weights": "pytorch_model.bin", "no vocab": "vocab.txt", "no config": "config.json"}
    if what in gone:
        (folder / gone[what]).unlink()
    if what == "no json":
        (folder / "config.json").write_text("{")
    if what == "latin":
        (folder / "vocab.txt").write_bytes(b"caf\xe9\n")
    if what == "damaged":
        (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and nothing")
    with pytest.raises(InputError) as error:
        pad.load_bert(folder)
    assert word in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------

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
    ids = common.Tokenizer(PIECES)(text)
    assert [PIECES[i] for i in ids] == ["[CLS]", *pieces, "[SEP]"]


def test_a_long_text_is_cut_before_its_end_mark():
    ids = common.Tokenizer(PIECES)("the " * 600)
    assert len(ids) == 512 and ids[0] == 2 and ids[-1] == 3 and set(ids[1:-1]) == {20}
    assert common.Tokenizer(PIECES, positions=4)("the lights on") == [2, 20, 8, 3]


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
    words += [
        "中国",
        "日本語",
        "ひらがな",
        "한글",
        "αβγ",
        "джж",
        "ﬁne",
        "x" * 100,
        "x" * 101,
        "e\u0301e",
    ]
    words += [
        "\u200b",
        "\u00ad",
        "\x00",
        "\ufffd",
        "\x07",
        "a\x85b",
        "a\u2028b",
        "\u00a0",
        "\u3000",
    ]
    words += ["½", "x²", "😀", "#tag", "a_b", "10:30", "$5.00", "ЖЖ", "\U00020000", "豈"]
    ours = common.Tokenizer(pieces)
    for _ in range(500):
        chosen = [
            words[i] if i < len(words) else "".join(rng.choice([*letters, *marks], 4))
            for i in rng.integers(len(words) + 12, size=rng.integers(0, 9))
        ]
        text = str(rng.choice([" ", "  ", "\t", "", "\n", "-"])).join(chosen)
        assert ours(text) == reference(text)["input_ids"], repr(text)


# ------------------------------------------------------------------------------------------------
# Toy BERT
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """An empty cache and a training of three updates."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(common.TEXT_TRAINING, "updates", 3)
    monkeypatch.setitem(common.TEXT_TRAINING, "sentences", 40)
    return tmp_path / "checkpoints"


def test_toy_bert_is_made_once_and_loads_in_the_published_form(quick, monkeypatch):
    state = torch.get_rng_state()
    folder = pad.toy_bert()
    assert torch.equal(torch.get_rng_state(), state)
    names = {"config.json", "vocab.txt", "pytorch_model.bin"}
    assert {path.name for path in folder.iterdir()} == names
    assert list(quick.iterdir()) == [folder]  # nothing temporary is left
    model, tokenizer = pad.load_bert(folder)
    assert model.shape.width == 64
    pieces = list(tokenizer.ids)
    ids = tokenizer("Turn on the LIGHTS, heating; unheard")
    spelled = " ".join(pieces[i] for i in ids)
    start = "[CLS] turn on the light ##s [UNK] heat ##ing [UNK] "
    assert spelled == start + "u ##n ##h ##e ##a ##r ##d [SEP]"
    hidden_states, received = model(torch.tensor([ids]), torch.ones(1, len(ids)).bool())
    assert torch.isfinite(hidden_states[-1]).all() and (received >= 0).all()
    monkeypatch.setattr(common, "tqdm", lambda *_, **__: pytest.fail("trained twice"))
    assert pad.toy_bert() == folder


def test_another_recipe_is_another_folder_and_an_interrupted_one_is_none(quick, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            pad.toy_bert()
    assert list(quick.iterdir()) == []
    first = pad.toy_bert()
    monkeypatch.setitem(common.TEXT_TRAINING, "updates", 2)
    assert pad.toy_bert() != first


def test_two_processes_may_make_the_toy_bert_at_once(quick, monkeypatch):
    folder, move = pad.toy_bert(), common.os.replace

    def after_the_other(source, target):
        if str(target) == str(folder):
            move(kept, folder)
        return move(source, target)

    kept = folder.rename(folder.with_name("other"))
    monkeypatch.setattr(common.os, "replace", after_the_other)
    assert pad.toy_bert() == folder and (folder / "vocab.txt").exists()
    assert list(quick.iterdir()) == [folder]


def test_toy_paragraphs_keep_one_intent_and_all_sentences(quick):
    tokenizer = common.Tokenizer(common.text_vocabulary())
    paragraphs = common.text_paragraphs(tokenizer, np.random.default_rng(0))
    ends = [ids.count(tokenizer.ids["[SEP]"]) for ids in paragraphs]
    assert sum(ends) == 40 and max(ends) <= common.TEXT_TRAINING["paragraph"] and max(ends) > 1
    assert all(ids[0] == 2 and ids.count(2) == 1 and ids[-1] == 3 for ids in paragraphs)
    assert all(1 not in ids for ids in paragraphs)  # nothing of the toy world is unknown
    assert max(map(len, paragraphs)) <= common.TEXT_MODEL["positions"]


# ------------------------------------------------------------------------------------------------
# Speech with its transcripts
# ------------------------------------------------------------------------------------------------


def small_config(tiny_teacher, bert_folder, spoken, out, **changes):
    settings = dict(
        data=str(spoken),
        teacher=str(bert_folder),
        student=str(tiny_teacher),
        out=str(out),
        workers=0,
        device="cpu",
        steps=8,
        batch_seconds=3.0,
        longest_seconds=2.0,
        widths=(2, 4, 8),
        lr=1e-3,
        log_every=2,
        save_every=4,
    )
    return pad.Config(**(settings | changes))


def shaken_student(**changes):
    return pad.Student(make_hubert(encoder_config(**changes)).wav2vec2).eval()


def random_units(seed, sizes, longest, width=6):
    """Units of the given sizes in float64 with random priors; rubbish where nothing is valid."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(sizes), longest, width, generator=generator, dtype=torch.float64)
    valid = torch.arange(longest) < torch.tensor(sizes)[:, None]
    prior = torch.rand(len(sizes), longest, generator=generator, dtype=torch.float64) * valid
    return pad.Units(hidden, prior / prior.sum(1, keepdim=True), valid)


@pytest.fixture
def both():
    return random_units(0, [23, 9, 14], 23), random_units(1, [4, 5, 2], 5)


# ---- equations ----------------------------------------------------------------------------------


def loop_significance(maps, sizes):
    """Eq. 1 from attention maps [layer][utterance][head][row][column], plain Python."""
    priors = []
    for b, size in enumerate(sizes):
        prior = [0.0] * size
        for layer in maps:
            heads = layer[b]
            received = [
                sum(sum(head[row][m] for head in heads) / len(heads) for row in range(size))
                for m in range(size)
            ]
            for m in range(size):
                prior[m] += received[m] / sum(received) / len(maps)
        priors.append(prior)
    return priors


def test_eq1_significance_matches_loop_over_heads_and_layers():
    torch.manual_seed(0)
    sizes, longest, heads = [7, 3], 7, 2
    valid = torch.arange(longest) < torch.tensor(sizes)[:, None]
    maps, received = [], []
    for _ in range(3):
        query, key = torch.randn(2, 2, heads, longest, 4, dtype=torch.float64)
        received.append(pad.attention_received(query, key, valid))
        layer = []
        for b, size in enumerate(sizes):  # each utterance without its padding
            scores = query[b, :, :size] @ key[b, :, :size].mT / 2
            layer.append(scores.softmax(-1).tolist())
        maps.append(layer)
    prior = pad.significance(torch.stack(received), valid)
    for row, expected in zip(prior.tolist(), loop_significance(maps, sizes), strict=True):
        assert row[: len(expected)] == pytest.approx(expected, rel=1e-9)
        assert all(value == 0 for value in row[len(expected) :])  # padding gets exactly nothing
        assert sum(row) == pytest.approx(1)


def test_eq1_each_layer_counts_the_same_however_much_attention_it_has():
    received = torch.tensor([[[3.0, 1.0]], [[10.0, 30.0]]])  # two layers of one utterance
    assert pad.significance(received, torch.ones(1, 2).bool()).tolist() == [[0.5, 0.5]]


def test_eq1_what_padding_received_does_not_count():
    received = torch.tensor([[[3.0, 1.0, 50.0]]])
    valid = torch.tensor([[True, True, False]])
    assert pad.significance(received, valid).tolist() == [[0.75, 0.25, 0.0]]


def test_eq1_uniform_attention_gives_the_uniform_prior():
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    query = torch.zeros(2, 2, 5, 4)
    received = pad.attention_received(query, torch.randn(2, 2, 5, 4), valid)
    prior = pad.significance(received[None], valid)
    torch.testing.assert_close(prior, pad.uniform(valid))
    assert pad.uniform(valid)[1].tolist() == [0.5, 0.5, 0, 0, 0]


def test_eq2_global_loss_matches_loop(both):
    speech, text = both
    for b, value in enumerate(pad.global_loss(speech, text).tolist()):
        total = 0.0
        for d in range(6):
            s = sum(float(speech.prior[b, i] * speech.hidden[b, i, d]) for i in range(23))
            t = sum(float(text.prior[b, j] * text.hidden[b, j, d]) for j in range(5))
            total += abs(s - t)  # a sum over D, not a mean: S10
        assert value == pytest.approx(total, rel=1e-12)


def test_eq2_with_uniform_priors_is_the_distance_of_means(both):
    speech, text = (each._replace(prior=pad.uniform(each.valid).double()) for each in both)
    for b, value in enumerate(pad.global_loss(speech, text).tolist()):
        s = speech.hidden[b, : speech.valid[b].sum()].mean(0)
        t = text.hidden[b, : text.valid[b].sum()].mean(0)
        assert value == pytest.approx(float(torch.linalg.vector_norm(s - t, 1)), rel=1e-6)


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def loop_local(pools, text):
    """Eq. 3 or 6: ``pools`` lists the vectors that each utterance's pieces may choose from."""
    losses = []
    for b, pool in enumerate(pools):
        loss = 0.0
        for j in range(int(text.valid[b].sum())):
            piece = text.hidden[b, j].tolist()
            loss -= float(text.prior[b, j]) * max(cosine(unit, piece) for unit in pool)
        losses.append(loss)
    return losses


def test_eq3_token_loss_matches_loop(both):
    speech, text = both
    pools = [speech.hidden[b, :size].tolist() for b, size in enumerate([23, 9, 14])]
    found = pad.local_loss(speech.hidden, speech.valid, text).tolist()
    assert found == pytest.approx(loop_local(pools, text), rel=1e-9)
    total, parts = pad.alignment_loss(speech, text, "token", (4,), False)
    assert total.item() == pytest.approx(sum(found) / 3) and set(parts) == {"local"}


def test_eq3_with_uniform_priors_is_the_mean_of_the_best_cosines(both):
    speech, text = both
    text = text._replace(prior=pad.uniform(text.valid).double())
    for b, value in enumerate(pad.local_loss(speech.hidden, speech.valid, text).tolist()):
        s = speech.hidden[b, : speech.valid[b].sum()]
        t = text.hidden[b, : text.valid[b].sum()]
        phi = torch.nn.functional.cosine_similarity(s[:, None], t[None], dim=-1)
        assert value == pytest.approx(-phi.amax(0).mean().item(), rel=1e-6)


def test_eq3_is_minus_one_where_each_piece_finds_itself(both):
    _, text = both
    padded = torch.cat([torch.randn(3, 2, 6).double(), 7 * text.hidden], 1)
    usable = torch.cat([torch.ones(3, 2).bool(), text.valid], 1)
    assert pad.local_loss(padded, usable, text).tolist() == pytest.approx([-1, -1, -1])


def test_eq4_anchors_are_the_most_significant_valid_frames(both):
    speech, _ = both
    positions, chosen = pad.choose_anchors(speech, 4, even=False)
    for b, size in enumerate([23, 9, 14]):
        count = max(1, round(size / 4))
        best = sorted(range(size), key=lambda i: -speech.prior[b, i].item())[:count]
        assert positions[b, chosen[b]].tolist() == best
        assert chosen[b].sum() == count
    positions, chosen = pad.choose_anchors(speech, 1000, even=False)  # never fewer than one
    assert chosen.tolist() == [[True]] * 3


def test_s8_even_anchors_are_as_many_and_evenly_spread(both):
    speech, _ = both
    positions, chosen = pad.choose_anchors(speech, 4, even=True)
    assert torch.equal(chosen, pad.choose_anchors(speech, 4, even=False)[1])
    for b, size in enumerate([23, 9, 14]):
        count = int(chosen[b].sum())
        middles = [int((k + 0.5) * size / count) for k in range(count)]
        assert positions[b, chosen[b]].tolist() == middles and max(middles) < size


def test_eq5_spans_of_a_hand_made_example():
    hidden = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(1, 8, 1)  # 1 .. 8; 6 are valid
    speech = pad.Units(hidden, torch.ones(1, 8) / 6, torch.arange(8)[None] < 6)
    means = pad.span_means(speech, torch.tensor([[0, 3, 5]]), (1, 2, 4))
    # begin:end of the nine spans is 0:1 0:1 0:2, 3:4 2:4 1:5, 5:6 4:6 3:6
    assert means[0, :, 0].tolist() == [1, 1, 1.5, 4, 3.5, 3.5, 6, 5.5, 5]


def test_eq5_span_means_equal_slices_and_stop_at_the_utterances_own_end(both):
    speech, _ = both
    positions, chosen = pad.choose_anchors(speech, 3, even=False)
    means = pad.span_means(speech, positions, (3, 6, 40))
    for b, size in enumerate([23, 9, 14]):
        for q in range(means.shape[1]):
            center, width = int(positions[b, q // 3]), (3, 6, 40)[q % 3]
            first, last = max(0, center - width // 2), min(size, center - width // 2 + width)
            expected = speech.hidden[b, first:last].mean(0)
            torch.testing.assert_close(means[b, q], expected, rtol=1e-9, atol=1e-9)


def test_eq6_span_loss_matches_loop_over_all_spans(both):
    speech, text = both
    pools = []
    for b, size in enumerate([23, 9, 14]):
        anchors = sorted(range(size), key=lambda i: -speech.prior[b, i].item())
        pool = []
        for center in anchors[: max(1, round(size / 4))]:
            for width in (2, 4, 8):
                first, last = max(0, center - width // 2), min(size, center + width // 2)
                pool.append(speech.hidden[b, first:last].mean(0).tolist())
        pools.append(pool)
    total, parts = pad.alignment_loss(speech, text, "span", (2, 4, 8), False)
    assert total.item() == pytest.approx(sum(loop_local(pools, text)) / 3, rel=1e-9)
    assert total.dtype == torch.float64 and set(parts) == {"local"}


def test_eq6_with_all_frames_as_anchors_and_width_1_is_eq3(both):
    span, _ = pad.alignment_loss(*both, "span", (1,), False)
    token, _ = pad.alignment_loss(*both, "token", (1,), False)
    assert span.item() == pytest.approx(token.item(), rel=1e-12)


def test_s10_joint_is_the_global_loss_per_dimension_and_the_span_loss(both):
    total, parts = pad.alignment_loss(*both, "joint", (2, 4, 8), False)
    apart = [pad.alignment_loss(*both, name, (2, 4, 8), False)[0] for name in ("global", "span")]
    assert [parts["global"], parts["local"]] == apart
    assert total.item() == pytest.approx((apart[0] / 6 + apart[1]).item())


@pytest.mark.parametrize("alignment", ["global", "token", "span", "joint"])
def test_s3_padding_duplicates_and_order_leave_the_loss_unchanged(both, alignment):
    speech, text = both
    settings = alignment, (2, 4, 8), False
    base = pad.alignment_loss(speech, text, *settings)[0].item()
    padded = []
    for units in both:
        hidden = torch.cat([units.hidden, 1e3 * torch.ones(3, 4, 6).double()], 1)
        extended = (torch.cat([x, torch.zeros(3, 4).to(x.dtype)], 1) for x in units[1:])
        padded.append(pad.Units(hidden, *extended))
    assert pad.alignment_loss(*padded, *settings)[0].item() == pytest.approx(base)
    doubled = [pad.Units(*(torch.cat([x, x]) for x in units)) for units in both]
    assert pad.alignment_loss(*doubled, *settings)[0].item() == pytest.approx(base)
    turned = [pad.Units(*(x[[2, 0, 1]] for x in units)) for units in both]
    assert pad.alignment_loss(*turned, *settings)[0].item() == pytest.approx(base)


@pytest.mark.parametrize("alignment", ["global", "token", "span", "joint"])
def test_gradients_are_finite_and_reach_only_valid_frames(both, alignment):
    speech, text = both
    hidden = speech.hidden.clone().requires_grad_()
    speech = speech._replace(hidden=hidden)
    pad.alignment_loss(speech, text, alignment, (2, 4, 8), False)[0].backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad[speech.valid].abs().sum() > 0
    assert hidden.grad[~speech.valid].abs().sum() == 0


@pytest.mark.parametrize("even", [False, True])
def test_s3_places_that_are_no_anchors_leave_no_trace_in_loss_or_gradient(even):
    """One utterance has ten anchors, one has one: nine of its ten places lie in its padding."""
    speech, text = random_units(3, [40, 2], 40), random_units(4, [3, 2], 3)
    hidden = speech.hidden.clone().requires_grad_()
    total, _ = pad.alignment_loss(speech._replace(hidden=hidden), text, "span", (2, 4), even)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(hidden.grad).all()
    assert hidden.grad[1, :2].abs().sum() > 0 and hidden.grad[1, 2:].abs().sum() == 0


def test_loss_in_bf16_is_computed_in_float32(both):
    speech, text = (each._replace(hidden=each.hidden.bfloat16()) for each in both)
    speech, text = (each._replace(prior=each.prior.float()) for each in (speech, text))
    total, _ = pad.alignment_loss(speech, text, "span", (2, 4), False)
    wide = [each._replace(hidden=each.hidden.float()) for each in (speech, text)]
    assert total.dtype == torch.float32
    assert total.item() == pad.alignment_loss(*wide, "span", (2, 4), False)[0].item()
    for alignment in ("global", "token", "span"):
        exact = pad.alignment_loss(*wide, alignment, (2, 4), False)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(pad.alignment_loss(*wide, alignment, (2, 4), False)[0], exact)


def test_shuffled_transcripts_are_those_of_the_neighbours(both):
    _, text = both
    shuffled = pad.shuffle(text)
    assert torch.equal(shuffled.hidden[1], text.hidden[0])
    assert torch.equal(shuffled.prior[0], text.prior[2])
    assert shuffled.valid.sum(1).tolist() == [2, 4, 5]


def test_health_counts_distinct_frames_and_their_order():
    pieces = torch.eye(4)[None]
    text = pad.Units(pieces, torch.ones(1, 4) / 4, torch.ones(1, 4).bool())

    def health(order):
        frames = torch.cat([pieces[:, order], 9 * torch.eye(4)[None]], 1)  # rubbish behind
        valid = torch.tensor([[True] * len(order) + [False] * 4])
        found = pad.alignment_health(pad.Units(frames, valid / 1.0, valid), text)
        return found["distinct"].item(), found["order"].item()

    assert health([0, 1, 2, 3]) == (1.0, 1.0)
    assert health([3, 2, 1, 0]) == (1.0, -1.0)
    assert health([0, 2, 1, 3]) == (1.0, pytest.approx(4 / 6))  # one of six pairs is turned
    frames = torch.ones(1, 5, 4)  # collapsed: all pieces choose the first frame
    same = pad.Units(frames, torch.ones(1, 5) / 5, torch.ones(1, 5).bool())
    found = pad.alignment_health(same, text)
    assert (found["distinct"].item(), found["order"].item()) == (0.25, 0.0)


# ---- student ------------------------------------------------------------------------------------


def test_student_equals_torchaudio_and_has_the_layer_numbers_of_the_other_files(tiny_teacher):
    teacher = common.load_teacher(str(tiny_teacher))
    student = pad.build(pad.Config(student=str(tiny_teacher)))
    waves = torch.randn(2, 6000)
    ours, frames = student(waves)
    theirs, _ = teacher(waves)
    assert frames is None and len(ours) == len(theirs) == 13
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[1:], teacher.model.extract_features(waves)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_student_equals_torchaudio_on_a_padded_batch():
    """With convolutions that hear one frame at a time, where padding does no harm in torchaudio."""
    student = shaken_student(extractor_mode="layer_norm", extractor_conv_bias=True)
    waves, lengths = torch.randn(3, 6000), torch.tensor([6000, 2500, 400])
    ours, frames = student(waves, lengths)
    theirs, sizes = student.model.extract_features(waves, lengths)
    assert torch.equal(frames, sizes)
    valid = pad.frame_mask(frames, ours[0].shape[1])
    for a, b in zip(ours[1:], theirs, strict=True):
        torch.testing.assert_close(a[valid], b[valid], rtol=1e-4, atol=1e-5)


def test_s3_very_unequal_lengths_give_what_each_utterance_gives_alone():
    """Behind a GroupNorm over time this needs convolutions that never hear the padding."""
    student = shaken_student().double()
    lengths = torch.tensor([16_000, 400, 5_000])
    waves = torch.randn(3, 16_000, dtype=torch.float64)  # rubbish, no zeros, behind the ends
    hidden_states, frames = student(waves, lengths)
    assert frames.tolist() == [49, 1, 15]
    received = student.received(hidden_states, frames)
    for b, (samples, size) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        alone, _ = student(waves[b : b + 1, :samples])
        for together, single in zip(hidden_states, alone, strict=True):
            torch.testing.assert_close(together[b, :size], single[0], rtol=1e-7, atol=1e-7)
        own = student.received(alone, torch.tensor([size]))
        torch.testing.assert_close(received[:, b, :size], own[:, 0], rtol=1e-7, atol=1e-7)
        assert received[:, b, size:].abs().sum() == 0


def test_attention_received_is_that_of_the_models_own_maps():
    """The maps are caught where torchaudio's attention computes them, in eval mode."""
    student, waves = shaken_student().eval(), torch.randn(2, 4000)
    hidden_states, _ = student(waves)
    frames = torch.full((2,), hidden_states[0].shape[1])
    received = student.received(hidden_states, frames)
    real, caught = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, key, value, **settings):
        caught.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1).sum(1))
        return real(query, key, value, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        student.model.extract_features(waves)
    torch.testing.assert_close(received, torch.stack(caught), rtol=1e-4, atol=1e-5)
    assert not received.requires_grad


def test_s4_no_gradient_passes_through_the_prior_and_dropout_stays_out_of_it():
    student = shaken_student(encoder_attention_dropout=0.9).train()
    config = pad.Config()
    units = pad.listen(config, student, torch.randn(1, 4000), torch.tensor([4000]))
    assert units.hidden.requires_grad and not units.prior.requires_grad
    hidden_states, frames = student(torch.randn(1, 4000), torch.tensor([4000]))
    pair = [student.received(hidden_states, frames) for _ in range(2)]
    assert torch.equal(*pair)


def test_without_a_prior_all_frames_weigh_the_same():
    student, waves, lengths = shaken_student(), torch.randn(2, 4000), torch.tensor([4000, 2000])
    for changes in (dict(prior="uniform"), dict(alignment="token"), {}):
        units = pad.listen(pad.Config(**changes), student, waves, lengths)
        even = pad.uniform(units.valid)
        assert torch.equal(units.prior, even) == bool(changes)
        torch.testing.assert_close(units.prior.sum(1), torch.ones(2))


def test_s6_special_pieces_are_no_units(bert_folder):
    bert, tokenizer = pad.load_bert(bert_folder)
    rows = [torch.tensor(tokenizer(text)) for text in SAID[:3]]
    text = pad.read(pad.Config(), bert, rows)
    for row, ids in enumerate(rows):
        expected = [False, *[True] * (len(ids) - 2), False]
        assert text.valid[row, : len(ids)].tolist() == expected
        assert not text.valid[row, len(ids) :].any()
        assert (text.prior[row] > 0).tolist() == text.valid[row].tolist()
        alone = pad.read(pad.Config(), bert, [ids])
        torch.testing.assert_close(text.prior[row, : len(ids)], alone.prior[0])
        torch.testing.assert_close(
            text.hidden[row, : len(ids)], alone.hidden[0], rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(text.prior.sum(1), torch.ones(3))
    even = pad.read(pad.Config(prior="uniform"), bert, rows)
    torch.testing.assert_close(even.prior, pad.uniform(text.valid))


def test_s1_the_last_layers_are_aligned(bert_folder):
    bert, tokenizer = pad.load_bert(bert_folder)
    ids = torch.tensor(tokenizer(SAID[0]))
    states, _ = bert(ids[None], torch.ones(1, len(ids)).bool())
    assert torch.equal(pad.read(pad.Config(), bert, [ids]).hidden, states[-1])
    student, waves = shaken_student(), torch.randn(1, 4000)
    speech = pad.listen(pad.Config(), student, waves, torch.tensor([4000]))
    torch.testing.assert_close(speech.hidden, student(waves)[0][-1])


def test_s2_all_but_the_convolutions_learn_and_no_layer_is_dropped(bert_folder):
    bert, tokenizer = pad.load_bert(bert_folder)
    student = shaken_student(encoder_layer_drop=1.0).train()
    before = copy.deepcopy(bert.state_dict())
    text = pad.read(pad.Config(), bert, [torch.tensor(tokenizer(said)) for said in SAID[:2]])
    speech = pad.listen(pad.Config(), student, torch.randn(2, 9000), torch.tensor([9000, 7000]))
    pad.alignment_loss(speech, text, "joint", (2, 4, 8), False)[0].backward()
    for name, parameter in student.model.named_parameters():
        if name.startswith("feature_extractor"):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(not q.requires_grad and q.grad is None for q in bert.parameters())
    assert all(torch.equal(v, before[k]) for k, v in bert.state_dict().items())


@pytest.mark.parametrize("kind", [large(), "wavlm"])
def test_a_speech_model_of_another_build_is_refused_by_name(tmp_path, kind):
    if kind == "wavlm":
        settings = encoder_config(encoder_num_buckets=8, encoder_max_distance=20, aux_num_out=None)
        model = torchaudio.models.wavlm_model(**settings)
        torch.save(model.state_dict(), tmp_path / "other.pt")
    else:
        form = {"config": pretrain_config(kind), "state_dict": make_hubert(kind).state_dict()}
        torch.save(form, tmp_path / "other.pt")
    with pytest.raises(common.InputError, match=r"--student other\.pt: a model with post-norm"):
        pad.build(pad.Config(student=str(tmp_path / "other.pt")))


def test_widths_that_differ_are_refused_in_one_sentence(tiny_teacher, bert_folder):
    config = pad.Config(teacher=str(bert_folder), student=str(tiny_teacher))
    pad.build_text(config, pad.build(config))
    wide = shaken_student(encoder_embed_dim=32)
    with pytest.raises(common.InputError, match="has width 16 and --student .* 32"):
        pad.build_text(config, wide)


# ---- data ---------------------------------------------------------------------------------------


def utterance(number, seconds=1.0, **columns):
    return common.Utterance(path=f"{number}.wav", samples=int(16_000 * seconds), **columns)


def test_s11_hours_are_whole_speakers_in_a_seeded_order():
    rows = [utterance(i, 360, speaker=f"s{i % 5}") for i in range(50)]  # five speakers, an hour
    for hours, speakers in ((0.5, 1), (1.0, 1), (1.5, 2), (3.0, 3), (99, 5)):
        chosen = common.choose_hours(rows, hours, seed=0)
        assert len(chosen) == 10 * speakers
        assert len({u.speaker for u in chosen}) == speakers
    sets = [{u.speaker for u in common.choose_hours(rows, 2, seed)} for seed in range(8)]
    assert (
        common.choose_hours(rows, 2, 3) == common.choose_hours(rows, 2, 3)
        and len(set(map(str, sets))) > 2
    )
    nameless = [utterance(i, 360) for i in range(20)]
    assert len(common.choose_hours(nameless, 0.5, 0)) == 5


def test_s12_long_and_wordless_utterances_are_left_out_and_counted(bert_folder, capsys):
    _, tokenizer = pad.load_bert(bert_folder)
    rows = [
        utterance(0, text="TURN ON"),
        utterance(1, text=""),
        utterance(2, text="   \x01 "),
        utterance(3, seconds=16.5, text="STOP"),
        utterance(4, seconds=16.0, text="STOP " * 40),
    ]
    kept, ids = pad.make_pairs(rows, tokenizer, 16.0)
    assert [u.path for u in kept] == ["0.wav", "4.wav"]
    assert {path: len(row) for path, row in ids.items()} == {"0.wav": 4, "4.wav": 24}  # S15
    line = " ".join(capsys.readouterr().err.split())
    assert "2 pairs" in line and "2 without words, 1 longer than 16 s" in line
    assert "1 cut at 24 word pieces" in line
    with pytest.raises(common.InputError, match=r"no utterance can be used.*trans\.txt"):
        pad.make_pairs(rows[1:4], tokenizer, 16.0)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(prior="uniform"), "--anchors even"),
        (dict(prior="uniform", alignment="joint"), "--anchors even"),
        (dict(widths=(0, 4)), "--widths"),
        (dict(label_shares=(0.1, 0.0)), "--label-shares"),
        (dict(label_shares=(1.5,)), "--label-shares"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(common.InputError, match=words):
        pad.check(pad.Config(**changes))
    for model in ({}, *pad.CLAIM.values()):
        pad.check(pad.Config(**model))


# ---- training -----------------------------------------------------------------------------------


def test_learning_rate_rises_for_a_tenth_and_ends_at_zero():
    config = pad.Config()
    assert pad.learning_rate(180, config) == pytest.approx(5e-5)
    assert pad.learning_rate(990, config) == pytest.approx(2.5e-5)
    assert pad.learning_rate(1800, config) == 0.0


@pytest.mark.parametrize("alignment", ["global", "token", "span"])
def test_one_batch_can_be_learned_and_other_transcripts_fit_worse(bert_folder, alignment):
    student = shaken_student(encoder_num_layers=3)
    torch.manual_seed(0)
    config = pad.Config(alignment=alignment, widths=(2, 4, 8))
    bert, tokenizer = pad.load_bert(bert_folder)
    rows = [torch.tensor(tokenizer(said)) for said in SAID[:4]]
    words = torch.randn(len(KNOWN), 16)  # a random BERT hardly tells words apart
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    text = pad.read(config, bert, rows)._replace(hidden=words[ids])
    waves, lengths = torch.randn(4, 12_000), torch.tensor([12_000, 9_000, 5_000, 11_000])
    parameters = [q for q in student.parameters() if q.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(150):
        speech = pad.listen(config, student, waves, lengths)
        loss, _ = pad.alignment_loss(speech, text, alignment, config.widths, False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    other = pad.alignment_loss(speech, pad.shuffle(text), alignment, config.widths, False)[0].item()
    if alignment == "global":
        assert losses[-1] < 0.4 * losses[0] and other > 2 * losses[-1]
    else:
        assert losses[-1] < -0.8 and losses[0] > -0.6 and other > losses[-1] + 0.1


def test_heldout_loss_is_the_mean_over_utterances_without_dropout(bert_folder, spoken, tmp_path):
    bert, tokenizer = pad.load_bert(bert_folder)
    rows = common.scan(spoken, tmp_path / "scan.jsonl", 0)[:5]
    kept, ids = pad.make_pairs(rows, tokenizer, 16.0)
    config = pad.Config(widths=(2, 4, 8), anchors="even", batch_seconds=3.0)
    student = shaken_student().train()
    found = pad.heldout_loss(config, student, bert, kept, ids)
    alone = []
    for row in kept:
        wave = common.load_audio(row.path)[None]
        speech = pad.listen(config, student.eval(), wave, torch.tensor([wave.shape[1]]))
        text = pad.read(config, bert, [ids[row.path]])
        alone.append(pad.alignment_loss(speech, text, "span", (2, 4, 8), True)[0].item())
    assert found["heldout"] == pytest.approx(sum(alone) / 5, rel=1e-5)
    assert found["heldout_shuffled"] != found["heldout"]


def log_of(out):
    return (out / "log.jsonl").read_text()


def test_log_has_the_loss_its_shuffled_twin_and_the_health_of_the_alignment(
    tiny_teacher, bert_folder, spoken, tmp_path
):
    config = small_config(tiny_teacher, bert_folder, spoken, tmp_path / "run", alignment="joint")
    student, history = pad.train(config)
    assert [line["step"] for line in history] == [2, 4, 6, 8] and not student.training
    for line in history:
        keys = {"step", "lr", "grad_norm", "loss", "global", "local", "shuffled"}
        keys |= {"distinct", "order"}
        assert keys <= set(line)
        assert line["loss"] == pytest.approx(line["global"] / 16 + line["local"], rel=1e-5)
        assert line["shuffled"] != line["loss"]
        assert ("heldout" in line) == (line["step"] in (4, 8)) == ("heldout_shuffled" in line)


def test_same_seed_same_log_another_seed_another(tiny_teacher, bert_folder, spoken, tmp_path):
    logs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = small_config(tiny_teacher, bert_folder, spoken, tmp_path / name, seed=seed)
        pad.train(config)
        logs.append(log_of(tmp_path / name))
    assert logs[0] == logs[1] != logs[2]


def test_resumed_run_equals_an_unbroken_one_bit_by_bit(
    tiny_teacher, bert_folder, spoken, tmp_path, monkeypatch
):
    whole, broken = (
        small_config(tiny_teacher, bert_folder, spoken, tmp_path / name)
        for name in ("whole", "broken")
    )
    pad.train(whole)
    real, calls = torch.optim.AdamW.step, []

    def stop(self, *args, **settings):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            pad.train(broken)
    assert common.load_checkpoint(tmp_path / "broken" / "last.pt")["step"] == 4
    pad.train(broken, resume=True)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    ours, theirs = (
        common.load_checkpoint(tmp_path / name / "last.pt") for name in ("broken", "whole")
    )
    assert ours["step"] == theirs["step"] == 8
    for name, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][name]), name
    assert torch.equal(ours["random_state"]["cpu"], theirs["random_state"]["cpu"])


def test_settings_of_spans_reach_every_loss_and_dropout_is_on_in_training_alone(
    tiny_teacher, bert_folder, spoken, tmp_path, monkeypatch
):
    used, modes, align, listen = set(), [], pad.alignment_loss, pad.listen

    def align_spy(speech, text, *spans):
        used.add(spans)
        return align(speech, text, *spans)

    def listen_spy(config, student, *rest):
        modes.append(student.training)
        return listen(config, student, *rest)

    monkeypatch.setattr(pad, "alignment_loss", align_spy)
    monkeypatch.setattr(pad, "listen", listen_spy)
    changes = dict(steps=1, alignment="joint", anchors="even", widths=(2, 6))
    pad.train(small_config(tiny_teacher, bert_folder, spoken, tmp_path / "run", **changes))
    assert used == {("joint", (2, 6), True)} and modes == [True, False]  # an update, held-out loss


def test_accumulation_gives_the_same_update(tiny_teacher, bert_folder, spoken, tmp_path):
    weights = []
    for parts in (1, 3):
        config = small_config(
            tiny_teacher, bert_folder, spoken, tmp_path / str(parts), steps=1, accumulate=parts,
        )  # fmt: skip
        student = pad.build(config)
        for module in student.modules():  # dropout would draw other numbers
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pad, "build", lambda _, student=student: student)
            trained, history = pad.train(replace(config, warmup=0.0))
        weights.append((history[-1]["loss"], history[-1]["grad_norm"]))
    assert weights[0] == pytest.approx(weights[1], rel=1e-4)


def test_weight_decay_spares_biases_and_norms(
    tiny_teacher, bert_folder, spoken, tmp_path, monkeypatch
):
    seen, real = [], torch.optim.AdamW

    def spy(groups, **settings):
        seen.append((groups, settings))
        return real(groups, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    config = small_config(tiny_teacher, bert_folder, spoken, tmp_path / "run", steps=1)
    student, _ = pad.train(config)
    (decayed, spared), settings = seen[0]
    assert settings["weight_decay"] == 0.01 and spared["weight_decay"] == 0.0
    names = {id(q): name for name, q in student.model.named_parameters()}
    assert all("bias" in names[id(q)] or "norm" in names[id(q)] for q in spared["params"])
    assert not any("norm.weight" in names[id(q)] for q in decayed["params"])
    learned = {name for name in names.values() if not name.startswith("feature_extractor")}
    assert {names[id(q)] for q in [*decayed["params"], *spared["params"]]} == learned


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(
    tiny_teacher, bert_folder, spoken, tmp_path
):
    config = small_config(
        tiny_teacher, bert_folder, spoken, tmp_path / "run", lr=1e15, save_every=1
    )
    with pytest.raises(common.InputError, match="not finite at update"):
        pad.train(config)
    saved = common.load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(torch.isfinite(v).all() for v in saved["state_dict"].values())


def test_student_file_is_torchaudios_model_unchanged_in_names_and_shapes(
    tiny_teacher, bert_folder, spoken, tmp_path
):
    config = small_config(tiny_teacher, bert_folder, spoken, tmp_path / "run", steps=2)
    student, _ = pad.train(config)
    saved = torch.load(tmp_path / "run" / "student.pt", weights_only=True)
    before = common.load_teacher(str(tiny_teacher)).model.state_dict()
    shapes = {name: value.shape for name, value in before.items()}
    assert {name: value.shape for name, value in saved["state_dict"].items()} == shapes
    for name, value in saved["state_dict"].items():
        assert torch.equal(value, before[name]) == name.startswith("feature_extractor"), name
    model = torchaudio.models.wav2vec2_model(**saved["arguments"]).eval()
    model.load_state_dict(saved["state_dict"])
    waves = torch.randn(2, 4000)
    for a, b in zip(model.extract_features(waves)[0], student(waves)[0][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    loaded = pad.load_student(tmp_path / "run" / "student.pt")
    assert not loaded.training
    assert torch.equal(loaded(waves)[0][-1], student(waves)[0][-1])


def test_arguments_build_the_model_they_were_read_from():
    settings = encoder_config(
        encoder_projection_dropout=0.11,
        encoder_attention_dropout=0.12,
        encoder_ff_interm_dropout=0.13,
        encoder_dropout=0.14,
        encoder_layer_drop=0.0,
    )
    model = torchaudio.models.wav2vec2_model(**settings, aux_num_out=None)
    assert common.model_arguments(model) == settings | {"aux_num_out": None}


# ---- evaluation ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A manifest with two labels that the words tell, and two speakers."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    lines = ["path\tspeaker\tsplit\tsid_split\tlabel\tlabel_kind\ttext"]
    for i in range(36):
        part = ("train", "train", "train", "dev", "test", "test")[i // 2 % 6]
        text, label = (("TURN ON THE LIGHTS", "light"), ("STOP THE MUSIC", "music"))[i % 2]
        wave = 0.1 * rng.standard_normal(int(rng.integers(4_000, 8_000)))
        soundfile.write(folder / f"{i}.wav", wave.astype(np.float32), 16_000)
        lines.append(f"{i}.wav\ts{i % 2}\t{part}\t{part}\t{label}\tintent\t{text}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_d1_table_has_teacher_start_and_student_at_each_budget(
    tiny_teacher, bert_folder, labelled, tmp_path, monkeypatch
):
    real = common.classification_probe
    few = lambda parts, seed, updates=0, *rest: real(parts, seed, 25, *rest)  # noqa: E731
    monkeypatch.setattr(common, "classification_probe", few)
    monkeypatch.setattr(common, "LABEL_DRAWS", 2)
    config = small_config(
        tiny_teacher, bert_folder, labelled, tmp_path / "run", steps=2, label_shares=(0.5, 0.01)
    )
    rows = pad.distil(config)
    assert list(rows) == ["text teacher", "speech model", "distilled"]
    budgets = {"intent", "intent 50 %", "intent 1 %"}
    assert set(rows["text teacher"]) == {"parameters"} | budgets  # no speaker in a text
    for name in ("speech model", "distilled"):
        assert set(rows[name]) == {"parameters", "speaker"} | budgets
    assert rows["text teacher"]["intent 1 %"] == 1.0  # the words tell the label
    assert rows["speech model"]["parameters"] == rows["distilled"]["parameters"]
    again = pad.evaluate(config, pad.load_student(tmp_path / "run" / "student.pt"), baselines=False)
    del rows["distilled"]["speaker"]  # an ablation has its labels alone
    assert again == {"distilled": rows["distilled"]}


def test_a_manifest_of_test_rows_alone_is_told_so(tiny_teacher, bert_folder, labelled, tmp_path):
    lines = (labelled / "manifest.tsv").read_text().splitlines()
    tests = [line for line in lines if "\ttest\t" in line]
    (tmp_path / "manifest.tsv").write_text("\n".join([lines[0], *tests]) + "\n")
    for line in tests:
        (tmp_path / line.split("\t")[0]).symlink_to(labelled / line.split("\t")[0])
    config = small_config(tiny_teacher, bert_folder, tmp_path, tmp_path / "run")
    with pytest.raises(common.InputError, match="splits are 12 x test$"):
        pad.train(config)


def stub_task(name):
    return common.ProbeTask(name, "utterance", {"train": [], "dev": [], "test": []})


def test_d1_each_seed_draws_labels_of_its_own_and_trains_on_them_shortly(monkeypatch):
    drawn, updates = [], []
    monkeypatch.setattr(common, "few_labels", lambda task, share, seed: drawn.append((share, seed)))
    monkeypatch.setattr(common, "score_probes", lambda *a, **_: updates.append(a[3:]) or {})
    for seed in (0, 1):
        tasks = [stub_task(name) for name in ("intent", "speaker", "sid accuracy")]
        common.score_budgets({}, tasks, seed, (0.5, 0.1), "cpu")
    assert len(drawn) == len(set(drawn)) == 2 * 2 * common.LABEL_DRAWS  # none for speakers
    assert updates == 2 * [(), (common.FEW_UPDATES,)]


def test_d1_an_ablation_has_its_labels_alone_or_else_all_probes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "scan", lambda *_: [])
    monkeypatch.setattr(pad, "score", lambda *a: [task.name for task in a[2]])
    for names, expected in ((["speaker", "intent"], ["intent"]), (["speaker"], ["speaker"])):
        tasks = [stub_task(name) for name in names]
        monkeypatch.setattr(common, "probe_tasks", lambda _, tasks=tasks: tasks)
        config = pad.Config(out=str(tmp_path))
        assert pad.evaluate(config, shaken_student(), False) == {"distilled": expected}


def test_the_text_models_feature_is_the_mean_of_its_word_pieces(
    bert_folder, labelled, tmp_path, monkeypatch, capsys
):
    bert, tokenizer = pad.load_bert(bert_folder)
    rows = common.scan(labelled, tmp_path / "scan.jsonl", 0)
    tables = []
    monkeypatch.setattr(common, "score_budgets", lambda table, *_: tables.append(table) or {})
    tasks = common.probe_tasks(rows)
    pad.score_text(pad.Config(), bert, tokenizer, tasks, torch.device("cpu"))
    assert len(tables[0]) == len(rows)
    rows[0] = replace(rows[0], text="")
    pad.score_text(pad.Config(), bert, tokenizer, common.probe_tasks(rows), torch.device("cpu"))
    assert tables[1] == {} and "no intent, an utterance has no words" in capsys.readouterr().err
    for row in rows[1:3]:
        ids = torch.tensor([tokenizer(row.text)])
        states, _ = bert(ids, ids > 0)
        expected = torch.stack([state[0, 1:-1].mean(0) for state in states])
        torch.testing.assert_close(tables[0][row.path][0], expected)


def test_priors_script_shares_sum_to_one_and_silence_is_quiet(tiny_teacher):
    """Half noise, half silence: P is shared out between the two kinds of frames."""
    generator = torch.Generator().manual_seed(0)
    wave = torch.cat([torch.randn(16_000, generator=generator), torch.zeros(16_000)])
    row = priors.look(pad.build(pad.Config(student=str(tiny_teacher))), wave)
    assert row["frames quiet"] == pytest.approx(0.5, abs=0.02)
    shared = row["P quiet"] * row["frames quiet"] + row["P other"] * (1 - row["frames quiet"])
    assert shared == pytest.approx(1, abs=1e-5) and 0.5 < row["entropy"] < 1
    assert 0 <= row["anchors quiet"] <= 1 and 0 <= row["anchors crowded"] <= 1
