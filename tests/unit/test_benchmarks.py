"""The GPU benchmark on a CPU: its variants train on the same loss, and it runs to the end."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bert_cpt.model import PretrainingModel, pad


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("benchmark_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_variants_have_the_same_loss(gpu: ModuleType) -> None:
    cpu = torch.device("cpu")
    model = gpu.new_model("tiny", 128, cpu).eval()
    batch = gpu.new_batch(gpu.LENGTHS["articles", 128], 8, 1000, 128, cpu)
    labels, inputs = pad(batch)
    plain = model(**inputs, labels=labels, next_sentence_label=batch.next_sentence_label).loss
    assert gpu.mean_loss(PretrainingModel(model), batch).item() == pytest.approx(plain.item(), 1e-6)


def test_it_runs_to_the_end(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = "--device cpu --shapes tiny --precisions fp32 --tokens 1024 --seconds 0.01 --rounds 1"
    gpu.main([*options.split(), "--stages", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert {row["variant"] for row in rows} == {"ours", "dynamic", "naive"}
    assert {row["sequence_length"] for row in rows} == {128, 512}
    assert all(row["tokens_per_second"] > 0 for row in rows)
