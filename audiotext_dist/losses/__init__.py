"""Contrastive losses over the pairs of every rank."""
