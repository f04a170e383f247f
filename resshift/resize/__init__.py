"""Resizing by area averages and by bicubic interpolation."""
