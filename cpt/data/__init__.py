"""From raw text to batches: readers, tokenisation to Megatron shards, catalog, mixture stream, validation sets."""
