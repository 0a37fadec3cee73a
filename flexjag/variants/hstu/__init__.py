"""HSTU: layers, biases and masks of generative recommenders."""
