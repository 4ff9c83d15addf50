"""Depthwise convolution of images as one operator each way."""
