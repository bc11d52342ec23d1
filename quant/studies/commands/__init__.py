"""Define the studies' commands: each parses its arguments, runs a study and prints."""
