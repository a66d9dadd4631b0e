"""Calibrate one pipeline by the method of the paper, and keep the outcome."""
