"""A synthetic world whose truth is known, a base trained on it, and the claims tested in it."""
