"""How verbs ask: their options, where they look for zoo and server, and how failures are shown."""
