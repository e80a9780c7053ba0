"""What line sampling is made of: design points, roots along lines, and models of the boundary."""
