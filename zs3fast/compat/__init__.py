"""Doors for users of other frameworks, without those frameworks."""
