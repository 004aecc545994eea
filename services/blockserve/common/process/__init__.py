"""What every server process needs: signals, logs, threads, children. Nothing of a certain service."""
