"""Check arguments, write files and results, attach to modules."""
