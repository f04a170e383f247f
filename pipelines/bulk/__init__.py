"""Upscale a folder or a bucket: selection, scheduling, replicas, storing, one ledger row for every input."""
