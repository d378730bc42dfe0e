"""On a CUDA device: the variable-length kernel, fp16 and bf16 training, exact resume, offload."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention

from bert_cpt import train
from bert_cpt.attention import Packing, packed_attention
from bert_cpt.model import PretrainingModel, load_model, pad, to_device
from tests.distributed.test_training import losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (512, 3, 211, 5, 512, 64)


def packing() -> Packing:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return Packing(ends.to("cuda", torch.int32), LENGTHS, 512)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packed_attention_equals_sdpa_of_each_sequence(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (1, 12, sum(LENGTHS), 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in range(3))
    ours, _ = packed_attention(torch.nn.Module(), q, k, v, None, packing=packing(), scaling=0.125)
    weights = torch.randn_like(ours)
    gradients = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    parts = zip(*(t.split(LENGTHS, dim=2) for t in exact), strict=True)
    expected = torch.cat([scaled_dot_product_attention(*p, scale=0.125) for p in parts], dim=2)
    expected = expected.transpose(1, 2)
    truth = torch.autograd.grad((expected * weights.float()).sum(), exact)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip((ours, *gradients), (expected, *truth), strict=True):
        assert (a.float() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_packed_loss_equals_the_padded_one_in_half_precision(
    tiny_checkpoint: Path, tiny_shards: Path, dtype: torch.dtype
) -> None:
    from data_tools import open_shards
    from tests.unit.test_batches import loader_of

    batch = to_device(loader_of(open_shards(tiny_shards)).samples(0, 32), torch.device("cuda"), 64)
    results = []
    for attention in ("packed", "padded"):
        bert, _ = load_model(str(tiny_checkpoint), hidden_dropout=0.0)
        sums = PretrainingModel(bert.to("cuda", dtype), attention)(batch)
        results.append((sums.mlm_loss.item(), sums.nsp_loss.item()))
    assert results[0] == pytest.approx(results[1], rel=1e-2)
    assert pad(batch)[0].is_cuda


CONFIGS = ["zero1_fp16", "zero1_bf16", "zero2_fp16", "zero3_fp16", "zero1_auto", "zero1_fp32"]


def run(tiny_config: Path, target: Path, *overrides: str) -> int:
    settings = ["logging.interval=1", "train.steps=8", f"run.output_dir={target}"]
    return train.main(["--config", str(tiny_config), *settings, *overrides])


@pytest.mark.parametrize("name", CONFIGS)
def test_training_repeats_and_resumes_bit_for_bit(
    tiny_config: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bert_cpt.stopping import StopSignal

    setting = f"train.deepspeed_config=ds_configs/{name}.json"
    assert run(tiny_config, tmp_path / "whole", setting) == 0
    asked = iter([False] * 3 + [True] * 1000)
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "is_wanted", property(lambda self: next(asked)))
        assert run(tiny_config, tmp_path / "parts", setting) == 85
    assert run(tiny_config, tmp_path / "parts", setting) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole == parts
    a, b = (load_file(tmp_path / k / "final/model.safetensors") for k in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert whole[8][0] < whole[1][0]


def test_a_compiled_encoder_trains(tiny_config: Path, tmp_path: Path) -> None:
    for name, setting in (("plain", "false"), ("compiled", "true")):
        settings = (f"model.compile={setting}", "model.hidden_dropout=0.0")
        assert run(tiny_config, tmp_path / name, *settings) == 0
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert all(compiled[step] == pytest.approx(plain[step], rel=1e-2) for step in plain)


def test_auto_takes_bf16_where_the_hardware_has_it(tiny_config: Path, tmp_path: Path) -> None:
    assert (
        run(tiny_config, tmp_path / "run", "train.deepspeed_config=ds_configs/zero1_auto.json") == 0
    )
    content = json.loads((tmp_path / "run" / "ds_config.json").read_text())
    assert content["bf16"]["enabled"] == torch.cuda.is_bf16_supported()


def test_lamb_trains_in_fp32_with_zero_0(tiny_config: Path, tmp_path: Path) -> None:
    setting = "train.deepspeed_config=ds_configs/zero0_fp32.json"
    assert run(tiny_config, tmp_path / "run", setting, "optimizer.name=lamb") == 0
    curve = losses(tmp_path / "run")
    assert curve[8][0] < curve[1][0]


def test_the_optimizer_can_be_offloaded(tiny_config: Path, tmp_path: Path) -> None:
    setting = "train.deepspeed_config=ds_configs/zero2_offload_fp16.json"
    assert run(tiny_config, tmp_path / "run", setting) == 0
    curve = losses(tmp_path / "run")
    assert curve[8][0] < curve[1][0]
