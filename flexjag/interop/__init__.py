"""Drop-in replacements for other libraries' functions, and bridges to their types."""
