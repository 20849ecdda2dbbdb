"""Looks over the built documentation: does every link lead somewhere? Standard library only; `make docs` runs it."""
