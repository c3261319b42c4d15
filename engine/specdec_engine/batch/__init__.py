"""Several prompts at once, each with a draft, a rule and a seed of its own."""
