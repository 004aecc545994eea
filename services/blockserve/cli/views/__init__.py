"""What verbs print: tables, progress, live views. Values in, text out; nothing here asks a server."""
