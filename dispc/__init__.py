"""dispc: compile DISP-LLM pruned decoder models to ONNX artifacts that are right, small and fast."""

__version__ = "0.1.0"
