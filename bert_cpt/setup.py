"""What can be wrong before a GPU is taken: opened, compared, and refused with a reason."""

from dataclasses import dataclass
from typing import Any

from transformers import BertConfig

from bert_cpt.config import Config, shipped
from bert_cpt.ds_config import DeepSpeedConfig, read_ds_config, resolve_precision
from bert_cpt.evaluate import check_tokenizer
from bert_cpt.model import load_bert_config
from data_tools.errors import UserError
from data_tools.samples import check_pairs_possible
from data_tools.shards import ShardSet, open_shards


@dataclass(frozen=True)
class Setup:
    """A configuration whose files exist and belong together."""

    config: Config
    ds_content: dict[str, Any]
    bert_config: BertConfig
    corpora: list[ShardSet]
    heldout: dict[str, ShardSet]

    @property
    def is_auto_precision(self) -> bool:
        return any(self.ds_content.get(k, {}).get("enabled") == "auto" for k in ("fp16", "bf16"))

    def settle_precision(self, device: str) -> DeepSpeedConfig:
        """The DeepSpeed configuration for the hardware of this process."""
        from deepspeed.accelerator import get_accelerator

        return resolve_precision(
            self.config.train.deepspeed_config,
            self.ds_content,
            device=device,
            has_bf16=device == "cpu" or get_accelerator().is_bf16_supported(),
            has_fp16=get_accelerator().is_fp16_supported(),
        )


def check_setup(config: Config) -> Setup:
    """Open the shards, the checkpoint's configuration and the DeepSpeed JSON of a run.

    Raises:
        UserError: one of them is missing or damaged, or they do not belong together.
    """
    checkpoint = config.model.init_checkpoint
    ds_content = read_ds_config(shipped(config.train.deepspeed_config))
    corpora = [open_shards(corpus.path) for corpus in config.data.corpora]
    heldout = {name: open_shards(path) for name, path in config.data.heldout.items()}
    for corpus in [*corpora, *heldout.values()]:
        check_tokenizer(checkpoint, corpus)
        if config.objective.nsp:
            check_pairs_possible(corpus.shards, str(corpus.directory))
    bert_config = load_bert_config(checkpoint)
    vocab_size = corpora[0].manifest.tokenizer.vocab_size
    longest = max(phase.sequence_length for phase in config.phases)
    frozen = config.model.frozen_layers
    for what, needed, limit, unit in (
        ("entries of the tokenizer", vocab_size, bert_config.vocab_size, "embeddings"),
        ("data.sequence_length", longest, bert_config.max_position_embeddings, "positions"),
        ("model.frozen_layers", frozen, bert_config.num_hidden_layers, "layers"),
    ):
        if needed > limit:
            raise UserError(f"{what}={needed}, but the model {checkpoint} has {limit} {unit}")
    return Setup(config, ds_content, bert_config, corpora, heldout)


def check_structure(setup: Setup) -> None:
    """Read every shard's index once; raises UserError naming the first damage."""
    for corpus in [*setup.corpora, *setup.heldout.values()]:
        for shard in corpus.shards:
            shard.check_structure()
