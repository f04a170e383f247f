"""Training pairs from photos: decode, crop, augment, degrade."""
