"""Attention variants from papers, built of masks, scores and normalizers."""

from flexjag.variants.hstu import HSTU, HSTULayer, KVCache
from flexjag.variants.hstu_bias import HSTUBias, next_times
from flexjag.variants.hstu_mask import hstu_mask

__all__ = ["HSTU", "HSTUBias", "HSTULayer", "KVCache", "hstu_mask", "next_times"]
