"""Figures of a model on test sets, and the pages that show them."""
