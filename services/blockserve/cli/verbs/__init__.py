"""The verbs of the command, a module for each group of the help text. Imported when a verb runs."""
