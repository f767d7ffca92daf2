"""One file a command: its arguments and its handler, light at import."""
