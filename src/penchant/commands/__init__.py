"""Commands of the command line, one module each: `add` declares it, its handler runs it. Light at import."""
