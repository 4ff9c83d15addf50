"""Task interaction (TIM), its per-image gate (UPA), and both in one."""
