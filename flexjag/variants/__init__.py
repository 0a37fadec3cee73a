"""Attention variants from papers, built of masks, scores and normalizers."""

from flexjag.variants.hstu.bias import HSTUBias, next_times
from flexjag.variants.hstu.layer import HSTU, HSTULayer, KVCache
from flexjag.variants.hstu.mask import hstu_mask

__all__ = ["HSTU", "HSTUBias", "HSTULayer", "KVCache", "hstu_mask", "next_times"]
