"""Figures, not tests: `make bench`. Nothing here decides whether a build is good."""
