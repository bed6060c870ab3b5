"""Learning to reason by reinforcement: the problems, and the two engines that train on them."""
