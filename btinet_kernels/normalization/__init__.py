"""Batch normalisation and the activation after it as one operator."""
