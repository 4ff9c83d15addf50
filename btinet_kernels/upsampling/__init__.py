"""The transposed convolution that doubles the size, as one operator."""
