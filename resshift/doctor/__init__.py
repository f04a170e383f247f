"""Checks of a machine, each with the remedy; `resshift doctor` runs those that need no Ray."""
