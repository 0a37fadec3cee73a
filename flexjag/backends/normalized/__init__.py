"""Attention by any normalizer but a softmax, in plain torch: what `tiled` and `segments` share."""
