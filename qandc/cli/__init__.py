"""Hold the command line: reads options, calls the library, prints and saves."""
