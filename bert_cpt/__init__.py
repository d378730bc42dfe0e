"""Shards in, models out: continued pre-training of BERT with DeepSpeed."""
