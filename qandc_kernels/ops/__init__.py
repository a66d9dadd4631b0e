"""Define the public ops, one file per family; each has its kernels in the file of that name under ``triton``."""
