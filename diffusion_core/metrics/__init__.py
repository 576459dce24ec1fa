"""How pictures are judged: features, their moments, the distance of two laws, and what a number depends on."""
