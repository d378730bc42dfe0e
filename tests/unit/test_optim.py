"""Parameter groups and the learning-rate schedule."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForPreTraining

from bert_cpt.config import OptimizerConfig, ScheduleConfig
from bert_cpt.ds_config import DeepSpeedConfig
from bert_cpt.optim import learning_rate_factor, make_optimizer, parameter_groups, set_learning_rate
from data_tools.errors import UserError


@pytest.fixture(scope="module")
def model() -> BertForPreTraining:
    config = BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    return BertForPreTraining(config)


def by_name(model: BertForPreTraining, groups: list[dict]) -> dict[str, dict]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_every_parameter_is_in_one_group_and_biases_and_layer_norm_do_not_decay(
    model: BertForPreTraining,
) -> None:
    groups = by_name(model, parameter_groups(model, OptimizerConfig(weight_decay=0.1), []))
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    for name, group in groups.items():
        is_exempt = name.endswith("bias") or "LayerNorm" in name
        assert group["weight_decay"] == (0.0 if is_exempt else 0.1), name


def test_layers_learn_the_slower_the_lower_they_lie(model: BertForPreTraining) -> None:
    groups = by_name(model, parameter_groups(model, OptimizerConfig(layer_decay=0.9), []))

    def factor(name: str) -> float:
        return groups[name]["lr_factor"]

    assert factor("cls.seq_relationship.weight") == 1.0
    assert factor("bert.pooler.dense.weight") == 1.0
    assert factor("bert.encoder.layer.3.output.dense.weight") == 1.0
    assert factor("bert.encoder.layer.2.output.dense.weight") == pytest.approx(0.9)
    assert factor("bert.encoder.layer.0.output.dense.bias") == pytest.approx(0.9**3)
    assert factor("bert.embeddings.word_embeddings.weight") == pytest.approx(0.9**4)


def test_new_heads_may_learn_faster(model: BertForPreTraining) -> None:
    config = OptimizerConfig(new_head_factor=5.0)
    groups = by_name(model, parameter_groups(model, config, ["cls.seq_relationship.weight"]))
    assert groups["cls.seq_relationship.weight"]["lr_factor"] == 5.0
    assert groups["cls.predictions.transform.dense.weight"]["lr_factor"] == 1.0
    everything = [name for name, _ in model.named_parameters()]
    groups = by_name(model, parameter_groups(model, config, everything))
    assert groups["cls.seq_relationship.weight"]["lr_factor"] == 1.0, "all new: no head stands out"


def test_frozen_parameters_are_in_no_group(model: BertForPreTraining) -> None:
    model.bert.embeddings.requires_grad_(False)
    try:
        groups = by_name(model, parameter_groups(model, OptimizerConfig(), []))
    finally:
        model.bert.embeddings.requires_grad_(True)
    assert not any(name.startswith("bert.embeddings") for name in groups)


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [
        ("linear", 0, 0.1), ("linear", 9, 1.0), ("linear", 10, 1.0), ("linear", 60, 0.5),
        ("linear", 110, 0.0), ("cosine", 60, 0.5), ("cosine", 35, 0.8535533905932737),
        ("constant", 0, 0.1), ("constant", 99, 1.0),
    ],
)  # fmt: skip
def test_the_schedule_warms_up_and_decays(decay: str, step: int, expected: float) -> None:
    config = ScheduleConfig(warmup_steps=10, decay=decay)
    assert learning_rate_factor(step, 110, config) == pytest.approx(expected)


def test_the_schedule_ends_at_its_end_factor() -> None:
    config = ScheduleConfig(warmup_steps=0, decay="cosine", end_factor=0.1)
    assert learning_rate_factor(1000, 1000, config) == pytest.approx(0.1)


def test_the_rate_of_each_group_is_its_share_of_the_top_one(model: BertForPreTraining) -> None:
    config = OptimizerConfig(layer_decay=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, config, []))
    assert set_learning_rate(optimizer, 1e-3, 0.5) == 5e-4
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(5e-4 * group["lr_factor"])


def ds_config(stage: int) -> DeepSpeedConfig:
    return DeepSpeedConfig({"zero_optimization": {"stage": stage}}, "fp32")


def test_adamw_is_fused(model: BertForPreTraining) -> None:
    config = OptimizerConfig()
    groups = parameter_groups(model, config, [])
    optimizer = make_optimizer(groups, config, ds_config(1), torch.device("cpu"))
    assert optimizer.defaults["fused"]


@pytest.mark.parametrize(
    ("device", "stage", "expected"), [("cpu", 0, "CUDA only"), ("cuda", 1, "trust ratio")]
)
def test_lamb_is_refused_where_it_would_be_missing_or_wrong(
    model: BertForPreTraining, device: str, stage: int, expected: str, tmp_path: Path
) -> None:
    config = OptimizerConfig(name="lamb")
    groups = parameter_groups(model, config, [])
    with pytest.raises(UserError, match=expected):
        make_optimizer(groups, config, ds_config(stage), torch.device(device))
