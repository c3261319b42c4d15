"""What a run is asked and what it says: prompts, events, traces, figures, text. Never torch."""
