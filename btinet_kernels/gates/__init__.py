"""Gates over maps: dual-path attention."""
