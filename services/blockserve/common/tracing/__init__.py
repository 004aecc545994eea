"""Where time goes: what is kept of it, and for how long."""
