"""What inputs say about the weights: statistics that methods ask for by type."""
