"""What executes a plan: one file per backend, all with the same ``run`` signature."""
