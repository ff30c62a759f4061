"""Single weights become zero or change."""
