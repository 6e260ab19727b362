"""Sparse autoencoders, pure: tensors in, tensors out. Touches no disk, no pipe and no network."""
