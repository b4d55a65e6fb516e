"""Updates of whole matrices, by the ranks that own them."""
