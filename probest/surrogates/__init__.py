"""Learned severities: what they are linear in, and how they are fitted."""
