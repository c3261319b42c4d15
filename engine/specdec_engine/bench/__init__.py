"""Is it helping, and by how much? Paired, interleaved measurements of draft/target settings against plain decoding.

`plan` says what is run, `measure` runs it and looks into greedy texts that differ, `figures` turns samples into figures (no
torch), `report` makes the record that is written.
"""
