"""Resizing by areas and by bicubic interpolation."""
