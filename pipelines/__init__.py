"""The flows on Ray: shards, training pairs, training, bulk upscaling and its ledger, evaluation, doctor."""
