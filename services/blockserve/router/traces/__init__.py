"""Where the time of calls went, as this router saw it. No I/O."""
