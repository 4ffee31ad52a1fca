"""How graftd's processes live: the loop, threads, the descriptor store, the keeper, the cage."""
