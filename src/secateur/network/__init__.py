"""A network as methods see it: its anatomy, its tensors, and how both are cut."""
