"""The chain on pictures of any size: tile plans, windows of rows, blending, batching, memory."""
