"""Shard-building jobs: sources -> records -> media -> WebDataset tar shards with indexes."""
