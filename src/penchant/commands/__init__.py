"""One module a command: its arguments (`add`) and its handler; imports of weight stay inside the handler."""
