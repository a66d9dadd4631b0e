"""Block sizes: tables per GPU, the formula elsewhere, and how they are tuned."""
