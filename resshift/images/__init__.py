"""Encoded pictures to arrays and back, with everything that travels beside the pixels."""
