"""Pure mathematics on tensors: no model, no configuration, no logging. Imports torch alone."""
