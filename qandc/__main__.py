from qandc.cli.main import entry_point

entry_point()
