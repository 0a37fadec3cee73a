"""The public functions: planning, attention, explanations and pictures of plans."""
