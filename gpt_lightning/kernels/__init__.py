"""Triton kernels for the loss and for decoding. Optional: they need Triton and an NVIDIA GPU."""
