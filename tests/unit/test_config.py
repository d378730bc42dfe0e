"""The TOML configuration and the DeepSpeed JSON: strict keys, one owner each, clear errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bert_cpt.config import Config, describe_fields, load_config
from bert_cpt.ds_config import read_ds_config, resolve_precision
from data_tools.errors import UserError

MINIMAL = """
[run]
output_dir = "run"
[data]
corpora = [{ path = "shards" }]
[model]
init_checkpoint = "bert"
[train]
steps = 100
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "config.toml"
    path.write_text(text)
    return path


def test_overrides_take_precedence_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "train_batch_size = 64\n")
    config = load_config(path, ["train.steps=7", "objective.masking=span", "run.seed = 3"])
    assert (config.train.steps, config.train.train_batch_size) == (7, 64)
    assert (config.objective.masking, config.run.seed) == ("span", 3)
    assert config.data.sequence_length == 128


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["data.heldout.news=shards/news"])
    again = load_config(write(tmp_path, config.as_toml()))
    assert again == config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["train.stepz=7"], "did you mean 'train.steps'"),
        (["trian.steps=7"], "did you mean 'train'"),
        (["optimizer.learning_rate=-1"], "optimizer.learning_rate=-1"),
        (["data.sequence_length=1024"], "less than or equal to 512"),
        (["objective.masking=words"], "'token', 'whole_word' or 'span'"),
        (["train.train_batch_size=100", "train.micro_batch_size=32"], "no multiple"),
        (["schedule.warmup_steps=1000"], "more than all 100 steps"),
        (["train.steps=0"], "train.steps or [[train.phases]]"),
        (["nonsense"], "expected section.key=value"),
        (["run.seed=1", "run.seed.deeper=1"], "not a section"),
        (["data.corpora=[]"], "data.corpora"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, change: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, MINIMAL), change)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[run\n", "\xff"])
def test_a_file_that_is_no_toml_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "none.toml")


def test_phases_follow_one_another(tmp_path: Path) -> None:
    text = MINIMAL.replace("steps = 100", "") + (
        "train_batch_size = 64\n"
        "[[train.phases]]\nsteps = 90\nsequence_length = 128\n"
        "[[train.phases]]\nsteps = 10\nsequence_length = 512\ntrain_batch_size = 32\n"
        "micro_batch_size = 8\n"
    )
    first, second = load_config(write(tmp_path, text)).phases
    assert (first.first_step, first.last_step, first.first_sample) == (0, 90, 0)
    assert (second.first_step, second.last_step, second.first_sample) == (90, 100, 90 * 64)
    assert (second.train_batch_size, second.micro_batch_size) == (32, 8)


def test_batch_sizes_that_do_not_divide_among_the_ranks_name_a_remedy(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["train.train_batch_size=96"])
    config.check_world_size(3)
    with pytest.raises(UserError, match="multiple of 64"):
        config.check_world_size(2)


def test_there_are_at_most_60_fields_and_each_is_described() -> None:
    fields = list(describe_fields())
    assert len(fields) <= 60
    assert all(description for _, _, description in fields)


def test_the_config_modules_import_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, bert_cpt.config, bert_cpt.ds_config, launcher.cli;"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numba', 'datasets'} & set(sys.modules);"
        "print(sorted(heavy))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_shipped_ds_config_is_accepted() -> None:
    folder = Path(__file__).parents[2] / "ds_configs"
    paths = sorted(folder.glob("*.json"))
    assert len(paths) >= 6
    for path in paths:
        content = read_ds_config(path)
        resolve_precision(path, content, device="cuda", has_bf16=True, has_fp16=True)


def ds_file(directory: Path, content: dict[str, Any] | str) -> Path:
    path = directory / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"gradient_clipping": 1.0}, "belongs to optimizer.max_grad_norm"),
        ({"train_batch_size": 8}, "belongs to train.train_batch_size"),
        ({"zero_optimization": {"stage": 4}}, "expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stag": 1}}, "did you mean 'stage'"),
        ({"zero_optimization": 1}, "expected an object"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "nothing fills"),
        ({"elasticity": {}}, "no effect"),
        ('{"fp16": {}, "fp16": {}}', "twice"),
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_ds_config_is_named(
    tmp_path: Path, content: dict[str, Any] | str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_ds_config(ds_file(tmp_path, content))
    assert expected in str(caught.value)


def test_owned_keys_may_be_auto(tmp_path: Path) -> None:
    content = read_ds_config(ds_file(tmp_path, {"train_batch_size": "auto", "optimizer": "auto"}))
    assert content == {"zero_optimization": {"stage": 0}}


@pytest.mark.parametrize(
    ("stage", "device", "has_bf16", "expected"),
    [(1, "cuda", True, "bf16"), (1, "cuda", False, "fp16"), (2, "cpu", True, "fp32"),
     (0, "cuda", False, "fp32"), (0, "cuda", True, "fp32")],
)  # fmt: skip
def test_auto_precision_follows_the_hardware(
    tmp_path: Path, stage: int, device: str, has_bf16: bool, expected: str
) -> None:
    auto = {"enabled": "auto"}
    path = ds_file(tmp_path, {"zero_optimization": {"stage": stage}, "fp16": auto, "bf16": auto})
    config = resolve_precision(
        path, read_ds_config(path), device=device, has_bf16=has_bf16, has_fp16=device == "cuda"
    )
    assert config.precision == expected
    assert config.content["fp16"]["enabled"] == (expected == "fp16")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_with_zero_0_is_refused(tmp_path: Path, precision: str) -> None:
    path = ds_file(tmp_path, {precision: {"enabled": True}})
    with pytest.raises(UserError, match="ZeRO stage 0"):
        resolve_precision(path, read_ds_config(path), device="cuda", has_bf16=True, has_fp16=True)


def test_precision_the_hardware_lacks_is_refused(tmp_path: Path) -> None:
    path = ds_file(tmp_path, {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}})
    with pytest.raises(UserError, match="cannot train in fp16"):
        resolve_precision(path, read_ds_config(path), device="cpu", has_bf16=True, has_fp16=False)


def test_resolved_ds_config_leaves_nothing_to_surprising_defaults(tmp_path: Path) -> None:
    path = ds_file(tmp_path, {"zero_optimization": {"stage": 2}})
    config = resolve_precision(
        path, read_ds_config(path), device="cpu", has_bf16=True, has_fp16=False
    )
    resolved = config.resolved(
        train_batch_size=64, micro_batch_size=8, world_size=2, max_grad_norm=0.0
    )
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 0.0
    assert "auto" not in json.dumps(resolved)


def test_a_config_is_immutable(tmp_path: Path) -> None:
    config: Config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3  # type: ignore[misc]
