"""Dropout whose random numbers are a function of a seed and of the place in memory."""
