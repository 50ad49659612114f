"""The "marathon" model: small, and sound far beyond its training length, for contexts up to a million tokens."""
