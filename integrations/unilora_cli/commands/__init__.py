"""What `unilora` does, a module for each subcommand."""
