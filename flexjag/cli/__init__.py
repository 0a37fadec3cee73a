"""The commands of ``flexjag``."""
