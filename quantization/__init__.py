"""What a number can be stored as, and how a model's tensors are put into it.

Formats (`formats/`), quantizers (`quantizers/`), the adapter that finds a transformers model's
units (`adapter.py`), the bank of units quantized once (`bank.py`) and precision maps. This room
imports no other room. Its package is empty so that importing it costs nothing.
"""
