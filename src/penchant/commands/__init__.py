"""Commands in modules of their own: `add` puts the arguments on the parser, and nothing heavy is imported before a command runs."""
