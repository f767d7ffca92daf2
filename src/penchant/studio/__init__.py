"""`penchant studio`: people compare answers, watch runs and look through data, in the browser of this machine."""
