"""Towers and their frontends: raw batches in, L2-normalised embeddings out."""
