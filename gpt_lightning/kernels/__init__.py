"""Triton kernels for the loss and for decoding, and C code for decoding on a CPU. Optional: torch's kernels run where they cannot."""
