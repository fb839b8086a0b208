"""The definition of right: the masked and quantised PyTorch models, and the error budget."""
