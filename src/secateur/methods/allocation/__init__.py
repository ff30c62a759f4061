"""How a budget is divided among matrices."""
