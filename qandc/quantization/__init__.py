"""Quantize any model: layers, plans, what layers are given, adapters, diffusers' formats."""
