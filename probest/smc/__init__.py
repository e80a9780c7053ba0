"""What tempering is made of: a population, its softened targets, its moves, and where they may jump to."""
