from qandc.cli import entry_point

entry_point()
