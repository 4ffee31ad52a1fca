"""Programs of the tree; tests read their tables."""
