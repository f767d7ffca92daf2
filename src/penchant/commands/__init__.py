"""Commands with a module of their own: arguments and a handler each, light at import."""
