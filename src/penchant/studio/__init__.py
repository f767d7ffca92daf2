"""`penchant studio`: a local web page for comparing answers, watching runs and browsing data."""
