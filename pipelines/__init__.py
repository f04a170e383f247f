"""Ray Data flows: shards, training pairs, bulk upscaling, evaluation."""
