"""Compiled ``flex_attention``, its kernel options and their measurements."""
