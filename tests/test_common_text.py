"""common.py for speech with transcripts: LibriSpeech trees, whole utterances, few labels."""

import json

import numpy as np
import pytest
import soundfile
import torch

import common
from common import InputError


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
    assert by_name["84-121123-0000"].text == "GO DO YOU HEAR"
    assert by_name["84-121123-0000"].speaker == "84"
    assert by_name["1272-121123-0000"].speaker == "1272"
    assert by_name["84-121123-0001"].text == by_name["84-121123-0001"].speaker == ""
    assert {u.split for u in found} == {""}
    assert common.probe_tasks(found) == []  # no split, no probe


def test_scan_keeps_the_transcripts_in_its_cache(tree, tmp_path):
    first = common.scan(tree, tmp_path / "scan.jsonl")
    for path in tree.rglob("*.trans.txt"):
        path.unlink()
    assert common.scan(tree, tmp_path / "scan.jsonl") == first


def test_a_transcript_with_a_byte_order_mark_and_crlf_is_read(tree, tmp_path):
    path = next(tree.rglob("84-*.trans.txt"))
    path.write_bytes(b"\xef\xbb\xbf84-121123-0000 D'ACCORD  \r\n84-121123-0001\r\n")
    texts = {u.path[-10:]: u.text for u in common.scan(tree, tmp_path / "scan.jsonl")}
    assert "D'ACCORD" in texts.values()
    assert [u.speaker for u in common.scan(tree, tmp_path / "b.jsonl") if "/84-" in u.path] == [
        "84",
        "84",
    ]  # a line without words still names its reader


def test_a_transcript_that_is_not_text_is_named(tree, tmp_path):
    path = next(tree.rglob("84-*.trans.txt"))
    path.write_bytes(b"84-121123-0000 \xff\xfe\n")
    with pytest.raises(common.InputError, match=r"84-121123\.trans\.txt is not UTF-8"):
        common.scan(tree, tmp_path / "scan.jsonl")


# ---- whole utterances ---------------------------------------------------------------------------

SAMPLES = np.random.default_rng(0).integers(6_400, 256_000, 200).tolist()


def test_each_utterance_occurs_once_an_epoch_beside_others_of_its_length():
    batches = common.make_whole_batches(SAMPLES, 1_600_000, seed=0, epoch=3)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    audio = padded = 0
    for batch in batches:
        lengths = [SAMPLES[i] for i in batch]
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
    assert sorted(map(sorted, batches)) == [[0], [1], [2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_numbers_padded_waves_and_lengths(tmp_path, workers):
    rows = []
    for i, samples in enumerate((16_000, 15_900, 15_800, 4_000, 3_900)):
        tone(tmp_path / f"{i}.wav", samples)
        rows.append(common.Utterance(path=str(tmp_path / f"{i}.wav"), samples=samples))
    seen = []
    for numbers, waves, lengths in common.load_whole_batches(rows, 2.0, 0, 0, None, workers):
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
        rows.append(common.Utterance(path=str(tmp_path / f"{i}.wav"), samples=4_000 + 1_000 * i))
    whole = [n.tolist() for n, *_ in common.load_whole_batches(rows, 1.0, 5, 0, 12, 0)]
    later = [n.tolist() for n, *_ in common.load_whole_batches(rows, 1.0, 5, 7, 12, 0)]
    assert len(whole) == 12 and later == whole[7:]


def test_a_batch_below_a_frame_is_refused():
    rows = [common.Utterance(path="a.wav", samples=8_000)]
    with pytest.raises(common.InputError, match="--batch-seconds"):
        common.load_whole_batches(rows, 0.02, 0, 0, None, 0)


def test_loading_draws_nothing_from_the_global_generator(tmp_path):
    tone(tmp_path / "a.wav", 8_000)
    rows = [common.Utterance(path=str(tmp_path / "a.wav"), samples=8_000)]
    before = torch.get_rng_state()
    list(common.load_whole_batches(rows, 1.0, 0, 0, 3, 0))
    assert torch.equal(torch.get_rng_state(), before)


# ---- few labels ---------------------------------------------------------------------------------


def task(counts):
    rows = [
        (common.Utterance(path=f"{label}-{i}", samples=16_000), label)
        for label, count in counts.items()
        for i in range(count)
    ]
    return common.ProbeTask("intent toy", "utterance", dict(train=rows, dev=rows[:3], test=rows))


def test_few_labels_are_a_share_with_every_class_in_it():
    full = task({"a": 300, "b": 50, "c": 2})
    for share, count in ((0.1, 35), (0.5, 176), (1.0, 352), (0.001, 3)):
        for seed in range(5):
            few = common.few_labels(full, share, seed)
            assert len(few.parts["train"]) == count == len(set(few.parts["train"]))
            assert {label for _, label in few.parts["train"]} == {"a", "b", "c"}
            assert set(few.parts["train"]) <= set(full.parts["train"])
            assert (few.parts["dev"], few.parts["test"]) == (full.parts["dev"], full.parts["test"])
    assert common.few_labels(full, 0.1, 0).name == "intent toy 10 %"
    assert common.few_labels(full, 0.001, 0).name == "intent toy 0.1 %"


def test_few_labels_follow_from_the_seed_and_take_every_row_at_times():
    full = task({"a": 12, "b": 4})
    draws = [common.few_labels(full, 0.25, seed).parts["train"] for seed in range(60)]
    assert draws[7] == common.few_labels(full, 0.25, 7).parts["train"]
    assert len({tuple(u.path for u, _ in rows) for rows in draws}) > 20
    assert {row for rows in draws for row in rows} == set(full.parts["train"])


def test_scores_from_a_table_are_those_of_run_probes(tmp_path):
    rng, parts = np.random.default_rng(0), {"train": [], "dev": [], "test": []}
    for i in range(24):
        path, label = tmp_path / f"{i}.wav", "ab"[i % 2]
        soundfile.write(path, (0.01 + 0.3 * (i % 2)) * rng.standard_normal(4_000), 16_000)
        part = ("train", "train", "dev", "test")[i // 2 % 4]
        parts[part].append((common.Utterance(path=str(path), samples=4_000), label))
    both = [common.ProbeTask("loud", "utterance", parts)]

    def features(waves, lengths):
        return [waves.abs().unfold(1, 400, 320).mean(-1, keepdim=True)], lengths

    table = common.extract_features(features, both, "cpu")
    assert common.score_probes(table, both, 0) == common.run_probes(features, both, "cpu", 0)
    assert common.run_probes(features, both, "cpu", 0) == {"loud": 1.0}
    assert common.score_probes(table, both, 0, updates=24) == {
        "loud": -1.0
    }  # before the first look


# ------------------------------------------------------------------------------------------------
# Weights in .safetensors files
# ------------------------------------------------------------------------------------------------


def safetensors_bytes(header, content, length=None):
    """The bytes of a file; ``length`` overrides what its first eight bytes say."""
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + content


KINDS = {  # type in the file -> a tensor of it
    "F64": torch.tensor([1.5, -2.25], dtype=torch.float64),
    "F32": torch.tensor([[0.1, -3e38], [1e-38, 7.0]]),
    "F16": torch.tensor([0.5, -65504.0, 6e-8], dtype=torch.float16),
    "BF16": torch.tensor([[3.0], [-1e38]], dtype=torch.bfloat16),
    "I64": torch.tensor([-(2**62), 3]),
    "BOOL": torch.tensor([True, False, True]),
    "U8": torch.tensor(200, dtype=torch.uint8),  # no axis at all
}


def test_safetensors_give_every_type_and_shape_back(tmp_path):
    header, content = {"__metadata__": {"format": "pt"}}, b"x"  # from here on nothing is aligned
    for kind, tensor in KINDS.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(content), len(content) + len(raw)]
        header[kind] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}
        content += raw
    offsets = [len(content), len(content)]
    header["empty"] = {"dtype": "F32", "shape": [0, 3], "data_offsets": offsets}
    path = tmp_path / "all.safetensors"
    path.write_bytes(safetensors_bytes(header, content))
    found = common.read_safetensors(path)
    assert list(found) == [*KINDS, "empty"] and found["empty"].shape == (0, 3)
    for kind, tensor in KINDS.items():
        assert found[kind].dtype == tensor.dtype and torch.equal(found[kind], tensor)
    found["F32"].zero_()
    assert torch.equal(common.read_safetensors(path)["F32"], KINDS["F32"])  # the file is untouched


def test_safetensors_equal_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    weights = {"a": torch.randn(3, 5), "a.bias": torch.randn(3).bfloat16(), "b": torch.arange(4)}
    library.save_file(weights, tmp_path / "b.safetensors", metadata={"format": "pt"})
    found = common.read_safetensors(tmp_path / "b.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02\x00",
        safetensors_bytes({"a": ENTRY}, b"\0" * 8)[:20],  # cut inside the header
        safetensors_bytes({"a": ENTRY}, b"\0" * 7),  # cut inside the tensor
        safetensors_bytes({"a": ENTRY}, b"\0" * 8, length=2**63),
        safetensors_bytes({"a": ENTRY | {"data_offsets": [-8, 0]}}, b"\0" * 8),
        safetensors_bytes({"a": ENTRY | {"data_offsets": [8, 0]}}, b"\0" * 8),
        safetensors_bytes({"a": ENTRY | {"data_offsets": [0, 2**70]}}, b"\0" * 8),
        safetensors_bytes({"a": ENTRY | {"data_offsets": ["0", "8"]}}, b"\0" * 8),
        safetensors_bytes({"a": ENTRY | {"shape": [3]}}, b"\0" * 8),
        safetensors_bytes({"a": ENTRY | {"dtype": "F99"}}, b"\0" * 8),
        safetensors_bytes({"a": {"dtype": "F32"}}, b"\0" * 8),
        safetensors_bytes({"a": 7}, b"\0" * 8),
        safetensors_bytes(b"7", b""),
        safetensors_bytes(b"[1, 2]", b""),
        safetensors_bytes(b"{", b""),
        safetensors_bytes(b"\xff\xfe{}", b""),
        safetensors_bytes(b"[" * 100_000, b""),
    ],
)
def test_a_broken_safetensors_file_is_one_sentence(content, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="broken.safetensors is damaged") as error:
        common.read_safetensors(path)
    assert "\n" not in str(error.value)


def test_a_missing_safetensors_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none.safetensors does not exist"):
        common.read_safetensors(tmp_path / "none.safetensors")
