"""Plain torch over the plan's tiles."""
