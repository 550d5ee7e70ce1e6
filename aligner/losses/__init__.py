"""Losses as pure mathematics on small arrays. They import nothing but jax."""
