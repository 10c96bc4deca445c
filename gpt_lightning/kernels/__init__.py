"""Triton kernels, used where Triton and a GPU are there."""
