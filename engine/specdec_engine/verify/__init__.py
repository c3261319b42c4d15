"""From the target's logits and a draft to the tokens that are kept, and the evidence."""
