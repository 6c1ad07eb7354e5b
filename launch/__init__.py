"""Entry points: parse the words of the command line and call the library."""
