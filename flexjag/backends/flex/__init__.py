"""Compiled ``flex_attention``, its kernel options and what was measured of them."""
