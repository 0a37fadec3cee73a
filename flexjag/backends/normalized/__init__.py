"""Attention by any normalizer but a softmax, in plain torch; shared by the backends ``tiled`` and ``segments``."""
