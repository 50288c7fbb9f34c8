"""One module a subcommand: its function, with its settings, registers itself."""
