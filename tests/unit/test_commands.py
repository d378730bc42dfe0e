"""The commands as a user meets them: what they write, what they say, and their exit codes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer
from typer.testing import CliRunner, Result

from bert_cpt import train
from bert_cpt.evaluate import evaluate_checkpoint
from data_tools import write_shards
from launcher.cli import app
from tests.conftest import generated_documents, write_tiny_checkpoint

Run = Callable[..., Result]


@pytest.fixture
def bert_cpt() -> Run:
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def heldout(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("heldout") / "shards"
    write_shards(generated_documents(40, seed=3), directory, tokenizer=tiny_checkpoint)
    return directory


def one_error_line(result: Result) -> str:
    """The only line of an error that ends with exit code 2."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    return lines[0]


# --- evaluate and export --------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_writes_json(
    bert_cpt: Run, tiny_checkpoint: Path, tiny_shards: Path, heldout: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    result = bert_cpt(
        "evaluate", tiny_checkpoint, "--data", f"one={heldout}", "--data", f"two={tiny_shards}",
        "--samples", 50, "--sequence-length", 64, "--json", figures,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads(figures.read_text())
    assert content.keys() == {"one", "two"}
    assert content["one"]["num_samples"] == 50
    assert content["one"]["mlm_loss"] == pytest.approx(5.8, abs=0.3), "ln of the vocabulary"
    assert "one" in result.stdout
    assert "perplexity" in result.stdout


def test_evaluation_depends_neither_on_the_batch_size_nor_on_the_time(
    tiny_checkpoint: Path, heldout: Path
) -> None:
    results = [
        evaluate_checkpoint(
            str(tiny_checkpoint), {"x": heldout}, sequence_length=64, num_samples=48,
            batch_size=size, device=torch.device("cpu"),
        )[0]["x"]
        for size in (7, 48)
    ]  # fmt: skip
    assert results[0].num_masked == results[1].num_masked
    assert results[0].mlm_loss == pytest.approx(results[1].mlm_loss, rel=1e-6)
    assert results[0].nsp_accuracy == results[1].nsp_accuracy


@pytest.mark.parametrize(
    ("kind", "loaders"),
    [
        ("pretraining", [AutoModelForPreTraining, AutoModelForMaskedLM, AutoModel]),
        ("masked-lm", [AutoModelForMaskedLM]),
        ("encoder", [AutoModel]),
    ],
)
def test_an_export_loads_with_transformers_and_keeps_the_weights(
    bert_cpt: Run, tiny_checkpoint: Path, tmp_path: Path, kind: str, loaders: list[type]
) -> None:
    output = tmp_path / "model"
    result = bert_cpt("export", tiny_checkpoint, output, "--as", kind)
    assert result.exit_code == 0, result.output
    stored = load_file(tiny_checkpoint / "model.safetensors")
    for loader in loaders:
        model = loader.from_pretrained(output)
        for name, value in model.state_dict().items():
            original = stored.get(name, stored.get(f"bert.{name}"))
            assert original is None or torch.equal(value, original), name
    if kind == "sentence-transformers":
        assert json.loads((output / "1_Pooling/config.json").read_text())["pooling_mode"] == "mean"
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("bada").input_ids[0] == tokenizer.cls_token_id


def test_an_export_never_overwrites(bert_cpt: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    assert "not empty" in one_error_line(bert_cpt("export", tiny_checkpoint, tmp_path))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "{checkpoint}", "--data", "nonsense"], "expected NAME=SHARDS"),
        (["evaluate", "{checkpoint}", "--data", "x={tmp}/none"], "no such directory"),
        (["evaluate", "{checkpoint}", "--data", "x={tmp}"], "no manifest.json"),
        (["evaluate", "{tmp}/none", "--data", "x={shards}"], "none"),
        (["evaluate", "{shards}", "--data", "x={shards}"], "no config.json"),
        (["export", "{tmp}/none", "{tmp}/out"], "no such directory"),
        (["export", "{shards}", "{tmp}/out"], "no config.json"),
        (["verify", "{tmp}"], "no manifest.json"),
        (["inspect", "{tmp}/none"], "no such directory"),
        (["train", "{tmp}/none.toml"], "No such file"),
    ],
)
def test_a_wrong_path_is_one_clear_line(
    bert_cpt: Run, tiny_checkpoint: Path, tiny_shards: Path, tmp_path: Path,
    arguments: list[str], expected: str,
) -> None:  # fmt: skip
    filled = [
        a.format(checkpoint=tiny_checkpoint, shards=tiny_shards, tmp=tmp_path) for a in arguments
    ]
    assert expected in one_error_line(bert_cpt(*filled))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose vocabulary has two entries exchanged."""
    directory = write_tiny_checkpoint(tmp_path_factory.mktemp("other") / "checkpoint")
    words = (directory / "vocab.txt").read_text().split("\n")
    words[50], words[51] = words[51], words[50]
    (directory / "vocab.txt").write_text("\n".join(words))
    (directory / "tokenizer.json").unlink()
    return directory


def test_shards_of_another_tokenizer_are_refused(
    bert_cpt: Run, other_checkpoint: Path, tiny_shards: Path
) -> None:
    error = one_error_line(bert_cpt("evaluate", other_checkpoint, "--data", f"x={tiny_shards}"))
    assert "shard the corpus again with --tokenizer" in error


@pytest.fixture(scope="module")
def one_document(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one") / "shards"
    write_shards([["Bada bebe.", "Dodo dudu."]], directory, tokenizer=tiny_checkpoint)
    return directory


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.corpora=[{{path='{tmp}/none'}}]", "no such directory"),
        ("data.corpora=[{{path='{one}'}}]", "NSP needs at least two"),
        ("model.init_checkpoint={other}", "shard the corpus again"),
        ("model.init_checkpoint={tmp}", "no tokenizer.json and no vocab.txt"),
        ("data.sequence_length=256", "has 128 positions"),
        ("model.frozen_layers=3", "has 2 layers"),
        ("train.deepspeed_config={tmp}/none.json", "no such file"),
        ("train.train_batch_size=30", "no multiple"),
        ("train.stepz=1", "did you mean 'train.steps'"),
        ("run.output_dir=/proc/none", "/proc/none"),
    ],
)
def test_a_training_that_cannot_be_says_why_before_it_begins(
    tiny_config: Path, other_checkpoint: Path, one_document: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], override: str, expected: str,
) -> None:  # fmt: skip
    given = override.format(tmp=tmp_path, other=other_checkpoint, one=one_document)
    run_dir = f"run.output_dir={tmp_path / 'run'}"
    code = train.main(["--config", str(tiny_config), run_dir, given])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damaged_shards_are_named_at_the_start(
    tiny_config: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:  # fmt: skip
    copy = shutil.copytree(tiny_shards, tmp_path / "shards")
    path = copy / "shard_00000.bin"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "remove":
        path.unlink()
    else:
        text = (copy / "manifest.json").read_text()
        (copy / "manifest.json").write_text(text.replace('"name": "shard', '"name": "../shard'))
    given = f"data.corpora=[{{path='{copy}'}}]"
    code = train.main(["--config", str(tiny_config), f"run.output_dir={tmp_path / 'run'}", given])
    error = capsys.readouterr().err
    assert code == 2, error
    assert str(copy) in error
