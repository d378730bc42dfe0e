"""The packed forward equals transformers' own loss and gradients; loading says what it did."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from bert_cpt.batches import PackedBatch
from bert_cpt.model import PretrainingModel, freeze, load_model, pad, to_device
from data_tools.errors import UserError

VOCABULARY = 500


def bert(nsp: bool = True, **options: object) -> BertForPreTraining | BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2, **options,
    )  # fmt: skip
    return (BertForPreTraining if nsp else BertForMaskedLM)(config)


def batch_of(lengths: list[int], num_masked: int, seed: int = 0) -> PackedBatch:
    """Random samples of the given lengths, B about a third of each."""
    generator = np.random.default_rng(seed)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(cu_seqlens[-1])
    ids = generator.integers(5, VOCABULARY, total).astype(np.int32)
    types = np.concatenate([(np.arange(n) > 2 * n // 3).astype(np.int32) for n in lengths])
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    masked = np.sort(generator.choice(total, num_masked, replace=False)).astype(np.int32)
    labels = generator.integers(5, VOCABULARY, num_masked)
    pairs = generator.integers(0, 2, len(lengths))
    return PackedBatch(
        ids, types, positions, cu_seqlens, masked, labels, pairs, np.arange(len(lengths))
    )


CASES = {
    "length 128": ([128, 100, 128, 37, 128, 128], 80),
    "length 512": ([512, 211, 512], 180),
    "one sequence": ([90], 13),
    "one-token segments": ([5, 5, 5, 64], 9),
    "very few masks": ([128, 128], 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_loss_and_gradients_equal_those_of_transformers(case: str, attention: str) -> None:
    ours, reference = bert(), bert()
    batch = to_device(batch_of(*CASES[case]), torch.device("cpu"), 512)
    model = PretrainingModel(ours, attention).train()
    sums = model(batch)
    loss = sums.mlm_loss / len(batch.masked_labels) + sums.nsp_loss / len(batch.lengths)
    loss.backward()
    labels, inputs = pad(batch)
    expected = reference.train()(
        **inputs, labels=labels, next_sentence_label=batch.next_sentence_label
    ).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_equal_gradients(ours, reference)


def assert_equal_gradients(ours: torch.nn.Module, reference: torch.nn.Module) -> None:
    pairs = zip(ours.named_parameters(), reference.named_parameters(), strict=True)
    for (name, parameter), (_, truth) in pairs:
        if "key.bias" in name:  # a constant added to all keys: softmax is blind to it
            assert parameter.grad.abs().max() < 1e-6
            continue
        difference = (parameter.grad - truth.grad).norm()
        assert difference <= 1e-5 * truth.grad.norm(), name


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # inductor is what `model.compile` uses; here it spends a minute in the C++ compiler
def test_a_compiled_encoder_computes_the_same(backend: str) -> None:
    plain, compiled = bert(), bert()
    compiled.bert.encoder.compile(dynamic=True, backend=backend)
    for case in ("length 128", "one sequence"):
        batch = to_device(batch_of(*CASES[case]), torch.device("cpu"), 512)
        for model in (plain, compiled):
            model.zero_grad()
            sums = PretrainingModel(model)(batch)
            loss = sums.mlm_loss / len(batch.masked_labels) + sums.nsp_loss / len(batch.lengths)
            loss.backward()
        assert_equal_gradients(compiled, plain)


def test_sequences_of_a_packed_stream_do_not_see_each_other() -> None:
    model = PretrainingModel(bert()).eval()
    whole = batch_of([40, 60, 50], 20)
    changed = batch_of([40, 60, 50], 20)
    changed.input_ids[:40] = 7
    with torch.no_grad():
        hidden = [
            model.model.bert(
                torch.from_numpy(b.input_ids)[None],
                position_ids=torch.from_numpy(b.position_ids)[None],
                token_type_ids=torch.from_numpy(b.token_type_ids)[None],
                packing=_packing(b),
            ).last_hidden_state[0]
            for b in (whole, changed)
        ]
    assert torch.equal(hidden[0][40:], hidden[1][40:])
    assert not torch.allclose(hidden[0][:40], hidden[1][:40])


def _packing(batch: PackedBatch) -> object:
    from bert_cpt.attention import Packing

    lengths = tuple(np.diff(batch.cu_seqlens).tolist())
    return Packing(torch.from_numpy(batch.cu_seqlens), lengths, 128)


def test_mlm_only_has_no_pair_loss_and_equals_transformers() -> None:
    ours, reference = bert(nsp=False), bert(nsp=False)
    batch = to_device(batch_of([80, 64], 20), torch.device("cpu"), 128)
    sums = PretrainingModel(ours)(batch)
    labels, inputs = pad(batch)
    expected = reference(**inputs, labels=labels).loss
    assert (sums.mlm_loss / 20).item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.nsp_loss.item() == 0
    assert not sums.nsp_loss.requires_grad


def test_samples_without_a_pair_are_left_out_of_the_pair_loss() -> None:
    batch = batch_of([60, 70, 80], 20)
    batch.next_sentence_label[:] = [1, -100, 0]
    tensors = to_device(batch, torch.device("cpu"), 128)
    ours, reference = bert(), bert()
    sums = PretrainingModel(ours)(tensors)
    labels, inputs = pad(tensors)
    expected = reference(
        **inputs, labels=labels, next_sentence_label=tensors.next_sentence_label
    ).loss
    loss = sums.mlm_loss / 20 + sums.nsp_loss / batch.num_pairs
    assert batch.num_pairs == 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_attention_dropout_takes_effect_in_packed_mode() -> None:
    model = PretrainingModel(bert()).train()
    model.model.config.attention_probs_dropout_prob = 0.5
    for layer in model.model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    batch = to_device(batch_of([64, 64], 12), torch.device("cpu"), 128)
    torch.manual_seed(0)
    first = model(batch).mlm_loss.item()
    torch.manual_seed(1)
    second = model(batch).mlm_loss.item()
    torch.manual_seed(0)
    assert first != second
    assert first == model(batch).mlm_loss.item()


# --- loading --------------------------------------------------------------------------------------


def test_a_complete_checkpoint_is_loaded_completely(tiny_checkpoint: Path) -> None:
    model, report = load_model(str(tiny_checkpoint))
    stored = load_file(tiny_checkpoint / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name])
    assert report.new == report.ignored == []
    assert len(report.loaded) == len(list(model.named_parameters()))


def encoder_only(source: Path, target: Path) -> Path:
    """A checkpoint as sentence encoders have it: no heads, names without "bert."."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    kept = {k.removeprefix("bert."): v for k, v in weights.items() if k.startswith("bert.")}
    save_file(kept | {"extra.weight": torch.zeros(2)}, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    return target


def test_an_encoder_without_heads_gets_new_heads_and_a_word_about_it(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = encoder_only(tiny_checkpoint, tmp_path / "encoder")
    model, report = load_model(str(path), seed=5)
    assert {name.split(".")[0] for name in report.new} == {"cls"}
    assert any("extra" in name for name in report.ignored)
    assert "without an MLM head" in report.as_text()
    again, _ = load_model(str(path), seed=5)
    other, _ = load_model(str(path), seed=6)
    name = "cls.seq_relationship.weight"
    assert torch.equal(model.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(model.state_dict()[name], other.state_dict()[name])


def test_scratch_takes_the_configuration_only(tiny_checkpoint: Path) -> None:
    model, report = load_model(str(tiny_checkpoint), init="scratch", seed=9)
    stored = load_file(tiny_checkpoint / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(model.state_dict()[name], stored[name])
    assert report.loaded == []
    assert "all new" in report.as_text()


def test_weights_are_loaded_in_fp32_whatever_they_are_stored_in(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(tiny_checkpoint, tmp_path / "half")
    weights = load_file(path / "model.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, path / "model.safetensors")
    model, _ = load_model(str(path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def damaged(tmp_path: Path, source: Path, kind: str) -> Path:
    path = Path(shutil.copytree(source, tmp_path / kind))
    config = json.loads((path / "config.json").read_text())
    if kind == "another model":
        config["model_type"] = "roberta"
    if kind == "no config":
        (path / "config.json").unlink()
        return path
    if kind == "other shapes":
        config["intermediate_size"] = 256
    if kind == "truncated":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    if kind == "pickle":
        (path / "model.safetensors").unlink()
        torch.save({}, path / "pytorch_model.bin")
    if kind == "no encoder":
        save_file({"something.else": torch.zeros(3)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("another model", "a roberta model"),
        ("no config", "no config.json"),
        ("other shapes", "asks for"),
        ("truncated", "cannot be loaded"),
        ("pickle", "not read"),
        ("no encoder", "no BERT encoder"),
    ],
)
def test_what_is_no_bert_checkpoint_is_one_clear_line(
    tiny_checkpoint: Path, tmp_path: Path, kind: str, expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        load_model(str(damaged(tmp_path, tiny_checkpoint, kind)))
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_model(str(tmp_path / "none"))


def test_frozen_parts_receive_no_gradient() -> None:
    model = bert()
    kept = freeze(model, embeddings=True, num_layers=2)
    expected = [*model.bert.embeddings.parameters()]
    expected += [p for layer in model.bert.encoder.layer[:2] for p in layer.parameters()]
    assert kept == sum(p.numel() for p in expected)
    assert all(not p.requires_grad for p in expected)
    assert all(p.requires_grad for p in model.bert.encoder.layer[2].parameters())
