"""What the parts of the system tell each other: frozen values and protocols, without I/O or wire format."""
