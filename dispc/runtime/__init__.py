"""ONNX Runtime as dispc uses it: providers, sessions, placement, latency, generation."""
