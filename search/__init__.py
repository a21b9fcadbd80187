"""From tables to fronts: arrays in, arrays out. Knows no model, worker or database."""
