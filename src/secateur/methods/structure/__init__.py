"""Units are scored and cut."""
