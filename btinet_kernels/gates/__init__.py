"""Gates over the channels and positions of one dense tensor."""
