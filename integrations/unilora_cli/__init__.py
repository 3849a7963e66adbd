"""The command `unilora`. Nothing heavy is imported before a subcommand needs it; see `unilora_cli.main`."""
