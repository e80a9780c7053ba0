"""The differentiable phase: log P as a function of the parameters, with the particles held fixed."""
