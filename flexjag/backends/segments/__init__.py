"""``scaled_dot_product_attention`` per segment or run of queries."""
