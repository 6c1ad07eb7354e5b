"""From shards to batches: sample and index (the contracts), plan, decode, loader."""
