"""One command a file; `main.py` lists them."""
