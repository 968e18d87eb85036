"""The page and the figures that show what runs have learned."""
