"""Checks of a machine, a cluster and a bucket, each with its remedy."""
