"""AITER, AMD's library of kernels: where it is, what it offers, and every call of it that this backend makes."""
