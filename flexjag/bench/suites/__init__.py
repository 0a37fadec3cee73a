"""One module per suite, and their registry."""
