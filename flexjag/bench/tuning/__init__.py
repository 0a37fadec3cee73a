"""Autotuning of kernel options on GPUs and calibration of cost models on CPUs."""
