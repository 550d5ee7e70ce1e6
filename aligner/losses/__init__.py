"""Losses as pure mathematics on small arrays. They import jax, each other, and from aligner what lays arrays out over devices."""
