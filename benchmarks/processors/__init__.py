"""Everyday work under different emulated processors."""
