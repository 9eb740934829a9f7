"""The verbs of a working day, as the command line takes them."""
