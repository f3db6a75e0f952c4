"""Linear subspace erasure: maps on vectors that leave no linear trace of a concept."""
