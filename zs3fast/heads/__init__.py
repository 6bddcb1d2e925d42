"""Decode heads: descriptors (text and image -> class queries) and decoders (queries and patches -> mask logits)."""
