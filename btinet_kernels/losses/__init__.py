"""Losses as one operator each."""
