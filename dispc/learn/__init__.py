"""Mask learning: the DISP-LLM objective over a frozen model, and the final sets that come out of it."""
