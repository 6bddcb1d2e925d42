"""Training of the world's CLIP and of the small models in the package; needs a checkout, is in no wheel."""
