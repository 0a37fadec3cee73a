"""Mask, score and normalizer nodes: walks over their trees, and properties derived from them."""
