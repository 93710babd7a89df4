"""Kernels of vAttention: custom ops, their float64 reference and their implementations; knows nothing of SGLang."""
