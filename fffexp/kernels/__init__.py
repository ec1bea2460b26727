"""Tensors in, tensors out: the computations that backends compete on."""
