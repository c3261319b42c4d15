"""Which draft and which k, without trying them all: `whatif` has the sums, `passes` measures, `servers` writes for others.

Start at `passes.looked_at`. What is predicted here, `bench` measures.
"""
