"""Decide when a feature cache computes, and keep what it reuses."""
