"""Error analysis of attention."""
