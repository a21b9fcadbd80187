"""The truth: texts, the unquantized reference, a candidate put on a model, its loss by chunk."""
