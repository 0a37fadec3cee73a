"""Trees of mask, score and normalizer nodes: how they are walked, and what follows from what their fields say."""
