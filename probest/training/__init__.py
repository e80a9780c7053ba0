"""What training is made of: the descent, its checkpoints, and the particles that follow it."""
