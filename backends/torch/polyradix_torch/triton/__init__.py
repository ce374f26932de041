"""Triton kernels for any GPU that Triton compiles for, each beside what it computes; tuned numbers are arguments."""
