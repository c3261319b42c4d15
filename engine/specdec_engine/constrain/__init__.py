"""Output that follows a JSON schema, a regular expression or a grammar: which tokens may come next."""
