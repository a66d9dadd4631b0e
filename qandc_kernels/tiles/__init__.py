"""Choose block sizes: from tables per GPU, by a formula elsewhere; and tune the tables."""
