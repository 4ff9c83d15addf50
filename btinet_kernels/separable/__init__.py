"""Separable convolutions, with ReLU and batch normalisation, as one operator."""
