"""Contrastive losses over negatives gathered from every rank."""
