"""Is this speculation lossless? What is emitted, held against the target's own distribution."""
