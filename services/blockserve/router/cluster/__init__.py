"""An engine made of many workers: streams to them, what they hold, and moving on when one is lost."""
