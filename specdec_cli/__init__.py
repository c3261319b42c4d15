"""The command line. Data goes to stdout, words go to stderr, and models are imported inside commands only."""
