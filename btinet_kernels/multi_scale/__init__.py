"""Multi-scale context fusion as one operator."""
