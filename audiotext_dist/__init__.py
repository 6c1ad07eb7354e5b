"""Distributed contrastive training of audio-image and audio-text dual encoders."""

__version__ = "0.1.0"
