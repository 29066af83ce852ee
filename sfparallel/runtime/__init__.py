"""The guest half: what runs inside the parent VM and its clones."""
