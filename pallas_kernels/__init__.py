"""Kernels over plain arrays, one folder for each operation. Imports jax only."""
